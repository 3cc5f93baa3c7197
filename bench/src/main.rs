//! The `bench` command: load and verification of a chunkserver, and the disk's own speed to compare with.
//!
//! Exit code 0: measured and nothing wrong; 1: it could not run; 2: a block was wrong.

use anyhow::{Context, Result};
use bench::report::Report;
use bench::{nebd, raw, rpc};
use clap::{Parser, Subcommand};
use serde::Serialize;
use std::path::Path;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "bench", version, about = "Load and verification over the wire, with a client of its own")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Drive a chunkserver's ChunkService over TCP.
    Rpc(Box<rpc::Args>),
    /// Drive an NEBD server (part2) over its Unix socket, through part1.
    Nebd(Box<nebd::Args>),
    /// Measure a plain file on the same disk with fio.
    Raw(raw::Args),
}

fn write_json(path: Option<&Path>, value: &impl Serialize) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let text = serde_json::to_string_pretty(value)?;
    std::fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))
}

fn tell(report: &Report, json: Option<&Path>) -> Result<ExitCode> {
    print!("{report}");
    write_json(json, report)?;
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Rpc(args) => tell(&rpc::run(&args)?, args.load.json.as_deref()),
        Command::Nebd(args) => tell(&nebd::run(&args)?, args.load.json.as_deref()),
        Command::Raw(args) => {
            let raw = raw::run(&args)?;
            println!("{}", serde_json::to_string_pretty(&raw)?);
            write_json(args.json.as_deref(), &raw)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn main() -> ExitCode {
    run(Cli::parse().command).unwrap_or_else(|error| {
        eprintln!("bench: {error:#}");
        ExitCode::from(1)
    })
}
