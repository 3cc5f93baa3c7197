//! Starting: what is refused, in one line, and what is not; Curve's own configuration file; many files on record.

use super::client::{K, NOK, Nebd, OK, VOL1, lab, metafile, open_files, setup};
use crate::client::pattern;
use crate::harness::{BINARY, Lab, Setup, wait_for};
use crate::upgrade::upgrade;
use rustix::process::Signal;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

#[test]
fn metafiles_that_are_refused_stay_as_they_are() {
    let lab = lab("");
    let good = metafile(&[(3, VOL1.into())]);
    let newer = good.replacen("{\n", "{\n\t\"format\" : 2,\n", 1);
    for (what, bytes, word) in [
        ("rotten", good.replace("vol1", "vol2").into_bytes(), "checksum"),
        ("half written", good.as_bytes()[..good.len() / 2].to_vec(), "damaged"),
        ("empty", vec![], "damaged"),
        ("binary", vec![0xff; 5000], "damaged"),
        ("newer", newer.into_bytes(), "newer"),
        ("without fd", good.replace("\"fd\" : 3,", "").into_bytes(), "fd is missing"),
        ("without checksum", b"{\"volumes\":null}".to_vec(), "crc is missing"),
    ] {
        std::fs::write(lab.path("nebdserver.meta"), &bytes).unwrap();
        let said = lab.refused(&[]);
        assert!(said.contains(word) && said.contains("nebdserver.meta"), "{what}: {said}");
        assert_eq!(std::fs::read(lab.path("nebdserver.meta")).unwrap(), bytes, "{what}");
    }
}

#[test]
fn metafiles_that_are_understood() {
    let lab = lab("");
    let crc = metafile(&[(3, VOL1.into())]).replace(",\n\t\t\t\"session\" : \"\"", "");
    let without = {
        let text = crc.split_once("\"volumes\"").unwrap().1;
        let volumes = format!("\t\"volumes\"{text}");
        let crc = crc32c::crc32c(format!("{{\n{volumes}").as_bytes());
        format!("{{\n\t\"crc\" : {crc},\n{volumes}")
    };
    for (what, text) in [
        ("with trailing bytes", format!("{}}}\n\t]\n}}garbage\0\u{1}", metafile(&[(3, VOL1.into())]))),
        ("without session", without),
    ] {
        std::fs::write(lab.path("nebdserver.meta"), text).unwrap();
        let server = lab.start();
        let mut client = Nebd::connect(&lab);
        assert_eq!(client.read(3, 0, 4096), (OK, vec![0; K]), "{what}");
        let (code, fd) = client.open_with(&format!("{VOL1}:x"), None);
        assert_eq!((code, fd), (OK, Some(4)), "{what}");
        server.stop();
        let text = std::fs::read_to_string(lab.path("nebdserver.meta")).unwrap();
        assert_eq!(
            text,
            metafile(&[(3, VOL1.into()), (4, format!("{VOL1}:x"))]),
            "{what}: written anew, as it should be"
        );
    }
}

#[test]
fn a_file_that_cannot_be_reopened_does_not_stop_the_start() {
    let lab = lab("");
    let records = [(2, "cbd:p//gone_u_".into()), (5, VOL1.into()), (9, "test:x".into())];
    std::fs::write(lab.path("nebdserver.meta"), metafile(&records)).unwrap();
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    assert_eq!((client.read(2, 0, 4096).0, client.read(9, 0, 4096).0, client.read(5, 0, 4096).0), (NOK, NOK, OK));
    assert_eq!(client.open("cbd:p//vol1_u_"), 10);
    lab.ask(&["volume", "create", "--name", "gone", "--size", "1MiB"]);
    assert_eq!(client.read(2, 0, 4096).0, OK, "opened when it can be");
    assert_eq!((client.plain("CloseFile", 9), client.plain("CloseFile", 2)), (OK, OK));
    server.stop();
}

#[test]
fn five_hundred_files_on_record() {
    let lab = lab("");
    let records: Vec<(u64, String)> = (1..=500).map(|fd| (fd, format!("{VOL1}:{fd}"))).collect();
    std::fs::write(lab.path("nebdserver.meta"), metafile(&records)).unwrap();
    let begun = Instant::now();
    let server = lab.launch(lab.command());
    let (_, answer) = Nebd::insist(&lab, 500, 0, 4096);
    assert_eq!(answer.status(), OK);
    println!("answered {} ms after the start of the process", begun.elapsed().as_millis());
    wait_for("all to be open", || open_files(&lab) == 500);
    server.stop();
}

#[test]
fn one_server_of_a_socket() {
    let lab = lab("");
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let fd = client.open(VOL1);
    let other = Lab::new(setup("").clone());
    let socket = lab.path("nebd.sock");
    let text = std::fs::read_to_string(other.path("chunkserver.toml")).unwrap().replace("10000", "100");
    std::fs::write(other.path("chunkserver.toml"), text).unwrap();
    let said = other.refused(&["--nebd-socket", socket.to_str().unwrap()]);
    assert!(said.contains("another server has the socket"), "{said}");
    assert_eq!(client.write(fd, 0, &pattern(1, K)), OK, "it did not hurt");
    server.kill();
    // What a killed server leaves, socket and lock file, is in nobody's way.
    let server = lab.start();
    assert_eq!(Nebd::connect(&lab).read(fd, 0, 4096), (OK, pattern(1, K)));
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&socket).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o777);
    server.stop();
}

#[test]
fn paths_that_cannot_be() {
    let lab = lab("");
    let long = format!("/tmp/{}", "x".repeat(103));
    assert_eq!(long.len(), 108);
    let said = lab.refused(&["--nebd-socket", &long]);
    assert!(said.contains("nebd.socket") && said.contains("107"), "{said}");
    let said = lab.refused(&["--nebd-socket", "/nonexistent/nebd.sock"]);
    assert!(said.contains("/nonexistent/nebd.sock"), "{said}");
    let said = lab.refused(&["--nebd-conf", "/nonexistent/nebd-server.conf"]);
    assert!(said.contains("/nonexistent/nebd-server.conf"), "{said}");
}

#[test]
fn the_original_configuration_file() {
    let lab = lab("");
    let conf = lab.path("nebd-server.conf");
    let text = format!(
        "# brpc server\nlisten.address={}  # __CURVEADM_TEMPLATE__ ${{x}} __CURVEADM_TEMPLATE__\n\
         curveclient.confPath=/etc/curve/client.conf\n#meta\nmeta.file.path={}\nheartbeat.timeout.sec=30\n\
         heartbeat.check.interval.ms=3000\n",
        lab.path("nebd.sock").display(),
        lab.path("other.meta").display(),
    );
    std::fs::write(&conf, &text).unwrap();
    let mut command = lab.command();
    command.arg("--nebd-conf").arg(&conf);
    let mut server = lab.launch(command);
    server.wait_ready();
    lab.wait_led();
    let mut client = Nebd::connect(&lab);
    assert_eq!(client.open(VOL1), 1);
    assert_eq!(std::fs::read_to_string(lab.path("other.meta")).unwrap(), metafile(&[(1, VOL1.into())]));
    server.stop();
    std::fs::write(&conf, text.replace("meta.file.path", "meta.path")).unwrap();
    let said = lab.refused(&["--nebd-conf", conf.to_str().unwrap()]);
    assert!(said.contains("meta.file.path is missing"), "{said}");
}

/// Whoever takes over has no lock yet; names that are in use stay whose they are.
#[test]
fn an_upgrade_takes_no_socket_of_another_server() {
    let (theirs, ours) = (lab(""), Lab::new(Setup::default()));
    let (their_server, mut server) = (theirs.start(), ours.start());
    let good = std::fs::read_to_string(ours.path("chunkserver.toml")).unwrap();
    let fails = |toml: String| {
        std::fs::write(ours.path("chunkserver.toml"), toml).unwrap();
        crate::upgrade_failures::fails(&ours, BINARY)
    };
    let nebd = format!("{good}[nebd]\nsocket = {:?}\nmetafile = {:?}\n", theirs.path("nebd.sock"), ours.path("meta"));
    assert!(fails(nebd).contains("another server has the socket"));
    let name = ours.path("nbd.sock");
    std::fs::create_dir(ours.path("folder")).unwrap();
    let spelled = ours.path("folder/../nbd.sock");
    let said = fails(good.replace(name.to_str().unwrap(), spelled.to_str().unwrap()));
    assert!(said.contains("in use"), "{said}");
    assert!(fails(good.replace(name.to_str().unwrap(), theirs.path("nbd.sock").to_str().unwrap())).contains("in use"));
    for lab in [&ours, &theirs] {
        assert!(UnixStream::connect(lab.path("nbd.sock")).is_ok());
    }
    assert_eq!(Nebd::connect(&theirs).open(VOL1), 1);
    // A name that nobody listens at is taken, and NEBD can come with a new program.
    drop(UnixListener::bind(ours.path("new.sock")).unwrap());
    let more = format!("[nebd]\nsocket = {:?}\nmetafile = {:?}\n", ours.path("nebd.sock"), ours.path("meta"));
    let new = good.replace(name.to_str().unwrap(), ours.path("new.sock").to_str().unwrap());
    std::fs::write(ours.path("chunkserver.toml"), new + &more).unwrap();
    let (heir, _) = upgrade(&ours);
    assert!(server.wait().success());
    assert!(UnixStream::connect(ours.path("new.sock")).is_ok() && Nebd::try_connect(&ours).is_ok());
    let (heir, old) = (upgrade(&ours).0, heir);
    wait_for("the end of the old process", || old.is_gone());
    heir.end(Signal::TERM);
    their_server.stop();
}
