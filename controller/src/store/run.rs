//! A run: edges of one node in the order of their keys, packed into one value that is never changed. What it means when several hold
//! the same edge is [`Evidence::merge`]'s.
//!
//! # Format
//! One edge after the other, all numbers as varints (protobuf.dev/programming-guides/encoding): how much the client's number is above
//! that of the edge before; the server's number; protocol; port; flags, in which bit n stands for counter n not being 0, then bits for
//! "direction known", "has a first time", "has a last time" and the roads; the counters that are not 0; the first time as microseconds
//! from that of the edge before, zigzag; the last time from the first one (from the epoch, if there is none), zigzag; how many runs of
//! hours, and of each the distance from the one before and its length. At the end a CRC-32C of node, number of edges and all of this:
//! SQLite's own check looks at the pages of a file, not at what is in them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crc::{CRC_32_ISCSI, Crc, Table};
use jiff::Timestamp;
use policy::evidence::Road;
use policy::{Evidence, HourSet};
use prost::encoding::{decode_varint, encode_varint};

/// Sixteen bytes at a time: a million edges are some 25 MB, and all are read at each start.
static CRC: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// Bits above those of the counters.
const DIRECTION_KNOWN: u64 = 1 << COUNTERS;
const HAS_FIRST: u64 = 1 << (COUNTERS + 1);
const HAS_LAST: u64 = 1 << (COUNTERS + 2);
const ROADS: [(Road, u64); 3] =
    [(Road::Direct, 1 << (COUNTERS + 3)), (Road::Published, 1 << (COUNTERS + 4)), (Road::Proxy, 1 << (COUNTERS + 5))];
const COUNTERS: usize = 10;

/// Which edge, within a node: ends by their numbers in the table of endpoints, protocol by IANA's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Row {
    pub(super) client: i64,
    pub(super) server: i64,
    pub(super) protocol: u8,
    pub(super) port: u16,
    pub(super) direction_known: bool,
}

/// Edges of one node, packed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) node: i64,
    pub(super) edges: i64,
    pub(super) packed: Vec<u8>,
}

/// Why a run cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error("its checksum does not fit")]
    Checksum,
    #[error("it ends within an edge")]
    Cut,
    #[error("a number in it is too large")]
    TooLarge,
    #[error("a time in it is no time")]
    NoTime,
    #[error("its hours are mixed up")]
    Hours,
    #[error("it has flags that this version does not know")]
    Flags,
    #[error("it does not hold as many edges as it says")]
    Count,
}

fn checksum(node: i64, edges: i64, body: &[u8]) -> [u8; 4] {
    let mut digest = CRC.digest();
    digest.update(&node.to_le_bytes());
    digest.update(&edges.to_le_bytes());
    digest.update(body);
    digest.finalize().to_le_bytes()
}

/// The counters in the order of the format.
fn counts(e: &mut Evidence) -> [&mut u64; COUNTERS] {
    [
        &mut e.established,
        &mut e.connected_no_data,
        &mut e.one_way,
        &mut e.unanswered,
        &mut e.refused,
        &mut e.denied,
        &mut e.would_deny,
        &mut e.pre_existing,
        &mut e.bytes_sent,
        &mut e.bytes_received,
    ]
}

fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)).cast_unsigned()
}

fn unzigzag(number: u64) -> i64 {
    (number >> 1).cast_signed() ^ -(number & 1).cast_signed()
}

/// Packs edges that come in the order of their keys; equal ones are merged.
struct Packer {
    body: Vec<u8>,
    edges: i64,
    client: i64,
    first: i64,
    waiting: Option<(Row, Evidence)>,
}

impl Packer {
    fn new(room: usize) -> Self {
        Self { body: Vec::with_capacity(room), edges: 0, client: 0, first: 0, waiting: None }
    }

    fn push(&mut self, row: Row, seen: Evidence) {
        match &mut self.waiting {
            Some((waiting, sum)) if *waiting == row => sum.merge(&seen),
            waiting => {
                if let Some((row, seen)) = waiting.replace((row, seen)) {
                    self.write(row, seen);
                }
            }
        }
    }

    fn write(&mut self, row: Row, mut seen: Evidence) {
        let Row { client, server, protocol, port, direction_known } = row;
        let body = &mut self.body;
        encode_varint((client - self.client).cast_unsigned(), body);
        encode_varint(server.cast_unsigned(), body);
        encode_varint(u64::from(protocol), body);
        encode_varint(u64::from(port), body);
        let mut flags = 0;
        let mut flag = |bit, set| flags |= if set { bit } else { 0 };
        flag(DIRECTION_KNOWN, direction_known);
        flag(HAS_FIRST, seen.first.is_some());
        flag(HAS_LAST, seen.last.is_some());
        ROADS.iter().for_each(|&(road, bit)| flag(bit, seen.roads.contains(road)));
        let (first, last) = (seen.first.map(Timestamp::as_microsecond), seen.last.map(Timestamp::as_microsecond));
        let counts = counts(&mut seen);
        counts.iter().enumerate().for_each(|(n, count)| flag(1 << n, **count != 0));
        encode_varint(flags, body);
        counts.into_iter().filter(|count| **count != 0).for_each(|count| encode_varint(*count, body));
        if let Some(first) = first {
            encode_varint(zigzag(first - self.first), body);
            self.first = first;
        }
        if let Some(last) = last {
            encode_varint(zigzag(last - first.unwrap_or(0)), body);
        }
        encode_varint(seen.hours.runs().len() as u64, body);
        let mut before = 0;
        for &(first, last) in seen.hours.runs() {
            encode_varint(u64::from(first - before), body);
            encode_varint(u64::from(last - first), body);
            before = last;
        }
        (self.client, self.edges) = (client, self.edges + 1);
    }

    fn seal(mut self, node: i64) -> Run {
        if let Some((row, seen)) = self.waiting.take() {
            self.write(row, seen);
        }
        let (edges, mut packed) = (self.edges, self.body);
        let sum = checksum(node, edges, &packed);
        packed.extend_from_slice(&sum);
        Run { node, edges, packed }
    }
}

/// Packs edges of one node, given in any order.
pub(super) fn pack(node: i64, mut edges: Vec<(Row, &Evidence)>) -> Run {
    edges.sort_unstable_by_key(|(row, _)| *row);
    let mut packer = Packer::new(32 * edges.len());
    edges.into_iter().for_each(|(row, seen)| packer.push(row, seen.clone()));
    packer.seal(node)
}

/// One run of what several of one node hold.
///
/// # Errors
/// One of them cannot be read.
pub(super) fn merge(node: i64, runs: &[Run]) -> Result<Run, Broken> {
    let mut readers = runs.iter().map(|run| read(run.node, run.edges, &run.packed)).collect::<Result<Vec<_>, _>>()?;
    let mut packer = Packer::new(runs.iter().map(|run| run.packed.len()).sum());
    let mut heads: Vec<Option<Evidence>> = Vec::new();
    heads.resize_with(readers.len(), || None);
    let mut order = BinaryHeap::new();
    let mut advance = |at: usize, heads: &mut [Option<Evidence>], order: &mut BinaryHeap<Reverse<(Row, usize)>>| {
        if let Some(next) = readers[at].next() {
            let (row, seen) = next?;
            heads[at] = Some(seen);
            order.push(Reverse((row, at)));
        }
        Ok(())
    };
    for at in 0..heads.len() {
        advance(at, &mut heads, &mut order)?;
    }
    while let Some(Reverse((row, at))) = order.pop() {
        if let Some(seen) = heads[at].take() {
            packer.push(row, seen);
        }
        advance(at, &mut heads, &mut order)?;
    }
    Ok(packer.seal(node))
}

/// Reads a run whose checksum fits.
///
/// # Errors
/// It does not.
pub(super) fn read(node: i64, edges: i64, packed: &[u8]) -> Result<Reader<'_>, Broken> {
    let (body, sum) = packed.split_last_chunk::<4>().ok_or(Broken::Cut)?;
    if checksum(node, edges, body) != *sum {
        return Err(Broken::Checksum);
    }
    Ok(Reader { rest: body, left: edges, client: 0, first: 0 })
}

/// The edges of a run, in the order of their keys. Ends after the first that cannot be read.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    left: i64,
    client: i64,
    first: i64,
}

impl Reader<'_> {
    fn number(&mut self) -> Result<u64, Broken> {
        decode_varint(&mut self.rest).map_err(|_| Broken::Cut)
    }

    fn small<T: TryFrom<u64>>(&mut self) -> Result<T, Broken> {
        T::try_from(self.number()?).map_err(|_| Broken::TooLarge)
    }

    /// A time as a distance from another, microseconds.
    fn time(&mut self, from: i64) -> Result<(i64, Timestamp), Broken> {
        let us = from.checked_add(unzigzag(self.number()?)).ok_or(Broken::NoTime)?;
        Ok((us, Timestamp::from_microsecond(us).map_err(|_| Broken::NoTime)?))
    }

    fn edge(&mut self) -> Result<(Row, Evidence), Broken> {
        let ahead: i64 = self.small()?;
        self.client = self.client.checked_add(ahead).ok_or(Broken::TooLarge)?;
        let (client, server, protocol, port) = (self.client, self.small()?, self.small()?, self.small()?);
        let flags = self.number()?;
        if flags >> (COUNTERS + 3 + ROADS.len()) != 0 {
            return Err(Broken::Flags);
        }
        let row = Row { client, server, protocol, port, direction_known: flags & DIRECTION_KNOWN != 0 };
        let mut seen = Evidence::default();
        for (n, count) in counts(&mut seen).into_iter().enumerate() {
            if flags & (1 << n) != 0 {
                *count = self.number()?;
            }
        }
        let mut from = 0;
        if flags & HAS_FIRST != 0 {
            let (us, first) = self.time(self.first)?;
            (self.first, from, seen.first) = (us, us, Some(first));
        }
        if flags & HAS_LAST != 0 {
            seen.last = Some(self.time(from)?.1);
        }
        seen.hours = self.hours()?;
        seen.roads.extend(ROADS.iter().filter(|(_, bit)| flags & bit != 0).map(|(road, _)| *road));
        Ok((row, seen))
    }

    fn hours(&mut self) -> Result<HourSet, Broken> {
        let mut before = 0_u32;
        let mut run = |reader: &mut Self| {
            let first = before.checked_add(reader.small()?).ok_or(Broken::Hours)?;
            let last = first.checked_add(reader.small()?).ok_or(Broken::Hours)?;
            before = last;
            Ok((first, last))
        };
        match self.number()? {
            0 => Ok(HourSet::default()),
            1 => Ok(HourSet::from_runs([run(self)?])),
            more => Ok(HourSet::from_runs((0..more).map(|_| run(self)).collect::<Result<Vec<_>, _>>()?)),
        }
    }
}

impl Iterator for Reader<'_> {
    type Item = Result<(Row, Evidence), Broken>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = match self.left {
            0 if self.rest.is_empty() => return None,
            ..=0 => Err(Broken::Count),
            1.. => self.edge(),
        };
        self.left -= 1;
        if next.is_err() {
            (self.left, self.rest) = (0, &[]);
        }
        Some(next)
    }
}

#[cfg(test)]
mod tests;
