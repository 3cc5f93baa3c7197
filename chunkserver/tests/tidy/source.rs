//! The sources of the workspace as the rules see them: without comments, texts and tests.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A source file.
pub(crate) struct Source {
    /// From the workspace's folder, with `/`.
    pub(crate) path: String,
    pub(crate) raw: String,
    /// Comments and the insides of texts are blank; items under `#[cfg(test)]` are gone.
    pub(crate) code: String,
    /// Compiled for tests only.
    pub(crate) test: bool,
}

impl Source {
    /// Module path inside the crate `chunkserver`; `None` for what is not part of it.
    pub(crate) fn module(&self) -> Option<Vec<&str>> {
        let inside = self.path.strip_prefix("chunkserver/src/")?.strip_suffix(".rs")?;
        let parts: Vec<&str> = inside.split('/').collect();
        Some(match parts.as_slice() {
            ["lib"] => return None,
            [folder @ .., "mod"] => folder.to_vec(),
            whole => whole.to_vec(),
        })
    }

    pub(crate) fn code_lines(&self) -> usize {
        self.code.lines().filter(|line| !line.trim().is_empty()).count()
    }

    /// Whether `word` occurs in the code as a word of its own.
    pub(crate) fn has_word(&self, word: &str) -> bool {
        let inside = |c: char| c.is_alphanumeric() || c == '_';
        self.code.match_indices(word).any(|(at, _)| {
            let before = self.code[..at].chars().next_back();
            let after = self.code[at + word.len()..].chars().next();
            !before.is_some_and(inside) && !after.is_some_and(inside)
        })
    }
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Files of the workspace whose names end so, from its folder.
pub(crate) fn files(endings: &[&str]) -> Vec<String> {
    let root = root();
    let (mut found, mut folders) = (Vec::new(), vec![root.clone()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
            if entry.file_type().unwrap().is_dir() {
                if name != "target" && !name.starts_with('.') && !path.join("CACHEDIR.TAG").exists() {
                    folders.push(path);
                }
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                found.push(path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// All Rust files.
pub(crate) fn all() -> Vec<Source> {
    let (mut sources, mut only_tests) = (Vec::new(), BTreeSet::new());
    for path in files(&[".rs"]) {
        let raw = std::fs::read_to_string(root().join(&path)).unwrap();
        let (code, modules) = without_tests(&blank(&raw));
        let stem = path.strip_suffix(".rs").unwrap();
        let owns_folder = ["/lib", "/main", "/mod"].iter().find_map(|name| stem.strip_suffix(name));
        only_tests.extend(modules.into_iter().map(|name| format!("{}/{name}", owns_folder.unwrap_or(stem))));
        sources.push(Source { path, raw, code, test: false });
    }
    for source in &mut sources {
        let stem = source.path.strip_suffix(".rs").unwrap();
        let marked = only_tests.iter().any(|test| stem == test || stem.starts_with(&format!("{test}/")));
        source.test = marked || stem.ends_with("_tests") || source.path.contains("/tests/");
    }
    sources
}

/// Spaces in place of comments and of the insides of texts; lines stay where they are.
fn blank(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out: Vec<char> = chars.iter().map(|&c| if c == '\n' { '\n' } else { ' ' }).collect();
    let mut at = 0;
    while at < chars.len() {
        let end = skip(&chars, at);
        if end == at {
            out[at] = chars[at];
            at += 1;
        } else {
            if chars[at] == '"' {
                (out[at], out[end - 1]) = ('"', '"');
            }
            at = end;
        }
    }
    out.into_iter().collect()
}

/// Where the comment, text or character that begins at `at` ends; `at` if none begins here.
fn skip(chars: &[char], at: usize) -> usize {
    let is = |i: usize, c: char| chars.get(i) == Some(&c);
    let find =
        |from: usize, stop: &dyn Fn(usize) -> bool| (from..chars.len()).find(|&i| stop(i)).unwrap_or(chars.len());
    match chars[at] {
        '/' if is(at + 1, '/') => find(at, &|i| chars[i] == '\n'),
        '/' if is(at + 1, '*') => {
            let (mut depth, mut i) = (1, at + 2);
            while depth > 0 && i < chars.len() {
                match (chars[i], chars.get(i + 1)) {
                    ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
                    ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
                    _ => i += 1,
                }
            }
            i
        }
        'r' if !(at > 0 && (chars[at - 1].is_alphanumeric() && chars[at - 1] != 'b' || chars[at - 1] == '_')) => {
            let hashes = chars[at + 1..].iter().take_while(|&&c| c == '#').count();
            if !is(at + 1 + hashes, '"') {
                return at;
            }
            let closes = |i: usize| chars[i] == '"' && (1..=hashes).all(|n| is(i + n, '#'));
            (find(at + 2 + hashes, &closes) + 1 + hashes).min(chars.len())
        }
        '"' => {
            let mut i = at + 1;
            while i < chars.len() && chars[i] != '"' {
                i += if chars[i] == '\\' { 2 } else { 1 };
            }
            (i + 1).min(chars.len())
        }
        '\'' if is(at + 1, '\\') => (find(at + 3, &|i| chars[i] == '\'') + 1).min(chars.len()),
        '\'' if is(at + 2, '\'') => at + 3,
        _ => at,
    }
}

/// The code without its `#[cfg(test)]` items, and the names of the modules among them that are files.
fn without_tests(code: &str) -> (String, Vec<String>) {
    const MARK: &str = "#[cfg(test)]";
    let (mut out, mut modules, mut rest) = (String::new(), Vec::new(), code);
    while let Some(at) = rest.find(MARK) {
        out.push_str(&rest[..at]);
        let item = &rest[at + MARK.len()..];
        let body = item.find(['{', ';']).unwrap();
        if item[body..].starts_with(';') {
            let name = item[..body].split_whitespace().skip_while(|&word| word != "mod").nth(1);
            modules.extend(name.map(str::to_owned));
            rest = &item[body + 1..];
        } else {
            rest = &item[body + block(&item[body..])..];
        }
    }
    out.push_str(rest);
    (out, modules)
}

/// Length of the block in braces that `text` begins with.
fn block(text: &str) -> usize {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at + 1;
        }
    }
    text.len()
}

/// Every path in `code` that begins with the word `start` and `::`, in full: groups in braces are spread out.
pub(crate) fn paths(code: &str, start: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let word = |c: char| c.is_alphanumeric() || c == '_';
    for (at, _) in code.match_indices(&format!("{start}::")) {
        let before = code[..at].chars().next_back();
        if !before.is_some_and(|c| word(c) || c == ':') {
            tree(&code[at + start.len() + 2..], &[], &mut found);
        }
    }
    found
}

/// Read one branch of a use tree (or the path of an expression); returns its length.
fn tree(text: &str, prefix: &[String], found: &mut Vec<Vec<String>>) -> usize {
    let start = text.len() - text.trim_start().len();
    let here = &text[start..];
    if here.starts_with('{') {
        let end = block(here);
        let mut at = 1;
        while at < end - 1 {
            at += tree(&here[at..end - 1], prefix, found);
            at += here[at..end].find([',', '}']).unwrap() + 1;
        }
        return start + end;
    }
    let len = here.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(here.len());
    let mut path = prefix.to_vec();
    if len > 0 && &here[..len] != "self" {
        path.push(here[..len].to_owned());
    }
    if len > 0 && here[len..].starts_with("::") {
        return start + len + 2 + tree(&here[len + 2..], &path, found);
    }
    found.push(path);
    start + len
}

#[test]
fn comments_texts_and_tests_are_taken_out() {
    let text = "a /* b /* c */ */ d // e\n\"f \\\" g\" r#\"h \" i\"# 'j' '\\'' &'k l #[cfg(test)]\nmod m { { } n }\no";
    let (code, modules) = without_tests(&blank(text));
    assert_eq!(code.split_whitespace().collect::<String>(), "ad\"\"&'klo");
    assert!(modules.is_empty());
    let (code, modules) = without_tests("x #[cfg(test)]\npub(crate) mod fake;\ny");
    assert_eq!((code.split_whitespace().collect::<String>(), modules), ("xy".into(), vec!["fake".to_owned()]));
}

#[test]
fn groups_are_spread_out() {
    let code =
        "use crate::{io::{self, Bufs, buffer::{Arena}}, limits}; fn f(x: crate::shard::Shard<u8>) { my_crate::no(); }";
    let all: Vec<String> = paths(code, "crate").iter().map(|path| path.join("::")).collect();
    assert_eq!(all, ["io", "io::Bufs", "io::buffer::Arena", "limits", "shard::Shard"]);
}
