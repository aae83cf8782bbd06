//! Keys of set elements.
//!
//! # Why
//! A ruleset has a hundred thousand of them, which are sorted, walked along and thrown away again. Those of IPv4 (20 bytes a pair) lie
//! in the map itself: without a place of their own on the heap the same walk takes a third of the time.

use std::cmp::Ordering;
use std::fmt;
use std::ops::Deref;

use smallvec::SmallVec;

/// A key in the making. An IPv6 pair is 44 bytes long.
pub(super) type Draft = SmallVec<[u8; 48]>;

/// Bytes that lie in a [`Bytes`] itself.
const HERE: usize = 22;

/// The bytes of a key.
#[derive(Clone)]
pub(super) enum Bytes {
    /// So many of them.
    Here(u8, [u8; HERE]),
    Apart(Box<[u8]>),
}

const _: () = assert!(size_of::<Key>() == 24);

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Self {
        let mut here = [0; HERE];
        match here.get_mut(..bytes.len()) {
            Some(place) => {
                place.copy_from_slice(bytes);
                Self::Here(bytes.len() as u8, here)
            }
            None => Self::Apart(bytes.into()),
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Here(length, bytes) => bytes.get(..usize::from(*length)).unwrap_or(bytes),
            Self::Apart(bytes) => bytes,
        }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.deref().fmt(f)
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Bytes {}

impl Ord for Bytes {
    fn cmp(&self, other: &Self) -> Ordering {
        self.deref().cmp(other)
    }
}

impl PartialOrd for Bytes {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Which element.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Exact(Bytes),
    /// From the first to the last, both included.
    Range(Box<(Bytes, Bytes)>),
    /// Everything that is not in the map.
    Otherwise,
}

/// A key whose bytes are elsewhere: in the kernel's answer, or in a [`Key`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Named<'a> {
    Exact(&'a [u8]),
    Range(&'a [u8], &'a [u8]),
    Otherwise,
}

impl Key {
    pub(super) fn exact(bytes: &[u8]) -> Self {
        Self::Exact(bytes.into())
    }

    pub(super) fn range(first: &[u8], last: &[u8]) -> Self {
        Self::Range(Box::new((first.into(), last.into())))
    }

    pub(super) fn named(&self) -> Named<'_> {
        match self {
            Self::Exact(bytes) => Named::Exact(bytes),
            Self::Range(ends) => Named::Range(&ends.0, &ends.1),
            Self::Otherwise => Named::Otherwise,
        }
    }
}

impl From<Named<'_>> for Key {
    fn from(named: Named<'_>) -> Self {
        match named {
            Named::Exact(bytes) => Self::exact(bytes),
            Named::Range(first, last) => Self::range(first, last),
            Named::Otherwise => Self::Otherwise,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_every_length_are_what_they_were_made_of_and_sort_as_their_bytes() {
        let all: Vec<Vec<u8>> = (0..=48_u8).flat_map(|length| [vec![0; length.into()], (1..=length).collect()]).collect();
        for one in &all {
            assert_eq!(&*Bytes::from(one.as_slice()), one.as_slice());
            for other in &all {
                assert_eq!(Key::exact(one).cmp(&Key::exact(other)), one.cmp(other), "{one:?} {other:?}");
                assert_eq!(Key::range(one, other), Key::from(Key::range(one, other).named()));
            }
        }
    }
}
