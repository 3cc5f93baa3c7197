//! What an operation that got its final good answer does to the counts and to the model.

use crate::engine::Check;
use crate::model::{Model, ReadToken, Survival, Violation};
use crate::plan::Access;
use crate::stamp::BLOCK;
use crate::stats::Stats;

/// An answered operation.
pub(crate) struct Answered<'a> {
    pub(crate) access: Access,
    /// When it should have started.
    pub(crate) intended: u64,
    /// Number of a write.
    pub(crate) seq: u64,
    /// Of a read that is judged.
    pub(crate) token: Option<ReadToken>,
    /// What a read returned; `None`: nothing was ever written there.
    pub(crate) data: Option<&'a [u8]>,
}

impl Answered<'_> {
    /// Counts it (latency and rate only inside `window`) and lets the model judge it.
    pub(crate) fn count(
        self,
        check: Check,
        window: std::ops::Range<u64>,
        now: u64,
        model: Option<&mut Model>,
        (stats, survival): (&mut Stats, &mut Survival),
    ) {
        let Self { access, intended, seq, token, data } = self;
        stats.answered += 1;
        if window.contains(&intended) {
            stats.record(access.write, now.saturating_sub(intended));
        }
        if window.contains(&now) {
            stats.complete(access.write, u64::from(access.len), now);
        }
        if let Some(data) = data
            && data.len() != access.len as usize
        {
            let text = format!("chunk {} at {}: {} bytes of {}", access.chunk, access.offset, data.len(), access.len);
            stats.wrong(1, text);
        }
        let Some(model) = model else { return };
        let range = (first(&access), count(&access));
        let mut bad: Vec<String> = Vec::new();
        let mut wrong = |violation: Violation| bad.push(violation.to_string());
        match (access.write, check, token) {
            (true, _, _) => model.end_write(access.chunk, range.0, range.1, seq),
            (false, Check::Judge, Some(token)) => model.end_read(token, access.chunk, range, data, &mut wrong),
            (false, Check::Settle, _) => {
                let settled = model.settle(access.chunk, range, data, &mut wrong);
                survival.survived += settled.survived;
                survival.vanished += settled.vanished;
                survival.hidden += settled.hidden;
            }
            _ => {}
        }
        stats.checked_blocks += if access.write { 0 } else { u64::from(range.1) };
        for text in bad {
            stats.wrong(1, text);
        }
    }
}

/// Registers an operation that begins: number of a write, token of a read that will be judged.
pub(crate) fn begin(check: Check, model: Option<&mut Model>, access: &Access) -> (u64, Option<ReadToken>) {
    let Some(model) = model else { return (0, None) };
    match (access.write, check) {
        (true, _) => (model.begin_write(access.chunk, first(access), count(access)), None),
        (false, Check::Judge) => (0, Some(model.begin_read())),
        (false, _) => (0, None),
    }
}

/// First block of an access.
pub(crate) fn first(access: &Access) -> u32 {
    access.offset / BLOCK as u32
}

/// Blocks of an access.
pub(crate) fn count(access: &Access) -> u32 {
    access.len / BLOCK as u32
}
