//! The house rules that no compiler checks: arrows between rooms, sizes, where `unsafe` may be, what the sans-I/O
//! rooms must not know, and that the documents keep up with the code.
//!
//! `UPDATE_DOCS=1 cargo test -p chunkserver --test tidy` rewrites the generated part of docs/OPERATIONS.md.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "tidy/source.rs"]
mod source;

use chunkserver::config::Config;
use source::{Source, all, files, paths, root};
use std::collections::{BTreeMap, BTreeSet};

/// Rooms of the crate `chunkserver`, lowest first, and whom each may use: only rooms that stand above it here.
/// Parts of a room that stand lower or higher than the rest have lines of their own.
#[rustfmt::skip]
const ROOMS: &[(&str, &[&str])] = &[
    ("limits", &[]),
    ("io", &[]),
    ("io::uring", &["io"]),
    ("config", &["limits"]),
    ("metrics", &["io"]),
    ("shard::request", &[]), // plain values: what a shard is asked and answers
    ("shard::mail", &[]), // likewise: what replicas tell each other
    ("chunk", &["io", "shard::request"]),
    ("shard", &["chunk", "io", "limits", "metrics", "shard::mail", "shard::request"]),
    ("mailbox", &["io", "limits", "shard::request"]),
    ("rpc", &["io", "limits"]),
    ("peer", &["chunk", "io", "limits", "rpc", "shard::mail"]),
    ("service", &["io", "limits", "metrics", "rpc", "shard::request"]),
    ("volume", &["io", "rpc", "shard::request"]),
    ("replace", &[]), // small files written anew
    ("volume::catalog", &["replace", "volume"]),
    ("nbd", &["io", "limits", "shard::request", "volume", "volume::catalog"]),
    ("nebd", &["io", "limits", "metrics", "replace", "rpc", "service", "shard::request", "volume"]),
    ("control::shards", &["chunk", "io::uring", "shard::request"]), // the wire between control thread and shards
    ("reactor", &["chunk", "control::shards", "io", "limits", "mailbox", "metrics", "nbd", "nebd", "peer", "rpc", "service", "shard",
        "shard::mail", "shard::request", "volume", "volume::catalog"]),
    ("handover", &["reactor"]),
    ("control", &["chunk", "control::shards", "io", "io::uring", "nebd", "shard", "shard::request", "volume", "volume::catalog"]),
    ("serve", &["chunk", "config", "control", "control::shards", "handover", "io", "io::uring", "limits", "mailbox", "metrics",
        "nebd", "reactor", "replace", "service", "shard", "volume::catalog"]),
    ("main", &["config", "control", "serve"]),
];

/// Crates of the workspace and those they may depend on, of the workspace and of what has a say in the design.
const CRATES: &[(&str, &[&str])] = &[
    ("proto", &["prost"]),
    ("raftlog", &[]),
    ("copyset", &["protobuf", "raft", "raftlog"]),
    ("chunkserver", &["copyset", "io-uring", "prost", "proto", "raftlog", "tokio", "tokio-uring"]),
    ("chunkserver/part1", &["proto", "tokio"]), // tokio: its channels, no runtime
    ("bench", &["nebd-client", "tokio", "tokio-uring"]), // a client of its own, so that it tests our codec (rule 34); but part1 is what it drives NEBD with
];

/// Where `unsafe` may be. (The last one counts allocations for tests: an allocator has no safe form.)
const UNSAFE: &[&str] = &[
    "chunkserver/src/io/buffer.rs",
    "chunkserver/src/io/uring.rs",
    "chunkserver/part1/src/ffi.rs", // pointers of C callers (decision 0015)
    "chunkserver/tests/support/heap.rs",
];

/// State machines: told what time it is and what the disk and the network did.
const SANS_IO: &[&str] = &[
    "raftlog/src/",
    "copyset/src/",
    "proto/src/",
    "chunkserver/src/chunk/",
    "chunkserver/src/mailbox.rs",
    "chunkserver/src/nbd/",
    "chunkserver/src/nebd/conf.rs",
    "chunkserver/src/nebd/executor.rs",
    "chunkserver/src/nebd/files",
    "chunkserver/src/nebd/metafile/",
    "chunkserver/src/nebd/name.rs",
    "chunkserver/src/nebd/server.rs",
    "chunkserver/src/nebd/service.rs",
    "chunkserver/src/nebd/stat.rs",
    "chunkserver/src/peer/",
    "chunkserver/src/reactor",
    "chunkserver/src/rpc/",
    "chunkserver/src/service/",
    "chunkserver/src/shard/",
    "chunkserver/src/volume/io.rs",
    "chunkserver/src/volume/leaders.rs",
    "chunkserver/src/volume/map.rs",
    "chunkserver/src/volume/mod.rs",
    "chunkserver/part1/src/exchange.rs",
    "chunkserver/part1/src/outgoing.rs",
    "chunkserver/part1/src/request.rs",
    "chunkserver/src/volume/remote.rs",
    "chunkserver/src/volume/wire.rs",
];
/// What they must not know. (The reactor takes error numbers, not calls, from `libc`.)
const FORBIDDEN_PATHS: &[&str] =
    &["std::fs", "std::net", "std::thread", "std::os", "std::process", "std::env", "rustix", "io_uring", "tokio"];
const FORBIDDEN_WORDS: &[&str] = &["HashMap", "HashSet", "SystemTime", "thread_rng", "async", "unsafe"];

const CODE_LINES_MAX: usize = 500;

fn complain(what: &str, problems: &[String]) {
    assert!(problems.is_empty(), "{what}:\n  {}", problems.join("\n  "));
}

fn problems(check: impl Fn(&Source) -> Option<String>) -> Vec<String> {
    all().iter().filter_map(|source| Some(format!("{}: {}", source.path, check(source)?))).collect()
}

fn room_of(path: &[&str]) -> Option<&'static str> {
    let inside =
        |room: &str| room.split("::").count() <= path.len() && room.split("::").zip(path).all(|(a, &b)| a == b);
    ROOMS.iter().map(|room| room.0).filter(|room| inside(room)).max_by_key(|room| room.len())
}

/// Every path by which a file reaches into the crate, from the crate's root.
fn reaches(source: &Source, module: &[&str]) -> Vec<Vec<String>> {
    let mut found = paths(&source.code, "crate");
    if module == ["main"] {
        found.extend(paths(&source.code, "chunkserver"));
    }
    for mut path in paths(&source.code, "super") {
        let ups = 1 + path.iter().take_while(|&part| part == "super").count();
        let mut full: Vec<String> = module[..module.len() - ups].iter().map(|&part| part.to_owned()).collect();
        full.extend(path.drain(ups - 1..));
        found.push(full);
    }
    found
}

#[test]
fn arrows_between_rooms_point_downwards() {
    let mut edges: BTreeMap<(&str, &str), BTreeSet<String>> = BTreeMap::new();
    let mut wrong = Vec::new();
    for source in all().iter().filter(|source| !source.test) {
        let Some(module) = source.module() else { continue };
        let Some(from) = room_of(&module) else {
            wrong.push(format!("{}: no room of ROOMS holds it", source.path));
            continue;
        };
        for path in reaches(source, &module) {
            let parts: Vec<&str> = path.iter().map(String::as_str).collect();
            match room_of(&parts) {
                Some(to) if to != from => drop(edges.entry((from, to)).or_default().insert(source.path.clone())),
                Some(_) => {}
                None => wrong.push(format!("{}: crate::{} is in no room of ROOMS", source.path, path.join("::"))),
            }
        }
    }
    let order: Vec<&str> = ROOMS.iter().map(|room| room.0).collect();
    for (at, (room, uses)) in ROOMS.iter().enumerate() {
        wrong.extend(uses.iter().filter(|&to| !order[..at].contains(to)).map(|to| format!("ROOMS: {room} above {to}")));
        let unused = uses.iter().filter(|&&to| !edges.contains_key(&(*room, to)));
        wrong.extend(unused.map(|to| format!("ROOMS: {room} does not use {to} (any more): take it out")));
    }
    for ((from, to), places) in &edges {
        if !ROOMS.iter().any(|(room, uses)| room == from && uses.contains(to)) {
            wrong.push(format!("{from} must not use {to}: {places:?}"));
        }
    }
    complain("arrows between rooms (house: downwards only)", &wrong);
}

#[test]
fn arrows_between_crates() {
    let named: BTreeSet<&str> = CRATES.iter().flat_map(|(name, uses)| uses.iter().chain([name])).copied().collect();
    for (name, uses) in CRATES {
        let text = std::fs::read_to_string(root().join(name).join("Cargo.toml")).unwrap();
        let manifest: toml::Table = text.parse().unwrap();
        let found = manifest["dependencies"].as_table().unwrap().keys().map(String::as_str);
        let found: Vec<&str> = found.filter(|found| named.contains(found)).collect();
        assert_eq!(found, *uses, "dependencies of {name}");
    }
}

#[test]
fn unsafe_has_three_rooms() {
    let outside = problems(|s| (!UNSAFE.contains(&s.path.as_str()) && s.has_word("unsafe")).then(|| "unsafe".into()));
    complain("unsafe outside its rooms", &outside);
}

#[test]
fn files_say_what_they_are_and_stay_small() {
    let dumb = problems(|s| (!s.raw.starts_with("//!")).then(|| "does not begin with //!".into()));
    complain("every file says what it promises", &dumb);
    let long = problems(|s| {
        let lines = s.code_lines();
        (lines > CODE_LINES_MAX).then(|| format!("{lines} lines of code"))
    });
    complain("files over the limit want cutting", &long);
}

#[test]
fn nothing_is_left_for_later() {
    let marks =
        [["to", "do!"].concat(), ["unimpl", "emented!"].concat(), ["db", "g!"].concat(), ["#[ig", "nore"].concat()];
    let left = problems(|s| marks.iter().find(|mark| s.code.contains(*mark)).cloned());
    complain("left for later", &left);
    let words = [["FIX", "ME"].concat(), ["X", "XX"].concat(), ["TO", "DO"].concat()];
    let mut left = Vec::new();
    for path in files(&[".rs", ".md", ".toml", ".proto"]) {
        let text = std::fs::read_to_string(root().join(&path)).unwrap();
        left.extend(words.iter().filter(|word| text.contains(*word)).map(|word| format!("{path}: {word}")));
    }
    complain("left for later", &left);
}

#[test]
fn the_core_is_sans_io() {
    let mut wrong = Vec::new();
    for source in all().iter().filter(|s| !s.test && SANS_IO.iter().any(|room| s.path.starts_with(room))) {
        let mut known: Vec<Vec<String>> = Vec::new();
        for start in ["std", "rustix", "io_uring", "tokio", "tokio_uring", "socket2"] {
            let prefixed = |path: Vec<String>| [vec![start.to_owned()], path].concat();
            known.extend(paths(&source.code, start).into_iter().map(prefixed));
        }
        // An address is a value, not a socket.
        let known = known.iter().map(|path| path.join("::")).filter(|path| path != "std::net::Ipv4Addr");
        let forbidden = |path: &String| FORBIDDEN_PATHS.iter().any(|start| path.starts_with(start));
        wrong.extend(known.filter(forbidden).map(|path| format!("{}: {path}", source.path)));
        let words = FORBIDDEN_WORDS.iter().filter(|word| source.has_word(word));
        wrong.extend(words.map(|word| format!("{}: {word}", source.path)));
        if source.code.contains("Instant::now") {
            wrong.push(format!("{}: Instant::now", source.path));
        }
    }
    complain("no files, sockets, threads, clocks, chance in the core", &wrong);
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// What stands between `<!-- name:begin … -->` and `<!-- name:end -->`, and where.
fn marked<'a>(text: &'a str, name: &str) -> (usize, &'a str) {
    let begin = text.find(&format!("<!-- {name}:begin")).unwrap();
    let start = begin + text[begin..].find('\n').unwrap() + 1;
    let end = text.find(&format!("<!-- {name}:end")).unwrap();
    (start, &text[start..end])
}

/// The table of configuration keys: names and texts from config.rs, values from `Config::default()`.
fn config_table() -> String {
    let defaults = toml::Table::try_from(Config::default()).unwrap();
    let source = read("chunkserver/src/config.rs");
    let body = source.split_once("pub struct Config {").unwrap().1.split_once("\n}").unwrap().0;
    let (mut out, mut text) = (String::from("| key | default | meaning |\n|---|---|---|\n"), String::new());
    for line in body.lines().map(str::trim) {
        if let Some(more) = line.strip_prefix("///") {
            text += more;
        } else if let Some((key, _)) = line.strip_prefix("pub ").and_then(|rest| rest.split_once(':')) {
            assert!(!text.is_empty(), "config.rs: {key} has no doc comment");
            let default = defaults.get(key).map_or_else(|| "–".to_owned(), |value| format!("`{value}`"));
            out += &format!("| `{key}` | {default} | {} |\n", std::mem::take(&mut text).trim());
        }
    }
    out
}

#[test]
fn every_configuration_key_is_in_operations() {
    const PATH: &str = "docs/OPERATIONS.md";
    let (text, table) = (read(PATH), config_table());
    let (start, found) = marked(&text, "config");
    if found == table {
        return;
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let rewritten = format!("{}{table}{}", &text[..start], &text[start + found.len()..]);
        return std::fs::write(root().join(PATH), rewritten).unwrap();
    }
    panic!("{PATH} is behind config.rs; run with UPDATE_DOCS=1. It should be:\n{table}");
}

#[test]
fn the_metrics_in_operations_exist() {
    let text = read("docs/OPERATIONS.md");
    let code = ["metrics.rs", "service/pages.rs"].map(|name| read(&format!("chunkserver/src/{name}"))).concat();
    let (_, table) = marked(&text, "metrics");
    let names = table.lines().filter_map(|row| row.strip_prefix("| ")).filter_map(|row| row.split(" | ").next());
    let names: Vec<&str> = names.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect();
    assert!(names.len() > 10, "{names:?}");
    let missing = names.iter().filter(|name| !code.contains(&format!("\"{name}\""))).map(|name| (*name).to_owned());
    complain("metrics that do not exist", &missing.collect::<Vec<_>>());
}

#[test]
fn links_and_paths_in_documents_lead_somewhere() {
    let mut dead = Vec::new();
    for document in files(&[".md"]) {
        let text = read(&document);
        let folder = root().join(&document).parent().unwrap().to_owned();
        let links = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
        let local = links.filter(|link| !link.is_empty() && !link.contains("://"));
        dead.extend(local.filter(|link| !folder.join(link).exists()).map(|link| format!("{document}: {link}")));
        let first = |name: &str| CRATES.iter().any(|c| c.0 == name) || ["docs", "scripts"].contains(&name);
        let quoted = text.split('`').skip(1).step_by(2).filter(|text| !text.contains(['*', '{', ' ', '<', '\n', ',']));
        let repository = quoted.filter(|text| text.split_once('/').is_some_and(|(top, _)| first(top)));
        dead.extend(repository.filter(|p| !root().join(p).exists()).map(|path| format!("{document}: {path}")));
    }
    complain("documents that lead nowhere", &dead);
}

#[test]
fn decisions_are_numbered_and_complete() {
    let names: Vec<String> =
        files(&[".md"]).into_iter().filter_map(|p| Some(p.strip_prefix("docs/decisions/")?.to_owned())).collect();
    let numbered: Vec<&String> = names.iter().filter(|name| *name != "README.md").collect();
    let index = read("docs/decisions/README.md");
    let mut last = 0;
    for name in &numbered {
        // Numbers are given out before pages are written: one may be missing, none is there twice.
        let number: usize = name.get(..4).and_then(|number| number.parse().ok()).unwrap_or(0);
        assert!(number > last && name.get(4..5) == Some("-"), "{name} should have a number of its own above {last}");
        last = number;
        assert!(index.contains(name.as_str()), "docs/decisions/README.md does not list {name}");
        let text = read(&format!("docs/decisions/{name}"));
        for heading in ["## Question", "## Options", "## Evidence", "## Verdict"] {
            assert!(text.contains(heading), "{name} has no {heading:?}");
        }
    }
    let named = |s: &Source| {
        let mut numbers = s.raw.split("decision ").skip(1).filter_map(|rest| rest.get(..4)?.parse::<usize>().ok());
        numbers
            .find(|number| !numbered.iter().any(|name| name.starts_with(&format!("{number:04}-"))))
            .map(|number| format!("decision {number:04}"))
    };
    complain("decisions that do not exist", &problems(named));
}
