//! The text of the metafile: what jsoncpp 1.8.4 prints in its styled form, byte for byte, and back. Sans-I/O.
//!
//! ```text
//! {"crc": CRC32C of this very text without the crc line, "volumes": null | [{"fd", "filename", "session", …}]}
//! ```
//! (laid out with tabs, keys sorted; nebd-behaviour §B7). A reader of the originals prints what it has parsed again and
//! compares the checksum, so the layout is part of the format: any other spacing is understood, the same values are the
//! same text.
//!
//! Promise: whatever the bytes are, the answer is records or an error, and records are never made up: a member that is
//! not understood is an error, because writing the file again would lose it.

use super::ReadError;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// Where an executor keeps what it needs to open a file again.
pub type Attributes = BTreeMap<String, String>;

/// One file that was opened and not closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its number, which clients keep using over restarts.
    pub fd: i32,
    /// Its name, complete.
    pub name: String,
    /// All other members, `session` and perhaps `openflags` among them.
    pub attributes: Attributes,
}

/// What stood at `volumes`. All three mean no records; the checksum tells them apart.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Volumes {
    Absent,
    Null,
    List,
}

/// The file for these records, checksum included.
#[must_use]
pub fn encode(records: &[Record]) -> String {
    let kind = if records.is_empty() { Volumes::Null } else { Volumes::List };
    let crc = raftlog::crc32c(print(None, kind, records).as_bytes());
    print(Some(crc), kind, records)
}

/// Records of a file, in its order; of several records of one name the first. What follows the first JSON value is
/// ignored, as the originals do: their writer leaves the end of a longer old file standing.
///
/// # Errors
/// [`ReadError`].
pub fn decode(bytes: &[u8]) -> Result<Vec<Record>, ReadError> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = Value::deserialize(&mut reader).map_err(|e| ReadError::Json(e.to_string()))?;
    let Value::Object(mut root) = value else { return Err(ReadError::Json("not an object".into())) };
    let crc = root.remove("crc").ok_or(ReadError::Missing("crc"))?;
    let crc = crc.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or(ReadError::Json("crc is no number".into()))?;
    let volumes = root.remove("volumes");
    if let Some(member) = root.keys().next() {
        return Err(ReadError::Newer(member.clone()));
    }
    let (kind, records) = match volumes {
        None => (Volumes::Absent, Vec::new()),
        Some(Value::Null) => (Volumes::Null, Vec::new()),
        Some(Value::Array(all)) => (Volumes::List, all.into_iter().map(record).collect::<Result<Vec<_>, _>>()?),
        Some(_) => return Err(ReadError::Json("volumes is no list".into())),
    };
    let found = raftlog::crc32c(print(None, kind, &records).as_bytes());
    if found != crc {
        return Err(ReadError::Checksum { written: crc, found });
    }
    distinct(records)
}

fn record(value: Value) -> Result<Record, ReadError> {
    let Value::Object(mut members) = value else { return Err(ReadError::Json("a volume is no object".into())) };
    let fd = members.remove("fd").ok_or(ReadError::Missing("fd"))?;
    let fd = fd.as_i64().and_then(|n| i32::try_from(n).ok()).filter(|&n| n > 0);
    let fd = fd.ok_or(ReadError::Json("fd is no positive number of 31 bits".into()))?;
    let name = text_member(&mut members, "filename")?.ok_or(ReadError::Missing("filename"))?;
    let mut attributes = Attributes::new();
    for (key, value) in members {
        let Value::String(text) = value else { return Err(ReadError::Newer(key)) };
        attributes.insert(key, text);
    }
    Ok(Record { fd, name, attributes })
}

fn text_member(members: &mut Map<String, Value>, key: &'static str) -> Result<Option<String>, ReadError> {
    match members.remove(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(ReadError::Json(format!("{key} is no text"))),
    }
}

fn distinct(records: Vec<Record>) -> Result<Vec<Record>, ReadError> {
    let (mut names, mut fds) = (BTreeSet::new(), BTreeSet::new());
    let mut kept = Vec::with_capacity(records.len());
    for record in records {
        if names.insert(record.name.clone()) {
            if !fds.insert(record.fd) {
                return Err(ReadError::Json(format!("fd {} has two names", record.fd)));
            }
            kept.push(record);
        }
    }
    Ok(kept)
}

fn print(crc: Option<u32>, kind: Volumes, records: &[Record]) -> String {
    // Writing to a String cannot fail.
    let mut members = Vec::new();
    if let Some(crc) = crc {
        members.push(format!("\t\"crc\" : {crc}"));
    }
    match kind {
        Volumes::Absent => {}
        Volumes::Null => members.push("\t\"volumes\" : null".into()),
        Volumes::List if records.is_empty() => members.push("\t\"volumes\" : []".into()),
        Volumes::List => {
            let all: Vec<String> = records.iter().map(print_record).collect();
            members.push(format!("\t\"volumes\" : \n\t[\n{}\n\t]", all.join(",\n")));
        }
    }
    if members.is_empty() { "{}\n".into() } else { format!("{{\n{}\n}}\n", members.join(",\n")) }
}

fn print_record(record: &Record) -> String {
    let mut members: BTreeMap<&str, String> =
        record.attributes.iter().map(|(key, text)| (key.as_str(), quoted(text))).collect();
    members.insert("fd", record.fd.to_string());
    members.insert("filename", quoted(&record.name));
    let lines: Vec<String> = members.iter().map(|(key, value)| format!("\t\t\t{} : {value}", quoted(key))).collect();
    format!("\t\t{{\n{}\n\t\t}}", lines.join(",\n"))
}

/// A string as jsoncpp 1.8.4 writes it.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    // Its quick way out looks for bytes it takes for control characters, and sees none in these.
    if text.bytes().all(|byte| byte >= 0x80) {
        out.push_str(text);
    } else {
        text.chars().for_each(|c| put_char(&mut out, c));
    }
    out.push('"');
    out
}

fn put_char(out: &mut String, c: char) {
    match c {
        '"' => out.push_str("\\\""),
        '\\' => out.push_str("\\\\"),
        '\u{8}' => out.push_str("\\b"),
        '\u{c}' => out.push_str("\\f"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        ' '..='\u{7f}' => out.push(c),
        _ => {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EMPTY: &str = include_str!("../../../tests/data/metafile-empty.json");
    const SHARED: &str = include_str!("../../../tests/data/metafile-shared-conf.json");

    fn of(fd: i32, name: &str, attributes: &[(&str, &str)]) -> Record {
        let attributes = attributes.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Record { fd, name: name.into(), attributes }
    }
    fn crc_of(text: &str) -> u32 {
        let line = text.lines().find(|line| line.contains("\"crc\"")).unwrap();
        line.split(" : ").nth(1).unwrap().trim_end_matches(',').parse().unwrap()
    }

    #[test]
    fn what_the_original_wrote_is_what_we_write() {
        assert_eq!(decode(EMPTY.as_bytes()).unwrap(), []);
        assert_eq!(encode(&[]), EMPTY);
        let records = decode(SHARED.as_bytes()).unwrap();
        let name = "cbd:pool1//vol1_user_:/etc/curve/client.conf";
        assert_eq!(records, [of(5, name, &[("openflags", "\u{8}\0"), ("session", "")])]);
        assert_eq!(encode(&records), SHARED);
    }

    #[test]
    fn checksums_of_the_contract() {
        let plain = of(1, "cbd:pool//file_user_", &[("session", "")]);
        assert_eq!(crc_of(&encode(std::slice::from_ref(&plain))), 3_028_880_859);
        let flags = of(1, "cbd:pool//file_user_", &[("session", ""), ("openflags", "\u{8}\u{1}")]);
        assert_eq!(crc_of(&encode(&[flags])), 301_555_119);
    }

    #[test]
    fn strings_look_as_jsoncpp_prints_them() {
        for (text, printed) in [
            ("a/b\u{7f}", "\"a/b\u{7f}\""),
            ("\"\\\u{8}\u{c}\n\r\t", r#""\"\\\b\f\n\r\t""#),
            ("\0\u{1f}", r#""\u0000\u001f""#),
            ("xé\u{20ac}\u{1f600}", r#""x\u00e9\u20ac\ud83d\ude00""#),
            ("é", "\"é\""),
            ("", "\"\""),
        ] {
            assert_eq!(quoted(text), printed);
        }
    }

    #[test]
    fn another_layout_and_what_follows_do_not_matter() {
        let record = [of(7, "cbd:pool//v_u_", &[])];
        let crc = crc_of(&encode(&record));
        for tail in ["", "\n", "}\n\t]\n}", "\0\0\u{1}garbage"] {
            let text = format!(r#"{{"volumes":[{{"filename":"cbd:pool//v_u_","fd":7}}],"crc":{crc}}}{tail}"#);
            assert_eq!(decode(text.as_bytes()).unwrap(), record, "{tail:?}: without session, too");
        }
    }

    #[test]
    fn no_volumes_in_three_ways() {
        for (text, members) in [
            ("{}\n", ""),
            ("{\n\t\"volumes\" : null\n}\n", r#","volumes":null"#),
            ("{\n\t\"volumes\" : []\n}\n", r#","volumes":[]"#),
        ] {
            let crc = raftlog::crc32c(text.as_bytes());
            assert_eq!(decode(format!(r#"{{"crc":{crc}{members}}}"#).as_bytes()).unwrap(), []);
        }
    }

    #[test]
    fn what_is_refused() {
        let good = encode(&[of(1, "cbd:p//v_u_", &[("session", "")])]);
        let file = |volumes: &str| format!(r#"{{"crc":1,"volumes":{volumes}}}"#);
        for (what, text) in [
            ("empty", String::new()),
            ("half", good[..good.len() / 2].to_owned()),
            ("a list", "[]".into()),
            ("crc is text", r#"{"crc":"1"}"#.into()),
            ("crc of 33 bits", r#"{"crc":4294967296}"#.into()),
            ("volumes is text", file("\"\"")),
            ("a volume is a number", file("[1]")),
            ("fd is text", file(r#"[{"fd":"1","filename":"cbd:"}]"#)),
            ("fd 0", file(r#"[{"fd":0,"filename":"cbd:"}]"#)),
            ("fd of 32 bits", file(r#"[{"fd":2147483648,"filename":"cbd:"}]"#)),
            ("filename is a number", file(r#"[{"fd":1,"filename":1}]"#)),
            ("deep", "[".repeat(100_000)),
        ] {
            assert!(matches!(decode(text.as_bytes()), Err(ReadError::Json(_))), "{what}");
        }
        for (text, member) in [
            (r#"{"volumes":[]}"#.to_owned(), "crc"),
            (file(r#"[{"fd":1}]"#), "filename"),
            (file(r#"[{"filename":"cbd:"}]"#), "fd"),
        ] {
            assert_eq!(decode(text.as_bytes()), Err(ReadError::Missing(member)));
        }
        let newer = |text: &str| assert!(matches!(decode(text.as_bytes()), Err(ReadError::Newer(_))), "{text}");
        newer(r#"{"crc":1,"volumes":null,"version":2}"#);
        newer(&file(r#"[{"fd":1,"filename":"cbd:","leases":[1]}]"#));
        assert!(matches!(decode(&[b"{\"crc\":1,\"".as_slice(), &[0xff]].concat()), Err(ReadError::Json(_))));
        let twice = [of(1, "a:b", &[]), of(1, "a:c", &[])];
        assert!(matches!(decode(encode(&twice).as_bytes()), Err(ReadError::Json(_))));
    }

    #[test]
    fn of_one_name_the_first_record_counts() {
        let twice = [of(4, "cbd:a", &[("session", "")]), of(5, "cbd:a", &[("session", "")]), of(6, "cbd:b", &[])];
        assert_eq!(decode(encode(&twice).as_bytes()).unwrap(), [twice[0].clone(), twice[2].clone()]);
    }

    fn records() -> impl Strategy<Value = Vec<Record>> {
        let text = || prop::collection::vec(any::<char>(), 0..12).prop_map(|c| c.into_iter().collect::<String>());
        let attributes = prop::collection::btree_map("[a-z]{1,6}", text(), 0..4);
        let record = (1..=i32::MAX, text(), attributes).prop_map(|(fd, name, mut attributes)| {
            attributes.retain(|key, _| key != "fd" && key != "filename");
            Record { fd, name: format!("cbd:{name}"), attributes }
        });
        prop::collection::vec(record, 0..5).prop_map(|mut all| {
            let (mut names, mut fds) = (BTreeSet::new(), BTreeSet::new());
            all.retain(|r: &Record| names.insert(r.name.clone()) && fds.insert(r.fd));
            all
        })
    }

    proptest! {
        #[test]
        fn records_come_back(records in records()) {
            prop_assert_eq!(decode(encode(&records).as_bytes()), Ok(records));
        }

        #[test]
        fn rot_is_never_taken_for_records(records in records(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = encode(&records).into_bytes();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            if let Ok(found) = decode(&bytes) {
                prop_assert_eq!(found, records, "only white space may change unnoticed");
            }
        }

        #[test]
        fn hostile_bytes_are_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes);
        }
    }
}
