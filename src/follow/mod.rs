//! An image under way: how whoever brings its guest back finds the save of it, and what goes between
//! the two.
//!
//! ```text
//! the save        header: which version this is; with it an image that has no memory
//!                 the guest's memory as far as it is captured: its pages
//!                 the same: which pages are there
//! who follows     block u16, page u64: capture this one first; as often as it likes
//! ```
//!
//! Each line is a packet (unix(7), SOCK_SEQPACKET) with one descriptor or none; numbers are
//! little-endian. Nothing is answered: who follows looks into the shared memory. The end of the
//! connection says that nothing more is captured.

mod address;
mod message;

pub use address::{accept, connect, is_trusted, listen, peer_user};
pub use message::{Followed, receive_header, receive_wish, send_header, send_wish};
