//! What is asked of the server, and what its replies mean.

use bytes::{Bytes, BytesMut};
use proto::{
    BodyError, code,
    frame::{MAX_BODY, RequestHead, put_request},
    nebd,
};

use crate::error::{Error, Failure};

/// Most bytes one request may write or read: what a frame holds, less its head.
pub const MAX_IO: u64 = MAX_BODY as u64 - 4096;

const FILE_SERVICE: &str = "nebd.client.NebdFileService";
const HEARTBEAT_SERVICE: &str = "nebd.client.NebdHeartbeatService";

/// Where the bytes of a read go; all of it is filled, or the read failed.
#[derive(Debug)]
pub enum ReadBuffer {
    /// Memory that comes back with the completion.
    Owned(Vec<u8>),
    /// Memory that outlives the request.
    Static(&'static mut [u8]),
}

impl ReadBuffer {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Owned(bytes) => bytes.len(),
            Self::Static(bytes) => bytes.len(),
        }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        match self {
            Self::Owned(bytes) => bytes,
            Self::Static(bytes) => bytes,
        }
    }
}

/// The message of a request.
#[derive(Debug)]
pub(crate) enum Body {
    Open(nebd::OpenFileRequest),
    Close(nebd::CloseFileRequest),
    Read(nebd::ReadRequest),
    Write(nebd::WriteRequest),
    Discard(nebd::DiscardRequest),
    Flush(nebd::FlushRequest),
    Resize(nebd::ResizeRequest),
    GetInfo(nebd::GetInfoRequest),
    InvalidateCache(nebd::InvalidateCacheRequest),
    KeepAlive(nebd::HeartbeatRequest),
}

/// How long a request is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Budget {
    /// Until there is an answer.
    Forever,
    /// So many times.
    Attempts(u32),
    /// Once, until then.
    Once(std::time::Instant),
}

/// Called with what became of a request. It runs on the thread that got the answer.
pub(crate) type Done = Box<dyn FnOnce(Outcome) + Send>;

/// A request on its way in.
pub(crate) struct Request {
    pub(crate) body: Body,
    /// Sent behind the message.
    pub(crate) payload: Bytes,
    /// Of reads.
    pub(crate) buffer: Option<ReadBuffer>,
    pub(crate) budget: Budget,
    pub(crate) done: Done,
}

/// What became of a request.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) result: Result<Reply, Error>,
    /// The buffer of a read, as handed in; filled if the result is good.
    pub(crate) buffer: Option<ReadBuffer>,
    /// Attempts after the first.
    pub(crate) retries: u32,
}

/// A good answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Reply {
    /// kOK.
    Done,
    /// The file's number, if it was given.
    Opened(Option<i32>),
    /// What is known of a file.
    Info(nebd::FileInfo),
}

impl Body {
    pub(crate) const fn is_heartbeat(&self) -> bool {
        matches!(self, Self::KeepAlive(_))
    }

    const fn method(&self) -> &'static str {
        match self {
            Self::Open(_) => "OpenFile",
            Self::Close(_) => "CloseFile",
            Self::Read(_) => "Read",
            Self::Write(_) => "Write",
            Self::Discard(_) => "Discard",
            Self::Flush(_) => "Flush",
            Self::Resize(_) => "ResizeFile",
            Self::GetInfo(_) => "GetInfo",
            Self::InvalidateCache(_) => "InvalidateCache",
            Self::KeepAlive(_) => "KeepAlive",
        }
    }

    /// Appends the frame up to its payload.
    pub(crate) fn put(&self, out: &mut BytesMut, correlation_id: i64, log_id: i64, payload: usize) {
        let service = if self.is_heartbeat() { HEARTBEAT_SERVICE } else { FILE_SERVICE };
        let head = RequestHead { service, method: self.method(), log_id: Some(log_id), correlation_id };
        match self {
            Self::Open(message) => put_request(out, &head, message, payload),
            Self::Close(message) => put_request(out, &head, message, payload),
            Self::Read(message) => put_request(out, &head, message, payload),
            Self::Write(message) => put_request(out, &head, message, payload),
            Self::Discard(message) => put_request(out, &head, message, payload),
            Self::Flush(message) => put_request(out, &head, message, payload),
            Self::Resize(message) => put_request(out, &head, message, payload),
            Self::GetInfo(message) => put_request(out, &head, message, payload),
            Self::InvalidateCache(message) => put_request(out, &head, message, payload),
            Self::KeepAlive(message) => put_request(out, &head, message, payload),
        }
    }

    /// Reads the answer to this request. The outer error is an attempt that failed (to be tried again), the inner one
    /// what the server said.
    pub(crate) fn judge(&self, body: Bytes) -> Result<Result<Reply, Error>, Failure> {
        let reply = match self {
            Self::Open(_) => proto::decode::<nebd::OpenFileResponse>(body).map(|r| (r.ret_code, Reply::Opened(r.fd))),
            Self::Close(_) => proto::decode::<nebd::CloseFileResponse>(body).map(|r| (r.ret_code, Reply::Done)),
            Self::Read(_) => proto::decode::<nebd::ReadResponse>(body).map(|r| (r.ret_code, Reply::Done)),
            Self::Write(_) => proto::decode::<nebd::WriteResponse>(body).map(|r| (r.ret_code, Reply::Done)),
            Self::Discard(_) => proto::decode::<nebd::DiscardResponse>(body).map(|r| (r.ret_code, Reply::Done)),
            Self::Flush(_) => proto::decode::<nebd::FlushResponse>(body).map(|r| (r.ret_code, Reply::Done)),
            Self::Resize(_) => proto::decode::<nebd::ResizeResponse>(body).map(|r| (r.ret_code, Reply::Done)),
            Self::InvalidateCache(_) => {
                proto::decode::<nebd::InvalidateCacheResponse>(body).map(|r| (r.ret_code, Reply::Done))
            }
            Self::KeepAlive(_) => proto::decode::<nebd::HeartbeatResponse>(body).map(|r| (r.ret_code, Reply::Done)),
            Self::GetInfo(_) => return info(proto::decode::<nebd::GetInfoResponse>(body)),
        };
        let (ret_code, reply) = reply.map_err(|_| Failure::BadReply)?;
        Ok(if ret_code == OK { Ok(reply) } else { Err(Error::Refused) })
    }
}

const OK: i32 = code::RetCode::KOk as i32;

fn info(reply: Result<nebd::GetInfoResponse, BodyError>) -> Result<Result<Reply, Error>, Failure> {
    let reply = reply.map_err(|_| Failure::BadReply)?;
    Ok(match reply.info {
        _ if reply.ret_code != OK => Err(Error::Refused),
        Some(info) => Ok(Reply::Info(info)),
        None => Err(Error::Reply("no file info")),
    })
}
