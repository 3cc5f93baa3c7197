//! What a server refuses to start with: one clear line each.

use super::harness::{Lab, Setup, refusal, text};
use std::process::Command;

#[test]
fn bad_configurations() {
    for (extra, words) in [
        ("dirty_limt = \"1MiB\"", &["dirty_limt", "unknown"][..]),
        ("[shards]\ncount = 4", &["shards", "unknown"]),
        ("flush_age_ms = \"soon\"", &["flush_age_ms"]),
        ("max_inflight_requests = 0", &["max_inflight_requests"]),
        ("log = \"chunkserver=loud\"", &["loud"]),
        ("this is not TOML", &["chunkserver.toml"]),
    ] {
        // A key that is there already is given anew.
        let key = extra.split(' ').next().unwrap();
        let lab = Lab::new(Setup::default());
        let file = lab.path("chunkserver.toml");
        let kept: String = std::fs::read_to_string(&file)
            .unwrap()
            .lines()
            .filter(|line| line.split(' ').next() != Some(key))
            .map(|line| format!("{line}\n"))
            .collect();
        std::fs::write(&file, kept + extra).unwrap();
        let said = lab.refused(&[]);
        assert!(words.iter().all(|word| said.contains(word)), "{extra}: {said}");
    }
    let lab = Lab::new(Setup::default());
    assert!(lab.refused(&["--listen", "0.0.0.0:8200"]).contains("listen"));
    assert!(lab.refused(&["--dirty-limit", "1GiB"]).contains("payload_buffers"));
    let missing = lab.path("missing");
    let said = lab.refused(&["--data", missing.to_str().unwrap()]);
    assert!(said.contains("missing") && said.contains("No such file"), "{said}");
    let mut command = Command::new(super::harness::BINARY);
    command.args(["serve", "--config", "/no/such/file"]);
    assert!(refusal(command).contains("/no/such/file"));
}

#[test]
fn a_port_that_is_taken_is_waited_for_and_then_refused() {
    let lab = Lab::new(Setup { extra: String::new(), ..Setup::default() });
    let file = lab.path("chunkserver.toml");
    let config = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, config.replace("start_wait_ms = 10000", "start_wait_ms = 100")).unwrap();
    let listener = std::net::TcpListener::bind(lab.address).unwrap();
    let said = lab.refused(&[]);
    assert!(said.contains(&lab.address.to_string()) && said.contains("in use"), "{said}");
    std::fs::write(&file, config).unwrap();
    let mut server = lab.launch(lab.command());
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(server.is_alive(), "it waits");
    drop(listener);
    server.wait_ready();
}

/// A filter that forbids io_uring, as container runtimes have it, put in place by Python before it becomes the server.
const FORBID: &str = r#"
import ctypes, os, struct, sys
def op(code, jt, jf, k): return struct.pack("HBBI", code, jt, jf, k)
io_uring_setup = 425
program = op(0x20, 0, 0, 0) + op(0x15, 0, 1, io_uring_setup) + op(0x06, 0, 0, 0x00050001) + op(0x06, 0, 0, 0x7fff0000)
buffer = ctypes.create_string_buffer(program)
class Fprog(ctypes.Structure): _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
fprog = Fprog(4, ctypes.cast(buffer, ctypes.c_void_p))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(fprog), 0, 0): sys.exit("no seccomp")
os.execv(sys.argv[1], sys.argv[1:])
"#;

#[test]
fn forbidden_io_uring_is_one_clear_line() {
    if !Command::new("python3").arg("--version").output().is_ok_and(|out| out.status.success()) {
        eprintln!("SKIPPED forbidden_io_uring_is_one_clear_line: python3 is missing");
        return;
    }
    let lab = Lab::new(Setup::default());
    let mut command = Command::new("python3");
    command.args(["-c", FORBID, super::harness::BINARY, "serve", "--config"]).arg(lab.path("chunkserver.toml"));
    let said = refusal(command);
    if said.contains("no seccomp") {
        eprintln!("SKIPPED forbidden_io_uring_is_one_clear_line: seccomp filters are not available");
        return;
    }
    assert!(said.contains("io_uring") && said.trim_end().lines().count() == 1, "{said}");
}

#[test]
fn too_few_descriptors_are_one_clear_line() {
    let lab = Lab::new(Setup::default());
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 8 && exec \"$0\" serve --config \"$1\"", super::harness::BINARY]);
    command.arg(lab.path("chunkserver.toml"));
    let said = refusal(command);
    assert!(said.contains("files"), "{said}");
    let help = Command::new(super::harness::BINARY).args(["serve", "--help"]).output().unwrap();
    assert!(help.status.success() && text(&help.stdout).contains("--config"));
}
