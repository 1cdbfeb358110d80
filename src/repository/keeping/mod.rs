//! What is kept, and what goes.

pub mod marks;
