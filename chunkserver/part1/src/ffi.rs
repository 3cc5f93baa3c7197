//! libnebd's C API (`include/libnebd.h`): names, structs and results are the C++ library's, so that a program built
//! against that one runs with this one.
//!
//! One client per process. Calls return −1 for every error. Asynchronous calls return 0 and call back from the client's
//! thread; they return −1, without a callback, if there is no client or no context, or no buffer where one is needed.
//! Where C++ is careless this is not: a read never writes more than `length` bytes and succeeds only with exactly as
//! many, and what is open at `nebd_lib_uninit` is called back with −1. `op` is not looked at; `retryCount` is set before
//! the callback.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    path::Path,
    sync::{Arc, PoisonError, RwLock},
};

use bytes::Bytes;

use crate::{
    client::{Completion, Io, NebdClient, NebdFd, OpenFlags},
    config::Config,
    logging,
    request::ReadBuffer,
    wait::block_on,
};

/// Where the configuration is if the caller does not say.
const DEFAULT_CONF: &str = "/etc/nebd/nebd-client.conf";

/// `LIBAIO_OP`: what a context asks for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LibaioOp {
    /// `LIBAIO_OP_READ`
    Read,
    /// `LIBAIO_OP_WRITE`
    Write,
    /// `LIBAIO_OP_DISCARD`
    Discard,
    /// `LIBAIO_OP_FLUSH`
    Flush,
}

/// `NebdOpenFlags`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct NebdOpenFlags {
    /// Not 0: nobody else writes the volume.
    pub exclusive: c_int,
}

/// `LibAioCallBack`
pub type LibAioCallBack = unsafe extern "C" fn(context: *mut NebdClientAioContext);

/// `NebdClientAioContext`: an asynchronous request. It and its buffer are the library's until the callback is called.
#[repr(C)]
#[derive(Debug)]
pub struct NebdClientAioContext {
    /// Bytes from the file's start.
    pub offset: libc::off_t,
    /// Bytes.
    pub length: usize,
    /// Set before the callback: 0, or −1.
    pub ret: c_int,
    /// A C caller may put any number here, and it is never read.
    pub op: c_int,
    /// Called when the request is over.
    pub cb: Option<LibAioCallBack>,
    /// Bytes to write, or room for bytes to read.
    pub buf: *mut c_void,
    /// Set before the callback: attempts after the first.
    pub retry_count: c_uint,
}

static CLIENT: RwLock<Option<Arc<NebdClient>>> = RwLock::new(None);

fn client() -> Option<Arc<NebdClient>> {
    CLIENT.read().unwrap_or_else(PoisonError::into_inner).clone()
}

/// A context while it is ours.
struct Context(*mut NebdClientAioContext);

// SAFETY: the caller gives the context away until its callback; no other thread touches it meanwhile.
unsafe impl Send for Context {}

impl Context {
    /// Gives the context back to its owner.
    fn complete(self, ret: c_int, retries: u32) {
        // SAFETY: the caller keeps the context alive until its callback, which is called here, once; the reference ends
        // before.
        let callback = unsafe {
            let context = &mut *self.0;
            context.ret = ret;
            context.retry_count = retries;
            context.cb
        };
        if let Some(callback) = callback {
            // SAFETY: a function of the caller's, called as the header says.
            unsafe { callback(self.0) };
        }
    }
}

/// Blocks all signals of this thread, and so of threads it starts, while it lives: a host's signals are for the host's
/// threads.
struct SignalsBlocked(libc::sigset_t);

impl SignalsBlocked {
    fn new() -> Self {
        // SAFETY: both sets are plain memory that sigfillset and pthread_sigmask fill before it is used.
        unsafe {
            let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: the set is what pthread_sigmask wrote.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

fn init(path: &Path) -> Result<(), String> {
    let mut place = CLIENT.write().unwrap_or_else(PoisonError::into_inner);
    if place.is_some() {
        return Ok(());
    }
    let config = Config::load(path).map_err(|error| format!("{}: {error}", path.display()))?;
    if let Err(error) = logging::start(&config.log_dir) {
        eprintln!("libnebd: no log file in {}: {error}", config.log_dir.display());
    }
    let _blocked = SignalsBlocked::new();
    let client = NebdClient::new(config).map_err(|error| error.to_string())?;
    *place = Some(Arc::new(client));
    Ok(())
}

fn init_result(path: &Path) -> c_int {
    match init(path) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("libnebd: {error}");
            -1
        }
    }
}

/// Starts the library with the default configuration file. Later calls do nothing.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_init() -> c_int {
    init_result(DEFAULT_CONF.as_ref())
}

/// Starts the library with a configuration file. Later calls do nothing.
///
/// # Safety
/// `conf` is null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_init_with_conf(conf: *const c_char) -> c_int {
    // SAFETY: as promised by the caller.
    match unsafe { text(conf) } {
        Some(path) => init_result(path.as_ref()),
        None => -1,
    }
}

/// Ends the library: keep-alives and retries stop, what is open is called back with −1. Files are not closed.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_uninit() -> c_int {
    let client = CLIENT.write().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(client) = client {
        client.shutdown();
    }
    0
}

/// # Safety
/// `pointer` is null or a C string.
unsafe fn text<'a>(pointer: *const c_char) -> Option<&'a str> {
    if pointer.is_null() {
        return None;
    }
    // SAFETY: not null, and a C string as promised by the caller.
    unsafe { CStr::from_ptr(pointer) }.to_str().ok()
}

fn open(name: Option<&str>, flags: Option<OpenFlags>) -> c_int {
    let (Some(client), Some(name)) = (client(), name) else { return -1 };
    match block_on(client.open(name, flags)) {
        Ok(fd) => fd.0,
        Err(error) => {
            tracing::warn!("open {name}: {error}");
            -1
        }
    }
}

/// Opens a file without flags. Its number, above 0, or −1.
///
/// # Safety
/// `name` is null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_open(name: *const c_char) -> c_int {
    // SAFETY: as promised by the caller.
    open(unsafe { text(name) }, None)
}

/// Opens a file with flags (none if null). Its number, above 0, or −1.
///
/// # Safety
/// `name` is null or a C string; `flags` is null or points to flags.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_open_with_flags(name: *const c_char, flags: *const NebdOpenFlags) -> c_int {
    // SAFETY: as promised by the caller.
    let (name, flags) = unsafe { (text(name), flags.as_ref()) };
    open(name, flags.map(|flags| OpenFlags { exclusive: flags.exclusive != 0 }))
}

/// Sets flags to their defaults: exclusive.
///
/// # Safety
/// `flags` is null or points to room for flags.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_init_open_flags(flags: *mut NebdOpenFlags) {
    if !flags.is_null() {
        // SAFETY: not null, and room for flags as promised by the caller.
        unsafe { flags.write(NebdOpenFlags { exclusive: 1 }) };
    }
}

/// Makes a call that the caller waits for; −1 for every error.
fn call<T, F>(name: &str, fd: c_int, start: impl FnOnce(&NebdClient, NebdFd) -> F) -> Option<T>
where
    F: Future<Output = Result<T, crate::Error>>,
{
    let client = client()?;
    let result = block_on(start(&client, NebdFd(fd)));
    result.inspect_err(|error| tracing::warn!("{name} {fd}: {error}")).ok()
}

fn status(result: Option<()>) -> c_int {
    if result.is_some() { 0 } else { -1 }
}

fn number(result: Option<u64>) -> i64 {
    result.and_then(|value| i64::try_from(value).ok()).unwrap_or(-1)
}

/// Closes a file: 0 as soon as the server has answered.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_close(fd: c_int) -> c_int {
    status(call("close", fd, NebdClient::close))
}

/// Not supported: −1.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_pread(_fd: c_int, _buf: *mut c_void, _offset: libc::off_t, _length: usize) -> c_int {
    -1
}

/// Not supported: −1.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_pwrite(_fd: c_int, _buf: *const c_void, _offset: libc::off_t, _length: usize) -> c_int {
    -1
}

/// Nothing to do, as every write is durable when it is answered: 0.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_sync(_fd: c_int) -> c_int {
    0
}

/// Bytes of a file, or −1.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_filesize(fd: c_int) -> i64 {
    number(call("filesize", fd, NebdClient::file_size))
}

/// Bytes of a file's blocks, or −1.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_blocksize(fd: c_int) -> i64 {
    number(call("blocksize", fd, NebdClient::block_size).map(u64::from))
}

/// Bytes of a file's objects, or −1.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_getinfo(fd: c_int) -> i64 {
    number(call("getinfo", fd, NebdClient::get_info).map(|info| info.object_size))
}

/// Makes a file larger.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_resize(fd: c_int, size: i64) -> c_int {
    let Ok(size) = u64::try_from(size) else { return -1 };
    status(call("resize", fd, |client, fd| client.extend(fd, size)))
}

/// Makes the server forget what it knows of a file's layout.
#[unsafe(no_mangle)]
pub extern "C" fn nebd_lib_invalidcache(fd: c_int) -> c_int {
    status(call("invalidcache", fd, NebdClient::invalidate_cache))
}

/// Submits what `make` finds in the context.
///
/// # Safety
/// `context` is null or points to a context that, with its buffer, is left alone until its callback.
unsafe fn submit(
    fd: c_int,
    context: *mut NebdClientAioContext,
    make: impl FnOnce(&NebdClientAioContext) -> Option<Io>,
) -> c_int {
    // SAFETY: null, or a context as promised by the caller; the reference ends with `make`.
    let io = unsafe { context.as_ref() }.and_then(make);
    let (Some(client), Some(io)) = (client(), io) else { return -1 };
    let context = Context(context);
    client.submit(NebdFd(fd), io, move |completion: Completion| {
        let Completion { result, buffer, retries } = completion;
        // The last that refers to the caller's memory goes before the callback.
        drop(buffer);
        let context = context;
        context.complete(if result.is_ok() { 0 } else { -1 }, retries);
    });
    0
}

/// Reads `length` bytes at `offset` into `buf`.
///
/// # Safety
/// `context` is null or points to a context with room for `length` bytes at `buf`; both are left alone until the callback.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_aio_pread(fd: c_int, context: *mut NebdClientAioContext) -> c_int {
    let make = |context: &NebdClientAioContext| {
        let bytes: &'static mut [u8] = match (context.buf.is_null(), context.length) {
            (_, 0) => &mut [],
            (true, _) => return None,
            // SAFETY: the caller gives us this memory until the callback, before which the reference is dropped.
            (false, length) => unsafe { std::slice::from_raw_parts_mut(context.buf.cast(), length) },
        };
        Some(Io::Read { offset: context.offset as u64, buffer: ReadBuffer::Static(bytes) })
    };
    // SAFETY: as promised by the caller.
    unsafe { submit(fd, context, make) }
}

/// Writes the `length` bytes at `buf` to `offset`.
///
/// # Safety
/// `context` is null or points to a context with `length` bytes at `buf`; both are left alone until the callback.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_aio_pwrite(fd: c_int, context: *mut NebdClientAioContext) -> c_int {
    let make = |context: &NebdClientAioContext| {
        let bytes: &'static [u8] = match (context.buf.is_null(), context.length) {
            (_, 0) => &[],
            (true, _) => return None,
            // SAFETY: the caller leaves this memory alone until the callback. A request is complete only when its frame
            // was wholly sent or dropped, and its bytes are dropped before the callback.
            (false, length) => unsafe { std::slice::from_raw_parts(context.buf.cast(), length) },
        };
        Some(Io::Write { offset: context.offset as u64, data: Bytes::from_static(bytes) })
    };
    // SAFETY: as promised by the caller.
    unsafe { submit(fd, context, make) }
}

/// Gives up the content of `length` bytes at `offset`.
///
/// # Safety
/// `context` is null or points to a context that is left alone until its callback.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_discard(fd: c_int, context: *mut NebdClientAioContext) -> c_int {
    let make = |context: &NebdClientAioContext| {
        Some(Io::Discard { offset: context.offset as u64, length: context.length as u64 })
    };
    // SAFETY: as promised by the caller.
    unsafe { submit(fd, context, make) }
}

/// Makes what was answered durable.
///
/// # Safety
/// `context` is null or points to a context that is left alone until its callback.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nebd_lib_flush(fd: c_int, context: *mut NebdClientAioContext) -> c_int {
    // SAFETY: as promised by the caller.
    unsafe { submit(fd, context, |_| Some(Io::Flush)) }
}
