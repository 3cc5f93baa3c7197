//! `libnebd.so` and its header, as a C compiler sees them.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may panic")]

mod fake;

use std::{
    fmt::Write as _,
    mem::{align_of, offset_of, size_of},
    path::{Path, PathBuf},
    process::Command,
};

use fake::{Act, Fake};
use nebd::ffi::{LibAioCallBack, LibaioOp, NebdClientAioContext, NebdOpenFlags};

/// Compiles a program of `c/` against the header, and the library if asked.
fn compile(name: &str, folder: &Path, link: bool) -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = folder.join(name);
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread", "-I"]);
    cc.arg(crate_dir.join("include")).arg(crate_dir.join(format!("tests/c/{name}.c"))).arg("-o").arg(&program);
    if link {
        // Cargo puts the library beside its tests.
        let tests = std::env::current_exe().unwrap().parent().unwrap().to_owned();
        assert!(tests.join("libnebd.so").exists(), "{} has no libnebd.so", tests.display());
        cc.arg("-L").arg(&tests).arg("-lnebd").arg(format!("-Wl,-rpath,{}", tests.display()));
    }
    assert!(cc.status().unwrap().success());
    program
}

#[test]
fn the_header_says_what_the_library_is() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(compile("layout", folder.path(), false)).output().unwrap();
    type Context = NebdClientAioContext;
    let mut ours = String::new();
    writeln!(ours, "context {} {}", size_of::<Context>(), align_of::<Context>()).unwrap();
    for (name, offset, size) in [
        ("offset", offset_of!(Context, offset), size_of::<i64>()),
        ("length", offset_of!(Context, length), size_of::<usize>()),
        ("ret", offset_of!(Context, ret), size_of::<i32>()),
        ("op", offset_of!(Context, op), size_of::<LibaioOp>()),
        ("cb", offset_of!(Context, cb), size_of::<Option<LibAioCallBack>>()),
        ("buf", offset_of!(Context, buf), size_of::<*mut u8>()),
        ("retryCount", offset_of!(Context, retry_count), size_of::<u32>()),
    ] {
        writeln!(ours, "{name} {offset} {size}").unwrap();
    }
    type Flags = NebdOpenFlags;
    writeln!(ours, "flags {} {} {}", size_of::<Flags>(), align_of::<Flags>(), offset_of!(Flags, exclusive)).unwrap();
    let [a, b, c, d] = [LibaioOp::Read, LibaioOp::Write, LibaioOp::Discard, LibaioOp::Flush].map(|op| op as i32);
    writeln!(ours, "op {} {a} {b} {c} {d}", size_of::<LibaioOp>()).unwrap();
    ours += "path 1024\n";
    assert_eq!(String::from_utf8(output.stdout).unwrap(), ours);
    // And what it was for the C++ library on this architecture.
    assert_eq!((size_of::<Context>(), offset_of!(Context, retry_count)), (48, 40));
}

#[test]
fn a_c_program_does_its_io() {
    let fake = Fake::start(|_, seen| match (seen.method.as_str(), seen.number(2)) {
        ("Read", Some(12345)) => Act::Attach(vec![7; 64]),
        ("Read", Some(54321)) => Act::Mute,
        _ => Act::Serve,
    });
    let program = compile("io", fake.folder.path(), true);
    let output = Command::new(program).arg(fake.conf(&[])).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    assert_eq!(text(&output.stdout), "ok\n");
    let methods = fake.methods();
    let count = |name: &str| methods.iter().filter(|method| *method == name).count();
    assert_eq!((count("Write"), count("Read"), count("OpenFile"), count("CloseFile")), (65, 67, 2, 2));
    let log = std::fs::read_to_string(fake.folder.path().join("log/nebd-client.log")).unwrap();
    assert!(log.contains("connected") && log.contains("is locked"), "{log}");
}

#[test]
fn every_function_of_the_header_is_in_the_library() {
    let header = include_str!("../include/libnebd.h");
    let names = header.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| word.starts_with("nebd_lib_"));
    let names: std::collections::BTreeSet<&str> = names.collect();
    assert_eq!(names.len(), 19);
    let library = std::env::current_exe().unwrap().parent().unwrap().join("libnebd.so");
    let symbols = Command::new("nm").args(["-D", "--defined-only"]).arg(library).output().unwrap();
    let symbols = String::from_utf8(symbols.stdout).unwrap();
    let defined: std::collections::BTreeSet<&str> =
        symbols.lines().filter_map(|line| line.split_whitespace().nth(2)).filter(|s| s.starts_with("nebd_")).collect();
    assert_eq!(defined, names);
}
