//! Repositories as they are read.

pub mod drafts;
pub mod list;
pub mod name;
pub mod pull;
pub mod repository;
