//! NBD against bytes of libnbd and qemu (tests/data/README.md), and against what clients should not send.

mod common;

use std::fs;

use bytes::BytesMut;
use common::path;
use proptest::{collection::vec, prelude::*};
use proto::nbd::{
    BLOCK_SIZE, ClientOption, Command, MAX_OPTION, MAX_OPTION_SKIP, MAX_PAYLOAD, Negotiation, NegotiationError,
    Request, RequestDecoder, command_flag, negotiation, option, reply, simple_reply,
};

const SIZE: u64 = 1 << 20;
/// What qemu-nbd says of its export: flags, flush, FUA, trim, zeroes, DF, multi-conn, cache and fast zero.
const QEMU_FLAGS: u16 = 0x0d6d;

/// A server of one export, for one client. Consumes the stream in pieces; returns what it was asked and its answers.
#[derive(Debug, PartialEq)]
struct Served {
    options: Vec<ClientOption>,
    requests: Vec<Request>,
    out: Vec<u8>,
    error: Option<NegotiationError>,
    clean: bool,
}

fn serve(stream: &[u8], piece: usize) -> Served {
    let mut negotiation = Negotiation::new();
    let mut decoder: Option<RequestDecoder> = None;
    let mut out = BytesMut::from(&negotiation::greeting()[..]);
    let (mut options, mut requests) = (Vec::new(), Vec::new());
    let mut payload = 0;
    for chunk in stream.chunks(piece.max(1)) {
        let mut input = chunk;
        loop {
            let Some(transmission) = &mut decoder else {
                match negotiation.step(&mut input) {
                    Ok(None) => break,
                    Ok(Some(asked)) => {
                        if answer(&mut out, &asked, negotiation.no_zeroes()) {
                            decoder = Some(RequestDecoder::new());
                        }
                        options.push(asked);
                    }
                    Err(error) => {
                        assert_eq!(negotiation.step(&mut input), Err(error), "an error stays");
                        return Served { options, requests, out: out.into(), error: Some(error), clean: false };
                    }
                }
                continue;
            };
            let count = input.len().min(payload);
            payload -= count;
            input = &input[count..];
            match transmission.step(&mut input) {
                Ok(None) => break,
                Ok(Some(request)) => {
                    payload = request.payload_len() as usize;
                    let error = request.check(SIZE, BLOCK_SIZE, MAX_PAYLOAD).err().unwrap_or(0);
                    if request.command != Command::Disconnect {
                        out.extend_from_slice(&simple_reply(error, request.cookie));
                    }
                    if request.command == Command::Read && error == 0 {
                        out.resize(out.len() + request.length as usize, 0);
                    }
                    requests.push(request);
                }
                Err(_) => return Served { options, requests, out: out.into(), error: None, clean: false },
            }
        }
    }
    let clean = payload == 0 && decoder.is_none_or(|decoder| decoder.is_idle());
    Served { options, requests, out: out.into(), error: None, clean }
}

/// Answers an option; whether requests follow.
fn answer(out: &mut BytesMut, asked: &ClientOption, no_zeroes: bool) -> bool {
    match asked {
        ClientOption::ExportName(_) => {
            negotiation::put_export(out, SIZE, QEMU_FLAGS, no_zeroes);
            return true;
        }
        ClientOption::Abort => negotiation::put_ack(out, option::ABORT),
        ClientOption::List => {
            negotiation::put_list_entry(out, "vol");
            negotiation::put_ack(out, option::LIST);
        }
        ClientOption::Info(haggle) | ClientOption::Go(haggle) => {
            let start = matches!(asked, ClientOption::Go(_));
            let number = if start { option::GO } else { option::INFO };
            if haggle.name != "vol" {
                negotiation::put_error(out, number, reply::ERR_UNKNOWN, "no such export");
                return false;
            }
            if haggle.wants_name {
                negotiation::put_info_name(out, number, "vol");
            }
            negotiation::put_info_block_size(out, number);
            negotiation::put_info_export(out, number, SIZE, QEMU_FLAGS);
            negotiation::put_ack(out, number);
            return start;
        }
        ClientOption::Refuse { option, reply, text } => negotiation::put_error(out, *option, *reply, text),
    }
    false
}

/// Option, kind of reply, data.
type OptionReply = (u32, u32, Vec<u8>);

/// The server's bytes taken apart: option replies without texts and descriptions, then everything else.
fn replies(mut stream: &[u8], refine: bool) -> (Vec<OptionReply>, Vec<u8>) {
    let mut found = Vec::new();
    assert_eq!(stream[..18], negotiation::greeting());
    stream = &stream[18..];
    while stream.starts_with(&[0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9]) {
        let number = |at: usize| u32::from_be_bytes(stream[at..at + 4].try_into().expect("four bytes"));
        let (option, kind, length) = (number(8), number(12), number(16) as usize);
        let mut data = stream[20..20 + length].to_vec();
        stream = &stream[20 + length..];
        if kind & 1 << 31 != 0 {
            data.clear();
        }
        if kind == reply::SERVER {
            data.truncate(4 + 3);
        }
        if refine && kind == reply::INFO && data[..2] == [0, 3] {
            // qemu's smallest block is one byte.
            assert_eq!(data[2..6], [0, 0, 0, 1]);
            data[2..6].copy_from_slice(&BLOCK_SIZE.to_be_bytes());
        }
        if kind != reply::INFO || data[..2] != [0, 2] {
            found.push((option, kind, data));
        }
    }
    (found, stream.to_vec())
}

fn recorded(name: &str) -> (Vec<u8>, Vec<u8>) {
    let read = |side: &str| fs::read(path(&format!("data/nbd-{name}-{side}.bin"))).expect("the capture");
    (read("c2s"), read("s2c"))
}

#[test]
fn recorded_clients_get_what_qemu_answered() {
    for name in ["list", "info", "missing", "io"] {
        let (sent, answered) = recorded(name);
        let served = serve(&sent, usize::MAX);
        assert!(served.clean && served.error.is_none(), "{name}: {served:?}");
        for piece in [1, 2, 3, 7, 100, 4097] {
            assert_eq!(serve(&sent, piece), served, "{name} in pieces of {piece}");
        }
        let (ours, mut our_rest) = replies(&served.out, false);
        let (theirs, their_rest) = replies(&answered, true);
        assert_eq!(ours, theirs, "{name}");
        // The content of the one read, which is not ours to know: in `io` behind the replies to two writes.
        let content = match name {
            "info" => 16..16 + 8192,
            "io" => 48..48 + 4096,
            _ => 0..0,
        };
        our_rest[content.clone()].copy_from_slice(&their_rest[content]);
        assert!(our_rest == their_rest, "{name}: transmission differs");
    }
}

#[test]
fn recorded_requests_mean_what_the_commands_said() {
    let served = serve(&recorded("io").0, 1000);
    let unsupported = |option| ClientOption::Refuse { option, reply: reply::ERR_UNSUP, text: "unknown option" };
    assert_eq!(served.options[..2], [unsupported(option::EXTENDED_HEADERS), unsupported(option::STRUCTURED_REPLY)]);
    let ClientOption::Go(haggle) = &served.options[2] else { panic!("{:?}", served.options) };
    assert_eq!((&haggle.name[..], haggle.block_size, haggle.wants_name), ("vol", true, false));
    let got: Vec<_> = served.requests.iter().map(|r| (r.command, r.flags, r.offset, r.length)).collect();
    const FUA: u16 = command_flag::FUA;
    let want = [
        (Command::Write, FUA, 0, 4096),
        (Command::Write, FUA, 4096, 8192),
        (Command::Read, 0, 0, 4096),
        (Command::Flush, 0, 0, 0),
        (Command::WriteZeroes, FUA | command_flag::NO_HOLE, 16384, 8192),
        (Command::WriteZeroes, FUA, 32768, 8192),
        (Command::Trim, 0, 65536, 65536),
        (Command::Flush, 0, 0, 0),
        (Command::Disconnect, 0, 0, 0),
    ];
    assert_eq!(got, want);
}

/// A client's option.
fn ask(option: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).expect("32 bits");
    [b"IHAVEOPT", &option.to_be_bytes()[..], &length.to_be_bytes(), data].concat()
}

fn negotiate(flags: u32, options: &[Vec<u8>]) -> Served {
    let stream = [&flags.to_be_bytes()[..], &options.concat()].concat();
    let served = serve(&stream, usize::MAX);
    assert_eq!(serve(&stream, 1), served);
    served
}

#[test]
fn client_flags_are_checked() {
    assert_eq!(negotiate(0, &[]).error, Some(NegotiationError::OldClient));
    assert_eq!(negotiate(2, &[]).error, Some(NegotiationError::OldClient));
    assert_eq!(negotiate(4 | 1, &[]).error, Some(NegotiationError::ClientFlags(5)));
    assert_eq!(negotiate(1, &[b"NBDMAGIC12345678".to_vec()]).error, Some(NegotiationError::BadMagic));
}

#[test]
fn export_name_starts_with_and_without_zeros() {
    let name = ask(option::EXPORT_NAME, b"vol");
    let served = negotiate(3, std::slice::from_ref(&name));
    assert_eq!(served.options, [ClientOption::ExportName("vol".into())]);
    assert_eq!(served.out[18..], [&SIZE.to_be_bytes()[..], &QEMU_FLAGS.to_be_bytes()].concat());
    let served = negotiate(1, &[name]);
    assert_eq!(served.out.len(), 18 + 10 + 124);
    for bad in [&b"a\0b"[..], &[0xff], &[b'x'; 4097], &[b'x'; 9000]] {
        assert_eq!(negotiate(3, &[ask(option::EXPORT_NAME, bad)]).error, Some(NegotiationError::BadName));
    }
}

#[test]
fn malformed_options_are_refused_and_the_next_one_is_served() {
    let haggles: [&[u8]; 8] = [
        b"",
        b"\0\0\0",
        b"\0\0\0\x04vol\0\0",       // a name longer than the data
        b"\xff\xff\xff\xffvol\0\0", // much longer
        b"\0\0\0\x03vol",           // no count
        b"\0\0\0\x03vol\0\x01",     // a kind missing
        b"\0\0\0\x03vol\0\0\0",     // a byte too many
        b"\0\0\0\x03v\0l\0\0",      // not a name
    ];
    for data in haggles {
        for number in [option::INFO, option::GO] {
            let served = negotiate(3, &[ask(number, data), ask(option::LIST, b"")]);
            let [ClientOption::Refuse { option, reply: reply::ERR_INVALID, .. }, ClientOption::List] =
                &served.options[..]
            else {
                panic!("{data:?} {:?}", served.options)
            };
            assert_eq!(*option, number);
        }
    }
    let served = negotiate(3, &[ask(option::LIST, b"x"), ask(option::ABORT, b"bye")]);
    assert!(matches!(
        served.options[..],
        [ClientOption::Refuse { reply: reply::ERR_INVALID, .. }, ClientOption::Abort,]
    ));
}

#[test]
fn long_options_are_passed_over_and_endless_ones_end_the_connection() {
    let served = negotiate(3, &[ask(99, &vec![0; MAX_OPTION + 1]), ask(option::LIST, b"")]);
    assert!(matches!(
        served.options[..],
        [ClientOption::Refuse { option: 99, reply: reply::ERR_TOO_BIG, .. }, ClientOption::List,]
    ));
    let length = MAX_OPTION_SKIP as u32 + 1;
    let header = [b"IHAVEOPT", &option::LIST.to_be_bytes()[..], &length.to_be_bytes()].concat();
    assert_eq!(negotiate(3, &[header]).error, Some(NegotiationError::TooLong { option: option::LIST, length }));
}

#[test]
fn info_of_the_default_export_may_ask_for_nothing() {
    let served = negotiate(3, &[ask(option::INFO, &[0; 6])]);
    let haggle = proto::nbd::Haggle { name: String::new(), block_size: false, wants_name: false };
    assert_eq!(served.options, [ClientOption::Info(haggle)]);
}

proptest! {
    #[test]
    fn arbitrary_streams_never_panic_and_splits_do_not_matter(
        name in prop::sample::select(vec!["list", "info", "missing", "io"]),
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        tail in vec(any::<u8>(), 0..100),
        piece in 1..300usize,
    ) {
        let mut stream = recorded(name).0;
        stream.truncate(1000);
        for (index, byte) in flips {
            let at = index.index(stream.len().min(200));
            stream[at] ^= byte;
        }
        stream.extend(tail);
        let (whole, pieces) = (serve(&stream, usize::MAX), serve(&stream, piece));
        prop_assert!(whole == pieces);
    }
}

#[test]
fn a_negotiation_begun_elsewhere_goes_on() {
    let mut stream = 3u32.to_be_bytes().to_vec();
    for (option, data) in
        [(option::LIST, vec![]), (99, vec![7; 100]), (98, vec![7; MAX_OPTION + 50]), (option::ABORT, vec![])]
    {
        let length = u32::try_from(data.len()).expect("32 bits");
        stream.extend([&b"IHAVEOPT"[..], &option.to_be_bytes(), &length.to_be_bytes(), &data].concat());
    }
    let take = |negotiation: &mut Negotiation, mut input: &[u8]| {
        std::iter::from_fn(|| negotiation.step(&mut input).expect("a good stream")).collect::<Vec<_>>()
    };
    let whole = take(&mut Negotiation::new(), &stream);
    assert_eq!(whole.len(), 4);
    for cut in 0..=stream.len() {
        let mut before = Negotiation::new();
        let mut seen = take(&mut before, &stream[..cut]);
        let begun = before.begun();
        let mut after = Negotiation::new();
        seen.extend(take(&mut after, &begun));
        assert_eq!(after.no_zeroes(), cut >= 4);
        seen.extend(take(&mut after, &stream[cut..]));
        assert_eq!(seen, whole, "cut at {cut}");
    }
}
