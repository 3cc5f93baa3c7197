//! SPEAKS: every byte that crosses a socket.
//!
//! * [`frame`]: baidu_std frames out of a byte stream and back, HTTP told apart on the same port;
//! * [`meta`]: the frame's meta;
//! * [`required`]: message bodies, with the checks of proto2;
//! * [`service`], [`code`]: names and numbers;
//! * [`nbd`]: the NBD protocol;
//! * [`peer`]: what our chunkservers say to each other;
//! * [`common`], [`chunkserver`], [`heartbeat`], [`topology`], [`nebd`], [`brpc`]: the messages.
//!
//! Invariants: nothing here does I/O, reads a clock or keeps more of a stream than one message; whatever the bytes are,
//! nothing panics and memory is bounded by the constants of [`frame`] and [`nbd`]. The crate knows no other crate of the
//! project.

#![forbid(unsafe_code)]

pub mod code;
mod encode;
pub mod frame;
pub mod meta;
pub mod nbd;
pub mod peer;
pub mod required;
mod schema;
pub mod service;
mod sniff;
mod wire;

pub use required::{BodyError, Checked, decode};
pub use schema::{
    brpc::policy as brpc,
    curve::{
        chunkserver, common,
        mds::{heartbeat, topology},
    },
    nebd::client as nebd,
};
pub use wire::NotProtobuf;
