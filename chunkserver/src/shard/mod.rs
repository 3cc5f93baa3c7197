//! A shard: copysets, log and chunk store of one core.

pub mod request;
