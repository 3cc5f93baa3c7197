//! What NEBD reads from files and names: the metafile, the original's configuration file, names of files.

use crate::engine::{Rng, Target};
use crate::mutate::Corpus;
use chunkserver::nebd::metafile::ReadError;
use chunkserver::nebd::metafile::text::{Attributes, Record, decode, encode};
use chunkserver::nebd::{conf, name::CurveName};

/// All three.
pub(crate) struct Texts([Corpus; 3]);

const WORDS: &[&[u8]] = &[
    b"\"crc\" : ",
    b"\"volumes\" : ",
    b"\"fd\" : ",
    b"\"filename\" : ",
    b"\"session\" : \"\"",
    b"null",
    b"[]",
    b"{}",
    b"2147483648",
    b"-1",
    b"\"\\u0000\"",
    b"\"\\ud800\"",
    b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    b"\xff",
    b"=",
    b" # ",
    b"\n",
    b"_",
    b":",
    b"/",
    b"cbd:",
];

impl Texts {
    pub(crate) fn new() -> Self {
        let record = |fd, name: &str, flags: Option<&str>| {
            let mut attributes = Attributes::from([("session".into(), String::new())]);
            attributes.extend(flags.map(|flags| ("openflags".into(), flags.into())));
            Record { fd, name: name.into(), attributes }
        };
        let two = [record(1, "cbd:pool//a_u_", None), record(7, "cbd:pool//é/b_u_:/conf", Some("\u{8}\u{1}"))];
        let files = [&two[..], &two[..1], &[]].map(|records| encode(records).into_bytes());
        let conf = b"curveclient.confPath=/etc/curve/client.conf # x\nlisten.address = /run/nebd.sock\n\
            meta.file.path=/data/nebd.meta\nheartbeat.timeout.sec=30\nheartbeat.check.interval.ms=3000\n\
            response.returnRpcWhenIoError=True\n";
        let names = [&b"cbd:pool1//cinder/volume-6f30_cinder_"[..], b"cbd:p//a_u_:/etc/curve/client.conf", b"test:a"];
        Self([
            Corpus::new(files.to_vec(), WORDS),
            Corpus::new(vec![conf.to_vec()], WORDS),
            Corpus::new(names.map(<[u8]>::to_vec).to_vec(), WORDS),
        ])
    }
}

/// Decoded, with the checksum made right if that is all that is wrong.
fn decode_sealed(bytes: &[u8]) -> Option<Vec<Record>> {
    let (written, found) = match decode(bytes) {
        Ok(records) => return Some(records),
        Err(ReadError::Checksum { written, found }) => (written.to_string(), found.to_string()),
        Err(_) => return None,
    };
    let at = bytes.windows(written.len()).position(|part| part == written.as_bytes())?;
    let mut bytes = bytes.to_vec();
    bytes.splice(at..at + written.len(), found.bytes());
    decode(&bytes).ok()
}

impl Target for Texts {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let which = rng.below(3);
        let bytes = self.0[which].mutated(rng);
        let text = || str::from_utf8(&bytes).ok();
        match which {
            0 => decode_sealed(&bytes).is_some_and(|records| {
                assert_eq!(decode(encode(&records).as_bytes()), Ok(records), "what was understood is written so again");
                true
            }),
            1 => text().and_then(|text| conf::parse(text).ok()).is_some_and(|conf| {
                assert!(conf.heartbeat_timeout_s > 0 && conf.heartbeat_check_ms > 0);
                true
            }),
            _ => text().and_then(|name| CurveName::parse(name).ok()).is_some_and(|name| {
                assert!(!name.local().contains('/'));
                true
            }),
        }
    }
}
