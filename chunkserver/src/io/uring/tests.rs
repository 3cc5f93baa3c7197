//! The ring against the kernel it runs on: files, sockets, wake-ups.

use super::*;
use crate::io::{Address, Errno, FileId, ListenerId, ShardId};
use socket2::{Domain, Socket, Type};
use std::io::{Read, Write};
use std::net::SocketAddrV4;

fn ring(files: Vec<RawFd>, listeners: Vec<RawFd>, shard: u16, doorbells: &Arc<Doorbells>) -> (Uring, Arc<Arena>) {
    ring_with(files, listeners, shard, doorbells, Arc::new(AtomicBool::new(true)))
}

fn ring_with(
    files: Vec<RawFd>,
    listeners: Vec<RawFd>,
    shard: u16,
    doorbells: &Arc<Doorbells>,
    touched: Arc<AtomicBool>,
) -> (Uring, Arc<Arena>) {
    let arena = Arena::new(4 << 20).unwrap();
    let setup = Setup {
        shard,
        files,
        listeners,
        arenas: vec![Arc::clone(&arena)],
        touched,
        entries: 64,
        recv_buffers: (8, 16 << 10),
        doorbells: Arc::clone(doorbells),
    };
    (Uring::new(setup).unwrap(), arena)
}

fn wait(io: &mut Uring, count: usize) -> Vec<Completion> {
    let mut out = Vec::new();
    let deadline = clock().after_ms(5_000);
    while out.len() < count && clock() < deadline {
        io.turn(deadline, &mut out);
    }
    assert_eq!(out.len(), count, "{out:?}");
    out
}

#[test]
fn disk_round_trip_vectored_and_synced() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let bells = Doorbells::new(1).unwrap();
    let (mut io, arena) = ring(vec![file.as_raw_fd()], vec![], 0, &bells);
    let bufs = (1..=3u8)
        .map(|i| {
            let mut buf = arena.alloc(BLOCK).unwrap();
            buf.fill(i);
            buf.freeze()
        })
        .collect();
    io.submit(Token(7), Op::Write { file: FileId(0), offset: 8192, bufs, dsync: true });
    assert!(matches!(wait(&mut io, 1)[0], Completion { token: Token(7), done: Done::Write(Ok(())) }));
    io.submit(Token(8), Op::Sync { file: FileId(0) });
    io.submit(Token(9), Op::Read { file: FileId(0), offset: 8192, buf: arena.alloc(3 * BLOCK).unwrap() });
    io.submit(Token(10), Op::Read { file: FileId(0), offset: (1 << 20) - 4096, buf: arena.alloc(8192).unwrap() });
    for c in wait(&mut io, 3) {
        match (c.token.0, c.done) {
            (8, Done::Sync(result)) => result.unwrap(),
            (9, Done::Read { buf, result }) => {
                result.unwrap();
                assert!(buf.chunks(BLOCK).zip(1..).all(|(block, i)| block.iter().all(|&b| b == i)));
            }
            (10, Done::Read { result, .. }) => assert_eq!(result, Err(Errno(libc::EIO)), "short reads are errors"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(arena.free_bytes(), 4 << 20, "every buffer came back");
}

#[test]
fn memory_is_registered_when_it_is_touched_and_of_use_before() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let (bells, touched) = (Doorbells::new(1).unwrap(), Arc::new(AtomicBool::new(false)));
    let (mut io, arena) = ring_with(vec![file.as_raw_fd()], vec![], 0, &bells, Arc::clone(&touched));
    for round in 0..3u8 {
        assert_eq!(io.fixed, round == 2);
        let mut buf = arena.alloc(BLOCK).unwrap();
        buf.fill(round + 1);
        // While it is touched from elsewhere, the contents stay.
        std::thread::scope(|scope| {
            let _ = scope.spawn(|| arena.populate());
        });
        let bufs = [buf.freeze()].into_iter().collect();
        io.submit(Token(1), Op::Write { file: FileId(0), offset: 4096, bufs, dsync: false });
        assert!(matches!(wait(&mut io, 1)[0].done, Done::Write(Ok(()))));
        touched.store(round > 0, Ordering::Release);
        io.submit(Token(2), Op::Read { file: FileId(0), offset: 4096, buf: arena.alloc(BLOCK).unwrap() });
        let Done::Read { buf, result } = wait(&mut io, 1).remove(0).done else { panic!() };
        result.unwrap();
        assert!(buf.iter().all(|&byte| byte == round + 1));
    }
}

#[test]
fn sockets_accept_receive_send_close() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let bells = Doorbells::new(1).unwrap();
    let (mut io, arena) = ring(vec![], vec![listener.as_raw_fd()], 0, &bells);
    io.submit(Token(1), Op::Accept { listener: ListenerId(0) });
    let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let Done::Accept(Ok(conn)) = wait(&mut io, 1).remove(0).done else { panic!() };
    io.submit(Token(2), Op::Recv { conn });
    client.write_all(b"hello").unwrap();
    let Done::Recv(Ok(data)) = wait(&mut io, 1).remove(0).done else { panic!() };
    assert_eq!(&*data, b"hello");
    drop(data);
    io.submit(Token(3), Op::RecvInto { conn, buf: arena.alloc(BLOCK).unwrap(), filled: 5 });
    client.write_all(b" world").unwrap();
    let Done::RecvInto { buf, result } = wait(&mut io, 1).remove(0).done else { panic!() };
    assert_eq!((result, &buf[5..11]), (Ok(6), &b" world"[..]));
    let big = Bytes::from(vec![9u8; 3 << 20]);
    io.submit(Token(4), Op::Send { conn, bufs: [Bytes::from_static(b"x"), big.clone()].into_iter().collect() });
    let reader = std::thread::spawn(move || {
        let mut all = vec![0; 1 + (3 << 20)];
        client.read_exact(&mut all).unwrap();
        (client, all)
    });
    assert!(matches!(wait(&mut io, 1)[0].done, Done::Send(Ok(()))));
    let (client, all) = reader.join().unwrap();
    assert!(all[0] == b'x' && all[1..] == big[..]);
    io.submit(Token(5), Op::Recv { conn });
    io.submit(Token(6), Op::Close { conn });
    for c in wait(&mut io, 2) {
        match c.done {
            Done::Recv(data) => assert!(data.is_ok_and(|d| d.is_empty())),
            Done::Close => assert_eq!(c.token, Token(6)),
            other => panic!("{other:?}"),
        }
    }
    drop(client);
}

#[test]
fn the_rest_of_a_send_cut_short_by_a_close_reaches_nobody_else() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let bells = Doorbells::new(1).unwrap();
    let (mut io, _arena) = ring(vec![], vec![listener.as_raw_fd()], 0, &bells);
    let address = listener.local_addr().unwrap();
    let connect = |io: &mut Uring| {
        io.submit(Token(1), Op::Accept { listener: ListenerId(0) });
        let client = std::net::TcpStream::connect(address).unwrap();
        let Done::Accept(Ok(conn)) = wait(io, 1).remove(0).done else { panic!() };
        (client, conn)
    };
    for _ in 0..5 {
        let (slow, first) = connect(&mut io);
        let secret = Bytes::from(vec![7u8; 32 << 20]); // more than the sockets hold
        io.submit(Token(2), Op::Send { conn: first, bufs: [secret].into_iter().collect() });
        let mut none = Vec::new();
        io.turn(clock().after_ms(5), &mut none);
        assert!(none.is_empty());
        let mut other = std::net::TcpStream::connect(address).unwrap();
        io.submit(Token(3), Op::Close { conn: first });
        let mut out = Vec::new();
        io.turn(clock(), &mut out);
        std::thread::sleep(std::time::Duration::from_millis(20));
        // The next client gets the number.
        let taken = listener.accept().unwrap().0;
        let number = rustix::io::fcntl_dupfd_cloexec(&taken, first.0).unwrap();
        for _ in 0..20 {
            io.turn(clock().after_ms(1), &mut out);
        }
        assert_eq!(out.len(), 2, "{out:?}");
        for c in out {
            assert!(matches!(c.done, Done::Close | Done::Send(Err(_))));
        }
        drop((taken, number, slow));
        let mut got = Vec::new();
        other.read_to_end(&mut got).unwrap();
        assert!(got.is_empty(), "{} bytes of somebody else's reply", got.len());
    }
}

#[test]
fn shards_and_foreign_threads_wake_a_turn() {
    let bells = Doorbells::new(2).unwrap();
    let (mut a, _arena) = ring(vec![], vec![], 0, &bells);
    let other = Arc::clone(&bells);
    let thread = std::thread::spawn(move || {
        let (mut b, _arena) = ring(vec![], vec![], 1, &other);
        b.submit(Token(0), Op::Wake { shard: ShardId(0) });
        let mut out = Vec::new();
        b.turn(clock(), &mut out);
        other.ring(0);
        while out.is_empty() {
            b.turn(Instant::FAR, &mut out);
        }
        assert!(matches!(out[0].done, Done::Wake));
    });
    let mut woken = Vec::new();
    while woken.len() < 2 {
        a.turn(Instant::FAR, &mut woken); // one from the ring of the other shard, one from its thread
    }
    assert!(woken.iter().all(|c| matches!(c.done, Done::Wake)));
    while !thread.is_finished() {
        a.submit(Token(0), Op::Wake { shard: ShardId(1) });
        let mut out = Vec::new();
        a.turn(clock().after_ms(5), &mut out);
    }
    thread.join().unwrap();
}

fn connected(io: &mut Uring, address: Address) -> Result<ConnId, Errno> {
    io.submit(Token(21), Op::Connect { address, timeout_ms: 200 });
    match wait(io, 1).remove(0) {
        Completion { token: Token(21), done: Done::Connect(result) } => result,
        other => panic!("{other:?}"),
    }
}

fn local(listener: &std::net::TcpListener) -> Address {
    Address::Tcp(std::net::Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port())
}

#[test]
fn connections_are_opened_over_tcp_and_unix_sockets() {
    let bells = Doorbells::new(1).unwrap();
    let (mut io, _arena) = ring(vec![], vec![], 0, &bells);
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let conn = connected(&mut io, local(&tcp)).unwrap();
    let (mut accepted, _) = tcp.accept().unwrap();
    io.submit(Token(2), Op::Send { conn, bufs: [Bytes::from_static(b"hello")].into_iter().collect() });
    io.submit(Token(3), Op::Recv { conn });
    let mut read = [0; 5];
    let Done::Send(Ok(())) = wait(&mut io, 1).remove(0).done else { panic!() };
    accepted.read_exact(&mut read).unwrap();
    accepted.write_all(&read).unwrap();
    let Done::Recv(Ok(data)) = wait(&mut io, 1).remove(0).done else { panic!() };
    assert_eq!((&read, &*data), (b"hello", &b"hello"[..]));
    io.submit(Token(4), Op::Close { conn });
    wait(&mut io, 1);
    assert_eq!(accepted.read(&mut read).unwrap(), 0);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let unix = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let conn = connected(&mut io, Address::Unix(path)).unwrap();
    let (mut accepted, _) = unix.accept().unwrap();
    io.submit(Token(5), Op::Send { conn, bufs: [Bytes::from_static(b"hello")].into_iter().collect() });
    wait(&mut io, 1);
    accepted.read_exact(&mut read).unwrap();
}

#[test]
fn connections_that_fail_leave_no_descriptor_behind() {
    let bells = Doorbells::new(1).unwrap();
    let (mut io, _arena) = ring(vec![], vec![], 0, &bells);
    let closed = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        local(&listener)
    };
    assert_eq!(connected(&mut io, closed), Err(Errno(libc::ECONNREFUSED)));
    assert_eq!(connected(&mut io, Address::Unix("/nowhere/socket".into())), Err(Errno(libc::ENOENT)));
    let long = Address::Unix("x".repeat(1000).into());
    assert_eq!(connected(&mut io, long), Err(Errno(libc::EINVAL)), "no socket address at all");

    // Nobody accepts, and the queue of a listener that wants none is soon full: the next one waits for ever.
    let full = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    full.bind(&SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    full.listen(0).unwrap();
    let port = full.local_addr().unwrap().as_socket().unwrap().port();
    let mut open = Vec::new();
    let error = loop {
        match connected(&mut io, Address::Tcp(std::net::Ipv4Addr::LOCALHOST, port)) {
            Ok(conn) => open.push(conn),
            Err(error) => break error,
        }
        assert!(open.len() < 10, "the queue never fills");
    };
    assert_eq!(error, Errno(libc::ETIMEDOUT));
    assert_eq!(io.in_flight, 0);
}
