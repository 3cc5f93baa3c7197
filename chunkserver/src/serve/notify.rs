//! What a supervisor of the systemd kind is told: datagrams to the socket named by `NOTIFY_SOCKET`, if there is one.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Tell it (`READY=1`, `MAINPID=…`). Nobody listens, or not any more: nothing happens.
pub(super) fn notify(text: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(&name, text) {
        tracing::debug!(%error, text, "the supervisor is not told");
    }
}

fn send(name: &std::ffi::OsStr, text: &str) -> std::io::Result<()> {
    // A leading '@' stands for the NUL of an abstract name.
    let address = match name.as_bytes().split_first() {
        Some((b'@', rest)) => SocketAddr::from_abstract_name(rest)?,
        _ => SocketAddr::from_pathname(std::ffi::OsString::from_vec(name.as_bytes().to_vec()))?,
    };
    UnixDatagram::unbound()?.send_to_addr(text.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_supervisor_hears_it_by_path_and_by_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("chunkserver-notify-{}", std::process::id());
        let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        let by_path = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), "READY=1").unwrap();
        send(format!("@{name}").as_ref(), "MAINPID=7").unwrap();
        let mut text = [0; 32];
        for (socket, said) in [(by_path, "READY=1"), (by_name, "MAINPID=7")] {
            let count = socket.recv(&mut text).unwrap();
            assert_eq!(&text[..count], said.as_bytes());
        }
        assert!(send("/nonexistent/socket".as_ref(), "READY=1").is_err());
    }
}
