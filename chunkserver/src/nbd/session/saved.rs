//! A session on its way to another process: what it is in the middle of, as values and as bytes of its stream.
//!
//! Promise: a session without requests in flight, saved and restored, makes of the rest of the stream what it would have
//! made itself. A request that is being received is written anew and given to the restored session again; one that was
//! refused is not: what is passed over of its payload must never become data.

use super::{Limits, Phase, Session};
use crate::volume::catalog::SharedCatalog;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What the bytes that are given again do not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The export in use, once chosen: number and name.
    #[serde(default)]
    volume: Option<(u32, String)>,
    /// The payload of a refused write is passed over.
    #[serde(default)]
    refused: Option<Refused>,
    /// The client has left; close it when all is sent.
    #[serde(default)]
    leaving: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Refused {
    left: usize,
    cookie: u64,
    error: u32,
}

/// What was saved makes no sense, or names a volume that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a saved NBD session that makes no sense, or whose volume is gone")]
pub struct BadSaved;

impl Session {
    /// What another process needs to go on, and the bytes to be given to the restored session before all others. Call
    /// only without requests in flight; what is queued to be sent is the caller's to take.
    #[must_use]
    pub fn save(&self) -> (Saved, Vec<u8>) {
        let volume = self.volume.as_ref().map(|volume| (volume.id(), volume.name().to_owned()));
        let mut saved = Saved { volume, ..Saved::default() };
        let bytes = match &self.phase {
            Phase::Negotiating(negotiation) => negotiation.begun(),
            Phase::Header => self.decoder.begun().to_vec(),
            Phase::Admit(request) => request.encode().to_vec(),
            Phase::Payload(request, receiver) => [&request.encode()[..], &receiver.received()].concat(),
            &Phase::Skip { left, cookie, error } => {
                saved.refused = Some(Refused { left, cookie, error });
                Vec::new()
            }
            Phase::Leaving | Phase::Failed => {
                saved.leaving = true;
                Vec::new()
            }
        };
        (saved, bytes)
    }

    /// The session that was saved, with `unsent` to be sent first.
    ///
    /// # Errors
    /// `BadSaved`; close it.
    pub fn restore(exports: SharedCatalog, limits: Limits, saved: Saved, unsent: Bytes) -> Result<Self, BadSaved> {
        let mut this = Self::new(exports, limits);
        // The greeting was sent, or is part of `unsent`.
        this.outbox = super::Outbox::default();
        if let Some((id, name)) = saved.volume {
            let volume = this.exports.snapshot().get(&name).filter(|volume| volume.id() == id).map(Arc::clone);
            this.volume = Some(volume.ok_or(BadSaved)?);
            this.phase = Phase::Header;
        }
        if let Some(Refused { left, cookie, error }) = saved.refused {
            if left > u32::MAX as usize || this.volume.is_none() {
                return Err(BadSaved);
            }
            this.phase = Phase::Skip { left, cookie, error };
        }
        if saved.leaving {
            this.phase = Phase::Leaving;
        }
        if !unsent.is_empty() {
            this.outbox.share(unsent);
        }
        Ok(this)
    }
}
