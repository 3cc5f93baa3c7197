//! Code made from `schema/*.proto` at build time. The names and numbers are the contract; the comments stand there.

#![allow(missing_docs, unreachable_pub, clippy::all, unused_qualifications, reason = "generated")]

include!(concat!(env!("OUT_DIR"), "/schema.rs"));
