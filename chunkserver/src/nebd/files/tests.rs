//! The table against scripts, and against a model that knows nothing but the rules.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

type E = Effect<u32>;
const TIMEOUT: u64 = 30_000_000_000;

fn at(ms: u64) -> Instant {
    Instant(0).after_ms(ms)
}
fn who(slot: u32) -> Origin {
    Origin { shard: 0, slot, serial: 0 }
}

/// A table and what it left.
struct Rig {
    files: Files<u32>,
    out: Vec<E>,
    now: Instant,
}

impl Rig {
    fn new(known: &[(NebdFd, &str, OpenFlags)]) -> Self {
        let known = known.iter().map(|&(fd, name, flags)| Known { fd, name: name.into(), flags }).collect();
        let mut out = Vec::new();
        let files = Files::new(known, TIMEOUT, at(0), &mut out);
        Self { files, out, now: at(0) }
    }
    fn left(&mut self) -> Vec<E> {
        std::mem::take(&mut self.out)
    }
    fn open(&mut self, name: &str, flags: OpenFlags, slot: u32) -> Vec<E> {
        self.files.open(name, flags, who(slot), self.now, &mut self.out);
        self.left()
    }
    fn request(&mut self, fd: NebdFd, slot: u32) -> Vec<E> {
        self.files.request(fd, who(slot), self.now, &mut self.out);
        self.left()
    }
    fn close(&mut self, fd: NebdFd, slot: u32) -> Vec<E> {
        self.files.close(fd, who(slot), self.now, &mut self.out);
        self.left()
    }
    fn end(&mut self, fd: NebdFd) -> Vec<E> {
        self.files.end(fd, false, self.now, &mut self.out);
        self.left()
    }
    fn opened(&mut self, fd: NebdFd, handle: Option<u32>) -> Vec<E> {
        self.files.opened(fd, handle, self.now, &mut self.out);
        self.left()
    }
    fn closed(&mut self, fd: NebdFd, how: Closed) -> Vec<E> {
        self.files.closed(fd, how, self.now, &mut self.out);
        self.left()
    }
    fn expire(&mut self, ms: u64) -> Vec<E> {
        self.now = at(ms);
        self.files.expire(self.now, &mut self.out);
        self.left()
    }
    /// Open without surprises; its number.
    fn must_open(&mut self, name: &str, flags: OpenFlags) -> NebdFd {
        let Some(E::Task(Task::Open { fd, .. })) = self.open(name, flags, 900).pop() else { panic!("no task") };
        assert_eq!(self.opened(fd, Some(fd as u32)), [E::Opened { whom: who(900), fd }]);
        fd
    }
}

fn opening(fd: NebdFd, name: &str, flags: OpenFlags) -> E {
    E::Task(Task::Open { fd, name: name.into(), flags, reopen: false })
}
fn closing(fd: NebdFd, name: &str, open: bool, forget: bool) -> E {
    E::Task(Task::Close { fd, name: name.into(), open, forget })
}
fn go(slot: u32, handle: u32) -> E {
    E::Go { whom: who(slot), handle }
}

#[test]
fn numbers_begin_at_one_and_a_failed_open_uses_one_up() {
    let mut rig = Rig::new(&[]);
    assert_eq!(rig.open("a", None, 1), [opening(1, "a", None)]);
    assert_eq!(rig.opened(1, None), [E::Refused(who(1))]);
    assert_eq!(rig.request(1, 2), [E::Refused(who(2))]);
    assert_eq!(rig.must_open("b", None), 2);
    assert_eq!(rig.must_open("a", None), 3);
    let mut rig = Rig::new(&[(7, "x", None)]);
    rig.left();
    assert_eq!(rig.open("y", None, 1), [opening(8, "y", None)]);
}

#[test]
fn numbers_wrap_past_those_in_use() {
    let mut rig = Rig::new(&[(NebdFd::MAX, "x", None), (1, "y", None)]);
    assert_eq!(rig.left().len(), 2);
    assert_eq!(rig.open("z", None, 1), [opening(2, "z", None)]);
}

#[test]
fn opening_again() {
    let mut rig = Rig::new(&[]);
    for flags in [None, Some(true), Some(false)] {
        let name = format!("{flags:?}");
        let fd = rig.must_open(&name, flags);
        for other in [None, Some(true), Some(false)] {
            let expected = if other == flags { E::Opened { whom: who(5), fd } } else { E::Refused(who(5)) };
            assert_eq!(rig.open(&name, other, 5), [expected]);
        }
    }
    // While it is being opened: in order, the second when the first is done.
    assert_eq!(rig.open("n", None, 1), [opening(4, "n", None)]);
    assert_eq!(rig.open("n", Some(true), 2), []);
    assert_eq!(rig.opened(4, None), [E::Refused(who(1)), opening(4, "n", Some(true))]);
    assert_eq!(rig.opened(4, Some(4)), [E::Opened { whom: who(2), fd: 4 }]);
}

#[test]
fn silence_closes_and_forgets_nothing() {
    let mut rig = Rig::new(&[]);
    let fd = rig.must_open("a", Some(false));
    assert_eq!(rig.request(fd, 1), [go(1, 1)]);
    assert_eq!(rig.expire(30_000), [], "not yet");
    assert!(rig.files.alive([fd].into_iter(), at(20_000)) && !rig.files.alive([fd, 99].into_iter(), at(20_000)));
    assert_eq!(rig.expire(50_000), []);
    assert_eq!(rig.expire(50_001), [], "a request is running");
    assert_eq!(rig.request(fd, 2), [], "and the next one waits");
    assert_eq!(rig.end(fd), [closing(fd, "a", true, false)]);
    assert_eq!(rig.closed(fd, Closed::Done), [opening(fd, "a", Some(false))], "who waits opens it again");
    assert_eq!(rig.request(fd, 3), []);
    assert_eq!(rig.opened(fd, Some(8)), [go(2, 8), go(3, 8)]);
    rig.end(fd);
    rig.end(fd);
    assert_eq!(rig.expire(80_001), [], "opening counts as a sign of life");
    assert_eq!(rig.expire(80_002), [closing(fd, "a", true, false)]);
    assert_eq!(rig.closed(fd, Closed::StillOpen), []);
    assert_eq!(rig.expire(83_000), [closing(fd, "a", true, false)], "tried again");
    assert_eq!(rig.closed(fd, Closed::Done), []);
    assert_eq!(rig.open("a", None, 4), [opening(fd, "a", None)], "with other flags, if it likes");
    assert_eq!(rig.opened(fd, Some(9)), [E::Opened { whom: who(4), fd }]);
}

#[test]
fn a_clock_that_stands_or_steps_back_closes_nothing() {
    let mut rig = Rig::new(&[]);
    rig.now = at(100_000);
    rig.must_open("a", None);
    assert_eq!(rig.expire(5), []);
}

#[test]
fn lazy_opening_fails_for_all_who_wait() {
    let mut rig = Rig::new(&[]);
    let fd = rig.must_open("a", None);
    rig.expire(30_001);
    rig.closed(fd, Closed::Done);
    assert_eq!(rig.request(fd, 1), [opening(fd, "a", None)]);
    assert_eq!(rig.request(fd, 2), []);
    assert_eq!(rig.close(fd, 3), []);
    let left = rig.opened(fd, None);
    assert_eq!(left, [E::Refused(who(1)), E::Refused(who(2)), closing(fd, "a", false, true)]);
    assert_eq!(rig.closed(fd, Closed::StillRecorded), [E::Refused(who(3))]);
    assert_eq!(rig.request(fd, 4), [opening(fd, "a", None)], "it is in the table still");
}

#[test]
fn close_file() {
    let mut rig = Rig::new(&[]);
    assert_eq!(rig.close(77, 1), [E::Done(who(1))], "an unknown number");
    let fd = rig.must_open("a", None);
    assert_eq!(rig.request(fd, 1), [go(1, 1)]);
    assert_eq!(rig.close(fd, 2), [], "waits for the request");
    assert_eq!((rig.request(fd, 3), rig.open("a", None, 4), rig.close(fd, 5)), (vec![], vec![], vec![]));
    assert_eq!(rig.end(fd), [closing(fd, "a", true, true)]);
    assert_eq!(rig.request(fd, 6), []);
    let left = rig.closed(fd, Closed::Done);
    let expected = [E::Done(who(2)), E::Refused(who(3)), opening(2, "a", None), E::Done(who(5)), E::Refused(who(6))];
    assert_eq!(left, expected, "the opening gets a file of its own");
    assert_eq!(rig.opened(2, Some(2)), [E::Opened { whom: who(4), fd: 2 }]);
    assert_eq!(rig.close(2, 7), [closing(2, "a", true, true)]);
    assert_eq!(rig.closed(2, Closed::StillOpen), [E::Refused(who(7))]);
    assert_eq!(rig.request(2, 8), [go(8, 2)], "it stays open");
    rig.end(2);
    rig.close(2, 9);
    assert_eq!(rig.closed(2, Closed::StillRecorded), [E::Refused(who(9))]);
    assert_eq!(rig.close(2, 10), [closing(2, "a", false, true)], "closed, in the table still");
    assert_eq!(rig.closed(2, Closed::Done), [E::Done(who(10))]);
    assert_eq!(rig.request(2, 11), [E::Refused(who(11))]);
}

#[test]
fn after_a_restart_requests_wait_for_the_reopening() {
    let mut rig = Rig::new(&[(3, "a", Some(false)), (5, "b", None)]);
    let reopening = |fd, name: &str, flags| E::Task(Task::Open { fd, name: name.into(), flags, reopen: true });
    assert_eq!(rig.left(), [reopening(3, "a", Some(false)), reopening(5, "b", None)]);
    assert_eq!((rig.request(3, 1), rig.request(5, 2), rig.open("a", Some(false), 3)), (vec![], vec![], vec![]));
    assert_eq!(rig.opened(3, Some(3)), [go(1, 3), E::Opened { whom: who(3), fd: 3 }]);
    assert_eq!(rig.opened(5, None), [opening(5, "b", None)], "not reopened: the request tries itself");
    assert_eq!(rig.opened(5, Some(5)), [go(2, 5)]);
    assert_eq!(rig.open("c", None, 4), [opening(6, "c", None)]);
}

#[test]
fn what_a_dead_connection_left_running_is_not_overtaken() {
    let mut rig = Rig::new(&[]);
    let fd = rig.must_open("a", None);
    assert_eq!((rig.request(fd, 1), rig.request(fd, 2)), (vec![go(1, 1)], vec![go(2, 1)]));
    rig.files.orphaned(fd);
    assert_eq!(rig.request(fd, 3), []);
    assert_eq!(rig.end(fd), [], "the other one");
    rig.files.end(fd, true, rig.now, &mut rig.out);
    assert_eq!(rig.left(), [go(3, 1)]);
}

#[test]
fn the_table_is_bounded() {
    let names: Vec<String> = (0..NEBD_FILES_MAX).map(|n| n.to_string()).collect();
    let known: Vec<_> = names.iter().zip(1..).map(|(name, fd)| (fd, name.as_str(), None)).collect();
    let mut rig = Rig::new(&known);
    rig.left();
    assert_eq!(rig.open("one more", None, 1), [E::Refused(who(1))]);
}

#[derive(Clone, Debug)]
enum Step {
    Open(usize, OpenFlags),
    Request(usize),
    Close(usize),
    End(usize, bool),
    /// A task of those in the worker's hands, and whether it goes well.
    Work(usize, u8),
    Wait(u64),
    Alive(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let flags = prop::option::of(any::<bool>());
    let step = prop_oneof![
        2 => (0usize..3, flags).prop_map(|(n, f)| Step::Open(n, f)),
        4 => (0usize..8).prop_map(Step::Request),
        1 => (0usize..8).prop_map(Step::Close),
        4 => (any::<usize>(), any::<bool>()).prop_map(|(n, o)| Step::End(n, o)),
        5 => (any::<usize>(), 0u8..8).prop_map(|(n, k)| Step::Work(n, k)),
        1 => (1u64..40_000).prop_map(Step::Wait),
        1 => (0usize..8).prop_map(Step::Alive),
    ];
    prop::collection::vec(step, 1..120)
}

/// What must hold whatever happens, without a word about how.
#[derive(Default)]
struct Model {
    asked: BTreeSet<u32>,
    running: Vec<(NebdFd, u32)>,
    tasks: Vec<Task>,
    /// Open at the executor; by number, the handle.
    open: BTreeMap<NebdFd, u32>,
    recorded: BTreeMap<NebdFd, String>,
    fd_of: BTreeMap<u32, NebdFd>,
    handles: u32,
}

impl Model {
    fn answered(&mut self, whom: Origin) {
        assert!(self.asked.remove(&whom.slot), "answered twice, or not asked");
    }
    fn take(&mut self, left: Vec<E>) {
        for effect in left {
            match effect {
                E::Go { whom, handle } => {
                    self.answered(whom);
                    let fd = self.fd_of[&whom.slot];
                    assert_eq!(self.open.get(&fd), Some(&handle), "runs on what is not open");
                    assert!(!self.tasks.iter().any(|t| matches!(t, Task::Close { fd: f, .. } if *f == fd)));
                    self.running.push((fd, whom.slot));
                }
                E::Opened { whom, fd } => {
                    self.answered(whom);
                    assert!(self.open.contains_key(&fd) && self.recorded.contains_key(&fd));
                }
                E::Done(whom) | E::Refused(whom) => self.answered(whom),
                E::Task(task) => {
                    let (Task::Open { fd, .. } | Task::Close { fd, .. }) = &task;
                    let same = |t: &Task| matches!(t, Task::Open { fd: f, .. } | Task::Close { fd: f, .. } if f == fd);
                    assert!(!self.tasks.iter().any(same), "two tasks of one file");
                    if let Task::Close { fd, .. } = &task {
                        assert!(self.running.iter().all(|r| r.0 != *fd), "closed under a request");
                    }
                    self.tasks.push(task);
                }
            }
        }
    }
    fn work(&mut self, rig: &mut Rig, at: usize, kind: u8) {
        if self.tasks.is_empty() {
            return;
        }
        let task = self.tasks.remove(at % self.tasks.len());
        let left = match task {
            Task::Open { fd, name, .. } => {
                let handle = (kind > 1).then(|| {
                    self.handles += 1;
                    assert!(self.open.insert(fd, self.handles).is_none(), "opened twice");
                    self.recorded.insert(fd, name);
                    self.handles
                });
                rig.opened(fd, handle)
            }
            Task::Close { fd, open, forget, .. } => {
                let how = match kind {
                    0 if open => Closed::StillOpen,
                    1 if forget => Closed::StillRecorded,
                    _ => Closed::Done,
                };
                if how != Closed::StillOpen {
                    assert_eq!(self.open.remove(&fd).is_some(), open);
                }
                if how == Closed::Done && forget {
                    self.recorded.remove(&fd);
                }
                rig.closed(fd, how)
            }
        };
        self.take(left);
    }
    /// Every record is in the table under its number.
    fn check(&self, rig: &Rig) {
        for (fd, name) in &self.recorded {
            assert_eq!(rig.files.files.get(fd).map(|f| f.name.as_str()), Some(name.as_str()));
            assert_eq!(rig.files.by_name.get(name), Some(fd));
        }
        assert_eq!(rig.files.files.len(), rig.files.by_name.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn everybody_is_answered_once_and_nothing_runs_on_a_closed_file(steps in steps()) {
        let mut rig = Rig::new(&[(2, "n1", None)]);
        let mut model = Model::default();
        model.recorded.insert(2, "n1".into());
        let left = rig.left();
        model.take(left);
        for (slot, step) in (0u32..).zip(steps) {
            let left = match step {
                Step::Open(name, flags) => {
                    model.asked.insert(slot);
                    rig.open(&format!("n{name}"), flags, slot)
                }
                Step::Request(fd) => {
                    model.asked.insert(slot);
                    model.fd_of.insert(slot, fd as NebdFd);
                    rig.request(fd as NebdFd, slot)
                }
                Step::Close(fd) => {
                    model.asked.insert(slot);
                    rig.close(fd as NebdFd, slot)
                }
                Step::End(n, orphan) => {
                    if model.running.is_empty() {
                        continue;
                    }
                    let (fd, _) = model.running.remove(n % model.running.len());
                    if orphan {
                        rig.files.orphaned(fd);
                    }
                    rig.files.end(fd, orphan, rig.now, &mut rig.out);
                    rig.left()
                }
                Step::Work(n, kind) => {
                    model.work(&mut rig, n, kind);
                    continue;
                }
                Step::Wait(ms) => {
                    let now = rig.now.after_ms(ms).0 / 1_000_000;
                    rig.expire(now)
                }
                Step::Alive(fd) => {
                    let now = rig.now;
                    rig.files.alive([fd as NebdFd].into_iter(), now);
                    continue;
                }
            };
            model.take(left);
            model.check(&rig);
        }
        // Everything that runs ends, every task is done: nobody waits for ever.
        for _ in 0..10_000 {
            if let Some((fd, _)) = model.running.pop() {
                let left = rig.end(fd);
                model.take(left);
            } else if !model.tasks.is_empty() {
                model.work(&mut rig, 0, 7);
            } else {
                break;
            }
        }
        prop_assert!(model.asked.is_empty(), "{:?} were never answered", model.asked);
        prop_assert!(model.running.is_empty() && model.tasks.is_empty());
        model.check(&rig);
    }
}
