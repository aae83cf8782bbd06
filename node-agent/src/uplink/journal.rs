//! Records in a file: length, checksum, kind, payload. A record that was cut or changed ends the reading; what is before it is good.
//!
//! ```text
//! length of the payload (u32) | CRC-32C of kind and payload (u32) | kind (u8) | payload        numbers little-endian
//! ```

use crc::{CRC_32_ISCSI, Crc};

/// The polynomial of iSCSI (RFC 3720, 12.1): finds every error in up to 32 neighbouring bits.
const CHECKSUM: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// Bytes of a record before its payload.
const HEADER: usize = 9;

/// No record of ours comes near; a length beyond it is damage, and is not allocated.
const LONGEST: usize = 64 << 20;

fn checksum(kind: u8, payload: &[u8]) -> u32 {
    let mut digest = CHECKSUM.digest();
    digest.update(&[kind]);
    digest.update(payload);
    digest.finalize()
}

/// Appends one record.
pub(super) fn append(to: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    debug_assert!(payload.len() <= LONGEST, "a batch is bounded by the number of its edges");
    to.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    to.extend_from_slice(&checksum(kind, payload).to_le_bytes());
    to.push(kind);
    to.extend_from_slice(payload);
}

/// Reads records until the end or until one is not whole.
#[derive(Debug)]
pub(super) struct Records<'a> {
    rest: &'a [u8],
    read: usize,
}

impl<'a> Records<'a> {
    pub(super) fn of(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, read: 0 }
    }

    /// Bytes of whole records read so far.
    pub(super) fn read(&self) -> usize {
        self.read
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (length, after) = self.rest.split_first_chunk::<4>()?;
        let (sum, after) = after.split_first_chunk::<4>()?;
        let (&kind, after) = after.split_first()?;
        let length = usize::try_from(u32::from_le_bytes(*length)).ok().filter(|&length| length <= LONGEST)?;
        let (payload, after) = after.split_at_checked(length)?;
        if checksum(kind, payload) != u32::from_le_bytes(*sum) {
            return None;
        }
        self.rest = after;
        self.read += HEADER + length;
        Some((kind, payload))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(records: &[(u8, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, payload) in records {
            append(&mut bytes, *kind, payload);
        }
        bytes
    }

    fn read(bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
        Records::of(bytes).map(|(kind, payload)| (kind, payload.to_vec())).collect()
    }

    proptest! {
        #[test]
        fn records_read_back_as_they_were_written(records in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..80)), 0..20)) {
            prop_assert_eq!(read(&file(&records)), records);
        }

        #[test]
        fn a_cut_file_gives_the_whole_records_before_the_cut(
            records in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..40)), 1..12), at: prop::sample::Index) {
            let bytes = file(&records);
            let found = read(&bytes[..at.index(bytes.len())]);
            prop_assert_eq!(&found[..], &records[..found.len()]);
            prop_assert!(found.len() < records.len());
        }

        #[test]
        fn a_flipped_bit_ends_the_reading_before_it(
            records in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..40)), 1..12), at: prop::sample::Index, bit in 0..8_u8) {
            let mut bytes = file(&records);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let mut reader = Records::of(&bytes);
            let found: Vec<_> = reader.by_ref().map(|(kind, payload)| (kind, payload.to_vec())).collect();
            prop_assert_eq!(&found[..], &records[..found.len()]);
            prop_assert!(found.len() < records.len());
            prop_assert!(reader.read() <= at);
        }

        #[test]
        fn arbitrary_bytes_don_t_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = read(&bytes);
        }
    }
}
