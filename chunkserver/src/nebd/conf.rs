//! `nebd-server.conf` of the originals, read as it is.
//!
//! Their parser removes all white space of a line, skips lines that begin with `#`, and cuts at the first `=`. Beyond
//! that, text behind ` #` is a comment here: the packaged files have such tails, which the originals take for a part of
//! the value.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// What it says, as far as this server uses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CurveConf {
    /// `listen.address`: the socket.
    pub socket: PathBuf,
    /// `meta.file.path`.
    pub metafile: PathBuf,
    /// `heartbeat.timeout.sec`.
    pub heartbeat_timeout_s: u64,
    /// `heartbeat.check.interval.ms`.
    pub heartbeat_check_ms: u64,
    /// `response.returnRpcWhenIoError`; false when absent.
    pub return_io_errors: bool,
}

/// Why it is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfError {
    /// A key that must be there.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A value that cannot be.
    #[error("{key}: {value:?} is {why}")]
    Value {
        /// Key.
        key: &'static str,
        /// What stands there.
        value: String,
        /// What is wrong.
        why: &'static str,
    },
}

/// Read the text of the file.
///
/// # Errors
/// [`ConfError`].
pub fn parse(text: &str) -> Result<CurveConf, ConfError> {
    let mut values = BTreeMap::new();
    for line in text.lines() {
        let end = line.match_indices('#').find(|(at, _)| line.get(..*at).is_some_and(blank_before)).map(|(at, _)| at);
        let line: String = line.get(..end.unwrap_or(line.len())).unwrap_or("").split_whitespace().collect();
        if let Some((key, value)) = line.split_once('=') {
            values.insert(key.to_owned(), value.to_owned());
        }
    }
    let get = |key: &'static str| values.get(key).filter(|v| !v.is_empty()).ok_or(ConfError::Missing(key));
    let number = |key: &'static str| {
        let value = get(key)?;
        let positive = value.parse().ok().filter(|&n: &u64| n > 0);
        positive.ok_or(ConfError::Value { key, value: value.clone(), why: "no positive number" })
    };
    get("curveclient.confPath")?;
    const RETURN: &str = "response.returnRpcWhenIoError";
    let return_io_errors = match values.get(RETURN).map(|v| v.to_ascii_lowercase()).as_deref() {
        None | Some("false" | "no" | "0") => false,
        Some("true" | "yes" | "1") => true,
        Some(other) => return Err(ConfError::Value { key: RETURN, value: other.into(), why: "not true or false" }),
    };
    Ok(CurveConf {
        socket: get("listen.address")?.into(),
        metafile: get("meta.file.path")?.into(),
        heartbeat_timeout_s: number("heartbeat.timeout.sec")?,
        heartbeat_check_ms: number("heartbeat.check.interval.ms")?,
        return_io_errors,
    })
}

fn blank_before(head: &str) -> bool {
    head.chars().next_back().is_none_or(char::is_whitespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKAGED: &str = "# curve-client's configuration file\n\
        curveclient.confPath=/etc/curve/client.conf  # __CURVEADM_TEMPLATE__ /curve/conf __CURVEADM_TEMPLATE__\n\n\
        #brpc server\nlisten.address=/data/nebd/nebd.sock  # __CURVEADM_TEMPLATE__ x=y\n\
        meta.file.path = /data/nebd/nebdserver.meta\n heartbeat.timeout.sec=30\n\
        heartbeat.check.interval.ms=3000\n";

    #[test]
    fn the_packaged_file() {
        let conf = parse(PACKAGED).unwrap();
        assert_eq!(
            (conf.socket.to_str(), conf.metafile.to_str()),
            (Some("/data/nebd/nebd.sock"), Some("/data/nebd/nebdserver.meta"))
        );
        assert_eq!((conf.heartbeat_timeout_s, conf.heartbeat_check_ms, conf.return_io_errors), (30, 3000, false));
        for (word, value) in [("True", true), ("YES", true), ("1", true), ("False", false), ("no", false)] {
            let text = format!("{PACKAGED}response.returnRpcWhenIoError={word}\n");
            assert_eq!(parse(&text).unwrap().return_io_errors, value, "{word}");
        }
        assert_eq!(
            parse(&PACKAGED.replace("nebd.sock ", "a#b.sock ")).unwrap().socket.to_str(),
            Some("/data/nebd/a#b.sock")
        );
    }

    #[test]
    fn what_is_refused() {
        for key in ["curveclient.confPath", "listen.address", "meta.file.path", "heartbeat.timeout.sec"] {
            assert_eq!(parse(&PACKAGED.replace(key, "x")), Err(ConfError::Missing(key)));
            assert_eq!(parse(&PACKAGED.replace(key, &format!("#{key}"))), Err(ConfError::Missing(key)));
        }
        for (from, to) in [("sec=30", "sec=-1"), ("sec=30", "sec=0"), ("ms=3000", "ms=3s")] {
            assert!(matches!(parse(&PACKAGED.replace(from, to)), Err(ConfError::Value { .. })), "{to}");
        }
        let text = format!("{PACKAGED}response.returnRpcWhenIoError=maybe\n");
        assert!(matches!(parse(&text), Err(ConfError::Value { .. })));
    }
}
