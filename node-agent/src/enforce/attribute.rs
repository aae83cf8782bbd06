//! Netlink attributes of nf_tables, written and read. What they mean is said by the modules beside this one.

use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED, NLA_TYPE_MASK, NlasIterator};

/// One attribute.
pub(super) type Attribute = DefaultNla;

/// Attributes as read: kinds and values.
pub(super) type Attributes = Vec<(u16, Vec<u8>)>;

/// A nested attribute's length is 16 bits wide (`struct nlattr`); lists are split well below it.
pub(super) const NEST_LIMIT: usize = 48 * 1024;

/// Text, ended by a zero.
pub(super) fn text(kind: u16, text: &str) -> Attribute {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    DefaultNla::new(kind, bytes)
}

/// Bytes as they are.
pub(super) fn bytes(kind: u16, bytes: &[u8]) -> Attribute {
    DefaultNla::new(kind, bytes.to_vec())
}

/// A number of 16 bits, in network order as nfnetlink wants it.
pub(super) fn be16(kind: u16, value: u16) -> Attribute {
    DefaultNla::new(kind, value.to_be_bytes().to_vec())
}

/// A number of 32 bits.
pub(super) fn be32(kind: u16, value: u32) -> Attribute {
    DefaultNla::new(kind, value.to_be_bytes().to_vec())
}

/// A number of 64 bits.
pub(super) fn be64(kind: u16, value: u64) -> Attribute {
    DefaultNla::new(kind, value.to_be_bytes().to_vec())
}

/// Attributes within an attribute.
pub(super) fn nest(kind: u16, inner: &[Attribute]) -> Attribute {
    let mut bytes = vec![0; inner.buffer_len()];
    inner.emit(&mut bytes);
    debug_assert!(bytes.len() <= usize::from(u16::MAX) - 4, "a list was not split");
    DefaultNla::new(kind | NLA_F_NESTED, bytes)
}

/// Writes one attribute behind others: for what is written by the hundred thousand.
pub(super) fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    put_nest(out, kind, |out| out.extend_from_slice(value));
}

/// The same of attributes within it; `kind` says so.
pub(super) fn put_nest(out: &mut Vec<u8>, kind: u16, inside: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(&kind.to_ne_bytes());
    inside(out);
    let length = u16::try_from(out.len() - at).expect("a list is split well before");
    out[at..at + 2].copy_from_slice(&length.to_ne_bytes());
    out.resize(out.len().next_multiple_of(4), 0);
}

/// The attributes in a buffer, as (kind, value). `None`: the buffer is cut or lies about a length.
pub(super) fn read(buffer: &[u8]) -> Option<Attributes> {
    NlasIterator::new(buffer).map(|nla| nla.ok().map(|nla| (nla.kind() & NLA_TYPE_MASK, nla.value().to_vec()))).collect()
}

/// The value of the first attribute of a kind.
pub(super) fn find(attributes: &[(u16, Vec<u8>)], kind: u16) -> Option<&[u8]> {
    attributes.iter().find(|(k, _)| *k == kind).map(|(_, value)| value.as_slice())
}

/// Text without its ending zero.
pub(super) fn as_text(value: &[u8]) -> String {
    let end = value.iter().position(|&b| b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// A number of 32 bits in network order.
pub(super) fn as_be32(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(value.try_into().ok()?))
}
