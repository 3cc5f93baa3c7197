//! Every way to run out of something, and that it ends.
