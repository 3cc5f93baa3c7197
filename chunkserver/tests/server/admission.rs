//! Requests that must not be carried out: sizes, versions, names; and nothing is proposed for them.

use super::client::{
    BACKWARD, BLOCK, Client, EPOCH_TOO_OLD, FAILURE, INVALID, NO_CHUNK, NO_COPYSET, SUCCESS, chunk_request, pattern,
};
use super::harness::{Lab, MIB, Setup};
use super::wire::Message;

/// Last log index of copyset 1: what was proposed counts.
fn last_index(lab: &Lab) -> u64 {
    lab.ask(&["copyset", "status", "1:1"])["last"].as_u64().unwrap()
}

fn write(client: &mut Client, chunk: u64, offset: u64, size: u64, sn: u64, data: &[u8]) -> u64 {
    client.chunk_call("WriteChunk", &chunk_request(2, 1, chunk, offset, size, sn), data).status()
}

#[test]
fn bad_sizes_and_places_propose_nothing() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(1);
    let mut client = server.client();
    let block = pattern(1, BLOCK);
    assert_eq!(client.write(1, 5, 0, &block), SUCCESS);
    let before = last_index(&lab);
    let b = BLOCK as u64;
    for (offset, size, attached) in [
        (1, b, BLOCK),
        (512, b, BLOCK),
        (b - 1, b, BLOCK),
        (0, 100, 100),
        (0, b + 512, BLOCK + 512),
        (0, b, 0),
        (0, b, BLOCK - 1),
        (0, b, 2 * BLOCK),
        (0, 2 * b, BLOCK),
        (0, 0, BLOCK),
        (MIB, b, BLOCK),
        (MIB - b, 2 * b, 2 * BLOCK),
        (0, MIB + b, MIB as usize + BLOCK),
        (u64::from(u32::MAX) - b + 1, b, BLOCK),
        (u64::from(u32::MAX), b, BLOCK),
    ] {
        let status = write(&mut client, 5, offset, size, 1, &vec![9; attached]);
        assert_eq!(status, INVALID, "offset {offset} size {size} attachment {attached}");
    }
    for (offset, size) in [(1, b), (0, 1), (MIB, b), (MIB - b, 2 * b), (u64::from(u32::MAX) - b + 1, b)] {
        let read = client.chunk_call("ReadChunk", &chunk_request(1, 1, 5, offset, size, 0), &[]);
        assert_eq!((read.status(), read.attachment.len()), (INVALID, 0), "offset {offset} size {size}");
    }
    assert_eq!(last_index(&lab), before, "nothing was proposed");
    assert_eq!(client.data(1, 5, 0, BLOCK), block);
    assert_eq!(client.read(1, 6, 0, BLOCK).0, NO_CHUNK, "and no chunk was made");
    // Sizes at the edge are good.
    let whole = pattern(2, MIB as usize);
    assert_eq!(client.write(1, 7, 0, &whole), SUCCESS);
    assert_eq!(client.data(1, 7, 0, MIB as usize), whole);
    assert_eq!(client.data(1, 7, MIB - b, BLOCK), &whole[MIB as usize - BLOCK..]);
}

#[test]
fn versions_only_go_forward() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(1);
    let mut client = server.client();
    let block = pattern(1, BLOCK);
    // The original finds a zero at apply, where everything but "backward" becomes FAILURE_UNKNOWN.
    assert_eq!(write(&mut client, 5, 0, BLOCK as u64, 0, &block), FAILURE, "sn 0");
    assert_eq!(client.read(1, 5, 0, BLOCK).0, NO_CHUNK);
    assert_eq!(write(&mut client, 5, 0, BLOCK as u64, 3, &block), SUCCESS);
    let before = last_index(&lab);
    assert_eq!(write(&mut client, 5, 0, BLOCK as u64, 2, &pattern(2, BLOCK)), BACKWARD);
    assert_eq!(write(&mut client, 5, 0, BLOCK as u64, 0, &pattern(2, BLOCK)), FAILURE);
    let delete = client.chunk_call("DeleteChunk", &chunk_request(0, 1, 5, 0, 0, 2), &[]);
    assert_eq!(delete.status(), FAILURE, "the original's answer to a delete of an older version");
    assert_eq!(last_index(&lab), before, "nothing was proposed");
    assert_eq!(client.data(1, 5, 0, BLOCK), block);
    assert_eq!(write(&mut client, 5, 0, BLOCK as u64, 3, &pattern(3, BLOCK)), SUCCESS);
    assert_eq!(client.chunk_call("DeleteChunk", &chunk_request(0, 1, 5, 0, 0, 3), &[]).status(), SUCCESS);
    assert_eq!(client.read(1, 5, 0, BLOCK).0, NO_CHUNK);
    assert_eq!(client.delete(1, 5), SUCCESS, "of a chunk that is not there");
}

#[test]
fn unknown_copysets() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(1);
    let mut client = server.client();
    let block = pattern(1, BLOCK);
    for copyset in [2, 77, u64::from(u32::MAX)] {
        assert_eq!(client.write(copyset, 1, 0, &block), NO_COPYSET);
        assert_eq!(client.read(copyset, 1, 0, BLOCK), (NO_COPYSET, Vec::new()));
        assert_eq!(client.delete(copyset, 1), NO_COPYSET);
        let info = Message::default().int(1, 1).int(2, copyset).int(3, 1);
        assert_eq!(client.chunk_call("GetChunkInfo", &info, &[]).status(), NO_COPYSET);
    }
    assert_eq!(client.write(1, 1, 0, &block), SUCCESS);
}

#[test]
fn fences() {
    let lab = Lab::new(Setup::default());
    let server = lab.start();
    lab.copysets(2);
    let mut client = server.client();
    let block = pattern(1, BLOCK);
    let update = |client: &mut Client, epoch: u64| {
        client.chunk_call("UpdateEpoch", &Message::default().int(1, 77).int(2, epoch), &[]).status()
    };
    let write = |client: &mut Client, file: u64, epoch: u64| {
        let message = chunk_request(2, 1, 5, 0, BLOCK as u64, 1).int(18, file).int(19, epoch);
        client.chunk_call("WriteChunk", &message, &block).status()
    };
    assert_eq!(write(&mut client, 77, 1), SUCCESS, "no fence yet");
    assert_eq!(
        (update(&mut client, 5), update(&mut client, 5), update(&mut client, 4)),
        (SUCCESS, SUCCESS, EPOCH_TOO_OLD)
    );
    let mut other = server.client();
    for client in [&mut client, &mut other] {
        assert_eq!(write(client, 77, 5), SUCCESS);
        assert_eq!(write(client, 77, 6), EPOCH_TOO_OLD, "only the very epoch passes");
        assert_eq!(write(client, 77, 4), EPOCH_TOO_OLD);
        assert_eq!(write(client, 78, 1), SUCCESS, "another volume");
        assert_eq!(client.write(1, 5, 0, &block), SUCCESS, "a client that sends no epoch");
    }
}
