//! NEBD's part2 in the binary, asked by frames of the test's own making and by the originals' recorded ones.

mod bad;
mod client;
mod failures;
mod leader;
mod life;
mod replay;
mod restart;
mod start;

pub(super) use client::{lab, setup};
