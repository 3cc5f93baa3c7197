//! Files people and tools write: the catalog and the configuration. And the small codecs of log entries.

use crate::engine::{Rng, Target};
use crate::mutate::Corpus;
use chunkserver::config::Config;
use chunkserver::nbd::export;
use chunkserver::shard::entry::{Header, Kind};
use chunkserver::volume::catalog::{Catalog, CatalogStore, NewVolume, OpenError};
use chunkserver::volume::map::Shape;
use copyset::{ConfState, PeerId, decode_change, encode_change};
use raftlog::CopysetId;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Catalog files, read through a file that is no file on disk.
pub(crate) struct Catalogs {
    corpus: Corpus,
    file: File,
    path: PathBuf,
}

const JSON: &[&[u8]] = &[
    b"\"version\"",
    b"\"crc\"",
    b"\"body\"",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"null",
    b"true",
    b"-1",
    b"1e400",
    b"18446744073709551616",
    b"18446744073709551615",
    b"4294967295",
    b"\"\\u0000\"",
    b"\"\\ud800\"",
    b"\"volumes\":[]",
    b"\"deleting\": true",
    b"\xff",
    b"\"stripe_count\": 0",
    b"\"size\": 4096",
    b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    b"{\"a\":",
];

impl Catalogs {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volumes.json");
        let mut store = CatalogStore::open(&path).unwrap();
        let mut samples = Vec::new();
        for (i, (size, unit, count)) in [(1 << 30, 65536, 4), (4096, 0, 0), (1 << 40, 0, 0)].into_iter().enumerate() {
            let shape = Shape { size, chunk_size: 16 << 20, stripe_unit: unit, stripe_count: count };
            let copysets: Vec<_> = (0..1 + 3 * i as u32).map(|n| CopysetId::new(1, 100 + n)).collect();
            let homes =
                copysets.iter().skip(1).map(|&id| (id, vec![0x7f00_0001_2008_0000, 0x7f00_0002_2008_0000])).collect();
            let (name, id) = (format!("volume {i}"), (i == 2).then_some(1 << 31 | 5));
            store.create(NewVolume { name, id, shape, copysets, homes, created: 1_700_000_000 }).unwrap();
            samples.push(std::fs::read(&path).unwrap());
        }
        store.delete("volume 1").unwrap();
        samples.push(std::fs::read(&path).unwrap());
        let memory = rustix::fs::memfd_create("catalog", rustix::fs::MemfdFlags::empty()).unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", memory.as_raw_fd()));
        Self { corpus: Corpus::new(samples, JSON), file: File::from(memory), path }
    }

    fn read(&self, bytes: &[u8]) -> Result<Catalog, OpenError> {
        self.file.set_len(0).unwrap();
        self.file.write_all_at(bytes, 0).unwrap();
        Catalog::read(&self.path)
    }

    /// Reads, with the checksum made right if that is all that is wrong.
    fn read_sealed(&self, mut bytes: Vec<u8>) -> Option<Catalog> {
        let why = match self.read(&bytes) {
            Ok(catalog) => return Some(catalog),
            Err(OpenError::Damaged { why, .. }) => why,
            Err(_) => return None,
        };
        let (was, is) = why.strip_prefix("checksum is ")?.split_once(", its contents have ")?;
        let at = bytes.windows(was.len().max(1)).position(|part| part == was.as_bytes())?;
        bytes.splice(at..at + was.len(), is.bytes());
        self.read(&bytes).ok()
    }
}

impl Target for Catalogs {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let bytes = self.corpus.mutated(rng);
        let Some(catalog) = self.read_sealed(bytes) else { return false };
        let mut names = 0;
        for volume in catalog.volumes().chain(catalog.deleting()) {
            let (size, geometry) = (volume.size(), volume.geometry());
            let offset = rng.next() % size;
            let len = rng.number(4096).clamp(1, size - offset);
            let mut at = 0;
            for extent in geometry.extents(offset, len).take(100) {
                assert_eq!(extent.at, at);
                assert!(extent.offset + extent.len <= geometry.shape().chunk_size && extent.len > 0);
                at += u64::from(extent.len);
            }
            assert!(at <= len);
            let _ = geometry.chunks().take(50).count();
            let _ = geometry.resized(size.saturating_add(4096));
            names += usize::from(export::find(&catalog, volume.name()).is_some());
        }
        assert!(names >= catalog.volumes().len());
        true
    }
}

/// Configuration files.
pub(crate) struct Configs(Corpus);

impl Configs {
    pub(crate) fn new() -> Self {
        let sample = toml::to_string(&Config::default()).unwrap();
        let lines: Vec<Vec<u8>> = sample.lines().map(|line| format!("{line}\n").into_bytes()).collect();
        let small = b"data = \"/dev/vdb\"\nlisten = \"127.0.0.1:8200\"\nnbd_socket = \"/run/nbd.sock\"\nnbd_listen = \"[::1]:10809\"\n\
            dirty_limit = \"64MiB\"\npayload_buffers = \"256MiB\"\nlog = \"info,chunkserver::shard=debug\"\n";
        let words: Vec<&[u8]> = [
            &b"[a]\n"[..],
            b"= ",
            b"\"\"\"",
            b"'''",
            b"9223372036854775808",
            b"\"18446744073709551616PiB\"",
            b"\"-1MiB\"",
            b"\"1e400GiB\"",
            b"true\n",
            b"#",
            b"\"0.0.0.0:0\"",
            b"\\u",
            b"1979-05-27T07:32:00Z",
            b"[[[[[[[[[[[[[[[[",
            b"{a={a={a=",
            b"a.b.c.d = 1\n",
            b"inf",
            b"\xff",
        ]
        .into_iter()
        .chain(lines.iter().map(Vec::as_slice))
        .collect();
        Self(Corpus::new(vec![sample.clone().into_bytes(), small.to_vec()], &words))
    }
}

impl Target for Configs {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let bytes = self.0.mutated(rng);
        let Ok(text) = str::from_utf8(&bytes) else { return false };
        let Ok(config) = toml::from_str::<Config>(text) else { return false };
        let _ = (config.ctl_socket(), config.catalog());
        if config.check().is_err() {
            return false;
        }
        let Ok(text) = toml::to_string(&config) else { return true };
        // Sizes are shown rounded, so it need not be the same.
        toml::from_str::<Config>(&text).expect("what is shown can be read");
        true
    }
}

/// Configurations and changes of copysets, peer ids, op headers.
pub(crate) struct Codecs([Corpus; 4]);

impl Codecs {
    pub(crate) fn new() -> Self {
        let joint = ConfState {
            voters: vec![1, 2, 3],
            learners: vec![9],
            voters_outgoing: vec![2, 3, 4],
            learners_next: vec![4],
            auto_leave: true,
            epoch: 7,
            retired: 0,
            void: 0,
            suspect: false,
        };
        let retired = ConfState { retired: 1_700_000_000, ..joint.clone() };
        let void = ConfState { void: 4711, ..retired.clone() };
        let confs = vec![
            joint.encode().to_vec(),
            retired.encode().to_vec(),
            void.encode().to_vec(),
            ConfState::of(&[1, 2]).encode().to_vec(),
        ];
        let change = vec![1, 2, 2, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0];
        let header = Header { kind: Kind::Write, offset: 4096, len: 8192, chunk: 7, sn: 3 };
        let peers = [&b"127.0.0.1:8200:0"[..], b"10.20.30.40:65535:3", b"0.0.0.0:0:0"].map(<[u8]>::to_vec);
        let words: &[&[u8]] =
            &[&[1, 0, 1, 0], &[0; 8], &[0xff; 8], &[64, 0], &[65, 0], b":", b"256", b"-1", b"+1", b" ", b"00"];
        Self([
            Corpus::new(confs, words),
            Corpus::new(vec![change, vec![1, 0, 0, 0]], words),
            Corpus::new(vec![header.encode().to_vec()], words),
            Corpus::new(peers.to_vec(), words),
        ])
    }
}

impl Target for Codecs {
    fn input(&mut self, rng: &mut Rng) -> bool {
        let which = rng.below(4);
        let bytes = self.0[which].mutated(rng);
        match which {
            0 => ConfState::decode(&bytes).is_ok_and(|conf| {
                assert_eq!(conf.encode(), bytes, "one form only");
                let raft = ConfState::from_raft(&conf.to_raft(), conf.epoch);
                assert_eq!(
                    ConfState { retired: conf.retired, void: conf.void, suspect: conf.suspect, ..raft },
                    conf,
                    "raft does not know the trash"
                );
                true
            }),
            1 => decode_change(&bytes).is_ok_and(|change| {
                assert_eq!(encode_change(&change), bytes, "one form only");
                true
            }),
            2 => Header::decode(&bytes).is_ok_and(|header| {
                assert_eq!(&header.encode()[..], &bytes[..], "one form only");
                true
            }),
            _ => str::from_utf8(&bytes).ok().and_then(|text| text.parse::<PeerId>().ok()).is_some_and(|peer| {
                assert_eq!(peer.to_string().parse::<PeerId>().ok(), Some(peer));
                true
            }),
        }
    }
}
