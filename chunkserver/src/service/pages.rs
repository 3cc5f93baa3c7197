//! The builtin HTTP pages: `/health /version /status /vars /metrics /raft_stat /flags`. Always plain text.
//!
//! Pages that show what only the shards know ask all of them first, so a page never looks into a shard's state.

use super::table::{self, RAFT_STAT};
use super::{Context, Handled, Pending, Step, raft_stat};
use crate::io::Instant;
use crate::metrics::text::{Var, Vars, underscored};
use crate::metrics::{Counter, OpKind};
use crate::rpc::{HttpReply, HttpRequest, Out};
use crate::shard::request::{AdminOp, CopysetStatus, Reply, ReplyData, ShardStatus};
use proto::code;
use std::fmt::Write as _;

/// A page that waits for the shards.
#[derive(Debug)]
pub(super) struct Waiting {
    request: HttpRequest,
    page: Page,
}

#[derive(Debug)]
enum Page {
    /// `/vars` (with patterns) or `/metrics`; first the shards' state, then the copysets.
    Vars(Wanted, Option<Vec<ShardStatus>>),
    /// `/raft_stat`, perhaps of one group.
    RaftStat(Option<u64>),
}

#[derive(Debug)]
enum Wanted {
    Text(Option<String>),
    Prometheus,
}

const ENOMETHOD: u32 = code::ENOMETHOD as u32;
const EPERM: u32 = code::errno::EPERM as u32;
const EREQUEST: u32 = code::EREQUEST as u32;
const ELOGOFF: u32 = code::ELOGOFF as u32;

fn answer(request: &HttpRequest, reply: &HttpReply) -> Handled {
    Handled::Reply(Out { head: reply.encode(request), close: !request.keep_alive, http: true, ..Out::default() })
}

pub(super) fn handle(ctx: &Context, now: Instant, request: HttpRequest) -> Handled {
    if let Some(status) = request.problem {
        return answer(&request, &HttpReply::error(status, EREQUEST, "Fail to parse the HTTP request\n"));
    }
    if !matches!(request.method.as_str(), "GET" | "HEAD" | "POST") {
        return answer(&request, &HttpReply::error(405, ENOMETHOD, "GET, HEAD and POST are served\n"));
    }
    let path = request.path.trim_matches('/').to_owned();
    let (page, rest) = path.split_once('/').unwrap_or((&path, ""));
    let reply = match (page, rest) {
        ("", "") => HttpReply::ok("/health\n/version\n/status\n/vars\n/metrics\n/raft_stat\n/flags\n"),
        ("health", "") if ctx.is_draining() => HttpReply::error(503, ELOGOFF, "Server is stopping"),
        ("health", "") => HttpReply::ok("OK"),
        ("version", "") => HttpReply::ok(version(ctx)),
        ("status", "") => HttpReply::ok(status(ctx, now)),
        ("flags", name) => flags(ctx, name, &request.query),
        ("vars", pattern) => {
            let pattern = (!pattern.is_empty()).then(|| pattern.to_owned());
            return ask_shards(request, Wanted::Text(pattern));
        }
        ("metrics" | "brpc_metrics", "") => return ask_shards(request, Wanted::Prometheus),
        ("raft_stat", "") => return ask_copysets(request, Page::RaftStat(None)),
        ("raft_stat", id) => match id.parse() {
            Ok(id) => return ask_copysets(request, Page::RaftStat(Some(id))),
            Err(_) => HttpReply::error(404, ENOMETHOD, format!("{id} is no group id\n")),
        },
        (service, method) => HttpReply::error(404, ENOMETHOD, format!("Fail to find method={service}/{method}\n")),
    };
    answer(&request, &reply)
}

fn ask_shards(request: HttpRequest, wanted: Wanted) -> Handled {
    let waiting = Waiting { request, page: Page::Vars(wanted, None) };
    Handled::AllShards { op: AdminOp::ShardStatus, pending: Pending(Step::Page(Box::new(waiting))) }
}

fn ask_copysets(request: HttpRequest, page: Page) -> Handled {
    let waiting = Waiting { request, page };
    Handled::AllShards { op: AdminOp::ListCopysets, pending: Pending(Step::Page(Box::new(waiting))) }
}

pub(super) fn resume(ctx: &Context, now: Instant, waiting: Waiting, replies: Vec<Reply>) -> Handled {
    let Waiting { request, page } = waiting;
    match page {
        Page::Vars(wanted, None) => {
            let shards = replies.into_iter().filter_map(|reply| match reply.data {
                ReplyData::Shard(status) => Some(*status),
                _ => None,
            });
            let shards = shards.collect();
            ask_copysets(request, Page::Vars(wanted, Some(shards)))
        }
        Page::Vars(wanted, Some(shards)) => {
            let vars = vars(ctx, now, &shards, &raft_stat::copysets(replies));
            let reply = match wanted {
                Wanted::Prometheus => HttpReply::ok(vars.prometheus()),
                Wanted::Text(pattern) => match vars.page(pattern.as_deref()) {
                    Some(text) => HttpReply::ok(text),
                    None => HttpReply::error(404, ENOMETHOD, "Fail to find any var\n"),
                },
            };
            answer(&request, &reply)
        }
        Page::RaftStat(only) => {
            let text = raft_stat::text(&raft_stat::copysets(replies), only);
            let reply = match (text.is_empty(), only) {
                (true, Some(id)) => HttpReply::error(404, ENOMETHOD, format!("No nodes in group {id}\n")),
                _ => HttpReply::ok(text),
            };
            answer(&request, &reply)
        }
    }
}

/// Number, service and name of every method there is.
fn lines(ctx: &Context) -> impl Iterator<Item = (usize, &'static str, &'static str)> {
    table::lines(ctx.shared().nebd_vars().is_some())
}

/// The services' names, as brpc makes its default version, after ours.
fn version(ctx: &Context) -> String {
    let mut services: Vec<&str> = lines(ctx).map(|line| line.1).collect();
    services.dedup();
    format!("chunkserver-{}+{}", ctx.info().version, services.join("+"))
}

fn status(ctx: &Context, now: Instant) -> String {
    let registry = ctx.shared().registry();
    let mut out = format!(
        "version: {}\nnon_service_error: {}\nconnection_count: {}\nmax_concurrency: unlimited\n",
        version(ctx),
        registry.total(Counter::NonService),
        registry.total(Counter::Connections),
    );
    let mut service = "";
    for (index, of, method) in lines(ctx) {
        // Writing to a String cannot fail.
        if of != service {
            service = of;
            let _ = writeln!(out, "[{service}]\n");
        }
        let (errors, running) = registry.method(index);
        let latency = registry.summary(|shard| &shard.method(index).latency, now);
        let (request, response) = messages(service, method);
        let _ = writeln!(out, "{method} ({request}) returns ({response})");
        let _ = writeln!(out, "count: {}\nqps: {}\nerror: {errors}", latency.count, latency.per_second);
        let _ = writeln!(out, "latency: {}", latency.mean / 1000);
        for ((name, _), value) in crate::metrics::recorder::QUANTILES.iter().zip(latency.quantiles) {
            let _ = writeln!(out, "latency_{name}: {}", value / 1000);
        }
        let _ = writeln!(out, "max_latency: {}\nconcurrency: {running}\n", latency.max / 1000);
    }
    out
}

fn messages(service: &str, method: &str) -> (&'static str, &'static str) {
    let short = |name: &'static str| name.rsplit_once('.').map_or(name, |(_, short)| short);
    let services = proto::service::SERVICES.iter().find(|found| found.name == service);
    let found = services.and_then(|found| found.methods.iter().find(|known| known.name == method));
    found.map_or(("IndexRequest", "IndexResponse"), |method| (short(method.request.name), short(method.response.name)))
}

/// The configuration; it is not changed here.
fn flags(ctx: &Context, name: &str, query: &str) -> HttpReply {
    if query.starts_with("setvalue") {
        return HttpReply::error(403, EPERM, "Flags cannot be set here\n");
    }
    let config = ctx.info().config.iter().filter(|(key, _)| name.is_empty() || key == name);
    let mut out = String::new();
    for (key, value) in config {
        let _ = writeln!(out, "{key} | {value}");
    }
    if out.is_empty() && !name.is_empty() {
        return HttpReply::error(404, ENOMETHOD, format!("Fail to find flag={name}\n"));
    }
    HttpReply::ok(out)
}

/// Every variable (ops-contract §4.1 for what exists here, then our own).
fn vars(ctx: &Context, now: Instant, shards: &[ShardStatus], copysets: &[CopysetStatus]) -> Vars {
    let mut vars = Vars::default();
    let prefix = underscored(&format!("chunkserver_{}", ctx.info().address()));
    operations(&mut vars, ctx, now, &prefix);
    chunkserver(&mut vars, ctx, &prefix, shards, copysets);
    methods(&mut vars, ctx, now);
    process(&mut vars, ctx, now);
    vars.set("curve_version", Var::Text(ctx.info().version.clone()));
    if let Some(more) = ctx.shared().nebd_vars() {
        more(&mut vars);
    }
    vars
}

fn operations(vars: &mut Vars, ctx: &Context, now: Instant, prefix: &str) {
    let registry = ctx.shared().registry();
    for kind in OpKind::ALL {
        let latency = registry.summary(|shard| &shard.op(kind).latency, now);
        let size = registry.summary(|shard| &shard.op(kind).size, now);
        vars.operation(&format!("{prefix}_{}", kind.name()), &registry.op(kind), &latency, &size);
    }
    for &counter in Counter::ALL {
        vars.int(format!("{prefix}_{}", counter.name()), registry.total(counter));
    }
}

fn chunkserver(vars: &mut Vars, ctx: &Context, prefix: &str, shards: &[ShardStatus], copysets: &[CopysetStatus]) {
    let sum = |field: fn(&ShardStatus) -> u64| shards.iter().map(field).sum::<u64>();
    let slots_unclaimed = shards.iter().map(|shard| shard.slots_unclaimed).max().unwrap_or(0);
    for (name, value) in [
        ("copyset_count", sum(|shard| shard.copysets)),
        ("leader_count", sum(|shard| shard.leaders)),
        ("chunk_count", sum(|shard| shard.chunks)),
        ("snapshot_count", 0),
        ("clonechunk_count", 0),
        ("chunk_trashed", sum(|shard| shard.trashed)),
        ("chunkfilepool_left", sum(|shard| shard.slots_free) + slots_unclaimed),
        ("dirty_bytes", sum(|shard| shard.dirty_bytes)),
        ("log_used_bytes", sum(|shard| shard.log_used_bytes)),
        ("log_size_bytes", sum(|shard| shard.log_bytes)),
        ("buffers_free_bytes", sum(|shard| shard.buffers_free_bytes)),
        ("shard_count", shards.len() as u64),
        ("shard_failed_count", sum(|shard| shard.failed.is_some().into())),
        ("inflight_requests", ctx.shared().inflight() as u64),
    ] {
        vars.int(format!("{prefix}_{name}"), value);
    }
    for copyset in copysets {
        let (pool, id) = (copyset.id >> 32, copyset.id & u64::from(u32::MAX));
        vars.int(format!("copyset_{pool}_{id}_chunk_count"), copyset.chunks);
    }
    for (key, value) in &ctx.info().config {
        let labels = vec![("conf_name", key.clone()), ("conf_value", value.clone())];
        vars.set(format!("{prefix}_config_{}", underscored(key)), Var::Labels(labels));
    }
    vars.int("raft_node_count", copysets.len() as u64);
}

fn methods(vars: &mut Vars, ctx: &Context, now: Instant) {
    let registry = ctx.shared().registry();
    let server = format!("rpc_server_{}", ctx.info().peer.port());
    for (index, service, method) in lines(ctx).filter(|line| line.1 != RAFT_STAT) {
        // A server on a Unix socket has port 0 there.
        let server = if service.starts_with("nebd.") { "rpc_server_0" } else { &server };
        let prefix = format!("{server}_{}", underscored(&format!("{service}.{method}")));
        let (errors, running) = registry.method(index);
        vars.int(format!("{prefix}_error"), errors);
        vars.int(format!("{prefix}_concurrency"), running);
        vars.method_recorder(&prefix, &registry.summary(|shard| &shard.method(index).latency, now));
    }
    vars.int(format!("{server}_connection_count"), registry.total(Counter::Connections));
    vars.int(format!("{server}_error"), registry.total(Counter::NonService));
    let mut services: Vec<&str> = lines(ctx).map(|line| line.1).collect();
    services.dedup();
    vars.int(format!("{server}_service_count"), services.len() as u64);
}

fn process(vars: &mut Vars, ctx: &Context, now: Instant) {
    let (stats, user, system) = ctx.shared().process(now);
    let rounded = |cores: f64| Var::Float((cores * 1000.0).round() / 1000.0);
    vars.set("process_cpu_usage", rounded(user + system));
    vars.set("process_cpu_usage_user", rounded(user));
    vars.set("process_cpu_usage_system", rounded(system));
    vars.int("process_cpu_user_us", stats.user_us);
    vars.int("process_cpu_system_us", stats.system_us);
    vars.int("process_memory_resident", stats.resident_bytes);
    vars.int("process_memory_virtual", stats.virtual_bytes);
    vars.int("process_thread_count", stats.threads);
    vars.int("process_fd_count", stats.fds);
    let uptime = stats.uptime_us as f64 / 1e6;
    vars.set("process_uptime", Var::Float(uptime));
    vars.set(format!("rpc_server_{}_uptime", ctx.info().peer.port()), Var::Float(uptime));
}
