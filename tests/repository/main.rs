//! Repositories: the program and the library against directories and a real S3 server, over a network
//! that breaks.

#[path = "../support/mod.rs"]
mod support;

mod figures;
mod harness;
mod keeping;
mod network;
mod repack;
mod signing;
mod transfer;
