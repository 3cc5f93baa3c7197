//! Every exchange recorded between the original part1 and part2, replayed: the same results, sizes and data.

use super::client::{Nebd, VOL1, lab, metafile};
use crate::harness::Lab;
use crate::wire::{Response, fields, responses};
use std::collections::BTreeMap;

fn recorded(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/../proto/tests/data/nebd-{name}.bin", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// Requests as they were sent, each a whole frame, and correlation ids.
fn requests(stream: &[u8]) -> Vec<(u64, &[u8])> {
    let (mut rest, mut all) = (stream, Vec::new());
    while !rest.is_empty() {
        let size = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap()) as usize;
        let (frame, next) = rest.split_at(12 + size(4));
        let meta = fields(&frame[12..12 + size(8)]);
        let crate::wire::Value::Int(cid) = meta[&4][0] else { panic!("no correlation id") };
        all.push((cid, frame));
        rest = next;
    }
    all
}

/// Send each request, one after the other, and compare what comes with what came. Returns how many had data.
fn replay(lab: &Lab, name: &str) -> (usize, usize) {
    let (sent, answered) = (recorded(&format!("{name}-c2s")), recorded(&format!("{name}-s2c")));
    let expected: BTreeMap<u64, Response> = responses(&answered).into_iter().map(|r| (r.cid, r)).collect();
    let mut client = Nebd::connect(lab);
    let (mut count, mut with_data) = (0, 0);
    for (cid, frame) in requests(&sent) {
        client.send(frame);
        let (got, want) = (client.try_receive().unwrap(), &expected[&cid]);
        assert_eq!((got.cid, got.error_code), (cid, want.error_code));
        // The originals' objSize and objNums are chance; size and block size are not.
        if let (Some([ours]), Some([theirs])) =
            (got.message.get(&3).map(Vec::as_slice), want.message.get(&3).map(Vec::as_slice))
            && let (crate::wire::Value::Bytes(ours), crate::wire::Value::Bytes(theirs)) = (ours, theirs)
        {
            let (ours, theirs) = (fields(ours), fields(theirs));
            assert_eq!((ours.get(&1), ours.get(&4)), (theirs.get(&1), theirs.get(&4)));
            assert_eq!(got.int(1), want.int(1));
        } else {
            assert_eq!(got.message, want.message, "{name}: call {cid:#x}");
        }
        assert!(got.attachment == want.attachment, "{name}: data of call {cid:#x} differ");
        count += 1;
        with_data += usize::from(!got.attachment.is_empty());
    }
    assert_eq!(count, expected.len());
    (count, with_data)
}

#[test]
fn a_volume_in_use() {
    let lab = lab("");
    let server = lab.start();
    let (count, with_data) = replay(&lab, "verify");
    assert!(count > 400 && with_data > 100, "{count} {with_data}");
    server.stop();
}

#[test]
fn signs_of_life_and_a_configuration_tail() {
    let lab = lab("");
    // The recorded server had given out four numbers before; the fourth goes to who writes below.
    std::fs::write(lab.path("nebdserver.meta"), metafile(&[(3, "cbd:pool1//gone_user_".into())])).unwrap();
    let server = lab.start();
    // The frames are a selection: what the reads found had been written by others, not in it.
    let answers: BTreeMap<u64, Response> =
        responses(&recorded("heartbeat-s2c")).into_iter().map(|r| (r.cid, r)).collect();
    let mut writer = Nebd::connect(&lab);
    let fd = writer.open(VOL1);
    for (cid, frame) in requests(&recorded("heartbeat-c2s")) {
        let data = &answers[&cid].attachment;
        if !data.is_empty() {
            let meta = u32::from_be_bytes(frame[8..12].try_into().unwrap()) as usize;
            let crate::wire::Value::Int(offset) = fields(&frame[12 + meta..])[&2][0] else { panic!("no offset") };
            assert_eq!(writer.write(fd, offset, data), 0);
        }
    }
    let (count, with_data) = replay(&lab, "heartbeat");
    assert!(count == 11 && with_data == 3, "{count} {with_data}");
    server.stop();
}

#[test]
fn a_volume_that_does_not_exist() {
    let lab = lab("");
    let server = lab.start();
    lab.ask(&["volume", "delete", "--name", "vol1"]);
    assert_eq!(replay(&lab, "open-missing"), (1, 0));
    server.stop();
}

#[test]
fn the_metafile_the_original_wrote_is_understood_and_written() {
    let lab = lab("");
    let theirs = include_str!("../../data/metafile-shared-conf.json");
    std::fs::write(lab.path("nebdserver.meta"), theirs).unwrap();
    let server = lab.start();
    let mut client = Nebd::connect(&lab);
    let name = format!("{VOL1}:/etc/curve/client.conf");
    assert_eq!(client.info(5).unwrap()[0], 64 << 20, "the number on record is that file");
    assert_eq!(client.open_with(&name, Some(true)).0, u64::MAX, "opened with other flags");
    assert_eq!(client.open_with(&name, Some(false)), (0, Some(5)));
    let read = || std::fs::read_to_string(lab.path("nebdserver.meta")).unwrap();
    assert_eq!(read(), theirs);
    assert_eq!(client.open_with(VOL1, Some(false)), (0, Some(6)), "without the tail it is another file");
    assert_eq!((client.plain("CloseFile", 6), read()), (0, theirs.to_owned()), "byte for byte");
    assert_eq!(client.plain("CloseFile", 5), 0);
    assert_eq!(read(), include_str!("../../data/metafile-empty.json"));
    server.stop();
}
