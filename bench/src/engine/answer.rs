//! What an answer (or its absence) leads to: done, failed, or tried again.

use super::{Engine, MS, State};
use crate::codec::{self, Reply, WireError};
use crate::verdict::Answered;
use std::borrow::Cow;

const SUCCESS: u64 = 0;
const REDIRECTED: u64 = 1;
const INVALID_REQUEST: u64 = 4;
const CHUNK_NOTEXIST: u64 = 7;
const OVERLOAD: u64 = 9;
const BACKWARD: u64 = 10;
const CHUNK_EXIST: u64 = 11;
const EPOCH_TOO_OLD: u64 = 12;
const TIMEOUT_MAX: u64 = 8_000 * MS;
/// Where other nodes can be asked, none is waited for that long.
const TIMEOUT_MAX_SEVERAL: u64 = 2_000 * MS;
/// Redirects of one operation after which the pause between them grows no more.
const REDIRECTS_MAX: u32 = 3;
const TIMEOUT_SCAN: u64 = 20 * MS;

impl Engine {
    /// Takes the whole replies at the start of `buf`; returns how many bytes they were. An error ends the connection.
    pub fn on_bytes(&mut self, buf: &[u8], now: u64) -> Result<usize, WireError> {
        let mut used = 0;
        while let Some(rest) = buf.get(used..)
            && let Some((reply, len)) = codec::cut_reply(rest)?
        {
            used += len;
            self.on_reply(&reply, now);
        }
        Ok(used)
    }

    fn on_reply(&mut self, reply: &Reply<'_>, now: u64) {
        let key = (reply.cid & u64::from(u32::MAX)) as usize;
        let Some(op) = self.ops.get(key).filter(|op| op.cid == reply.cid && matches!(op.state, State::Sent { .. }))
        else {
            self.stats.late_replies += 1;
            return;
        };
        let write = op.access.write;
        let State::Sent { conn, .. } = op.state else { return };
        if reply.error_code != 0 {
            self.stats.count(Cow::Owned(format!("rpc_{}", reply.error_code)));
            self.doubt(key, conn);
            return self.retry(key, now + 100 * MS, now);
        }
        let Ok(Some(status)) = codec::status(reply.message) else {
            self.stats.count(Cow::Borrowed("MALFORMED_RESPONSE"));
            return self.retry(key, now + 100 * MS, now);
        };
        match status {
            SUCCESS if write => return self.finish(key, None, now),
            SUCCESS => return self.finish(key, Some(reply.attachment), now),
            CHUNK_NOTEXIST if !write => return self.finish(key, None, now),
            _ => self.stats.count(Cow::Borrowed(codec::status_name(status))),
        }
        match status {
            INVALID_REQUEST | CHUNK_EXIST | EPOCH_TOO_OLD | BACKWARD | CHUNK_NOTEXIST => self.fail(key, now),
            REDIRECTED => self.redirected(key, conn, reply.message, now),
            OVERLOAD => {
                let Some(op) = self.ops.get_mut(key) else { return };
                let pause = (100 * MS) << op.overloads.min(6);
                op.overloads += 1;
                // The only refusal that promises that nothing was done.
                op.tried = false;
                self.retry(key, now + pause, now);
            }
            _ => {
                self.doubt(key, conn);
                self.retry(key, now + 100 * MS, now);
            }
        }
    }

    /// The node of connection `conn` is not what op `key` needs.
    pub(super) fn doubt(&mut self, key: usize, conn: usize) {
        if let Some(copyset) = self.copyset(key) {
            self.leaders.doubt(copyset, conn / self.config.conns.max(1));
        }
    }

    /// Another node is to be asked: the one named, else the next. Without a leader the pauses grow.
    fn redirected(&mut self, key: usize, conn: usize, message: &[u8], now: u64) {
        let Some(copyset) = self.copyset(key) else { return };
        let hint = codec::redirect(message).ok().flatten();
        if !hint.is_some_and(|peer| self.leaders.learn(copyset, &peer)) {
            self.doubt(key, conn);
        }
        let Some(op) = self.ops.get_mut(key) else { return };
        let pause = (10 * MS) << op.redirects.min(REDIRECTS_MAX);
        op.redirects += 1;
        self.retry(key, now + pause, now);
    }

    /// An operation got its final good answer.
    fn finish(&mut self, key: usize, data: Option<&[u8]>, now: u64) {
        let Some(op) = self.ops.try_remove(key) else { return };
        self.last_progress = now;
        let window = self.config.measure_from..self.config.stop_at;
        let answered = Answered { access: op.access, intended: op.intended, seq: op.seq, token: op.token, data };
        let counts = (&mut self.stats, &mut self.survival);
        answered.count(self.config.check, window, now, self.model.as_mut(), counts);
    }

    /// The server refused for good. A write may still have happened on an earlier try: it stays open in the model.
    fn fail(&mut self, key: usize, now: u64) {
        let Some(op) = self.ops.try_remove(key) else { return };
        self.last_progress = now;
        self.stats.failed += 1;
        if let (Some(token), Some(model)) = (op.token, &mut self.model) {
            model.cancel_read(token);
        }
    }

    /// Tries op `key` again at `until`.
    pub(super) fn retry(&mut self, key: usize, until: u64, now: u64) {
        let Some(op) = self.ops.get_mut(key) else { return };
        self.stats.retries += 1;
        op.cid = 0;
        op.state = State::Waiting { until };
        if until <= now {
            self.send(key, now);
        } else {
            self.waiting.insert((until, key));
        }
    }

    pub(super) fn scan_timeouts(&mut self, now: u64) {
        if now < self.next_scan {
            return;
        }
        self.next_scan = now + TIMEOUT_SCAN;
        let expired = |(key, op): (usize, &super::Op)| match op.state {
            State::Sent { conn, deadline } if deadline <= now => Some((key, conn)),
            _ => None,
        };
        let expired: Vec<(usize, usize)> = self.ops.iter().filter_map(expired).collect();
        let longest = if self.leaders.nodes().len() > 1 { TIMEOUT_MAX_SEVERAL } else { TIMEOUT_MAX };
        for (key, conn) in expired {
            self.stats.timeouts += 1;
            self.doubt(key, conn);
            if let Some(op) = self.ops.get_mut(key) {
                op.timeout = (op.timeout * 2).min(longest.max(self.config.timeout));
            }
            self.retry(key, now, now);
        }
    }
}
