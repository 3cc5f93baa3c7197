//! SIGTERM: what was begun is finished, the log is sealed, the process ends; nothing acknowledged is lost.

use super::client::{BLOCK, Client, SUCCESS, pattern, write_frame};
use super::harness::{Lab, Setup};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Write blocks with 32 in flight until the server ends the connection; which writes were acknowledged.
fn write_until_closed(mut client: Client, copyset: u64) -> (BTreeMap<u64, u64>, bool) {
    let (mut sent, mut acked, mut sent_away) = (0u64, BTreeMap::new(), false);
    let blocks = 128;
    let mut outstanding = 0;
    loop {
        while outstanding < 32 {
            let frame =
                write_frame(sent, copyset, 1, sent % blocks * BLOCK as u64, &pattern(copyset << 32 | sent, BLOCK));
            if std::io::Write::write_all(&mut client.stream, &frame).is_err() {
                break;
            }
            (sent, outstanding) = (sent + 1, outstanding + 1);
        }
        let Ok(answer) = client.try_receive() else { return (acked, sent_away) };
        outstanding -= 1;
        if answer.error_code == 2003 {
            sent_away = true; // ELOGOFF
        } else {
            assert_eq!(answer.status(), SUCCESS);
            let newest = acked.entry(answer.cid % blocks).or_insert(answer.cid);
            *newest = answer.cid.max(*newest);
        }
    }
}

#[test]
fn drain_under_load() {
    let lab = Lab::new(Setup::default());
    for round in 0..3 {
        let server = lab.start();
        if round == 0 {
            lab.copysets(4);
        }
        let mut idle = server.client();
        let mut half = server.client();
        half.send(&write_frame(1, 1, 2, 0, &pattern(1, BLOCK))[..2000]);
        let results: Vec<_> = std::thread::scope(|scope| {
            let writers: Vec<_> = (1..5)
                .map(|copyset| {
                    let client = server.client();
                    scope.spawn(move || (copyset, write_until_closed(client, copyset)))
                })
                .collect();
            std::thread::sleep(Duration::from_millis(100));
            let took = server.stop();
            println!("round {round}: stopped in {} ms", took.as_millis());
            // It should be less than a second; a busy machine is given more.
            assert!(took < Duration::from_secs(5), "{took:?}");
            writers.into_iter().map(|w| w.join().unwrap()).collect()
        });
        idle.expect_close();
        half.expect_close();
        assert!(!lab.path("ctl.sock").exists() && !lab.path("nbd.sock").exists());
        for shard in lab.inspect()["shards"].as_array().unwrap() {
            assert_eq!((&shard["torn_batches"], &shard["rotten_records"]), (&0.into(), &0.into()));
        }
        let server = lab.start();
        let mut client = server.client();
        for (copyset, (acked, sent_away)) in results {
            assert!(!acked.is_empty());
            println!("  copyset {copyset}: {} blocks, told to leave: {sent_away}", acked.len());
            for (block, newest) in acked {
                let data = client.data(copyset, 1, block * BLOCK as u64, BLOCK);
                // Writes of one block after the newest acknowledged one may have been carried out.
                let legal = (0..64).map(|i| newest + i * 128).any(|cid| data == pattern(copyset << 32 | cid, BLOCK));
                assert!(legal, "copyset {copyset}, block {block}: older than {newest}");
            }
        }
        drop(client);
        server.stop();
        // The next round begins where the numbers begin again: an older pattern must not pass for a newer one.
        assert!(lab.format(&["--sparse", "--force"]).status.success());
        let server = lab.start();
        lab.copysets(4);
        server.stop();
    }
}

#[test]
fn idle_and_impatient() {
    let lab = Lab::new(Setup::default());
    let mut server = lab.start();
    lab.copysets(1);
    let begun = Instant::now();
    server.signal(Signal::INT);
    assert!(server.wait().success(), "SIGINT is the same");
    println!("stopped in {} ms", begun.elapsed().as_millis());
    assert!(lab.log().contains("stopped"));
    // While it starts.
    for _ in 0..3 {
        let mut server = lab.launch(lab.command());
        std::thread::sleep(Duration::from_millis(20));
        server.signal(Signal::TERM);
        let status = server.wait();
        let early = Signal::TERM.as_raw();
        use std::os::unix::process::ExitStatusExt;
        assert!(status.success() || status.signal() == Some(early), "{status}");
    }
    let server = lab.start();
    assert_eq!(server.client().write(1, 1, 0, &pattern(1, BLOCK)), SUCCESS);
}
