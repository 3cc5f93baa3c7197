//! The bytes of a batch: a fixed header, the records behind it, and their decoding. Pure codec, no state.
//!
//! Format owned: everything of a batch but its payload (docs/formats.md). The fixed header fits one 512-byte
//! sector and has a CRC of its own, so a torn batch still tells how long it was meant to be.
//! Decoding is for hostile bytes: lengths are checked against what is there, and `None` means "not one of ours".

use crate::{BLOCK, Checkpoint, CopysetId, EntryKind, Geometry, HardState, Seq, crc32c};
use bytes::Bytes;

/// Bytes of the fixed header; the first record starts here.
pub(crate) const HEAD_LEN: usize = 128;
/// Bytes of a record without its context.
pub(crate) const RECORD_LEN: usize = 56;
/// Most bytes of header blocks in one batch.
pub(crate) const HEADER_MAX: usize = 1 << 20;
/// `durable_seq` never lags more than this behind the batch that carries it.
pub(crate) const LAG_MAX: u64 = 64;

const MAGIC: [u8; 8] = *b"RAFTLOG1";
const VERSION: u16 = 1;
/// Bytes of a checkpoint's context before its `conf`.
const CHECKPOINT_HARD_STATE: usize = 24;

const FLAG_SEAL: u16 = 1;
const RECORD_STAGED: u16 = 1;
const RECORD_SWAP: u16 = 2;

const KIND_ENTRY: u8 = 1;
const KIND_HARD_STATE: u8 = 2;
const KIND_CHECKPOINT: u8 = 3;
const KIND_PURGE: u8 = 4;

/// The fixed header of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// A segment's own seal: says what is durable and live, adds nothing and takes no number (`seq` is the last batch's).
    pub(crate) seal: bool,
    pub(crate) generation: u64,
    pub(crate) seq: Seq,
    pub(crate) durable_seq: Seq,
    /// No batch before this one holds anything still needed.
    pub(crate) live_seq: Seq,
    /// CRC of the previous batch's fixed header; 0 when it was lost.
    pub(crate) prev_crc: u32,
    /// Offset of the batch in the zone: a misdirected write is not a batch.
    pub(crate) offset: u64,
    pub(crate) header_len: u32,
    pub(crate) record_count: u32,
    pub(crate) records_len: u32,
    pub(crate) payload_len: u64,
}

/// A fixed header as found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// Ours; with its CRC and the CRC its records must have.
    Head { head: Head, crc: u32, records_crc: u32 },
    /// Ours, of a format this code does not know.
    Version(u16),
}

/// A decoded record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) copyset: CopysetId,
    pub(crate) incarnation: u64,
    pub(crate) body: Body,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// An entry; `staged` ones take effect with the checkpoint that swaps them in.
    Entry {
        index: u64,
        term: u64,
        prev_term: u64,
        kind: EntryKind,
        staged: bool,
        payload_len: u32,
        context: Bytes,
    },
    HardState(HardState),
    /// `swap`: the staged entries, which end at this index, are the whole tail from now on.
    Checkpoint {
        checkpoint: Checkpoint,
        swap: Option<u64>,
    },
    Purge,
}

/// Fills `header` (whole blocks, exactly `head.header_len`): fixed part, `records`, padding. Returns the header's CRC.
/// Padding is zeros; a seal's is not, so that no sector of it can complete a torn header it is written over.
pub(crate) fn encode_header(header: &mut [u8], geometry: &Geometry, head: &Head, records: &[u8]) -> u32 {
    assert_eq!(header.len(), head.header_len as usize, "the header buffer is the length that was asked for");
    let (fixed, rest) = header.split_at_mut(HEAD_LEN);
    let (body, padding) = rest.split_at_mut(records.len());
    body.copy_from_slice(records);
    padding.fill(if head.seal { 0xff } else { 0 });
    fixed.fill(0);
    fixed[0..8].copy_from_slice(&MAGIC);
    fixed[12..14].copy_from_slice(&VERSION.to_le_bytes());
    fixed[14..16].copy_from_slice(&(if head.seal { FLAG_SEAL } else { 0 }).to_le_bytes());
    fixed[16..32].copy_from_slice(&geometry.uuid);
    fixed[32..40].copy_from_slice(&head.generation.to_le_bytes());
    fixed[40..48].copy_from_slice(&head.seq.to_le_bytes());
    fixed[48..56].copy_from_slice(&head.durable_seq.to_le_bytes());
    fixed[56..64].copy_from_slice(&head.live_seq.to_le_bytes());
    fixed[64..68].copy_from_slice(&head.prev_crc.to_le_bytes());
    fixed[68..72].copy_from_slice(&crc32c(rest).to_le_bytes());
    fixed[72..76].copy_from_slice(&head.header_len.to_le_bytes());
    fixed[76..80].copy_from_slice(&head.record_count.to_le_bytes());
    fixed[80..84].copy_from_slice(&head.records_len.to_le_bytes());
    fixed[88..96].copy_from_slice(&head.payload_len.to_le_bytes());
    fixed[96..104].copy_from_slice(&head.offset.to_le_bytes());
    let crc = crc32c(&fixed[12..]);
    fixed[8..12].copy_from_slice(&crc.to_le_bytes());
    crc
}

/// The fixed header at the start of `block`, which was read at `offset` of the zone.
pub(crate) fn parse_head(block: &[u8], geometry: &Geometry, offset: u64) -> Option<Parsed> {
    let mut r = Reader(block.get(..HEAD_LEN)?);
    if r.take(8)? != MAGIC {
        return None;
    }
    let crc = r.u32()?;
    if crc != crc32c(r.0) {
        return None;
    }
    let (version, flags) = (r.u16()?, r.u16()?);
    if r.take(16)? != geometry.uuid {
        return None;
    }
    if version != VERSION {
        return Some(Parsed::Version(version));
    }
    let (generation, seq, durable_seq, live_seq) = (r.u64()?, r.u64()?, r.u64()?, r.u64()?);
    let (prev_crc, records_crc) = (r.u32()?, r.u32()?);
    let (header_len, record_count, records_len, _) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
    let (payload_len, own_offset) = (r.u64()?, r.u64()?);
    let head = Head {
        seal: flags & FLAG_SEAL != 0,
        generation,
        seq,
        durable_seq,
        live_seq,
        prev_crc,
        offset: own_offset,
        header_len,
        record_count,
        records_len,
        payload_len,
    };
    (own_offset == offset && plausible(&head, geometry)).then_some(Parsed::Head { head, crc, records_crc })
}

fn plausible(h: &Head, geometry: &Geometry) -> bool {
    let header = h.header_len as usize;
    let room = geometry.segment_size.saturating_sub(h.offset % geometry.segment_size.max(1));
    let ends = u64::from(h.header_len).checked_add(h.payload_len);
    let covers =
        if h.seal { h.durable_seq == h.seq } else { h.durable_seq < h.seq && h.seq - h.durable_seq <= LAG_MAX };
    (1..u64::MAX / 2).contains(&h.generation)
        && (u64::from(!h.seal)..u64::MAX / 2).contains(&h.seq)
        && (1..=h.seq.max(1)).contains(&h.live_seq)
        && covers
        && (BLOCK..=HEADER_MAX).contains(&header)
        && header.is_multiple_of(BLOCK)
        && h.payload_len.is_multiple_of(BLOCK as u64)
        && ends.is_some_and(|len| len <= room)
        && HEAD_LEN + h.records_len as usize <= header
        && u64::from(h.record_count) * RECORD_LEN as u64 <= u64::from(h.records_len)
        && !(h.seal && (h.record_count > 0 || h.payload_len > 0))
}

/// Encodes records behind each other into `out`.
pub(crate) struct Encoder<'a> {
    pub(crate) out: &'a mut Vec<u8>,
    pub(crate) copyset: CopysetId,
    pub(crate) incarnation: u64,
}

/// The fields every record has, in the order they stand on disk.
#[derive(Default)]
struct Fields {
    kind: u8,
    entry_kind: u8,
    flags: u16,
    term: u64,
    index: u64,
    aux: u64,
    payload_len: u32,
}

impl Encoder<'_> {
    fn fixed(&mut self, f: &Fields, context_len: usize) {
        let mut b = [0u8; RECORD_LEN];
        b[0] = f.kind;
        b[1] = f.entry_kind;
        b[2..4].copy_from_slice(&f.flags.to_le_bytes());
        b[4..8].copy_from_slice(&(context_len as u32).to_le_bytes());
        b[8..16].copy_from_slice(&self.copyset.0.to_le_bytes());
        b[16..24].copy_from_slice(&self.incarnation.to_le_bytes());
        b[24..32].copy_from_slice(&f.term.to_le_bytes());
        b[32..40].copy_from_slice(&f.index.to_le_bytes());
        b[40..48].copy_from_slice(&f.aux.to_le_bytes());
        b[48..52].copy_from_slice(&f.payload_len.to_le_bytes());
        self.out.extend_from_slice(&b);
    }

    /// An entry; `prev_term` is the term of the entry before it.
    pub(crate) fn entry(&mut self, e: &crate::Entry, prev_term: u64, staged: bool) {
        let flags = if staged { RECORD_STAGED } else { 0 };
        let payload_len = e.payload.len() as u32;
        let entry_kind = e.kind as u8;
        let fields =
            Fields { kind: KIND_ENTRY, entry_kind, flags, term: e.term, index: e.index, aux: prev_term, payload_len };
        self.fixed(&fields, e.context.len());
        self.out.extend_from_slice(&e.context);
    }

    pub(crate) fn hard_state(&mut self, hs: &HardState) {
        let fields =
            Fields { kind: KIND_HARD_STATE, term: hs.term, index: hs.commit, aux: hs.vote, ..Fields::default() };
        self.fixed(&fields, 0);
    }

    pub(crate) fn checkpoint(&mut self, cp: &Checkpoint, swap: Option<u64>) {
        let fields = Fields {
            kind: KIND_CHECKPOINT,
            flags: if swap.is_some() { RECORD_SWAP } else { 0 },
            term: cp.applied_term,
            index: cp.applied_index,
            aux: swap.unwrap_or(0),
            ..Fields::default()
        };
        self.fixed(&fields, CHECKPOINT_HARD_STATE + cp.conf.len());
        for v in [cp.hard_state.term, cp.hard_state.vote, cp.hard_state.commit] {
            self.out.extend_from_slice(&v.to_le_bytes());
        }
        self.out.extend_from_slice(&cp.conf);
    }

    pub(crate) fn purge(&mut self) {
        self.fixed(&Fields { kind: KIND_PURGE, ..Fields::default() }, 0);
    }
}

/// Bytes a checkpoint record takes.
pub(crate) fn checkpoint_len(cp: &Checkpoint) -> usize {
    RECORD_LEN + CHECKPOINT_HARD_STATE + cp.conf.len()
}

/// The records of a batch whose header blocks are `header`; `None` unless all of them make sense together.
pub(crate) fn parse_records(header: &[u8], head: &Head, records_crc: u32) -> Option<Vec<Record>> {
    let rest = header.get(HEAD_LEN..)?;
    if crc32c(rest) != records_crc {
        return None;
    }
    let mut r = Reader(rest.get(..head.records_len as usize)?);
    let mut records = Vec::with_capacity(head.record_count as usize);
    let mut payload = 0u64;
    for _ in 0..head.record_count {
        let record = parse_record(&mut r)?;
        if let Body::Entry { payload_len, .. } = record.body {
            payload += u64::from(payload_len);
        }
        records.push(record);
    }
    (r.0.is_empty() && payload == head.payload_len).then_some(records)
}

fn parse_record(r: &mut Reader<'_>) -> Option<Record> {
    let (kind, entry_kind, flags, context_len) = (r.u8()?, r.u8()?, r.u16()?, r.u32()?);
    let (copyset, incarnation) = (CopysetId(r.u64()?), r.u64()?);
    let (term, index, aux) = (r.u64()?, r.u64()?, r.u64()?);
    let (payload_len, _) = (r.u32()?, r.u32()?);
    let context = r.take(context_len as usize)?;
    let sane = (1..u64::MAX / 2).contains(&index);
    let body = match kind {
        KIND_ENTRY => {
            let kind = match entry_kind {
                0 => EntryKind::Normal,
                1 => EntryKind::ConfChange,
                _ => return None,
            };
            let crcs = payload_len as usize / BLOCK * 4;
            if !sane || !(payload_len as usize).is_multiple_of(BLOCK) || crcs > context.len() {
                return None;
            }
            let (staged, context) = (flags & RECORD_STAGED != 0, Bytes::copy_from_slice(context));
            Body::Entry { index, term, prev_term: aux, kind, staged, payload_len, context }
        }
        KIND_HARD_STATE => Body::HardState(HardState { term, vote: aux, commit: index }),
        KIND_CHECKPOINT => {
            let mut c = Reader(context);
            let hard_state = HardState { term: c.u64()?, vote: c.u64()?, commit: c.u64()? };
            let conf = Bytes::copy_from_slice(c.0);
            if !sane && index != 0 {
                return None;
            }
            let checkpoint = Checkpoint { applied_index: index, applied_term: term, hard_state, conf, incarnation };
            Body::Checkpoint { checkpoint, swap: (flags & RECORD_SWAP != 0).then_some(aux) }
        }
        KIND_PURGE => Body::Purge,
        _ => return None,
    };
    (payload_len == 0 || kind == KIND_ENTRY).then_some(Record { copyset, incarnation, body })
}

/// A cursor that never reads past the end.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }
    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[b]| b)
    }
    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}
