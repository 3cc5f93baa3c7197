//! Hand-overs that fail, at every stage: the old process goes on, and its clients have noticed nothing.

use super::client::{BLOCK, SUCCESS, pattern};
use super::crash::{WRITERS, Writer, writers};
use super::harness::{BINARY, Lab, MIB, Setup, text, wait_for};
use super::upgrade::{Heir, check, is_gone, upgrade, write_on};
use rustix::process::Signal;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// A new process that speaks the protocol (by a second implementation) until it fails in the way its name says.
const FAKE: &str = r#"#!/usr/bin/env python3
import array, json, os, socket, struct, sys, time
mode = os.path.basename(sys.argv[0]).rsplit('.', 1)[0]
s = socket.socket(fileno=os.dup(0))
def say(what, raw=b''):
    text = json.dumps(what).encode()
    s.sendall(b'CHO1' + struct.pack('<IQ', len(text), len(raw)) + text + raw)
def exactly(n):
    out = b''
    while len(out) < n:
        part = s.recv(n - len(out))
        if not part: sys.exit(3)
        out += part
    return out
def hear():
    fds = array.array('i')
    head, control, _, _ = s.recvmsg(16, socket.CMSG_SPACE(32 * 4))
    if not head: sys.exit(4)
    head += exactly(16 - len(head))
    assert head[:4] == b'CHO1'
    a, b = struct.unpack('<IQ', head[4:])
    what = json.loads(exactly(a)); exactly(b)
    return what
offer = hear()
assert offer['say'] == 'offer' and offer['protocol'] == 1, offer
if mode == 'dies-at-once': sys.exit(0)
if mode == 'garbage': s.sendall(b'\0' * 1000); time.sleep(60)
if mode == 'huge': s.sendall(b'CHO1' + b'\xff' * 12); time.sleep(60)
if mode == 'other-protocol': say({'say': 'prepared', 'protocol': 99, 'pid': os.getpid(), 'version': '9.9'}); time.sleep(60)
if mode == 'out-of-turn': say({'say': 'ready'}); time.sleep(60)
if mode == 'refuses': say({'say': 'refused', 'why': 'not today'}); sys.exit(1)
say({'say': 'prepared', 'protocol': 1, 'pid': os.getpid(), 'version': '9.9'})
if mode == 'dies-prepared': sys.exit(1)
while True:
    what = hear()
    if mode == 'dies-receiving': sys.exit(1)
    if what['say'] == 'end': break
if mode == 'dies-with-everything': sys.exit(1)
if mode == 'refuses-late': say({'say': 'refused', 'why': 'no memory'}); sys.exit(1)
if mode == 'hangs': time.sleep(60)
if mode == 'wrong-at-last': s.sendall(b'nonsense' * 10); time.sleep(60)
say({'say': 'ready'})
assert hear()['say'] == 'commit'
if mode == 'opens-a-file':
    folder = os.path.dirname(sys.argv[sys.argv.index('--config') + 1])
    open(folder + '/nebdserver.meta', 'a').write(' ')
if mode in ('dies-committed', 'opens-a-file'): sys.exit(1)
time.sleep(60)
"#;

pub(super) fn fake(lab: &Lab, mode: &str) -> PathBuf {
    let path = lab.path(&format!("{mode}.py"));
    std::fs::write(&path, FAKE).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// An upgrade that must fail; what it says.
pub(super) fn fails(lab: &Lab, binary: &str) -> String {
    let out = lab.cli(&["upgrade", "--binary", binary, "--timeout-ms", "1500"]);
    assert_eq!(out.status.code(), Some(1), "{binary}: {}{}", text(&out.stdout), text(&out.stderr));
    text(&out.stderr)
}

#[test]
fn whatever_the_new_process_does_the_old_one_goes_on() {
    let lab = Lab::new(Setup { size: 96 * MIB, ..Setup::default() });
    let mut server = lab.start();
    let pid = server.pid();
    lab.copysets(3);
    let (stop, longest_us) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let writers: Vec<_> = (1..4)
            .map(|copyset| {
                let (mut client, stop, longest_us) = (server.client(), &stop, &longest_us);
                scope.spawn(move || {
                    let newest = write_on(&mut client, copyset, stop, longest_us);
                    check(&mut client, copyset, &newest);
                })
            })
            .collect();
        // Before anything stops.
        assert!(fails(&lab, "/nonexistent/chunkserver").contains("No such file"));
        fails(&lab, "/bin/false");
        for (mode, word) in [
            ("dies-at-once", "ended the conversation"),
            ("garbage", "not understood"),
            ("huge", "not understood"),
            ("other-protocol", "protocol 99"),
            ("out-of-turn", "Ready"),
            ("refuses", "not today"),
        ] {
            let said = fails(&lab, fake(&lab, mode).to_str().unwrap());
            assert!(said.contains(word), "{mode}: {said}");
        }
        // A configuration that is refused is told by the new program itself.
        let good = std::fs::read_to_string(lab.path("chunkserver.toml")).unwrap();
        for (change, word) in [("dirty_limt = 3\n", "dirty_limt"), ("flush_age_ms = 0\n", "flush_age_ms")] {
            let kept = if change.starts_with("flush") { good.replace("flush_age_ms", "# ") } else { good.clone() };
            std::fs::write(lab.path("chunkserver.toml"), format!("{change}{kept}")).unwrap();
            let said = fails(&lab, BINARY);
            assert!(said.contains(word), "{said}");
        }
        std::fs::write(lab.path("chunkserver.toml"), good.replace(":8402", ":8403")).unwrap();
        assert!(fails(&lab, BINARY).contains("another address"));
        std::fs::write(lab.path("chunkserver.toml"), &good).unwrap();
        // After everything has stopped.
        for (mode, word) in [
            ("dies-prepared", "ended the conversation"),
            ("dies-receiving", "ended the conversation"),
            ("dies-with-everything", "ended the conversation"),
            ("refuses-late", "no memory"),
            ("hangs", "does not answer"),
            ("wrong-at-last", "not understood"),
        ] {
            let said = fails(&lab, fake(&lab, mode).to_str().unwrap());
            assert!(said.contains(word), "{mode}: {said}");
            assert_eq!(lab.ask(&["status"])["pid"].as_u64(), Some(u64::from(pid)));
        }
        // A third server must not get in, now or then.
        assert!(server.is_alive());
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().unwrap(); // not one request failed, on the same connections
        }
    });
    println!("longest gap {} ms", longest_us.load(Ordering::Relaxed) / 1000);
    // It had the connections when it died: they are gone, the server is not.
    let mut client = server.client();
    assert_eq!(client.write(1, 5, 0, &pattern(5, BLOCK)), SUCCESS);
    let said = fails(&lab, fake(&lab, "dies-committed").to_str().unwrap());
    assert!(said.contains("closed"), "{said}");
    client.expect_close();
    let mut client = server.client();
    assert!(client.data(1, 5, 0, BLOCK) == pattern(5, BLOCK));
    // And volumes can be changed again, descriptors are as many as before, and a good program takes over.
    lab.ask(&["volume", "create", "--name", "v", "--size", "4MiB"]);
    let mut before = 0;
    wait_for("the end of the commands' connections", || {
        std::thread::sleep(Duration::from_millis(200));
        std::mem::replace(&mut before, server.descriptors()) == before
    });
    fails(&lab, fake(&lab, "dies-with-everything").to_str().unwrap());
    wait_for("as many descriptors as before", || server.descriptors() == before);
    let (heir, _) = upgrade(&lab);
    assert!(server.wait().success());
    assert!(client.data(1, 5, 0, BLOCK) == pattern(5, BLOCK));
    heir.end(Signal::TERM);
}

/// Processes that serve this lab's disk, or are about to.
fn of(lab: &Lab) -> Vec<u32> {
    let config = lab.path("chunkserver.toml");
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let ours = pids.filter(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        text(&line).split('\0').any(|argument| config.as_os_str() == argument)
    });
    ours.filter(|&pid| !is_gone(pid)).collect()
}

fn count(lab: &Lab, word: &str) -> usize {
    lab.log().matches(word).count()
}

#[test]
fn acknowledged_writes_survive_kills_in_the_middle_of_hand_overs() {
    let setup = Setup { size: 64 * MIB, log: 8 * MIB, dirty: 2 * MIB, flush_age_ms: 20, ..Setup::default() };
    let lab = Lab::new(setup);
    let mut all: Vec<Writer> = writers(0x5eed);
    let (mut survived, mut vanished, mut alive) = (0, 0, 0);
    for round in 0..8u64 {
        let server = lab.start();
        if round == 0 {
            lab.copysets(WRITERS as u32);
        }
        std::thread::scope(|scope| {
            for writer in &mut all {
                let client = server.client();
                scope.spawn(|| writer.run(client));
            }
            std::thread::sleep(Duration::from_millis(50));
            wait_for("the command socket", || std::os::unix::net::UnixStream::connect(lab.path("ctl.sock")).is_ok());
            let (stopped, taken) = (count(&lab, "stopped for the new"), count(&lab, "took over"));
            let mut command = Command::new(BINARY);
            command.args(["upgrade", "--ctl"]).arg(lab.path("ctl.sock"));
            let said = std::fs::File::create(lab.path("said")).unwrap();
            let mut asking = command.stdout(Stdio::null()).stderr(said).spawn().unwrap();
            // While it prepares itself; when it gets everything; while it recovers; when it serves.
            let stage = round % 4;
            wait_for("the new process", || of(&lab).len() == 2 || asking.try_wait().unwrap().is_some());
            let mut reached = |word, before| {
                wait_for(word, || {
                    let over = asking.try_wait().unwrap().is_some_and(|status| !status.success());
                    assert!(!over, "{}", std::fs::read_to_string(lab.path("said")).unwrap());
                    count(&lab, word) > before
                });
            };
            match stage {
                1 | 2 => reached("stopped for the new", stopped),
                3 => reached("took over", taken),
                _ => {}
            }
            std::thread::sleep(Duration::from_millis(if stage == 2 { 10 + round * 4 } else { round }));
            server.kill();
            asking.wait().unwrap();
            // The old one is dead. The new one has taken over, or ends when it notices.
            std::thread::sleep(Duration::from_millis(300));
            let heirs = of(&lab);
            println!("killed in stage {stage}: {} alive", heirs.len());
            alive += heirs.len();
            assert!(heirs.len() <= 1 && (stage != 3 || heirs.len() == 1));
            for heir in heirs {
                Heir(heir).end(Signal::KILL);
            }
        });
        let again = lab.start();
        let mut client = again.client();
        for writer in &mut all {
            let (s, v) = writer.check(&mut client);
            survived += s;
            vanished += v;
        }
        again.kill();
    }
    let acknowledged: u64 = all.iter().map(|w| w.acknowledged).sum();
    println!("{acknowledged} acknowledged; {survived} survived, {vanished} vanished; {alive} of 8 had taken over");
    assert!(acknowledged > 0);
}
