//! The new process of a hand-over: prepare all that needs no disk, receive what the old one has, recover, serve.
//!
//! Promises: before the old one has committed itself no byte is received from a client or sent to one, so it can go on
//! if this process fails. When it dies instead of committing itself, having sent everything, it cannot go on: then this
//! process does.

use super::nebd::{Lock, Prepared};
use super::sockets::has_path;
use super::{
    Client, Config, Crew, Disk, Event, Node, Parts, Socket, Stage, raise_fd_limit, serve, start_logging, uring,
};
use crate::control::nebd;
use crate::handover::{Channel, ChannelError, Message, Offer, PROTOCOL, Received};
use crate::volume::catalog::CatalogStore;
use anyhow::{Context, bail};
use copyset::PeerId;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// The old process says who it is at once.
const OFFER_WAIT: Duration = Duration::from_secs(10);
/// How long the lock may stay shared: a command that looks at the disk may hold a share.
const CLAIM_WAIT: Duration = Duration::from_secs(600);

/// The process this one takes over from.
pub(super) struct Predecessor {
    channel: Channel,
    offer: Offer,
    sockets: Vec<OwnedFd>,
    /// Of NEBD's socket, if it does not have that.
    nebd_lock: Option<Lock>,
    pause_us: u64,
}

/// Serve in the place of the process that started this one; standard input is the way to it. A configuration that is
/// refused is said to it, too.
///
/// # Errors
/// Whatever prevents it, in one line; the old process has been told, and goes on.
pub fn take_over(configure: impl FnOnce() -> anyhow::Result<Config>) -> anyhow::Result<ExitCode> {
    let input = std::io::stdin().as_fd().try_clone_to_owned().context("standard input")?;
    let mut channel = Channel::new(input.into());
    let Received { message, descriptors, .. } =
        channel.receive(Some(OFFER_WAIT)).context("nobody hands over on standard input")?;
    let Message::Offer(offer) = message else { bail!("nobody hands over on standard input") };
    // The predecessor is told by whoever fails; a second channel to the same socket serves for that.
    let mut teller = Channel::new(std::io::stdin().as_fd().try_clone_to_owned().context("standard input")?.into());
    let predecessor = Predecessor { channel, offer, sockets: descriptors, nebd_lock: None, pause_us: 0 };
    let result = begin(configure, predecessor);
    if let Err(error) = &result {
        let _ = teller.say(&Message::Refused { why: format!("{error:#}") });
    }
    result
}

fn begin(configure: impl FnOnce() -> anyhow::Result<Config>, predecessor: Predecessor) -> anyhow::Result<ExitCode> {
    if predecessor.offer.protocol != PROTOCOL {
        let (old, version) = (predecessor.offer.protocol, &predecessor.offer.version);
        bail!("version {version} hands over by protocol {old}, this one takes over by protocol {PROTOCOL}");
    }
    let config = configure()?;
    let set_log = start_logging(&config.log)?;
    uring::probe()?;
    raise_fd_limit();
    let disk = config.data.as_deref().map(Disk::open_unlocked).transpose()?;
    serve(&config, disk.as_ref(), set_log, Some(predecessor))
}

impl Predecessor {
    /// Its listening sockets. If NEBD's is not among them, nobody else has it either.
    pub(super) fn take_sockets(&mut self, config: &Config) -> anyhow::Result<Vec<Socket>> {
        let sockets: Vec<Socket> = std::mem::take(&mut self.sockets).into_iter().map(Socket::from).collect();
        let new = config.nebd.as_ref().filter(|nebd| !has_path(&sockets, &nebd.socket));
        self.nebd_lock = new.map(|nebd| Lock::of_new(&nebd.socket)).transpose()?;
        Ok(sockets)
    }

    /// It is the server of this disk, and who we shall be.
    pub(super) fn check(&self, disk: Option<&Disk>, peer: PeerId) -> anyhow::Result<()> {
        let same_uuid = disk.is_none_or(|disk| disk.layout.uuid == self.offer.uuid);
        if self.offer.disk != disk.map(Disk::identity).transpose().context("stat")? || !same_uuid {
            bail!("data: another disk than the running server's; stop and start instead");
        }
        if self.offer.peer != peer.0 {
            bail!("listen: another address than the running server's; stop and start instead");
        }
        Ok(())
    }

    /// A process without a disk goes on under the other's number.
    pub(super) fn keep_identity(&self, disk: Option<&Disk>, node: &mut Node) {
        if disk.is_none() {
            node.id = self.offer.uuid;
        }
    }

    /// Take over: when this returns, nobody else serves, and our shards do.
    pub(super) fn succeed(
        &mut self,
        parts: &Parts<'_>,
        crew: &Crew,
        happened: &Receiver<Event>,
    ) -> anyhow::Result<(CatalogStore, Option<(nebd::Setup, Lock)>)> {
        let mut up = 0;
        while up < parts.node.shards {
            match happened.recv()? {
                Event::Up => up += 1,
                other => refuse_to_go_on(&other)?,
            }
        }
        let version = env!("CARGO_PKG_VERSION").into();
        self.channel.say(&Message::Prepared { protocol: PROTOCOL, pid: std::process::id(), version })?;
        let (clients, since_ns) = self.receive(parts)?;
        let count = clients.len();
        if let (Some(disk), Some(path)) = (parts.disk, &parts.config.data) {
            disk.join(path)?;
        }
        let catalog = CatalogStore::open(&parts.config.catalog())?;
        let prepared = Prepared::join(parts.config, self.nebd_lock.take())?;
        let nebd = prepared.map(|prepared| prepared.start(parts.node.shards, parts.bells));
        crew.go(clients, &catalog.shared(), nebd.as_ref().map(|n| &n.0.server));
        while !parts.pause.is_reported() {
            match happened.recv_timeout(Duration::from_millis(1)) {
                Ok(event) => refuse_to_go_on(&event)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the shards are gone"),
            }
        }
        self.channel.say(&Message::Ready)?;
        match self.channel.receive(None).map(|received| received.message) {
            Ok(Message::Commit) => {}
            Err(ChannelError::Closed) => tracing::warn!("the old process died; going on with what it left"),
            Ok(other) => bail!("instead of an order to serve: {other:?}"),
            Err(error) => return Err(error.into()),
        }
        parts.pause.set(Stage::Serve);
        parts.ring_all();
        self.pause_us = uring::clock().0.saturating_sub(since_ns) / 1000;
        let pause_ms = self.pause_us as f64 / 1000.0;
        tracing::info!(pause_ms, connections = count, from = %self.offer.version, "took over");
        Ok((catalog, nebd))
    }

    /// Its connections, until it says that these were all.
    fn receive(&mut self, parts: &Parts<'_>) -> anyhow::Result<(Vec<Client>, u64)> {
        let mut clients = Vec::new();
        loop {
            let Received { message, data, descriptors } = self.channel.receive(None)?;
            match message {
                Message::Connection { session, input } => {
                    let [socket] = <[OwnedFd; 1]>::try_from(descriptors)
                        .map_err(|all| anyhow::anyhow!("a connection with {} sockets", all.len()))?;
                    let Some((input, unsent)) = data.split_at_checked(input) else {
                        bail!("a connection with less input than it says");
                    };
                    let (input, unsent) = (input.to_vec(), unsent.to_vec());
                    clients.push(Client { socket, session, input, unsent });
                    if clients.len() > crate::limits::CONNECTIONS_MAX {
                        bail!("more connections than a server may have");
                    }
                }
                Message::Fences { epochs } if epochs.len() <= crate::limits::FENCES_MAX => {
                    parts.shared.fences().learn(epochs);
                }
                Message::End { connections, since_ns } if connections == clients.len() => {
                    return Ok((clients, since_ns));
                }
                other => bail!("in the middle of a hand-over: {other:?}"),
            }
        }
    }

    /// Say that we serve, now that nothing can prevent it; and be alone with the disk when the old process is gone.
    pub(super) fn confirm(mut self, config: &Config, disk: Option<&Disk>, nebd: Option<&Lock>) -> anyhow::Result<()> {
        let copy =
            |disk: &Disk| std::io::Result::Ok(Disk { file: disk.file.try_clone()?, layout: disk.layout.clone() });
        let disk = disk.map(copy).transpose().context("the disk")?.zip(config.data.clone());
        let nebd = nebd.map(Lock::try_clone).transpose().context("NEBD's lock")?;
        let (say, said) = std::sync::mpsc::channel::<Channel>();
        std::thread::Builder::new().name("claim".into()).spawn(move || {
            let Ok(mut channel) = said.recv() else { return };
            channel.wait_closed();
            if let Some((disk, path)) = disk
                && let Err(error) = disk.claim(&path, CLAIM_WAIT)
            {
                tracing::error!(%error, "the disk's lock is shared with somebody; leaving");
                std::process::exit(i32::from(super::EXIT_DISK_FAILED));
            }
            if let Some(lock) = nebd
                && let Err(error) = lock.claim(CLAIM_WAIT)
            {
                tracing::error!(%error, "the lock of NEBD's socket is shared with somebody; leaving");
                std::process::exit(i32::from(super::EXIT_DISK_FAILED));
            }
        })?;
        let _ = self.channel.say(&Message::Serving { pause_us: self.pause_us }); // or it is dead already
        let _ = say.send(self.channel);
        Ok(())
    }
}

/// What may happen to a process that does not serve yet, and ends it.
fn refuse_to_go_on(event: &Event) -> anyhow::Result<()> {
    match event {
        Event::Up => Ok(()),
        Event::Shard(_, Err(why)) => bail!("{why}"),
        Event::Shard(shard, Ok(_)) => bail!("shard {shard} has ended"),
        Event::Signal(number) => bail!("signal {number}"),
        Event::Upgrade(_) => bail!("an order to hand over"),
    }
}
