//! `bench raw`: what the disk itself does under fio, as the yardstick for ratios.
//!
//! A thin wrapper: fio with io_uring and direct I/O on a fully written file (extents allocated, nothing sparse),
//! writes durable one by one (`sync=dsync`), results from fio's JSON.

use crate::plan::parse_size;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Options of `bench raw`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The file to use; created and written in full if it is missing or too small, kept afterwards.
    #[arg(long)]
    pub file: PathBuf,
    /// Its size.
    #[arg(long, value_parser = parse_size, default_value = "1GiB")]
    pub size: u64,
    /// Bytes per request of the random jobs.
    #[arg(long, value_parser = parse_size, default_value = "4k")]
    pub bs: u64,
    /// Requests in flight of the random jobs.
    #[arg(long, default_value_t = 64)]
    pub depth: u32,
    /// Seconds per job.
    #[arg(long, default_value_t = 10)]
    pub seconds: u32,
    /// Write the results to this file as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Results of the four jobs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Raw {
    /// Random writes per second.
    pub raw_write_iops: f64,
    /// Random reads per second.
    pub raw_read_iops: f64,
    /// Sequential 1 MiB writes, million bytes per second.
    pub raw_seq_write_mbps: f64,
    /// Sequential 1 MiB reads, million bytes per second.
    pub raw_seq_read_mbps: f64,
}

struct Job {
    rw: &'static str,
    bs: u64,
    depth: u32,
    dsync: bool,
    seconds: u32,
}

/// Runs the four jobs.
pub fn run(args: &Args) -> Result<Raw> {
    if args.file.metadata().map_or(0, |meta| meta.len()) < args.size {
        // Written once from end to end: a fallocated file would measure extent conversion.
        fio(&args.file, args.size, &Job { rw: "write", bs: 1 << 20, depth: 4, dsync: false, seconds: 0 })?;
    }
    let job = |rw, bs, depth| {
        let dsync = rw != "read" && rw != "randread";
        fio(&args.file, args.size, &Job { rw, bs, depth, dsync, seconds: args.seconds })
    };
    Ok(Raw {
        raw_write_iops: job("randwrite", args.bs, args.depth)?.0,
        raw_read_iops: job("randread", args.bs, args.depth)?.0,
        raw_seq_write_mbps: job("write", 1 << 20, 4)?.1,
        raw_seq_read_mbps: job("read", 1 << 20, 4)?.1,
    })
}

fn fio(file: &Path, size: u64, job: &Job) -> Result<(f64, f64)> {
    let mut command = Command::new("fio");
    command.args(["--name=raw", "--ioengine=io_uring", "--direct=1", "--output-format=json", "--norandommap"]);
    command.arg(format!("--filename={}", file.display())).arg(format!("--size={size}"));
    command.arg(format!("--rw={}", job.rw)).arg(format!("--bs={}", job.bs)).arg(format!("--iodepth={}", job.depth));
    if job.dsync {
        command.arg("--sync=dsync");
    }
    if job.seconds > 0 {
        command.arg("--time_based").arg(format!("--runtime={}", job.seconds));
    }
    let output = command.output().context("run fio (is it installed?)")?;
    if !output.status.success() {
        bail!("fio {}: {}", job.rw, String::from_utf8_lossy(&output.stderr).trim());
    }
    parse(&String::from_utf8_lossy(&output.stdout)).with_context(|| format!("fio {}", job.rw))
}

/// IOPS and million bytes per second of a one-job fio JSON report, reads and writes added up.
pub fn parse(text: &str) -> Result<(f64, f64)> {
    // fio may print notes before the document.
    let start = text.find('{').context("no JSON from fio")?;
    let document: Value = serde_json::from_str(text.get(start..).unwrap_or_default())?;
    let job = document.pointer("/jobs/0").context("no job in fio's JSON")?;
    if let Some(error) = job.get("error").and_then(Value::as_i64).filter(|error| *error != 0) {
        bail!("fio reports error {error}");
    }
    let sum =
        |key: &str| -> f64 { ["read", "write"].iter().filter_map(|kind| job.get(kind)?.get(key)?.as_f64()).sum() };
    Ok((sum("iops"), sum("bw_bytes") / 1e6))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fio_reports_are_read_and_its_errors_are_not_results() {
        let text = |error: i32| {
            format!(
                "note: something\n{{\"jobs\":[{{\"error\":{error},\"read\":{{\"iops\":0.0,\"bw_bytes\":0}},\
                 \"write\":{{\"iops\":1500.5,\"bw_bytes\":6146048}}}}]}}"
            )
        };
        assert_eq!(parse(&text(0)).unwrap(), (1500.5, 6.146_048));
        assert!(parse(&text(5)).is_err() && parse("nothing").is_err() && parse("{}").is_err());
    }
}
