//! The worker of NEBD: opens, closes and grows files through an executor, and writes the metafile. On the control thread.
//!
//! Promise: every task it is given ends, with success or not; those of different files do not wait for each other.

use crate::io::uring::clock;
use crate::nebd::executor::{Executor, Handle, OpenFlags};
use crate::nebd::files::{Closed, NebdFd, Task};
use crate::nebd::metafile::{Attributes, Metafile, Record};
use crate::nebd::server::{Server, Work};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;

/// What the worker needs.
#[derive(Debug)]
pub struct Setup {
    /// Gives and takes.
    pub server: Arc<Server>,
    /// Tasks. There is one of each file at most, and one for each call that makes a file larger.
    pub work: UnboundedReceiver<Work>,
    /// The records.
    pub metafile: Metafile,
    /// Between two looks for silent files, milliseconds.
    pub check_ms: u64,
}

struct Worker {
    server: Arc<Server>,
    metafile: RefCell<Metafile>,
    executor: Rc<dyn Executor>,
}

/// Start it, on the control thread.
pub(super) fn spawn(setup: Setup, executor: Rc<dyn Executor>) {
    let Setup { server, mut work, metafile, check_ms } = setup;
    let worker = Rc::new(Worker { server: Arc::clone(&server), metafile: RefCell::new(metafile), executor });
    tokio_uring::spawn(async move {
        while let Some(work) = work.recv().await {
            let worker = Rc::clone(&worker);
            tokio_uring::spawn(async move { worker.work(work).await });
        }
    });
    let ticking = Arc::clone(&server);
    tokio_uring::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            ticking.tick(clock());
        }
    });
    tokio_uring::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(check_ms)).await;
            server.expire(clock());
        }
    });
}

impl Worker {
    async fn work(&self, work: Work) {
        match work {
            Work::File(Task::Open { fd, name, flags, reopen }) => {
                let handle = self.open(fd, &name, flags, reopen).await;
                self.server.opened(fd, handle, clock());
            }
            Work::File(Task::Close { fd, name, open, forget }) => {
                let how = self.close(&name, open, forget).await;
                self.server.closed(fd, how, clock());
            }
            Work::Extend { whom, name, size } => {
                let result = self.executor.extend(&name, size).await;
                if let Err(why) = &result {
                    tracing::warn!(name, size, %why, "NEBD: not resized");
                }
                self.server.extended(whom, result.is_ok());
            }
        }
    }

    async fn open(&self, fd: NebdFd, name: &str, flags: OpenFlags, reopen: bool) -> Option<Arc<dyn Handle>> {
        let opened = if reopen {
            let attributes = self.recorded(name);
            self.executor.reopen(name, &attributes).await
        } else {
            self.executor.open(name, flags).await
        };
        let opened = match opened {
            Ok(opened) => opened,
            Err(why) => {
                tracing::warn!(fd, name, %why, reopen, "NEBD: not opened");
                return None;
            }
        };
        let record = Record { fd, name: name.to_owned(), attributes: opened.attributes };
        let put = self.metafile.borrow_mut().put(record);
        if let Err(why) = put {
            tracing::error!(%why, "NEBD: not opened");
            if let Err(why) = self.executor.close(name).await {
                tracing::warn!(fd, name, %why, "NEBD: not closed again");
            }
            return None;
        }
        tracing::info!(fd, name, reopen, "NEBD: open");
        Some(opened.handle)
    }

    fn recorded(&self, name: &str) -> Attributes {
        self.metafile.borrow().get(name).map(|record| record.attributes.clone()).unwrap_or_default()
    }

    async fn close(&self, name: &str, open: bool, forget: bool) -> Closed {
        if open && let Err(why) = self.executor.close(name).await {
            tracing::warn!(name, %why, "NEBD: not closed");
            return Closed::StillOpen;
        }
        if forget && let Err(why) = self.metafile.borrow_mut().remove(name) {
            tracing::error!(%why, "NEBD: closed, but its record stays");
            return Closed::StillRecorded;
        }
        tracing::info!(name, forget, "NEBD: closed");
        Closed::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Instant;
    use crate::nebd::executor::{ExecutorError, FileInfo, Opened, Pending, attributes_of, flags_of};
    use crate::nebd::files::Known;
    use crate::nebd::server::{Answer, Options, Reply};
    use crate::shard::request::Origin;
    use crate::volume::io::{IoKind, VolumeError, VolumeIo};
    use std::cell::Cell;
    use std::path::PathBuf;
    use tokio::sync::mpsc::unbounded_channel;

    /// Opens and closes nothing, and fails when told to.
    #[derive(Debug, Default)]
    struct Fake {
        open: Cell<i32>,
        fails: Cell<bool>,
    }
    #[derive(Debug)]
    struct Nothing;

    impl Handle for Nothing {
        fn info(&self) -> Result<FileInfo, VolumeError> {
            Err(VolumeError::Deleted)
        }
        fn start(&self, _: IoKind, _: u64, _: u64, _: Instant) -> Result<VolumeIo, VolumeError> {
            Err(VolumeError::Deleted)
        }
        fn discard(&self, _: u64, _: u64, _: Instant) -> Result<Option<VolumeIo>, VolumeError> {
            Err(VolumeError::Deleted)
        }
        fn flush(&self) -> Result<(), VolumeError> {
            Ok(())
        }
        fn invalidate_cache(&self) -> Result<(), VolumeError> {
            Ok(())
        }
    }

    impl Fake {
        fn result<T>(&self, value: T) -> Result<T, ExecutorError> {
            if self.fails.get() { Err(ExecutorError("told to fail".into())) } else { Ok(value) }
        }
        fn opened(&self, flags: OpenFlags) -> Result<Opened, ExecutorError> {
            let opened = self.result(Opened { handle: Arc::new(Nothing), attributes: attributes_of(flags) })?;
            self.open.set(self.open.get() + 1);
            Ok(opened)
        }
    }

    impl Executor for Fake {
        fn open<'a>(&'a self, _: &'a str, flags: OpenFlags) -> Pending<'a, Opened> {
            Box::pin(async move { self.opened(flags) })
        }
        fn reopen<'a>(&'a self, _: &'a str, attributes: &'a Attributes) -> Pending<'a, Opened> {
            Box::pin(async move { self.opened(flags_of(attributes)?) })
        }
        fn close<'a>(&'a self, _: &'a str) -> Pending<'a, ()> {
            Box::pin(async move {
                self.result(())?;
                self.open.set(self.open.get() - 1);
                Ok(())
            })
        }
        fn extend<'a>(&'a self, _: &'a str, _: u64) -> Pending<'a, ()> {
            Box::pin(async move { self.result(()) })
        }
    }

    struct Rig {
        worker: Worker,
        work: UnboundedReceiver<Work>,
        fake: Rc<Fake>,
        path: PathBuf,
        _folder: tempfile::TempDir,
    }

    impl Rig {
        fn new(records: &[Record]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("meta");
            let mut metafile = Metafile::open(&path).unwrap();
            records.iter().for_each(|record| metafile.put(record.clone()).unwrap());
            let (send, work) = unbounded_channel();
            let known = |r: &Record| Known { fd: r.fd, name: r.name.clone(), flags: None };
            let options = Options { heartbeat_timeout_ns: 1, return_io_errors: false };
            let known = records.iter().map(known).collect();
            let send = Box::new(move |work| send.send(work).unwrap());
            let server = Server::new(options, known, 1, Instant(0), send, Box::new(|_| {}));
            let fake = Rc::new(Fake::default());
            let executor = Rc::clone(&fake);
            let worker = Worker { server, metafile: RefCell::new(metafile), executor };
            Self { worker, work, fake, path, _folder: folder }
        }
        /// Do what there is to do; the answer to the one who asked, if there is one.
        fn run(&mut self) -> Option<Answer> {
            tokio_uring::start(async {
                while let Ok(work) = self.work.try_recv() {
                    self.worker.work(work).await;
                }
            });
            let mut replies = Vec::new();
            self.worker.server.receive(0, &mut replies);
            assert!(replies.len() < 2);
            replies.pop().map(|Reply { answer, .. }| answer)
        }
        fn open(&mut self, name: &str) -> Option<Answer> {
            self.worker.server.open(name, None, WHO, Instant(0), &mut Vec::new());
            self.run()
        }
        fn request(&mut self, fd: NebdFd) -> Option<Answer> {
            let mut now = Vec::new();
            self.worker.server.request(fd, WHO, Instant(0), &mut now);
            now.pop().map(|reply| reply.answer).or_else(|| self.run())
        }
        fn end(&self, fd: NebdFd) {
            self.worker.server.end(0, fd, false, None, Instant(0), &mut Vec::new());
        }
        fn close(&mut self, fd: NebdFd) -> Option<Answer> {
            self.worker.server.close(fd, WHO, Instant(0), &mut Vec::new());
            self.run()
        }
        fn names(&self) -> Vec<String> {
            Metafile::open(&self.path).unwrap().records().iter().map(|r| r.name.clone()).collect()
        }
        /// Changes of the metafile fail, or do not any more.
        fn break_metafile(&self, broken: bool) {
            let temp = self.path.with_extension("tmp");
            if broken { std::fs::create_dir(temp).unwrap() } else { std::fs::remove_dir(temp).unwrap() }
        }
    }

    const WHO: Origin = Origin { shard: 0, slot: 0, serial: 0 };

    #[test]
    fn a_file_is_open_when_it_is_recorded() {
        let mut rig = Rig::new(&[]);
        assert!(matches!(rig.open("a"), Some(Answer::Opened(1))));
        assert_eq!((rig.names(), rig.fake.open.get()), (vec!["a".to_owned()], 1));
        rig.break_metafile(true);
        assert!(matches!(rig.open("b"), Some(Answer::Refused)));
        assert_eq!((rig.names(), rig.fake.open.get()), (vec!["a".to_owned()], 1), "closed again");
        rig.break_metafile(false);
        rig.fake.fails.set(true);
        assert!(matches!(rig.open("b"), Some(Answer::Refused)));
        assert_eq!(rig.names(), ["a"]);
    }

    #[test]
    fn closing_fails_halfway() {
        let mut rig = Rig::new(&[]);
        rig.open("a");
        rig.fake.fails.set(true);
        assert!(matches!(rig.close(1), Some(Answer::Refused)));
        assert!(matches!(rig.request(1), Some(Answer::Go(_))), "it is open still");
        rig.end(1);
        rig.fake.fails.set(false);
        rig.break_metafile(true);
        assert!(matches!(rig.close(1), Some(Answer::Refused)));
        assert_eq!((rig.names(), rig.fake.open.get()), (vec!["a".to_owned()], 0));
        assert!(matches!(rig.request(1), Some(Answer::Go(_))), "closed, in the table still: opened again");
        rig.end(1);
        rig.break_metafile(false);
        assert!(matches!(rig.close(1), Some(Answer::Done)));
        assert_eq!((rig.names(), rig.fake.open.get()), (vec![], 0));
        assert!(matches!(rig.request(1), Some(Answer::Refused)));
    }

    #[test]
    fn what_cannot_be_reopened_stays_on_record() {
        let of = |fd, name: &str, attributes| Record { fd, name: name.into(), attributes };
        let odd = Attributes::from([("openflags".into(), "nonsense".into())]);
        let old = Attributes::new(); // without session: to be written with it
        let mut rig = Rig::new(&[of(3, "a", attributes_of(None)), of(4, "b", odd), of(5, "c", old)]);
        rig.break_metafile(true);
        assert!(rig.run().is_none());
        assert_eq!((rig.names(), rig.fake.open.get()), (["a", "b", "c"].map(str::to_owned).to_vec(), 1));
        assert!(matches!(rig.request(3), Some(Answer::Go(_))));
        assert!(matches!(rig.request(5), Some(Answer::Refused)), "its record cannot be written");
        rig.break_metafile(false);
        assert!(matches!(rig.request(5), Some(Answer::Go(_))));
        assert!(matches!(rig.request(4), Some(Answer::Go(_))), "flags that cannot be read: as without");
        assert!(matches!(rig.open("d"), Some(Answer::Opened(6))));
    }

    #[test]
    fn silence_closes_at_the_executor_and_keeps_the_record() {
        let mut rig = Rig::new(&[]);
        rig.open("a");
        let later = Instant(clock().0 + 1_000_000);
        rig.worker.server.expire(later);
        assert!(rig.run().is_none());
        assert_eq!((rig.names(), rig.fake.open.get()), (vec!["a".to_owned()], 0));
        assert!(matches!(rig.request(1), Some(Answer::Go(_))));
        rig.worker.server.extend(1, 4096, WHO);
        assert!(matches!(rig.run(), Some(Answer::Done)));
        rig.fake.fails.set(true);
        rig.worker.server.extend(1, 4096, WHO);
        assert!(matches!(rig.run(), Some(Answer::Refused)));
    }
}
