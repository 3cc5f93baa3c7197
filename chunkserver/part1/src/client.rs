//! The API for Rust: calls as futures, I/O as futures or with callbacks.

use std::{io, sync::Arc};

use bytes::Bytes;
use proto::nebd;
use tokio::sync::oneshot;

use crate::{
    config::Config,
    driver::{OpenFile, Shared, locked},
    error::Error,
    exchange::Stats,
    lock::FileLock,
    request::{Body, Budget, Outcome, ReadBuffer, Reply, Request},
};

/// Block size of a server that does not say.
const BLOCK_SIZE: u32 = 4096;

/// The number under which the server knows an open file. It stays the same across restarts of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NebdFd(pub i32);

/// How a file is opened. No flags at all is not the same as any flags: a file that is open without is not opened with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFlags {
    /// Nobody else writes the volume.
    pub exclusive: bool,
}

/// What the server says of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// Bytes.
    pub size: u64,
    /// Bytes of an object, a chunk.
    pub object_size: u64,
    /// Objects.
    pub objects: u64,
    /// Bytes of the smallest unit of I/O.
    pub block_size: u32,
}

/// An I/O request.
#[derive(Debug)]
pub enum Io {
    /// Fill the buffer from `offset` on.
    Read {
        /// Bytes from the file's start.
        offset: u64,
        /// As many bytes as are wanted.
        buffer: ReadBuffer,
    },
    /// Write `data` at `offset`. The bytes are sent from where they lie.
    Write {
        /// Bytes from the file's start.
        offset: u64,
        /// The bytes.
        data: Bytes,
    },
    /// The content of a range is not needed any more.
    Discard {
        /// Bytes from the file's start.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// What was answered shall be durable.
    Flush,
}

/// What became of an [`Io`].
#[derive(Debug)]
pub struct Completion {
    /// Done, or why not.
    pub result: Result<(), Error>,
    /// The buffer of a read; filled if the result is good, else its content is anything.
    pub buffer: Option<ReadBuffer>,
    /// Attempts after the first.
    pub retries: u32,
}

/// A client: one connection to a server, shared by all threads. Ends when it is dropped; open files stay open on the
/// server until it misses their keep-alives.
pub struct NebdClient {
    shared: Arc<Shared>,
}

type Answer<T> = oneshot::Receiver<Result<T, Error>>;

/// A client that ends before it answers says so itself; this is for what never came to it.
async fn answer<T>(receiver: Answer<T>) -> Result<T, Error> {
    receiver.await.unwrap_or(Err(Error::Stopped))
}

impl NebdClient {
    /// Starts a client. The server need not be there; the first call connects. Fails without threads or descriptors, or if
    /// the socket's path is too long.
    pub fn new(config: Config) -> io::Result<Self> {
        Ok(Self { shared: Shared::start(config)? })
    }

    /// What it was started with.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// Counters since the start.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Opens a file: takes its lock on this host, then asks the server. From then on the file is kept alive until it is
    /// closed. A file whose future is dropped is closed again.
    pub fn open(
        &self,
        name: &str,
        flags: Option<OpenFlags>,
    ) -> impl Future<Output = Result<NebdFd, Error>> + Send + use<> {
        let lock = FileLock::take(&self.shared.config.lock_dir, name);
        let receiver = lock.map(|lock| {
            let (sender, receiver) = oneshot::channel();
            let flags = flags.map(|flags| nebd::ProtoOpenFlags { exclusive: flags.exclusive });
            let body = Body::Open(nebd::OpenFileRequest { file_name: name.to_owned(), flags });
            let (shared, name) = (Arc::clone(&self.shared), name.to_owned());
            self.call(body, move |outcome| opened(&shared, name, lock, outcome, sender));
            receiver
        });
        async move { answer(receiver?).await }
    }

    /// Closes a file. Good as soon as the server has answered, whatever it says; lock and keep-alive end in any case.
    pub fn close(&self, fd: NebdFd) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        let (sender, receiver) = oneshot::channel();
        let shared = Arc::clone(&self.shared);
        self.call(Body::Close(nebd::CloseFileRequest { fd: fd.0 }), move |outcome| {
            drop(locked(&shared.files).remove(&fd.0));
            let _ = sender.send(match outcome.result {
                Err(Error::Refused) => {
                    tracing::warn!("close of {}: the server refused", fd.0);
                    Ok(())
                }
                result => result.map(drop),
            });
        });
        answer(receiver)
    }

    /// What the server says of a file. (`objSize` and `objNums` of a C++ server are garbage.)
    pub fn get_info(&self, fd: NebdFd) -> impl Future<Output = Result<FileInfo, Error>> + Send + use<> {
        let (sender, receiver) = oneshot::channel();
        self.call(Body::GetInfo(nebd::GetInfoRequest { fd: fd.0 }), move |outcome| {
            let _ = sender.send(outcome.result.and_then(|reply| match reply {
                Reply::Info(info) => Ok(FileInfo {
                    size: info.size,
                    object_size: info.obj_size,
                    objects: info.obj_nums,
                    block_size: info.blocksize.unwrap_or(BLOCK_SIZE),
                }),
                _ => Err(Error::Reply("no file info")),
            }));
        });
        answer(receiver)
    }

    /// Bytes of a file.
    pub fn file_size(&self, fd: NebdFd) -> impl Future<Output = Result<u64, Error>> + Send + use<> {
        let info = self.get_info(fd);
        async move { Ok(info.await?.size) }
    }

    /// Bytes of a file's smallest unit of I/O.
    pub fn block_size(&self, fd: NebdFd) -> impl Future<Output = Result<u32, Error>> + Send + use<> {
        let info = self.get_info(fd);
        async move { Ok(info.await?.block_size) }
    }

    /// Makes a file larger.
    pub fn extend(&self, fd: NebdFd, new_size: u64) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        self.plain(Body::Resize(nebd::ResizeRequest { fd: fd.0, new_size }))
    }

    /// Makes the server forget what it knows of a file's layout.
    pub fn invalidate_cache(&self, fd: NebdFd) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        self.plain(Body::InvalidateCache(nebd::InvalidateCacheRequest { fd: fd.0 }))
    }

    /// Submits I/O; `done` is called once, on the client's thread, or at once if the request cannot be sent at all. It
    /// should not take long: other completions wait for it. What it submits itself leaves together, after it returns. If it
    /// has to wait for a future of this client, then with [`crate::block_on`]. How many requests are in flight is the
    /// caller's to bound.
    pub fn submit(&self, fd: NebdFd, io: Io, done: impl FnOnce(Completion) + Send + 'static) {
        let fd = fd.0;
        let (body, payload, buffer) = match io {
            Io::Read { offset, buffer } => {
                let size = buffer.len() as u64;
                (Body::Read(nebd::ReadRequest { fd, offset, size }), Bytes::new(), Some(buffer))
            }
            Io::Write { offset, data } => {
                let size = data.len() as u64;
                (Body::Write(nebd::WriteRequest { fd, offset, size }), data, None)
            }
            Io::Discard { offset, length } => {
                (Body::Discard(nebd::DiscardRequest { fd, offset, size: length }), Bytes::new(), None)
            }
            Io::Flush => (Body::Flush(nebd::FlushRequest { fd }), Bytes::new(), None),
        };
        let done = move |outcome: Outcome| {
            let Outcome { result, buffer, retries } = outcome;
            done(Completion { result: result.map(drop), buffer, retries });
        };
        self.shared.submit(Request { body, payload, buffer, budget: Budget::Forever, done: Box::new(done) });
    }

    /// Reads `length` bytes.
    pub fn read(
        &self,
        fd: NebdFd,
        offset: u64,
        length: usize,
    ) -> impl Future<Output = Result<Vec<u8>, Error>> + Send + use<> {
        let (sender, receiver) = oneshot::channel();
        let buffer = ReadBuffer::Owned(vec![0; length]);
        self.submit(fd, Io::Read { offset, buffer }, move |completion| {
            let _ = sender.send(match (completion.result, completion.buffer) {
                (Ok(()), Some(ReadBuffer::Owned(bytes))) => Ok(bytes),
                (Ok(()), _) => Err(Error::Reply("no bytes")),
                (Err(error), _) => Err(error),
            });
        });
        answer(receiver)
    }

    /// Writes `data`.
    pub fn write(
        &self,
        fd: NebdFd,
        offset: u64,
        data: Bytes,
    ) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        self.io(fd, Io::Write { offset, data })
    }

    /// Gives up the content of a range.
    pub fn discard(
        &self,
        fd: NebdFd,
        offset: u64,
        length: u64,
    ) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        self.io(fd, Io::Discard { offset, length })
    }

    /// Makes what was answered durable.
    pub fn flush(&self, fd: NebdFd) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        self.io(fd, Io::Flush)
    }

    /// Ends the client: what is open fails with [`Error::Stopped`]. Returns when all callbacks were called, from inside a
    /// callback at once. Locks are released; files are not closed.
    pub fn shutdown(&self) {
        self.shared.stop();
        let files = std::mem::take(&mut *locked(&self.shared.files));
        drop(files);
    }

    fn io(&self, fd: NebdFd, io: Io) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        let (sender, receiver) = oneshot::channel();
        self.submit(fd, io, move |completion| drop(sender.send(completion.result)));
        answer(receiver)
    }

    fn plain(&self, body: Body) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        let (sender, receiver) = oneshot::channel();
        self.call(body, move |outcome| drop(sender.send(outcome.result.map(drop))));
        answer(receiver)
    }

    fn call(&self, body: Body, done: impl FnOnce(Outcome) + Send + 'static) {
        call(&self.shared, body, done);
    }
}

impl Drop for NebdClient {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// A call its caller waits for.
fn call(shared: &Shared, body: Body, done: impl FnOnce(Outcome) + Send + 'static) {
    let budget = Budget::Attempts(shared.config.sync_attempts);
    shared.submit(Request { body, payload: Bytes::new(), buffer: None, budget, done: Box::new(done) });
}

/// The server has answered an open.
fn opened(
    shared: &Arc<Shared>,
    name: String,
    lock: FileLock,
    outcome: Outcome,
    sender: oneshot::Sender<Result<NebdFd, Error>>,
) {
    let result = match outcome.result {
        Ok(Reply::Opened(Some(fd @ 1..))) => {
            let mut files = locked(&shared.files);
            match files.entry(fd) {
                std::collections::btree_map::Entry::Vacant(place) => {
                    place.insert(OpenFile { name, _lock: lock });
                    Ok(NebdFd(fd))
                }
                std::collections::btree_map::Entry::Occupied(_) => {
                    drop(files);
                    tracing::error!("{name}: the server's number {fd} belongs to another open file");
                    // Better no file of that number than two: requests for the other one now fail.
                    call(shared, Body::Close(nebd::CloseFileRequest { fd }), move |_| drop(lock));
                    Err(Error::FdInUse(fd))
                }
            }
        }
        // Whoever hears of a failure may open the file again at once: it is unlocked before.
        other => {
            drop(lock);
            other.and(Err(Error::Reply("no file number")))
        }
    };
    if let Err(Ok(NebdFd(fd))) = sender.send(result) {
        // Nobody waits any more.
        let file = locked(&shared.files).remove(&fd);
        call(shared, Body::Close(nebd::CloseFileRequest { fd }), move |_| drop(file));
    }
}
