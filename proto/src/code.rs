//! Numbers that travel in `RpcResponseMeta.error_code`, and the status enums of the services.
//!
//! Two error channels that must not be mixed: an RPC failure (one of the codes here, or a system errno, in the meta, no
//! body) and a status inside a successful response (the enums re-exported here).

pub use crate::schema::curve::chunkserver::{ChunkOpStatus, ChunkOpType, CopysetOpStatus};
pub use crate::schema::nebd::client::RetCode;

/// The short service name is unknown (or the meta has no request part).
pub const ENOSERVICE: i32 = 1001;
/// The dotted service name or the method is unknown.
pub const ENOMETHOD: i32 = 1002;
/// The request cannot be parsed: body, attachment size, compression.
pub const EREQUEST: i32 = 1003;
/// Authentication failed.
pub const ERPCAUTH: i32 = 1004;
/// Client side: no reply in time.
pub const ERPCTIMEDOUT: i32 = 1008;
/// Client side: the connection broke.
pub const EFAILEDSOCKET: i32 = 1009;
/// HTTP failure.
pub const EHTTP: i32 = 1010;
/// Too many unsent bytes on this connection.
pub const EOVERCROWDED: i32 = 1011;
/// The peer closed the connection.
pub const EEOF: i32 = 1014;
/// The handler failed.
pub const EINTERNAL: i32 = 2001;
/// The response cannot be parsed or serialized.
pub const ERESPONSE: i32 = 2002;
/// The server is stopping. Who answers this must close the connection once its calls are done: C++ clients never use
/// a connection again after it, but wait until it breaks.
pub const ELOGOFF: i32 = 2003;
/// The limit of concurrent requests is reached.
pub const ELIMIT: i32 = 2004;

/// System errno values that services use as RPC failures.
pub mod errno {
    /// Not the leader.
    pub const EPERM: i32 = 1;
    /// No such copyset.
    pub const ENOENT: i32 = 2;
    /// Input/output error.
    pub const EIO: i32 = 5;
    /// Unknown reader.
    pub const ENXIO: i32 = 6;
    /// No leader known, or throttled.
    pub const EAGAIN: i32 = 11;
    /// Not allowed by configuration.
    pub const EACCES: i32 = 13;
    /// Another change is running.
    pub const EBUSY: i32 = 16;
    /// Unparsable peer or parameter.
    pub const EINVAL: i32 = 22;
    /// Host is down (client side: the connection is not there yet).
    pub const EHOSTDOWN: i32 = 112;
}
