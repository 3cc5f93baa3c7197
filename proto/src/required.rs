//! proto2's promises that prost does not keep: required fields are present, closed enums hold a value they declare.
//!
//! A C++ peer refuses a message that lacks a required field, so a server that accepted one (with zeros in place of what
//! is missing) would act on what the client never said. [`decode`] checks the bytes against a [`Shape`] derived from the
//! schema at build time, then lets prost decode them; both failures are answered with EREQUEST (1003).
//!
//! Stricter than C++ where that is the safe side: an *optional* enum out of range is refused too (C++ takes it for an
//! unknown field, prost would hand out the first value), a field of another wire type than declared is refused, strings
//! are UTF-8, and each occurrence of a nested message must be complete by itself.

use bytes::Bytes;

use crate::wire::{MAX_DEPTH, NotProtobuf, Reader, WireType};

/// What a message must look like: its fields in ascending order of number, at most 64 of them.
#[derive(Debug)]
pub struct Shape {
    /// Full name, for error texts.
    pub name: &'static str,
    pub(crate) fields: &'static [Field],
}

#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) number: u32,
    pub(crate) required: bool,
    pub(crate) kind: Kind,
}

#[derive(Debug)]
#[allow(dead_code, reason = "the schema has no fixed-width field yet")]
pub(crate) enum Kind {
    Varint,
    Fixed32,
    Fixed64,
    Bytes,
    Enum(&'static [i32]),
    Message(&'static Shape),
}

/// A message whose [`Shape`] is known: every message of the schema.
pub trait Checked: prost::Message + Default {
    /// Its shape.
    const SHAPE: &'static Shape;
}

/// Why a message body is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// Not protobuf, or nested too deeply, or a field of another type than declared.
    #[error("malformed message")]
    Malformed,
    /// A required field is missing.
    #[error("{message}: required field {number} is missing")]
    Missing {
        /// Full name of the (possibly nested) message.
        message: &'static str,
        /// Number of the field.
        number: u32,
    },
    /// An enum has a value its declaration does not have.
    #[error("{message}: field {number} has no value {value}")]
    BadEnum {
        /// Full name of the (possibly nested) message.
        message: &'static str,
        /// Number of the field.
        number: u32,
        /// What was sent.
        value: i64,
    },
}

impl From<NotProtobuf> for BodyError {
    fn from(_: NotProtobuf) -> Self {
        Self::Malformed
    }
}

/// Decodes a message and refuses what proto2 refuses.
pub fn decode<M: Checked>(body: Bytes) -> Result<M, BodyError> {
    check(M::SHAPE, &body)?;
    M::decode(body).map_err(|_| BodyError::Malformed)
}

/// Checks a message's bytes against its shape.
pub fn check(shape: &'static Shape, body: &[u8]) -> Result<(), BodyError> {
    check_at(shape, body, 0)
}

fn check_at(shape: &'static Shape, body: &[u8], depth: u32) -> Result<(), BodyError> {
    if depth > MAX_DEPTH {
        return Err(BodyError::Malformed);
    }
    let mut reader = Reader::new(body);
    let mut seen = 0u64;
    while !reader.is_empty() {
        let (number, wire) = reader.key()?;
        match shape.fields.iter().enumerate().find(|(_, field)| field.number == number) {
            Some((index, field)) => {
                value(shape, field, wire, &mut reader, depth)?;
                seen |= 1 << index;
            }
            None => reader.skip(number, wire, depth)?,
        }
    }
    match shape.fields.iter().enumerate().find(|(index, field)| field.required && seen >> index & 1 == 0) {
        Some((_, field)) => Err(BodyError::Missing { message: shape.name, number: field.number }),
        None => Ok(()),
    }
}

fn value(
    shape: &'static Shape,
    field: &Field,
    wire: WireType,
    reader: &mut Reader<'_>,
    depth: u32,
) -> Result<(), BodyError> {
    match (&field.kind, wire) {
        (Kind::Enum(values), WireType::Varint) => {
            let value = reader.varint()? as i64;
            if !values.iter().any(|&known| i64::from(known) == value) {
                return Err(BodyError::BadEnum { message: shape.name, number: field.number, value });
            }
        }
        (Kind::Message(inner), WireType::Bytes) => check_at(inner, reader.bytes()?, depth + 1)?,
        // Length-delimited where a number is declared: a packed list; whether the field repeats is prost's to know.
        (Kind::Varint, WireType::Varint)
        | (Kind::Fixed64, WireType::Fixed64)
        | (Kind::Fixed32, WireType::Fixed32)
        | (Kind::Bytes | Kind::Varint | Kind::Fixed32 | Kind::Fixed64, WireType::Bytes) => {
            reader.skip(field.number, wire, depth)?;
        }
        _ => return Err(BodyError::Malformed),
    }
    Ok(())
}
