//! What the kernel knows of this process. Read when someone asks for a page, never on the data path.
//!
//! The pages get it as a function pointer ([`Reader`]), so that a simulated node answers with constants.

use std::fs;

/// How a page learns about its process.
pub type Reader = fn() -> ProcessStats;

/// A reading.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProcessStats {
    /// CPU time in user mode since start, microseconds.
    pub user_us: u64,
    /// CPU time in the kernel since start, microseconds.
    pub system_us: u64,
    /// Resident memory, bytes.
    pub resident_bytes: u64,
    /// Virtual memory, bytes.
    pub virtual_bytes: u64,
    /// Threads.
    pub threads: u64,
    /// Open file descriptors.
    pub fds: u64,
    /// Wall-clock time since start, microseconds.
    pub uptime_us: u64,
}

impl ProcessStats {
    /// Read `/proc`. What cannot be read is 0.
    #[must_use]
    pub fn read() -> Self {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
        let mut stats = parse_stat(&stat, &uptime);
        stats.fds = fs::read_dir("/proc/self/fd").map_or(0, |dir| dir.count().saturating_sub(1) as u64);
        stats
    }
}

/// Clock ticks of `/proc` (USER_HZ) are 100 a second on every Linux this runs on.
const TICK_US: u64 = 10_000;

fn parse_stat(stat: &str, uptime: &str) -> ProcessStats {
    // The second field is the program's name in parentheses and may contain anything.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    let up = uptime.split_ascii_whitespace().next().and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    ProcessStats {
        user_us: field(14) * TICK_US,
        system_us: field(15) * TICK_US,
        threads: field(20),
        uptime_us: ((up * 1e6) as u64).saturating_sub(field(22) * TICK_US),
        virtual_bytes: field(23),
        resident_bytes: field(24) * 4096,
        fds: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_itself_and_survives_nonsense() {
        let stats = ProcessStats::read();
        assert!(stats.resident_bytes > 0 && stats.threads > 0 && stats.fds > 0);
        assert_eq!(parse_stat("", ""), ProcessStats::default());
        let odd = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 100 20 21";
        assert_eq!(parse_stat(odd, "5.5 9").user_us, 11 * TICK_US);
    }
}
