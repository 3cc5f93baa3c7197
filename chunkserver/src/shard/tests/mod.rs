//! A shard on a disk in memory: completions in random order, torn writes at a power cut, tiny limits. What is checked
//! is what clients see; what is counted is that the paths meant to be hit were hit.

mod changes;
mod cluster;
mod crash;
mod forced;
mod hostile;
mod limited;
mod mend;
mod model;
mod pressure;
mod random;
mod renew;
mod replay;
mod replicas;
mod world;
