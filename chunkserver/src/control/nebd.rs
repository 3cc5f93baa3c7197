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
        let metafile = self.metafile.borrow();
        metafile.records().iter().find(|r| r.name == name).map(|r| r.attributes.clone()).unwrap_or_default()
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
