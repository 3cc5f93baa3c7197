//! A connection on its way to another process: what it is in the middle of, as values and as bytes of its stream.
//!
//! Promise: a connection that owes no answers, saved and restored (by this version or another one of the same hand-over
//! format), makes of the rest of the stream what it would have made itself. Most of its state is the beginning of the
//! message that is being received, written anew: the restored one is simply given those bytes again.

use super::{Call, Connection, Incoming, Options, Reject, Route, State, unknown};
use crate::limits::{FRAME_BYTES_MAX, REQUEST_OVERHEAD_BYTES};
use crate::rpc::payload::Attachment;
use bytes::{Bytes, BytesMut};
use proto::frame::{Decoder, RequestHead, put_request_bytes};
use serde::{Deserialize, Serialize};

/// What the bytes that are given again do not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Bytes of a refused frame still to come; its answer was sent.
    #[serde(default)]
    skip: usize,
    /// An attachment that is passed over, and what is due behind it.
    #[serde(default)]
    passing: Option<Passing>,
    /// Close it when all is sent.
    #[serde(default)]
    closing: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Passing {
    /// Bytes still to come.
    left: usize,
    correlation_id: i64,
    due: Due,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Due {
    Reject { code: i32, text: String },
    Call { service: String, method: String, log_id: Option<i64>, body: Vec<u8>, dropped: usize },
}

/// What was saved makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a saved connection that makes no sense")]
pub struct BadSaved;

impl Connection {
    /// What another process needs to go on, and the bytes to be given to the restored connection before all others.
    /// `name` knows the methods' names. Call only when nothing is owed; what is queued to be sent is the caller's to take.
    #[must_use]
    pub fn save(&self, name: impl Fn(super::MethodId) -> Option<(&'static str, &'static str)>) -> (Saved, Vec<u8>) {
        let mut saved = Saved { closing: self.closing, ..Saved::default() };
        let bytes = match &self.state {
            State::Frames => {
                let begun = self.decoder.begun();
                saved.skip = begun.skip;
                begun.bytes
            }
            State::Http(parser) => parser.begun(),
            State::Buffer(len) => self.pending_frame(*len, &name),
            State::Payload => {
                let fill = self.fill.as_ref();
                let len = fill.map_or(0, |fill| fill.received().len() + fill.missing());
                let mut bytes = self.pending_frame(len, &name);
                bytes.extend_from_slice(fill.map_or(&[], |fill| fill.received()));
                bytes
            }
            State::Skip(left, incoming) => {
                saved.passing = passing(*left, incoming, &name);
                Vec::new()
            }
        };
        (saved, bytes)
    }

    /// The head of the frame whose payload is waited for.
    fn pending_frame(
        &self,
        len: usize,
        name: &impl Fn(super::MethodId) -> Option<(&'static str, &'static str)>,
    ) -> Vec<u8> {
        let Some(call) = &self.pending else { return Vec::new() };
        let (service, method) = name(call.method).unwrap_or_default();
        let head = RequestHead { service, method, log_id: call.log_id, correlation_id: call.correlation_id };
        let mut out = BytesMut::new();
        put_request_bytes(&mut out, &head, &call.body, len);
        out.to_vec()
    }

    /// The connection that was saved, with `unsent` to be sent first.
    ///
    /// # Errors
    /// `BadSaved`; close it.
    pub fn restore(options: Options, saved: Saved, unsent: Bytes) -> Result<Self, BadSaved> {
        let mut this = Self::new(options);
        let lengths = saved.skip.max(saved.passing.as_ref().map_or(0, |passing| passing.left));
        if lengths > FRAME_BYTES_MAX || saved.skip > 0 && saved.passing.is_some() {
            return Err(BadSaved);
        }
        this.closing = saved.closing;
        if saved.skip > 0 {
            this.decoder = Decoder::skipping(saved.skip);
        }
        if let Some(passing) = saved.passing {
            let (left, incoming) = passing.restored(options.route)?;
            // The decoder must believe that it has seen the frame's head.
            this.decoder = Decoder::in_attachment();
            this.state = State::Skip(left, Box::new(incoming));
        }
        this.outbox.push(Bytes::new(), [unsent]);
        Ok(this)
    }
}

fn passing(
    left: usize,
    incoming: &Incoming,
    name: &impl Fn(super::MethodId) -> Option<(&'static str, &'static str)>,
) -> Option<Passing> {
    let (correlation_id, due) = match incoming {
        Incoming::Reject(reject) => {
            (reject.correlation_id, Due::Reject { code: reject.code, text: reject.text.clone() })
        }
        Incoming::Call(call) => {
            let (service, method) = name(call.method)?;
            let (log_id, body, dropped) = (call.log_id, call.body.to_vec(), call.attachment.len());
            (call.correlation_id, Due::Call { service: service.into(), method: method.into(), log_id, body, dropped })
        }
        // Neither has an attachment.
        Incoming::Greeting(_) | Incoming::Http(_) => return None,
    };
    Some(Passing { left, correlation_id, due })
}

impl Passing {
    fn restored(self, route: fn(&[u8], &[u8]) -> Route) -> Result<(usize, Incoming), BadSaved> {
        let Self { left, correlation_id, due } = self;
        let incoming = match due {
            Due::Reject { code, text } => Incoming::Reject(Reject { correlation_id, code, text, cost: 0 }),
            Due::Call { service, method, log_id, body, dropped } => {
                match route(service.as_bytes(), method.as_bytes()) {
                    Route::Method { id, .. } => Incoming::Call(Call {
                        method: id,
                        correlation_id,
                        log_id,
                        cost: body.len() + REQUEST_OVERHEAD_BYTES,
                        body: body.into(),
                        attachment: Attachment::Dropped(dropped),
                    }),
                    Route::Unknown(code) => {
                        let text = unknown(code, service.as_bytes(), method.as_bytes());
                        Incoming::Reject(Reject { correlation_id, code, text, cost: 0 })
                    }
                    Route::Peer => return Err(BadSaved),
                }
            }
        };
        if left == 0 { Err(BadSaved) } else { Ok((left, incoming)) }
    }
}
