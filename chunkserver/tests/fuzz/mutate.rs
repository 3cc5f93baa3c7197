//! Making hostile bytes of valid ones: flips, splices, cuts, lengths and numbers; for protobuf also field by field.

use crate::engine::Rng;

/// Valid inputs, and pieces worth inserting.
#[derive(Default)]
pub(crate) struct Corpus {
    pub(crate) samples: Vec<Vec<u8>>,
    pub(crate) words: Vec<Vec<u8>>,
}

impl Corpus {
    pub(crate) fn new(samples: Vec<Vec<u8>>, words: &[&[u8]]) -> Self {
        assert!(!samples.is_empty(), "a corpus without samples");
        Self { samples, words: words.iter().map(|word| word.to_vec()).collect() }
    }

    pub(crate) fn pick(&self, rng: &mut Rng) -> Vec<u8> {
        rng.pick(&self.samples).clone()
    }

    /// One of the samples, changed in up to eight ways (now and then in none).
    pub(crate) fn mutated(&self, rng: &mut Rng) -> Vec<u8> {
        let mut bytes = self.pick(rng);
        self.mutate(&mut bytes, rng);
        bytes
    }

    pub(crate) fn mutate(&self, bytes: &mut Vec<u8>, rng: &mut Rng) {
        let few = 1 << rng.below(4);
        for _ in 0..rng.below(few + 1) {
            self.change(bytes, rng);
        }
    }

    fn change(&self, bytes: &mut Vec<u8>, rng: &mut Rng) {
        let len = bytes.len();
        let at = rng.below(len);
        let piece = |rng: &mut Rng, max: usize| at..(at + 1 + rng.below(max)).min(len);
        match rng.below(14) {
            _ if len == 0 => bytes.extend((0..rng.below(20)).map(|_| rng.next() as u8)),
            0..=2 => bytes[at] ^= 1 << rng.below(8),
            3 => bytes[at] = rng.next() as u8,
            4 => bytes[at] = *rng.pick(&[0, 1, 0x7f, 0x80, 0xff, b'\n', b' ', b'"', b'-', b'9']),
            5 => number(bytes, at, rng),
            6 => drop(bytes.drain(piece(rng, 40))),
            7 => {
                let copy = bytes[piece(rng, 60)].to_vec();
                insert(bytes, rng, &copy);
            }
            8 => {
                let noise: Vec<u8> = (0..1 + rng.below(20)).map(|_| rng.next() as u8).collect();
                insert(bytes, rng, &noise);
            }
            9 if !self.words.is_empty() => {
                let word = rng.pick(&self.words);
                insert(bytes, rng, word);
            }
            10 if !self.words.is_empty() => {
                let word = rng.pick(&self.words);
                let end = (at + word.len()).min(len);
                bytes[at..end].copy_from_slice(&word[..end - at]);
            }
            11 => bytes.truncate(at),
            12 => {
                let other = rng.pick(&self.samples);
                let from = rng.below(other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            _ => bytes[piece(rng, 16)].fill(*rng.pick(&[0, 0xff, b'0', b' '])),
        }
    }
}

fn insert(bytes: &mut Vec<u8>, rng: &mut Rng, what: &[u8]) {
    let at = rng.below(bytes.len() + 1);
    bytes.splice(at..at, what.iter().copied());
}

/// Changes the number at `at`, of some width and byte order.
pub(crate) fn number(bytes: &mut [u8], at: usize, rng: &mut Rng) {
    let width = (1usize << rng.below(4)).min(bytes.len() - at);
    let place = &mut bytes[at..at + width];
    let mut old = [0; 8];
    old[..width].copy_from_slice(place);
    if rng.one_in(2) {
        let new = rng.number(u64::from_le_bytes(old));
        place.copy_from_slice(&new.to_le_bytes()[..width]);
    } else {
        old[..width].reverse();
        let new = rng.number(u64::from_le_bytes(old));
        place.copy_from_slice(&new.to_le_bytes()[..width]);
        place.reverse();
    }
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A field: its key and its bytes, the length of a nested one taken off.
struct Field {
    key: u64,
    value: Vec<u8>,
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for (i, &byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f) << (7 * i as u32).min(63);
        if byte < 0x80 {
            *bytes = &bytes[i + 1..];
            return Some(value);
        }
    }
    None
}

fn fields(mut bytes: &[u8]) -> Option<Vec<Field>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let key = take_varint(&mut bytes)?;
        let rest = bytes;
        let len = match key & 7 {
            0 => {
                take_varint(&mut bytes)?;
                rest.len() - bytes.len()
            }
            1 => 8,
            5 => 4,
            2 => usize::try_from(take_varint(&mut bytes)?).ok()?,
            _ => return None,
        };
        let from = if key & 7 == 2 { bytes } else { rest };
        let (value, behind) = from.split_at_checked(len)?;
        all.push(Field { key, value: value.to_vec() });
        bytes = behind;
    }
    Some(all)
}

/// Changes a protobuf message field by field, lengths kept right; what is no message is changed byte by byte.
pub(crate) fn protobuf(bytes: &mut Vec<u8>, rng: &mut Rng, corpus: &Corpus, depth: usize) {
    let Some(mut all) = fields(bytes).filter(|all| !all.is_empty()) else { return corpus.mutate(bytes, rng) };
    for _ in 0..1 + rng.below(3) {
        let at = rng.below(all.len());
        match rng.below(10) {
            0 if all.len() > 1 => drop(all.remove(at)),
            1 => {
                let copy = Field { key: all[at].key, value: all[at].value.clone() };
                all.insert(rng.below(all.len()), copy);
            }
            2 => {
                let other = rng.below(all.len());
                all.swap(at, other);
            }
            3 => all[at].key = rng.next() % 200,
            4 => all[at].key ^= rng.next() & 7,
            5 | 6 if all[at].key & 7 == 2 && depth < 6 => protobuf(&mut all[at].value, rng, corpus, depth + 1),
            7 if all[at].key & 7 == 2 => corpus.mutate(&mut all[at].value, rng),
            8 if depth == 0 && all[at].key & 7 == 2 => nest(&mut all[at], rng),
            _ if all[at].key & 7 == 0 => {
                let old = take_varint(&mut &all[at].value[..]).unwrap_or(0);
                all[at].value.clear();
                let new = rng.number(old);
                put_varint(&mut all[at].value, new);
            }
            _ => {}
        }
    }
    bytes.clear();
    for field in all {
        put_varint(bytes, field.key);
        if field.key & 7 == 2 {
            put_varint(bytes, field.value.len() as u64);
        }
        bytes.extend_from_slice(&field.value);
    }
}

/// A field inside itself, again and again.
fn nest(field: &mut Field, rng: &mut Rng) {
    for _ in 0..rng.below(150) {
        let mut outer = Vec::new();
        put_varint(&mut outer, field.key);
        put_varint(&mut outer, field.value.len() as u64);
        outer.append(&mut field.value);
        field.value = outer;
    }
}
