//! Disks that are not ours to serve or to format: refused in one line, not a byte changed.

use super::client::{BLOCK, SUCCESS, pattern};
use super::harness::{Lab, MIB, Setup, fingerprint, text};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

fn patch(lab: &Lab, offset: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(lab.disk()).unwrap().write_all_at(bytes, offset).unwrap();
}

/// Change the superblock in both copies, with a checksum that is right again.
fn forge(lab: &Lab, change: impl Fn(&mut [u8])) {
    let mut block = vec![0; BLOCK];
    File::open(lab.disk()).unwrap().read_exact_at(&mut block, 0).unwrap();
    change(&mut block);
    let seed = crc32c::crc32c(&block[16..32]);
    block[12..16].copy_from_slice(&seed.to_le_bytes());
    let crc = crc32c::crc32c(&block);
    block[12..16].copy_from_slice(&crc.to_le_bytes());
    patch(lab, 0, &block);
    patch(lab, BLOCK as u64, &block);
}

/// It must not start, say so with these words, and leave the disk alone.
fn refuses(lab: &Lab, words: &str) {
    let before = fingerprint(&lab.disk());
    let said = lab.refused(&[]);
    assert!(said.contains(words), "{words:?} is not in {said:?}");
    assert!(said.contains("disk"), "it names the disk: {said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert_eq!(fingerprint(&lab.disk()), before, "the disk was changed");
    let inspect = std::process::Command::new(super::harness::BINARY).arg("inspect").arg(lab.disk()).output().unwrap();
    assert!(!inspect.status.success() && text(&inspect.stderr).contains(words), "{}", text(&inspect.stderr));
}

#[test]
fn disks_that_are_not_served() {
    let lab = Lab::blank(Setup::default());
    let file = File::create(lab.disk()).unwrap();
    refuses(&lab, "not formatted");
    file.set_len(64 * MIB).unwrap();
    refuses(&lab, "not formatted");
    file.write_all_at(b"my diary", 0).unwrap();
    refuses(&lab, "something else");
    std::fs::write(lab.disk(), "too short to be one").unwrap();
    let said = lab.refused(&[]);
    assert!(said.contains("not formatted") || said.contains("something else"), "{said}");

    let format = || assert!(lab.format(&["--sparse", "--force"]).status.success());
    format();
    forge(&lab, |block| block[8] = 2);
    refuses(&lab, "version 2");
    format();
    forge(&lab, |block| block[52..54].copy_from_slice(&300u16.to_le_bytes()));
    refuses(&lab, "contradicts itself");
    format();
    forge(&lab, |block| block[52..54].copy_from_slice(&1u16.to_le_bytes()));
    refuses(&lab, "contradicts itself");
    format();
    forge(&lab, |block| block[44..48].copy_from_slice(&(2 * MIB as u32).to_le_bytes()));
    refuses(&lab, "contradicts itself");
    format();
    forge(&lab, |block| block[48] |= 0x80);
    refuses(&lab, "contradicts itself");
    format();
    patch(&lab, 100, &[0xff; 8]);
    patch(&lab, BLOCK as u64 + 200, &[0xff; 8]);
    refuses(&lab, "damaged");
    format();
    let disk = OpenOptions::new().write(true).open(lab.disk()).unwrap();
    disk.set_len(lab.setup.size - MIB).unwrap();
    refuses(&lab, "now has");
    disk.set_len(lab.setup.size + MIB).unwrap();
    refuses(&lab, "now has");
    disk.set_len(lab.setup.size).unwrap();
    // One good copy of the superblock is enough.
    patch(&lab, 0, &[0xff; 64]);
    lab.start().stop();
}

#[test]
fn a_disk_belongs_to_one_process() {
    let lab = Lab::new(Setup::default());
    let mut server = lab.start();
    lab.copysets(1);
    let block = pattern(1, BLOCK);
    let mut client = server.client();
    assert_eq!(client.write(1, 1, 0, &block), SUCCESS);
    let second = lab.path("second.toml");
    let config = std::fs::read_to_string(lab.path("chunkserver.toml")).unwrap();
    std::fs::write(&second, config.replace("start_wait_ms = 10000", "start_wait_ms = 100")).unwrap();
    let mut command = std::process::Command::new(super::harness::BINARY);
    command.args(["serve", "--listen", "127.0.0.1:1", "--config"]).arg(&second);
    let said = super::harness::refusal(command);
    assert!(said.contains("locked by another process"), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    // Not even by force.
    let out = lab.format(&["--force", "--sparse"]);
    assert!(!out.status.success() && text(&out.stderr).contains("locked"), "{}", text(&out.stderr));
    assert!(server.is_alive() && lab.path("ctl.sock").exists() && lab.path("nbd.sock").exists());
    assert_eq!(client.data(1, 1, 0, BLOCK), block);
    // Who waits gets it when it is free.
    let mut heir = lab.launch(lab.command());
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(heir.is_alive());
    server.stop();
    heir.wait_ready();
    lab.wait_led();
    assert_eq!(heir.client().data(1, 1, 0, BLOCK), block);
}

#[test]
fn format_overwrites_nothing_unasked() {
    let lab = Lab::blank(Setup { size: 40 * MIB, log: 8 * MIB, ..Setup::default() });
    std::fs::write(lab.disk(), "my diary").unwrap();
    let before = fingerprint(&lab.disk());
    let out = lab.format(&[]);
    assert!(!out.status.success() && text(&out.stderr).contains("--force"), "{}", text(&out.stderr));
    assert_eq!(fingerprint(&lab.disk()), before);
    // Numbers that cannot work are refused before anything is touched, with --force as well.
    for bad in [&["--force", "--shards", "0"][..], &["--force", "--chunk-size", "1000"], &["--force", "--size", "1MiB"]]
    {
        let out = lab.format(bad);
        assert!(!out.status.success(), "{bad:?}");
        assert_eq!(fingerprint(&lab.disk()), before, "{bad:?}");
    }
    // In full, not sparse: every block is written.
    let out = lab.format(&["--force", "--json"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let said: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&said["disk_size"], &said["sparse"]), (&(40 * MIB).into(), &false.into()));
    use std::os::unix::fs::MetadataExt;
    assert!(std::fs::metadata(lab.disk()).unwrap().blocks() * 512 >= 40 * MIB);
    lab.start().stop();
    let before = fingerprint(&lab.disk());
    assert!(!lab.format(&["--sparse"]).status.success(), "a formatted disk");
    assert_eq!(fingerprint(&lab.disk()), before);
    let uuid = lab.inspect()["superblock"]["uuid"].clone();
    assert!(lab.format(&["--sparse", "--force"]).status.success());
    assert_ne!(lab.inspect()["superblock"]["uuid"], uuid);
    // A failed format of a new file leaves no file.
    let new = lab.path("new");
    let out = lab.format(&["--data", new.to_str().unwrap(), "--size", "1MiB"]);
    assert!(!out.status.success() && !new.exists());
}

#[test]
fn tmpfs_is_refused() {
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("SKIPPED tmpfs_is_refused: there is no /dev/shm");
        return;
    };
    let disk = folder.path().join("disk");
    let out = std::process::Command::new(super::harness::BINARY)
        .args(["format", "--size", "64MiB", "--data"])
        .arg(&disk)
        .output()
        .unwrap();
    let said = text(&out.stderr);
    assert!(!out.status.success() && !disk.exists());
    assert!(said.contains("tmpfs") || said.contains("O_DIRECT"), "{said}");
}
