//! Tests of the whole store, on a disk that loses and tears what was not synced.

mod codec;
mod disk;
mod metapages;
mod model;
mod scripted;
mod together;
