//! How this kernel lays out a packet (`struct sk_buff`), by its own account of its types (BTF, Documentation/bpf/btf.rst).

use std::io;

/// Where the kernel keeps it.
pub(super) const PLACE: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const STRUCT: u32 = 4;
const UNION: u32 = 5;

/// Why a layout cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TypesError {
    /// There is no account, or it cannot be read.
    #[error("cannot read {PLACE}")]
    Read(#[source] io::Error),
    /// It is not as it should be.
    #[error("{PLACE} makes no sense at byte {at}")]
    Unreadable {
        /// Where.
        at: usize,
    },
    /// A packet has no such field.
    #[error("a packet of this kernel has no field {name}")]
    Absent {
        /// Which.
        name: &'static str,
    },
}

/// Where fields of a packet are, in bytes from its beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) mark: i16,
    /// The byte in which `ip_summed` is, and by how many bits it is shifted there.
    pub(super) summed: (i16, u8),
    pub(super) head: i16,
    pub(super) tail: i16,
    pub(super) network_header: i16,
    pub(super) csum_start: i16,
    pub(super) csum_offset: i16,
}

/// One type of the account, with what follows it.
#[derive(Clone, Copy)]
struct Type<'a> {
    name: u32,
    kind: u32,
    /// Offsets of members have the size of a bit field in their upper byte.
    sized: bool,
    members: &'a [u8],
}

struct Account<'a> {
    types: Vec<Type<'a>>,
    names: &'a [u8],
}

fn word(bytes: &[u8], at: usize) -> Result<u32, TypesError> {
    let four = bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).ok_or(TypesError::Unreadable { at })?;
    Ok(u32::from_ne_bytes(four))
}

impl<'a> Account<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, TypesError> {
        let header = word(bytes, 4)? as usize;
        if word(bytes, 0)? as u16 != MAGIC {
            return Err(TypesError::Unreadable { at: 0 });
        }
        let part = |at: usize| -> Result<&'a [u8], TypesError> {
            let (from, length) = (header.saturating_add(word(bytes, at)? as usize), word(bytes, at + 4)? as usize);
            bytes.get(from..from.saturating_add(length)).ok_or(TypesError::Unreadable { at })
        };
        let (all, names) = (part(8)?, part(16)?);
        // The first is void.
        let mut types = vec![Type { name: 0, kind: 0, sized: false, members: &[] }];
        let mut at = 0;
        while at < all.len() {
            let info = word(all, at + 4)?;
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let more = match kind {
                // INT, VAR, DECL_TAG
                1 | 14 | 17 => 4,
                // ARRAY
                3 => 12,
                // STRUCT, UNION, DATASEC, ENUM64
                STRUCT | UNION | 15 | 19 => count * 12,
                // ENUM, FUNC_PROTO
                6 | 13 => count * 8,
                _ => 0,
            };
            let members = all.get(at + 12..at + 12 + more).ok_or(TypesError::Unreadable { at })?;
            types.push(Type { name: word(all, at)?, kind, sized: info >> 31 == 1, members });
            at += 12 + more;
        }
        Ok(Self { types, names })
    }

    fn is(&self, name: u32, wanted: &str) -> bool {
        let rest = self.names.get(name as usize..).unwrap_or_default();
        rest.strip_prefix(wanted.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }

    /// Where a member is, in bits, also within members without a name.
    fn member(&self, of: Type<'a>, wanted: &str, depth: usize) -> Result<Option<u32>, TypesError> {
        for member in of.members.chunks_exact(12) {
            let (name, kind, at) = (word(member, 0)?, word(member, 4)? as usize, word(member, 8)?);
            let at = if of.sized { at & 0x00ff_ffff } else { at };
            if self.is(name, wanted) {
                return Ok(Some(at));
            }
            let inner = self.types.get(kind).filter(|inner| self.is(name, "") && matches!(inner.kind, STRUCT | UNION) && depth > 0);
            if let Some(&inner) = inner
                && let Some(within) = self.member(inner, wanted, depth - 1)?
            {
                return Ok(Some(at.saturating_add(within)));
            }
        }
        Ok(None)
    }
}

/// Reads it from that account.
///
/// # Errors
/// `Unreadable`, `Absent`.
pub(super) fn layout(account: &[u8]) -> Result<Layout, TypesError> {
    /// Members without a name in such members: there are three of each other.
    const DEPTH: usize = 8;
    let account = Account::read(account)?;
    let is_packet = |of: &&Type<'_>| of.kind == STRUCT && !of.members.is_empty() && account.is(of.name, "sk_buff");
    let packet = *account.types.iter().find(is_packet).ok_or(TypesError::Absent { name: "at all" })?;
    let bits = |name: &'static str| account.member(packet, name, DEPTH)?.ok_or(TypesError::Absent { name });
    let bytes = |name: &'static str| i16::try_from(bits(name)? / 8).map_err(|_| TypesError::Absent { name });
    Ok(Layout {
        mark: bytes("mark")?,
        summed: (bytes("ip_summed")?, (bits("ip_summed")? % 8) as u8),
        head: bytes("head")?,
        tail: bytes("tail")?,
        network_header: bytes("network_header")?,
        csum_start: bytes("csum_start")?,
        csum_offset: bytes("csum_offset")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One account: void, an integer, and `struct sk_buff { u32 mark; union { u16 csum_start; }; u8 x:4, ip_summed:2; ... }`.
    fn account(members: &[(&str, u32, u32, u32)]) -> Vec<u8> {
        let mut names = b"\0sk_buff\0".to_vec();
        let mut name = |text: &str| {
            let at = if text.is_empty() { 0 } else { names.len() as u32 };
            if !text.is_empty() {
                names.extend([text.as_bytes(), b"\0"].concat());
            }
            at
        };
        let inner: Vec<u32> = vec![name("csum_start"), 1, 0, name("csum_offset"), 1, 16];
        let outer: Vec<u32> = members.iter().flat_map(|&(text, kind, at, bits)| [name(text), kind, at | bits << 24]).collect();
        let integer = [0, 1 << 24, 4, 32];
        let union = [[0, UNION << 24 | 2, 4].as_slice(), &inner].concat();
        let packet = [[1, 1 << 31 | STRUCT << 24 | members.len() as u32, 64].as_slice(), &outer].concat();
        let types: Vec<u8> = [integer.as_slice(), &union, &packet].concat().iter().flat_map(|word| word.to_ne_bytes()).collect();
        let header = [24, 0, types.len() as u32, types.len() as u32, names.len() as u32];
        let header: Vec<u8> = header.iter().flat_map(|word| u32::to_ne_bytes(*word)).collect();
        [&MAGIC.to_ne_bytes()[..], &[1, 0], &header, &types, &names].concat()
    }

    const FIELDS: [(&str, u32, u32, u32); 7] = [
        ("mark", 1, 32, 0),
        ("", 2, 64, 0),
        ("x", 1, 96, 4),
        ("ip_summed", 1, 101, 2),
        ("head", 1, 128, 0),
        ("tail", 1, 192, 0),
        ("network_header", 1, 224, 0),
    ];

    #[test]
    fn fields_are_found_where_they_are_also_within_what_has_no_name() {
        let expected = Layout { mark: 4, summed: (12, 5), head: 16, tail: 24, network_header: 28, csum_start: 8, csum_offset: 10 };
        assert_eq!(layout(&account(&FIELDS)).unwrap(), expected);
    }

    #[test]
    fn an_account_that_is_cut_or_lacks_a_field_is_an_error_and_no_guess() {
        let whole = account(&FIELDS);
        for length in 0..whole.len() - 1 {
            assert!(layout(&whole[..length]).is_err(), "{length}");
        }
        assert!(matches!(layout(&account(&FIELDS[1..])), Err(TypesError::Absent { name: "mark" })));
        assert!(matches!(layout(&[0; 64]), Err(TypesError::Unreadable { at: 0 })));
    }

    #[test]
    fn this_kernels_own_account_is_read() {
        // A kernel without one is told of by `status`.
        let Ok(account) = std::fs::read(PLACE) else { return };
        let layout = layout(&account).unwrap();
        assert!(layout.csum_offset == layout.csum_start + 2 && layout.head > 0, "{layout:?}");
    }
}
