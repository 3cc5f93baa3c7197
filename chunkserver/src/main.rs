//! `chunkserver`: one binary, its roles by subcommand.

use anyhow::{Context, bail};
use bytesize::ByteSize;
use chunkserver::config::Config;
use chunkserver::control::ctl::{self, Command as Ctl};
use chunkserver::control::{disk, inspect, remote};
use chunkserver::serve;
use clap::{Args, Parser, Subcommand};
use copyset::PeerId;
use raftlog::CopysetId;
use serde_json::Value;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

/// An io_uring block-storage data node that speaks Curve's chunkserver protocol.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prepare a disk file or block device: superblock, log, metadata, zero-written chunk slots
    Format(FormatArgs),
    /// Serve a formatted disk, or, without one, export volumes of other servers
    Serve(ServeArgs),
    /// Volumes of a running server
    Volume {
        #[command(flatten)]
        to: Target,
        #[command(subcommand)]
        command: VolumeCommand,
    },
    /// Copysets of a running server
    Copyset {
        #[command(flatten)]
        to: Target,
        #[command(subcommand)]
        command: CopysetCommand,
    },
    /// A running server and its shards
    Status {
        #[command(flatten)]
        to: Target,
    },
    /// Replace a running server's process by a new one, without closing its connections
    Upgrade {
        #[command(flatten)]
        to: Target,
        /// Program to start [default: the path the running one was started from]
        #[arg(long)]
        binary: Option<PathBuf>,
        /// How long the new process may take to recover, milliseconds; then the old one goes on
        #[arg(long, default_value_t = 10_000)]
        timeout_ms: u64,
    },
    /// Change the log filter of a running server, for example `debug` or `info,chunkserver::shard=trace`
    LogLevel {
        #[command(flatten)]
        to: Target,
        /// New filter
        filter: String,
    },
    /// Look at a disk without a server: superblock, pool, copysets, log. Read-only, also while it is being served
    Inspect {
        /// Disk file or block device
        disk: PathBuf,
        /// JSON instead of text
        #[arg(long)]
        json: bool,
    },
}

/// Which server, and how to show what it says.
#[derive(Args)]
struct Target {
    /// Command socket of the server
    #[arg(long = "ctl", visible_alias = "ctl-socket", default_value = "ctl.sock", global = true)]
    ctl: PathBuf,
    /// JSON instead of text
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Args)]
struct FormatArgs {
    /// File (made if missing) or block device
    #[arg(long, visible_alias = "device")]
    data: PathBuf,
    /// Size of the file, for example 4GiB; a block device is used whole
    #[arg(long)]
    size: Option<ByteSize>,
    /// Shards, one per core that shall serve; fixed for the life of the disk
    #[arg(long, default_value_t = default_shards())]
    shards: u16,
    /// Size of a chunk
    #[arg(long, default_value = "16MiB")]
    chunk_size: ByteSize,
    /// Log of each shard [default: a sixteenth of the disk, 64MiB to 512MiB]
    #[arg(long)]
    log_size: Option<ByteSize>,
    /// Lab: do not write the slots; the file system allocates while serving
    #[arg(long)]
    sparse: bool,
    /// Overwrite whatever is there
    #[arg(long)]
    force: bool,
    /// JSON instead of text
    #[arg(long)]
    json: bool,
}

fn default_shards() -> u16 {
    std::thread::available_parallelism().map_or(1, |n| (n.get() - 1).clamp(1, 256) as u16)
}

#[derive(Args)]
struct ServeArgs {
    /// Configuration file (TOML); flags below override it
    #[arg(long)]
    config: Option<PathBuf>,
    /// Disk file or block device; none: only export volumes whose copysets are on other servers
    #[arg(long)]
    data: Option<PathBuf>,
    /// Address of the RPC port
    #[arg(long)]
    listen: Option<SocketAddr>,
    /// Unix socket of the commands
    #[arg(long)]
    ctl_socket: Option<PathBuf>,
    /// File that describes the volumes
    #[arg(long)]
    catalog: Option<PathBuf>,
    /// Unix socket for NBD
    #[arg(long)]
    nbd_socket: Option<PathBuf>,
    /// TCP address for NBD
    #[arg(long)]
    nbd_listen: Option<SocketAddr>,
    /// Unix socket for NEBD; see `[nebd]` for the rest
    #[arg(long)]
    nebd_socket: Option<PathBuf>,
    /// NEBD as a `nebd-server.conf` of Curve says
    #[arg(long)]
    nebd_conf: Option<PathBuf>,
    /// Payload bytes per shard that may wait for write-back
    #[arg(long)]
    dirty_limit: Option<ByteSize>,
    /// Log filter
    #[arg(long)]
    log: Option<String>,
    /// Take over from the process that started this one; standard input is the way to it
    #[arg(long, hide = true)]
    take_over: bool,
}

#[derive(Subcommand)]
enum VolumeCommand {
    /// Create a volume
    Create {
        /// Name
        #[arg(long)]
        name: String,
        /// Size, for example 2GiB
        #[arg(long)]
        size: ByteSize,
        /// Copysets it is spread over: `POOL:FIRST-LAST` or `POOL:ID,POOL:ID` [default: all of the server]
        #[arg(long)]
        copysets: Option<String>,
        /// Servers that have the copysets, `ip:port[:index]` each: where to look for their leaders [default: as this server's
        /// own replicas know them]
        #[arg(long, value_delimiter = ',', requires = "copysets")]
        peers: Vec<PeerId>,
        /// Id of a volume that another server exports too, and describes with the same options
        #[arg(long, requires = "copysets")]
        id: Option<u32>,
        /// Size of a chunk, as the servers' disks are formatted [default: this server's, or 16MiB if it has no disk]
        #[arg(long)]
        chunk_size: Option<ByteSize>,
        /// Bytes written to one chunk before the next one's turn
        #[arg(long, default_value = "0")]
        stripe_unit: ByteSize,
        /// Chunks side by side
        #[arg(long, default_value_t = 0)]
        stripe_count: u32,
    },
    /// List volumes
    List,
    /// Delete a volume and its data
    Delete {
        /// Name
        #[arg(long)]
        name: String,
    },
    /// Make a volume larger
    Resize {
        /// Name
        #[arg(long)]
        name: String,
        /// New size
        #[arg(long)]
        size: ByteSize,
    },
}

#[derive(Subcommand)]
enum CopysetCommand {
    /// Create copysets: with this server as the only member, or on all of `--peers`
    Create {
        /// Logical pool
        #[arg(long, default_value_t = 1)]
        pool: u32,
        /// First id
        #[arg(long, default_value_t = 1)]
        first: u32,
        /// How many
        #[arg(long, default_value_t = 1)]
        count: u32,
        /// Members, `ip:port[:index]` each; all of them are asked, over their RPC ports
        #[arg(long, value_delimiter = ',')]
        peers: Vec<PeerId>,
        /// Servers that get a replica without members each, to be made one by `add-peer` or `change-peers`
        #[arg(long, value_delimiter = ',', conflicts_with = "peers")]
        empty_on: Vec<PeerId>,
    },
    /// List copysets
    List,
    /// Show one, as this server or `--node` sees it
    Status {
        /// `POOL:ID`
        copyset: String,
        /// RPC address of the server to ask
        #[arg(long)]
        node: Option<SocketAddr>,
    },
    /// Make a server a member
    AddPeer {
        #[command(flatten)]
        on: Remote,
        /// New member, `ip:port[:index]`; it must have been created there, with no members
        peer: PeerId,
    },
    /// Make a server a member no more
    RemovePeer {
        #[command(flatten)]
        on: Remote,
        /// Member
        peer: PeerId,
    },
    /// Make these the members
    ChangePeers {
        #[command(flatten)]
        on: Remote,
        /// Members
        #[arg(required = true, value_delimiter = ',')]
        peers: Vec<PeerId>,
    },
    /// Hand leadership over
    TransferLeader {
        #[command(flatten)]
        on: Remote,
        /// New leader [default: the member that is furthest]
        peer: Option<PeerId>,
    },
    /// Make what a server has applied durable outside its log
    Snapshot {
        #[command(flatten)]
        on: Remote,
    },
    /// Force one server's replica to be the only member, leader or not: when the others are gone for good. What only they had is lost
    ResetPeer {
        #[command(flatten)]
        on: Remote,
        /// That server
        peer: PeerId,
    },
    /// Take one that was deleted on this server out of the trash
    Restore {
        /// `POOL:ID`
        copyset: String,
    },
    /// Take this server's or `--node`'s replica of one away, with its data
    Delete {
        /// `POOL:ID`
        copyset: String,
        /// RPC address of the server to ask; it does not know whether a volume uses the copyset
        #[arg(long)]
        node: Option<SocketAddr>,
    },
}

/// A copyset and one of its servers.
#[derive(Args)]
struct Remote {
    /// `POOL:ID`
    copyset: String,
    /// RPC address of any of its servers
    #[arg(long)]
    node: SocketAddr,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("chunkserver: {}", explain(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes in one line. Most of our errors say their cause themselves; none is said twice.
fn explain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Format(args) => format(&args)?,
        Command::Serve(args) if args.take_over => return serve::take_over(|| configure(args)),
        Command::Serve(args) => return serve::run(&configure(args)?),
        Command::Volume { to, command } => ask(&to, &volume_command(command)?)?,
        Command::Copyset { to, command } => show(&copyset(&to, command)?, to.json),
        Command::Status { to } => ask(&to, &Ctl::Status)?,
        Command::Upgrade { to, binary, timeout_ms } => ask(&to, &Ctl::Upgrade { binary, timeout_ms })?,
        Command::LogLevel { to, filter } => ask(&to, &Ctl::LogLevel { filter })?,
        Command::Inspect { disk, json } => show(&inspect::inspect(&disk)?, json),
    }
    Ok(ExitCode::SUCCESS)
}

fn format(args: &FormatArgs) -> anyhow::Result<()> {
    let exists = args.data.exists();
    if args.size.is_none() && !exists {
        bail!("{}: give --size to make a new file", args.data.display());
    }
    let what = disk::Format {
        path: args.data.clone(),
        size: args.size.map(|s| s.0),
        shards: args.shards,
        chunk_size: u32::try_from(args.chunk_size.0).context("--chunk-size")?,
        log_size: args.log_size.map(|s| s.0),
        sparse: args.sparse,
        force: args.force,
    };
    let bar = indicatif::ProgressBar::new(0);
    bar.set_style(indicatif::ProgressStyle::with_template(
        "{bar:40} {bytes}/{total_bytes}  {binary_bytes_per_sec}  {elapsed} gone, {eta} to go",
    )?);
    let layout = disk::format(&what, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    show(&inspect::layout_json(&layout), args.json);
    Ok(())
}

fn configure(args: ServeArgs) -> anyhow::Result<Config> {
    let mut config = match &args.config {
        Some(path) => Config::load(path)?,
        None => Config::default(),
    };
    config.data = args.data.or(config.data);
    if let Some(listen) = args.listen {
        config.listen = listen;
    }
    if let Some(limit) = args.dirty_limit {
        config.dirty_limit = limit;
    }
    if let Some(log) = args.log {
        config.log = log;
    }
    config.ctl_socket = args.ctl_socket.or(config.ctl_socket);
    config.catalog = args.catalog.or(config.catalog);
    config.nbd_socket = args.nbd_socket.or(config.nbd_socket);
    config.nbd_listen = args.nbd_listen.or(config.nbd_listen);
    if args.nebd_socket.is_some() || args.nebd_conf.is_some() {
        let nebd = config.nebd.get_or_insert_default();
        nebd.conf = args.nebd_conf.or(nebd.conf.take());
        nebd.socket = args.nebd_socket.unwrap_or(std::mem::take(&mut nebd.socket));
    }
    config.check()?;
    Ok(config)
}

fn volume_command(command: VolumeCommand) -> anyhow::Result<Ctl> {
    Ok(match command {
        VolumeCommand::Create { name, size, copysets, peers, id, chunk_size, stripe_unit, stripe_count } => {
            Ctl::VolumeCreate {
                name,
                size: size.0,
                copysets: copysets.as_deref().map(parse_copysets).transpose()?.unwrap_or_default(),
                peers: peers.iter().map(ToString::to_string).collect(),
                id,
                chunk_size: chunk_size.map(|size| u32::try_from(size.0)).transpose().context("--chunk-size")?,
                stripe_unit: u32::try_from(stripe_unit.0).context("--stripe-unit")?,
                stripe_count,
            }
        }
        VolumeCommand::List => Ctl::VolumeList,
        VolumeCommand::Delete { name } => Ctl::VolumeDelete { name },
        VolumeCommand::Resize { name, size } => Ctl::VolumeResize { name, size: size.0 },
    })
}

fn copyset(to: &Target, command: CopysetCommand) -> anyhow::Result<Value> {
    let local = |command: Ctl| Ok(ctl::call(&to.ctl, &command)?);
    let change = |on: &Remote, change| Ok(remote::change(on.node, one(&on.copyset)?, &change)?);
    match command {
        CopysetCommand::Create { pool, first, count, empty_on, .. } if !empty_on.is_empty() => {
            Ok(remote::create_empty(&empty_on, pool, first, count)?)
        }
        CopysetCommand::Create { pool, first, count, peers, .. } if peers.is_empty() => {
            local(Ctl::CopysetCreate { pool, first, count })
        }
        CopysetCommand::Create { pool, first, count, peers, .. } => Ok(remote::create(&peers, pool, first, count)?),
        CopysetCommand::List => local(Ctl::CopysetList),
        CopysetCommand::Status { copyset, node: Some(node) } => Ok(remote::status(node, one(&copyset)?)?),
        CopysetCommand::Status { copyset, node: None } => {
            let id = one(&copyset)?;
            local(Ctl::CopysetStatus { pool: id.pool(), copyset: id.copyset() })
        }
        CopysetCommand::AddPeer { on, peer } => change(&on, remote::Change::Add(peer)),
        CopysetCommand::RemovePeer { on, peer } => change(&on, remote::Change::Remove(peer)),
        CopysetCommand::ChangePeers { on, peers } => change(&on, remote::Change::Set(peers)),
        CopysetCommand::TransferLeader { on, peer } => {
            change(&on, remote::Change::Transfer(peer.unwrap_or(PeerId::NONE)))
        }
        CopysetCommand::Snapshot { on } => Ok(remote::snapshot(on.node, one(&on.copyset)?)?),
        CopysetCommand::ResetPeer { on, peer } => Ok(remote::reset(on.node, one(&on.copyset)?, peer)?),
        CopysetCommand::Restore { copyset } => {
            let id = one(&copyset)?;
            local(Ctl::CopysetRestore { pool: id.pool(), copyset: id.copyset() })
        }
        CopysetCommand::Delete { copyset, node: Some(node) } => Ok(remote::delete(node, one(&copyset)?)?),
        CopysetCommand::Delete { copyset, node: None } => {
            let id = one(&copyset)?;
            local(Ctl::CopysetDelete { pool: id.pool(), copyset: id.copyset() })
        }
    }
}

fn one(text: &str) -> anyhow::Result<CopysetId> {
    match parse_copysets(text)?.as_slice() {
        &[(pool, copyset)] => Ok(CopysetId::new(pool, copyset)),
        _ => bail!("{text:?} is not one copyset; write POOL:ID"),
    }
}

/// `1:1-8,2:5` as pairs.
fn parse_copysets(text: &str) -> anyhow::Result<Vec<(u32, u32)>> {
    let mut pairs = Vec::new();
    for part in text.split(',') {
        let (pool, ids) =
            part.split_once(':').with_context(|| format!("{part:?}: write POOL:ID or POOL:FIRST-LAST"))?;
        let (first, last) = ids.split_once('-').unwrap_or((ids, ids));
        let (pool, first, last): (u32, u32, u32) = (pool.trim().parse()?, first.trim().parse()?, last.trim().parse()?);
        if first > last || last - first >= 1 << 16 {
            bail!("{part:?}: not a range of at most 65536 ids");
        }
        pairs.extend((first..=last).map(|id| (pool, id)));
    }
    Ok(pairs)
}

fn ask(to: &Target, command: &Ctl) -> anyhow::Result<()> {
    show(&ctl::call(&to.ctl, command)?, to.json);
    Ok(())
}

/// JSON as it is, or as indented `key: value` lines and tables.
fn show(value: &Value, json: bool) {
    if json {
        println!("{value:#}");
    } else {
        print!("{}", chunkserver::control::text::render(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let missing = std::path::Path::new("/nonexistent/disk");
        let error = disk::Disk::open(missing, std::time::Duration::ZERO).unwrap_err();
        let text = explain(&error.into());
        assert_eq!(text.matches("No such file").count(), 1, "{text}");
        let plain = anyhow::Error::new(std::io::Error::other("inner")).context("outer");
        assert_eq!(explain(&plain), "outer: inner");
    }

    #[test]
    fn copysets_by_range_and_list() {
        assert_eq!(parse_copysets("1:2-4,3:9").unwrap(), [(1, 2), (1, 3), (1, 4), (3, 9)]);
        for bad in ["", "1", "1:", "1:4-2", "x:1", "1:0-70000"] {
            assert!(parse_copysets(bad).is_err(), "{bad}");
        }
    }
}
