//! Names of services and methods, as the schema declares them.
//!
//! A caller names a service in full (`curve.chunkserver.ChunkService`) or, if the name has no dot, in short
//! (`ChunkService`); both are case sensitive. Short names are unique in the schema (tested).

use crate::{
    code,
    required::{Checked, Field, Kind, Shape},
};

/// A service and its methods.
#[derive(Debug)]
pub struct Service {
    /// Full name.
    pub name: &'static str,
    /// Name without the package.
    pub short: &'static str,
    /// In the order of the schema.
    pub methods: &'static [Method],
}

/// A method and what its messages look like.
#[derive(Debug)]
pub struct Method {
    /// Bare name.
    pub name: &'static str,
    /// Shape of the request.
    pub request: &'static Shape,
    /// Shape of the response.
    pub response: &'static Shape,
}

impl Service {
    /// Whether a caller who wrote `name` means this service.
    pub fn is_named(&self, name: &[u8]) -> bool {
        name == self.name.as_bytes() || name == self.short.as_bytes()
    }
}

/// Finds a method among the services a server offers, or the code of the error reply: 1001 for an unknown short
/// service name (the empty one included), 1002 for an unknown dotted one or an unknown method.
pub fn find<'a>(offered: &[&'a Service], service: &[u8], method: &[u8]) -> Result<(&'a Service, &'a Method), i32> {
    match offered.iter().find(|s| s.is_named(service)) {
        Some(found) => {
            let method = found.methods.iter().find(|m| m.name.as_bytes() == method).ok_or(code::ENOMETHOD)?;
            Ok((found, method))
        }
        None if service.contains(&b'.') => Err(code::ENOMETHOD),
        None => Err(code::ENOSERVICE),
    }
}

include!(concat!(env!("OUT_DIR"), "/shapes.rs"));
