//! Variables by name, and the two texts that show them: `/vars` (`name : value`) and Prometheus (`/metrics`).
//!
//! The formats are those of the pinned brpc with Curve's patch (ops-contract §4.4): every number is a gauge, a string
//! that is a flat JSON object becomes labels, latency recorders of `rpc_server_*` fold into one summary.

use super::{OpTotals, Summary, recorder::QUANTILES};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub enum Var {
    /// A whole number.
    Int(u64),
    /// A fraction.
    Float(f64),
    /// Text; shown by `/vars` alone.
    Text(String),
    /// A flat JSON object of strings, in order.
    Labels(Vec<(&'static str, String)>),
    /// Part of a recorder that `/metrics` folds into the summary it belongs to.
    Folded(u64),
    /// A summary; shown by `/metrics` alone.
    Summary(Box<Summary>),
}

/// All variables of a page, sorted by name.
#[derive(Clone, Debug, Default)]
pub struct Vars {
    vars: BTreeMap<String, Var>,
}

impl Vars {
    /// Set one.
    pub fn set(&mut self, name: impl Into<String>, value: Var) {
        self.vars.insert(name.into(), value);
    }
    /// Set a number.
    pub fn int(&mut self, name: impl Into<String>, value: u64) {
        self.set(name, Var::Int(value));
    }

    /// A latency recorder of bvar: `<prefix>_latency`, `_latency_80` … `_max_latency`, `_qps`, `_count`.
    /// `scale` divides (latencies are kept in ns and shown in µs).
    pub fn recorder(&mut self, prefix: &str, summary: &Summary, scale: u64) {
        self.recorder_as(prefix, summary, scale, Var::Int);
    }

    /// The recorder of an RPC method, which `/metrics` shows as a summary.
    pub fn method_recorder(&mut self, prefix: &str, summary: &Summary) {
        self.recorder_as(prefix, summary, 1000, Var::Folded);
        self.int(format!("{prefix}_qps"), summary.per_second);
        self.set(prefix, Var::Summary(Box::new(*summary)));
    }

    fn recorder_as(&mut self, prefix: &str, summary: &Summary, scale: u64, make: fn(u64) -> Var) {
        self.set(format!("{prefix}_latency"), make(summary.mean / scale));
        for ((name, _), value) in QUANTILES.iter().zip(summary.quantiles) {
            self.set(format!("{prefix}_latency_{name}"), make(value / scale));
        }
        self.set(format!("{prefix}_max_latency"), make(summary.max / scale));
        self.set(format!("{prefix}_qps"), make(summary.per_second));
        self.set(format!("{prefix}_count"), make(summary.count));
    }

    /// Curve's set of variables of one kind of operation.
    pub fn operation(&mut self, prefix: &str, total: &OpTotals, latency: &Summary, size: &Summary) {
        for (name, value) in [
            ("request_num", total.requests),
            ("io_num", total.done),
            ("io_bytes", total.bytes),
            ("error_num", total.errors),
            ("rps", total.rates[0]),
            ("iops", total.rates[1]),
            ("bps", total.rates[2]),
            ("eps", total.rates[3]),
        ] {
            self.int(format!("{prefix}_{name}"), value);
        }
        self.recorder(&format!("{prefix}_lat"), latency, 1000);
        self.recorder(&format!("{prefix}_io_size"), size, 1);
    }

    /// `/vars`, or `/vars/<patterns>`: names separated by comma or semicolon, `*` for any run, `$` for any one
    /// character. `None` when nothing matches.
    #[must_use]
    pub fn page(&self, patterns: Option<&str>) -> Option<String> {
        let patterns: Option<Vec<&str>> = patterns.map(|list| list.split([',', ';']).collect());
        let mut out = String::new();
        for (name, var) in &self.vars {
            if patterns.as_ref().is_some_and(|list| !list.iter().any(|pattern| matches(pattern, name))) {
                continue;
            }
            // Writing to a String cannot fail.
            let _ = match var {
                Var::Int(value) | Var::Folded(value) => writeln!(out, "{name} : {value}"),
                Var::Float(value) => writeln!(out, "{name} : {value}"),
                Var::Text(text) => writeln!(out, "{name} : \"{text}\""),
                Var::Labels(labels) => {
                    let fields: Vec<String> = labels.iter().map(|(k, v)| format!("\"{k}\":\"{v}\"")).collect();
                    writeln!(out, "{name} : \"{{{}}}\"", fields.join(","))
                }
                Var::Summary(_) => Ok(()),
            };
        }
        (!out.is_empty()).then_some(out)
    }

    /// `/metrics`.
    #[must_use]
    pub fn prometheus(&self) -> String {
        let mut out = String::new();
        for (name, var) in &self.vars {
            let _ = match var {
                Var::Int(value) => gauge(&mut out, name, "", value),
                Var::Float(value) => gauge(&mut out, name, "", value),
                Var::Labels(labels) => {
                    let fields: Vec<String> = labels.iter().map(|(k, v)| format!("{k}=\"{}\"", escape(v))).collect();
                    gauge(&mut out, name, &format!("{{{}}}", fields.join(",")), &0)
                }
                Var::Summary(summary) => summary_text(&mut out, name, summary),
                Var::Text(_) | Var::Folded(_) => Ok(()),
            };
        }
        out
    }
}

fn gauge(out: &mut String, name: &str, labels: &str, value: &dyn std::fmt::Display) -> std::fmt::Result {
    writeln!(out, "# HELP {name}\n# TYPE {name} gauge\n{name}{labels} {value}")
}

fn summary_text(out: &mut String, name: &str, summary: &Summary) -> std::fmt::Result {
    writeln!(out, "# HELP {name}\n# TYPE {name} summary")?;
    let last = ("1", summary.max);
    let quantiles = ["0.8", "0.9", "0.99", "0.999", "0.9999"].into_iter().zip(summary.quantiles).chain([last]);
    for (quantile, value) in quantiles {
        writeln!(out, "{name}{{quantile=\"{quantile}\"}} {}", value / 1000)?;
    }
    // brpc's own approximation: mean of the window times all calls.
    let sum = (summary.mean / 1000).saturating_mul(summary.count);
    writeln!(out, "{name}_sum {sum}\n{name}_count {}", summary.count)
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// brpc's wildcard match.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while let Some(&byte) = name.get(n) {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, n));
                p += 1;
            }
            Some(&want) if want == b'$' || want == byte => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((after, from)) => {
                    (p, n) = (after, from + 1);
                    star = Some((after, from + 1));
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).is_some_and(|rest| rest.iter().all(|&byte| byte == b'*'))
}

/// bvar's spelling of a name: CamelCase to snake_case, everything that is no letter or digit to `_`.
#[must_use]
pub fn underscored(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 8);
    let mut lower_before = false;
    for c in name.chars() {
        if c.is_ascii_uppercase() {
            if lower_before {
                out.push('_');
            }
            out.push(c.to_ascii_lowercase());
            lower_before = false;
        } else if c.is_ascii_alphanumeric() {
            out.push(c);
            lower_before = c.is_ascii_lowercase() || c.is_ascii_digit();
        } else {
            if !out.ends_with('_') {
                out.push('_');
            }
            lower_before = false;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_spelled_as_bvar_does() {
        assert_eq!(underscored("chunkserver_127.0.0.1:8402"), "chunkserver_127_0_0_1_8402");
        assert_eq!(
            underscored("curve.chunkserver.ChunkService.ReadChunk"),
            "curve_chunkserver_chunk_service_read_chunk"
        );
        assert_eq!(underscored("curve.chunkserver.CliService2.AddPeer"), "curve_chunkserver_cli_service2_add_peer");
        assert_eq!(underscored("trash.expire_afterSec"), "trash_expire_after_sec");
    }

    #[test]
    fn wildcards() {
        for (pattern, name, yes) in [
            ("a*c", "abbc", true),
            ("*", "", true),
            ("a$c", "abc", true),
            ("a$c", "ac", false),
            ("abc", "abcd", false),
            ("*_left", "x_left_left", true),
            ("**b*", "aab", true),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern, name), yes, "{pattern} {name}");
        }
    }

    #[test]
    fn pages() {
        let mut vars = Vars::default();
        vars.int("b_num", 3);
        vars.set("curve_version", Var::Text("2.7.0".into()));
        vars.set("a_conf", Var::Labels(vec![("conf_name", "x".into()), ("conf_value", "1GB".into())]));
        vars.method_recorder("rpc_server_1_m", &Summary { count: 4, mean: 2000, max: 9000, ..Summary::default() });
        assert_eq!(vars.page(Some("b_num;nothing")).unwrap(), "b_num : 3\n");
        assert_eq!(vars.page(Some("curve_*")).unwrap(), "curve_version : \"2.7.0\"\n");
        assert_eq!(vars.page(Some("a_conf")).unwrap(), "a_conf : \"{\"conf_name\":\"x\",\"conf_value\":\"1GB\"}\"\n");
        assert!(vars.page(Some("nothing")).is_none());
        assert!(vars.page(None).unwrap().contains("rpc_server_1_m_max_latency : 9\n"));
        let prometheus = vars.prometheus();
        assert!(prometheus.contains("a_conf{conf_name=\"x\",conf_value=\"1GB\"} 0\n"));
        assert!(prometheus.contains("# TYPE rpc_server_1_m summary\nrpc_server_1_m{quantile=\"0.8\"} 0\n"));
        assert!(prometheus.contains("rpc_server_1_m_sum 8\nrpc_server_1_m_count 4\n"));
        assert!(!prometheus.contains("curve_version") && !prometheus.contains("max_latency"));
    }
}
