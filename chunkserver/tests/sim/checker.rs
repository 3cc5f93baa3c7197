//! Linearizability of one block seen as a register.
//!
//! With unique values the zone test of Gibbons and Korach decides in O(n log n). Zeros are written by many operations
//! (deletes, zero ranges, the beginning), so histories that write them go to a search that keeps every possible state
//! (which pending operations took effect, which value stands) from one answer to the next. The tests play both against
//! each other and against brute force.

use std::collections::{BTreeMap, BTreeSet};

/// Time of an answer that never came.
pub(crate) const NEVER: u64 = u64::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Write(u64),
    Read(u64),
}

/// Times are points of a total order: no two ends are equal, except `NEVER`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockOp {
    pub(crate) kind: Kind,
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// The block began as 0. Writes without an answer may happen at any time after their start, or never.
pub(crate) fn check(ops: &[BlockOp]) -> Result<(), String> {
    let seen: BTreeSet<u64> = ops.iter().filter_map(read).collect();
    // A write nobody saw and nobody answered constrains nothing: put it at the end of time.
    let relevant = |op: &&BlockOp| match op.kind {
        Kind::Write(value) => op.end != NEVER || seen.contains(&value),
        Kind::Read(_) => op.end != NEVER,
    };
    let ops: Vec<BlockOp> = ops.iter().filter(relevant).copied().collect();
    if ops.iter().any(|op| op.kind == Kind::Write(0)) { search(&ops) } else { zones(&ops) }
}

fn read(op: &BlockOp) -> Option<u64> {
    match op.kind {
        Kind::Read(value) if op.end != NEVER => Some(value),
        _ => None,
    }
}

/// All operations of one value: from the earliest answer to the latest start.
#[derive(Clone, Copy)]
struct Zone {
    value: u64,
    first_end: u64,
    last_start: u64,
    written: Option<u64>,
}

/// The zone test; values of writes are unique and not 0.
pub(crate) fn zones(ops: &[BlockOp]) -> Result<(), String> {
    let mut zones: BTreeMap<u64, Zone> = BTreeMap::new();
    zones.insert(0, Zone { value: 0, first_end: 0, last_start: 0, written: Some(0) });
    for op in ops {
        let (Kind::Write(value) | Kind::Read(value)) = op.kind;
        let fresh = Zone { value, first_end: NEVER, last_start: 0, written: None };
        let zone = zones.entry(value).or_insert(fresh);
        zone.first_end = zone.first_end.min(op.end);
        zone.last_start = zone.last_start.max(op.start);
        if matches!(op.kind, Kind::Write(_)) {
            zone.written = Some(op.start);
        }
    }
    for zone in zones.values() {
        match zone.written {
            None => return Err(format!("value {:#x} was read, but nobody wrote it", zone.value)),
            Some(start) if zone.first_end < start => {
                return Err(format!("value {:#x} was read before its write began", zone.value));
            }
            Some(_) => {}
        }
    }
    let is_forward = |zone: &&Zone| zone.first_end < zone.last_start;
    let mut forward: Vec<Zone> = zones.values().filter(is_forward).copied().collect();
    forward.sort_by_key(|zone| zone.first_end);
    for pair in forward.windows(2) {
        if pair[1].first_end < pair[0].last_start {
            return Err(format!("values {:#x} and {:#x} alternate", pair[0].value, pair[1].value));
        }
    }
    for zone in zones.values().filter(|zone| !is_forward(zone)) {
        let at = forward.partition_point(|other| other.first_end < zone.last_start);
        let around = at.checked_sub(1).and_then(|at| forward.get(at));
        if let Some(other) = around.filter(|other| zone.first_end < other.last_start) {
            return Err(format!("value {:#x} lies wholly inside the life of {:#x}", zone.value, other.value));
        }
    }
    Ok(())
}

/// One possible state: pending operations that took effect (by slot), and the value.
type State = (u128, u64);

/// Operations that have begun; slots are reused.
struct Pending<'a> {
    ops: &'a [BlockOp],
    slots: Vec<Option<usize>>,
}

impl Pending<'_> {
    fn add(&mut self, id: usize) -> Result<(), String> {
        let slot = match self.slots.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                self.slots.len() - 1
            }
        };
        if slot >= 128 {
            return Err("undecided: too many operations at once".into());
        }
        self.slots[slot] = Some(id);
        Ok(())
    }

    /// States reachable from `from` by letting one more pending operation take effect.
    fn next(&self, from: State) -> Vec<State> {
        let mut open_writes = BTreeSet::new();
        let mut all = Vec::new();
        for (slot, op) in self.slots.iter().enumerate().filter_map(|(s, id)| id.map(|id| (s, self.ops[id]))) {
            if from.0 >> slot & 1 == 1 {
                continue;
            }
            match op.kind {
                // Writes of one value that were never answered are interchangeable: one of them is enough.
                Kind::Write(value) if op.end != NEVER || open_writes.insert(value) => {
                    all.push((from.0 | 1 << slot, value))
                }
                // A read that fits can be taken at once: it changes nothing.
                Kind::Read(value) if value == from.1 => return vec![(from.0 | 1 << slot, from.1)],
                _ => {}
            }
        }
        all
    }

    /// All states in which the operation in `slot` took effect, and no more than needed happened.
    fn settle(&self, states: &BTreeSet<State>, slot: usize) -> Result<BTreeSet<State>, String> {
        let (mut seen, mut done) = (states.clone(), BTreeSet::new());
        let mut todo: Vec<State> = states.iter().copied().collect();
        while let Some(state) = todo.pop() {
            if state.0 >> slot & 1 == 1 {
                done.insert((state.0 & !(1 << slot), state.1));
                continue;
            }
            todo.extend(self.next(state).into_iter().filter(|&next| seen.insert(next)));
            if seen.len() > 1 << 20 {
                return Err("undecided: too many states".into());
            }
        }
        Ok(done)
    }
}

/// The search; any values.
pub(crate) fn search(ops: &[BlockOp]) -> Result<(), String> {
    let mut events: Vec<(u64, bool, usize)> = Vec::new();
    for (id, op) in ops.iter().enumerate() {
        events.push((op.start, false, id));
        if op.end != NEVER {
            events.push((op.end, true, id));
        }
    }
    events.sort_unstable();
    let mut pending = Pending { ops, slots: Vec::new() };
    let mut states = BTreeSet::from([(0, 0)]);
    for (time, is_end, id) in events {
        if !is_end {
            pending.add(id)?;
            continue;
        }
        let slot = pending.slots.iter().position(|&s| s == Some(id)).ok_or("an answer without a request")?;
        states = pending.settle(&states, slot)?;
        pending.slots[slot] = None;
        if states.is_empty() {
            return Err(format!("no order explains {:?} answered at {time}", ops[id].kind));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// Every order of every subset that may have happened.
    fn brute(ops: &[BlockOp], used: u32, value: u64) -> bool {
        let left = || (0..ops.len()).filter(|at| used >> at & 1 == 0);
        if left().all(|at| ops[at].end == NEVER) {
            return true;
        }
        let first_end = left().map(|at| ops[at].end).min().unwrap_or(NEVER);
        left().filter(|&at| ops[at].start < first_end).any(|at| match ops[at].kind {
            Kind::Write(new) => brute(ops, used | 1 << at, new),
            Kind::Read(seen) => seen == value && brute(ops, used | 1 << at, value),
        })
    }

    /// A random history: played on a real register, then sometimes disturbed.
    fn random(rng: &mut Rng, zeros: bool) -> Vec<BlockOp> {
        let count = rng.between(2, 8);
        let mut times: Vec<u64> = (1..=2 * count).collect();
        rng.shuffle(&mut times);
        let mut ops = Vec::new();
        for (at, pair) in times.chunks(2).enumerate() {
            let (start, end) = (pair[0].min(pair[1]), pair[0].max(pair[1]));
            let write = rng.coin();
            let value = if zeros && rng.ppm(400_000) { 0 } else { at as u64 + 1 };
            let end = if write && rng.ppm(250_000) { NEVER } else { end };
            ops.push((rng.between(start, end.min(2 * count)), BlockOp { kind: Kind::Write(value), start, end }, write));
        }
        ops.sort_by_key(|op| op.0);
        let (mut value, mut all) = (0, Vec::new());
        for (_, mut op, write) in ops {
            match op.kind {
                Kind::Write(new) if write => {
                    if op.end != NEVER || rng.coin() {
                        value = new;
                    }
                }
                _ => op.kind = Kind::Read(if rng.ppm(150_000) { rng.below(count + 1) } else { value }),
            }
            all.push(op);
        }
        all
    }

    #[test]
    fn all_checkers_agree_on_random_histories() {
        let mut rng = Rng::new(17);
        let mut bad = [0; 2];
        for round in 0..20_000 {
            let zeros = round % 2 == 1;
            let ops = random(&mut rng, zeros);
            let expected = brute(&ops, 0, 0);
            bad[usize::from(zeros)] += usize::from(!expected);
            assert_eq!(search(&ops).is_ok(), expected, "search: {ops:?}");
            assert_eq!(check(&ops).is_ok(), expected, "check: {ops:?}");
            if !zeros {
                assert_eq!(zones(&ops).is_ok(), expected, "zones: {ops:?}");
            }
        }
        assert!(bad.iter().all(|&bad| bad > 500), "both kinds need violations: {bad:?}");
    }

    #[test]
    fn a_lost_acknowledged_write_is_found() {
        let op = |kind, start, end| BlockOp { kind, start, end };
        let ops = [op(Kind::Write(1), 1, 2), op(Kind::Write(2), 3, 4), op(Kind::Read(1), 5, 6)];
        assert!(check(&ops).is_err());
        let unanswered = [op(Kind::Write(1), 1, 2), op(Kind::Write(2), 3, NEVER), op(Kind::Read(1), 5, 6)];
        assert!(check(&unanswered).is_ok());
        let came_and_went = [unanswered[0], unanswered[1], op(Kind::Read(2), 5, 6), op(Kind::Read(1), 7, 8)];
        assert!(check(&came_and_went).is_err());
    }
}
