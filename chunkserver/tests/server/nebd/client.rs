//! A client of the Unix socket, one call after the other or many at once.

use crate::client::{BLOCK, receive};
use crate::harness::{Lab, MIB, PATIENCE, Setup, wait_for};
use crate::wire::{Message, Response, Value, fields, request};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

pub(super) const FILE: &str = "nebd.client.NebdFileService";
pub(super) const HEARTBEAT: &str = "nebd.client.NebdHeartbeatService";
pub(super) const OK: u64 = 0;
/// -1, as the wire has it.
pub(super) const NOK: u64 = u64::MAX;
pub(super) const VOL1: &str = "cbd:pool1//vol1_user_";

/// A disk with room for some volumes, and part2.
pub(crate) fn setup(more: &str) -> Setup {
    let extra = format!("[nebd]\nsocket = \"@/nebd.sock\"\nmetafile = \"@/nebdserver.meta\"\n{more}\n");
    Setup { extra, ..Setup::default() }
}

/// The same, started once, with a volume `vol1` of 64 MiB.
pub(crate) fn lab(more: &str) -> Lab {
    let lab = Lab::new(setup(more));
    let server = lab.start();
    lab.copysets(4);
    lab.ask(&["volume", "create", "--name", "vol1", "--size", "64MiB"]);
    server.stop();
    lab
}

pub(super) struct Nebd {
    pub(super) stream: UnixStream,
    next: u64,
}

impl Nebd {
    pub(super) fn connect(lab: &Lab) -> Self {
        Self::try_connect(lab).unwrap()
    }

    pub(super) fn try_connect(lab: &Lab) -> std::io::Result<Self> {
        let stream = UnixStream::connect(lab.path("nebd.sock"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream, next: 0 })
    }

    /// Connect and read as part1 does when a server comes back: whatever breaks is tried again. (What a killed server
    /// left listening may take connections for a moment, and drop them.)
    pub(super) fn insist(lab: &Lab, fd: u64, offset: u64, size: u64) -> (Self, Response) {
        let mut found = None;
        wait_for("an answer", || {
            let Ok(mut client) = Self::try_connect(lab) else { return false };
            client.next += 1;
            let call = request(FILE, "Read", client.next, &range(fd, offset, size), &[]);
            if client.stream.write_all(&call).is_err() {
                return false;
            }
            let answer = client.try_receive().ok();
            found = answer.map(|answer| (client, answer));
            found.is_some()
        });
        found.unwrap()
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(super) fn try_receive(&mut self) -> std::io::Result<Response> {
        receive(&mut self.stream)
    }

    /// Send a call; its number.
    pub(super) fn begin(&mut self, method: &str, message: &Message, attachment: &[u8]) -> u64 {
        self.next += 1;
        self.send(&request(FILE, method, self.next, message, attachment));
        self.next
    }

    pub(super) fn call(&mut self, method: &str, message: &Message, attachment: &[u8]) -> Response {
        let cid = self.begin(method, message, attachment);
        let response = self.try_receive().unwrap();
        assert_eq!(response.cid, cid);
        response
    }

    /// retCode and fd.
    pub(super) fn open_with(&mut self, name: &str, flags: Option<bool>) -> (u64, Option<u64>) {
        let response = self.call("OpenFile", &open(name, flags), &[]);
        (response.status(), response.int(3))
    }

    pub(super) fn open(&mut self, name: &str) -> u64 {
        let (code, fd) = self.open_with(name, None);
        assert_eq!(code, OK, "{name}");
        fd.unwrap()
    }

    /// retCode of a method that takes a number and nothing else.
    pub(super) fn plain(&mut self, method: &str, fd: u64) -> u64 {
        self.call(method, &Message::default().int(1, fd), &[]).status()
    }

    pub(super) fn write(&mut self, fd: u64, offset: u64, data: &[u8]) -> u64 {
        self.call("Write", &range(fd, offset, data.len() as u64), data).status()
    }

    pub(super) fn read(&mut self, fd: u64, offset: u64, size: u64) -> (u64, Vec<u8>) {
        let response = self.call("Read", &range(fd, offset, size), &[]);
        (response.status(), response.attachment)
    }

    pub(super) fn discard(&mut self, fd: u64, offset: u64, size: u64) -> u64 {
        self.call("Discard", &range(fd, offset, size), &[]).status()
    }

    pub(super) fn resize(&mut self, fd: u64, size: u64) -> u64 {
        self.call("ResizeFile", &Message::default().int(1, fd).int(2, size), &[]).status()
    }

    /// size, objSize, objNums, blocksize.
    pub(super) fn info(&mut self, fd: u64) -> Option<[u64; 4]> {
        let response = self.call("GetInfo", &Message::default().int(1, fd), &[]);
        if response.status() == NOK {
            assert!(response.message.len() == 1);
            return None;
        }
        let [Value::Bytes(info)] = response.message[&3].as_slice() else { panic!("{response:?}") };
        let info = fields(info);
        Some([1, 2, 3, 4].map(|field| match info[&field].as_slice() {
            [Value::Int(n)] => *n,
            other => panic!("{other:?}"),
        }))
    }

    pub(super) fn keep_alive(&mut self, pid: u64, files: &[(u64, &str)]) -> u64 {
        let mut message = Message::default().int(1, pid).bytes(2, b"2.7.0");
        for (fd, name) in files {
            message = message.bytes(3, &Message::default().int(1, *fd).bytes(2, name.as_bytes()).0);
        }
        self.next += 1;
        self.send(&request(HEARTBEAT, "KeepAlive", self.next, &message, &[]));
        self.try_receive().unwrap().status()
    }

    /// Nothing comes within a while.
    pub(super) fn expect_silence(&mut self) {
        self.stream.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
        let error = self.stream.read(&mut [0]).expect_err("something came, or the connection was closed");
        assert!(matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut), "{error}");
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }

    /// The server closes, having sent nothing more.
    pub(super) fn expect_close(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => assert!(rest.is_empty(), "{}", String::from_utf8_lossy(&rest)),
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
}

pub(super) fn open(name: &str, flags: Option<bool>) -> Message {
    let message = Message::default().bytes(1, name.as_bytes());
    match flags {
        Some(exclusive) => message.bytes(2, &Message::default().int(1, exclusive.into()).0),
        None => message,
    }
}

pub(super) fn range(fd: u64, offset: u64, size: u64) -> Message {
    Message::default().int(1, fd).int(2, offset).int(3, size)
}

/// A variable of the pages, through the Unix socket.
pub(super) fn var(lab: &Lab, name: &str) -> Option<String> {
    let page = http(lab, &format!("/vars/{name}"));
    let (head, body) = page.split_once("\r\n\r\n").unwrap();
    head.contains("200 OK").then(|| body.split_once(" : ").unwrap().1.trim_end().to_owned())
}

pub(super) fn http(lab: &Lab, path: &str) -> String {
    let mut stream = UnixStream::connect(lab.path("nebd.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

pub(super) fn open_files(lab: &Lab) -> u64 {
    var(lab, "open_file_num_*").unwrap().parse().unwrap()
}

/// Every payload buffer is free again.
pub(super) fn wait_buffers_free(lab: &Lab) {
    let free = || {
        let shards = lab.ask(&["status"])["shards"].clone();
        shards.as_array().unwrap().iter().map(|s| s["buffers_free_bytes"].as_u64().unwrap()).sum::<u64>()
    };
    wait_for("all payload buffers to come back", || free() == lab.setup.buffers * u64::from(lab.setup.shards));
}

/// A metafile as the originals write it, of records without flags.
pub(super) fn metafile(records: &[(u64, String)]) -> String {
    let all: Vec<String> = records
        .iter()
        .map(|(fd, name)| {
            format!("\t\t{{\n\t\t\t\"fd\" : {fd},\n\t\t\t\"filename\" : \"{name}\",\n\t\t\t\"session\" : \"\"\n\t\t}}")
        })
        .collect();
    let volumes = format!("\t\"volumes\" : \n\t[\n{}\n\t]\n}}\n", all.join(",\n"));
    let crc = crc32c::crc32c(format!("{{\n{volumes}").as_bytes());
    format!("{{\n\t\"crc\" : {crc},\n{volumes}")
}

pub(super) const K: usize = BLOCK;
pub(super) const M: u64 = MIB;
