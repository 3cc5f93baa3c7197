//! One socket's side of the conversation, sans-I/O: bytes in, calls out; replies in, bytes out.
//!
//! The reactor owns the socket and moves the bytes; [`connection`] decides what they mean and when to stop reading;
//! [`client`] is the other side: calls to other servers. [`payload`] is the one copy of a payload on its way in; [`outbox`] gathers replies for the next send.

pub mod client;
pub mod connection;
pub mod http;
pub mod outbox;
pub mod payload;

pub use connection::{
    Call, CloseReason, Connection, Greeting, Incoming, MethodId, Options, Out, Progress, Reject, Route, Saved,
};
pub use http::{HttpReply, HttpRequest};
pub use payload::Attachment;
