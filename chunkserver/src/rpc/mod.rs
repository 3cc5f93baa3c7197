//! One socket's side of the conversation, sans-I/O: bytes in, calls out; replies in, bytes out.
//!
//! The reactor owns the socket and moves the bytes; [`connection`] decides what they mean and when to stop reading.

pub mod http;
