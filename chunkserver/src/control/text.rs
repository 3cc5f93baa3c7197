//! JSON answers as text for people: objects as `key: value` lines, lists of objects as tables.

use serde_json::{Map, Value};
use std::fmt::Write;

/// Render a value.
#[must_use]
pub fn render(value: &Value) -> String {
    let mut out = String::new();
    block(&mut out, value, 0);
    out
}

fn block(out: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Object(map) => object(out, map, indent),
        Value::Array(rows) if rows.is_empty() => line(out, indent, "(none)"),
        Value::Array(rows) if rows.iter().all(Value::is_object) => table(out, rows, indent),
        Value::Array(rows) => rows.iter().for_each(|row| line(out, indent, &cell("", row))),
        other => line(out, indent, &cell("", other)),
    }
}

fn line(out: &mut String, indent: usize, text: &str) {
    let _ = writeln!(out, "{:indent$}{text}", "");
}

fn object(out: &mut String, map: &Map<String, Value>, indent: usize) {
    let width = map.keys().map(String::len).max().unwrap_or(0) + 2;
    for (key, value) in map {
        let nested = match value {
            Value::Object(_) => true,
            Value::Array(rows) => rows.iter().any(Value::is_object),
            _ => false,
        };
        if nested {
            line(out, indent, &format!("{}:", words(key)));
            block(out, value, indent + 2);
        } else {
            line(out, indent, &format!("{:width$}{}", format!("{}:", words(key)), cell(key, value)));
        }
    }
}

fn table(out: &mut String, rows: &[Value], indent: usize) {
    let Some(first) = rows.first().and_then(Value::as_object) else { return };
    let keys: Vec<&String> = first.keys().collect();
    let text = |row: &Value, key: &str| row.get(key).map_or_else(String::new, |v| cell(key, v));
    let widths: Vec<usize> = keys
        .iter()
        .map(|key| {
            rows.iter().map(|row| text(row, key).chars().count()).max().unwrap_or(0).max(words(key).chars().count())
        })
        .collect();
    let join = |cells: Vec<String>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(c, &w)| format!("{c:<w$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    line(out, indent, &join(keys.iter().map(|k| words(k)).collect()));
    for row in rows {
        line(out, indent, &join(keys.iter().map(|k| text(row, k)).collect()));
    }
}

fn words(key: &str) -> String {
    key.strip_suffix("_bytes").unwrap_or(key).replace('_', " ")
}

fn cell(key: &str, value: &Value) -> String {
    match value {
        Value::Number(n) if key.ends_with("bytes") || key.ends_with("size") => {
            n.as_u64().map_or_else(|| n.to_string(), |n| bytesize::ByteSize(n).display().iec().to_string())
        }
        Value::String(s) => s.clone(),
        Value::Null => "-".into(),
        Value::Array(items) => items.iter().map(pair).collect::<Vec<_>>().join(" "),
        other => other.to_string(),
    }
}

/// `[pool, copyset]` as `pool:copyset`.
fn pair(value: &Value) -> String {
    match value.as_array().map(Vec::as_slice) {
        Some([a, b]) if a.is_number() && b.is_number() => format!("{a}:{b}"),
        _ => cell("", value),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn objects_tables_and_sizes() {
        let text = super::render(&json!({
            "size": 4096, "shards": [{"shard": 0, "log_bytes": 1 << 20}, {"shard": 1, "log_bytes": 0}],
            "copysets": [[1, 2], [1, 3]],
        }));
        assert_eq!(
            text,
            "copysets: 1:2 1:3\nshards:\n  log      shard\n  1.0 MiB  0\n  0 B      1\nsize:     4.0 KiB\n"
        );
    }
}
