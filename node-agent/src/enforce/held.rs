//! The elements of a set as the kernel says them, compared with those that are wanted.
//!
//! # Why
//! A hundred thousand elements come in the order of the kernel's hash. To sort them only to find that all is well takes as long as the
//! kernel takes to list them. So first their number and the sum of their keyed hashes (SipHash, its key made for this one comparison)
//! are compared with those of what is wanted; what is different, or listed twice, is then looked for one by one.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use nix::libc;

use super::TABLE;
use super::attribute::{as_text, text};
use super::key::{Key, Named};
use super::model::{Family, Set, Value, Verdict, along};
use super::socket::{Bodies, NftSocket, SocketError};
use crate::observe::netfilter::{Attribute as Slice, Attributes as Slices, Unreadable};

pub(super) const GONE: &str = "is gone";
pub(super) const FOREIGN: &str = "is not ours";
pub(super) const OTHER: &str = "was changed";

/// How often a set in which something seems to be missing is dumped again, and the time between.
const DUMPS_WHILE_GROWING: usize = 5;
const GROWS_WITHIN: Duration = Duration::from_millis(20);

/// What an element carries, in the kernel's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Data<Chain> {
    Nothing,
    Verdict(u32, Chain),
}

/// The name of a chain where it lies.
type Here<'a> = Data<&'a [u8]>;

/// The elements of a set, kept.
pub(super) type Elements = BTreeMap<Key, Data<String>>;

impl From<Value> for Here<'static> {
    fn from(value: Value) -> Self {
        let code = |code: i32| code as u32;
        match value {
            Value::Nothing => Self::Nothing,
            Value::Verdict(verdict) => match verdict {
                Verdict::Accept => Self::Verdict(code(libc::NF_ACCEPT), b""),
                Verdict::Drop => Self::Verdict(code(libc::NF_DROP), b""),
                Verdict::Continue => Self::Verdict(code(libc::NFT_CONTINUE), b""),
                Verdict::Return => Self::Verdict(code(libc::NFT_RETURN), b""),
                Verdict::Jump(chain) => Self::Verdict(code(libc::NFT_JUMP), chain.as_bytes()),
                Verdict::Goto(chain) => Self::Verdict(code(libc::NFT_GOTO), chain.as_bytes()),
            },
        }
    }
}

impl Data<String> {
    fn of(here: Here<'_>) -> Self {
        match here {
            Data::Nothing => Self::Nothing,
            Data::Verdict(code, chain) => Self::Verdict(code, as_text(chain)),
        }
    }

    pub(super) fn is(&self, value: Value) -> bool {
        match (self, Here::from(value)) {
            (Self::Nothing, Data::Nothing) => true,
            (Self::Verdict(code, chain), Data::Verdict(wanted, to)) => *code == wanted && chain.as_bytes() == to,
            (Self::Nothing | Self::Verdict(..), _) => false,
        }
    }
}

/// Where what is held differs from what is wanted, and how.
pub(super) fn differences<'a>(set: &'a Set, held: &'a Elements) -> impl Iterator<Item = (&'a Key, &'static str)> {
    along(&set.elements, held).filter_map(|(key, wanted, held)| {
        let what = match (wanted, held) {
            (Some(_), None) => GONE,
            (Some(value), Some(data)) if !data.is(*value) => OTHER,
            (Some(_), Some(_)) => return None,
            (None, _) => FOREIGN,
        };
        Some((key, what))
    })
}

fn dump(socket: &mut NftSocket, family: Family, name: &str) -> Result<Bodies, SocketError> {
    let asked = [text(1, TABLE), text(2, name)];
    Ok(socket.ask_bodies(family, libc::NFT_MSG_GETSETELEM as u8, &asked, true, name)?.unwrap_or_default())
}

fn kept(dumped: &Bodies, name: &str) -> Result<Elements, SocketError> {
    let mut held = Vec::new();
    let read = dumped.iter().try_for_each(|body| each(body, |key, data| held.push((Key::from(key), Data::of(data)))));
    read.map_err(|_| SocketError::Unreadable { what: format!("set {name}") })?;
    Ok(held.into_iter().collect())
}

/// Whether the elements are those of the set and no others, each of them once.
fn same(dumped: &Bodies, set: &Set) -> Result<bool, Unreadable> {
    let keyed = RandomState::new();
    let sum = |sum: u64, key: Named<'_>, data: Here<'_>| sum.wrapping_add(keyed.hash_one((key, data)));
    let (mut count, mut held) = (0, 0);
    for body in dumped.iter() {
        each(body, |key, data| (count, held) = (count + 1, sum(held, key, data)))?;
    }
    let wanted = || set.elements.iter().fold(0, |all, (key, value)| sum(all, key.named(), Here::from(*value)));
    Ok(count == set.elements.len() && held == wanted())
}

/// The elements of a set.
pub(super) fn elements(socket: &mut NftSocket, family: Family, name: &str) -> Result<Elements, SocketError> {
    kept(&dump(socket, family, name)?, name)
}

/// The elements of a set where they are not those that are wanted; `None`: they are.
pub(super) fn others(socket: &mut NftSocket, family: Family, name: &str, set: &Set) -> Result<Option<Elements>, SocketError> {
    let dumped = dump(socket, family, name)?;
    match same(&dumped, set) {
        Ok(true) => Ok(None),
        Ok(false) => kept(&dumped, name).map(Some),
        Err(_) => Err(SocketError::Unreadable { what: format!("set {name}") }),
    }
}

/// The same, dumped again while something seems to be missing.
///
/// # Why
/// A hash set that has just grown is moved to a larger table in the background, and a dump meanwhile leaves elements out
/// (linux/rhashtable.h, rhashtable_walk_next: the walk begins anew and the dump goes on by count).
pub(super) fn others_in_the_end(socket: &mut NftSocket, family: Family, name: &str, set: &Set) -> Result<Option<Elements>, SocketError> {
    let Some(mut held) = others(socket, family, name, set)? else { return Ok(None) };
    for _ in 0..DUMPS_WHILE_GROWING {
        if differences(set, &held).all(|(_, what)| what != GONE) {
            break;
        }
        std::thread::sleep(GROWS_WITHIN);
        match others(socket, family, name, set)? {
            Some(more) => held.extend(more),
            None => return Ok(None),
        }
    }
    Ok(Some(held))
}

/// The elements in one message's attributes, read in place.
fn each<'a>(body: &'a [u8], mut element: impl FnMut(Named<'a>, Here<'a>)) -> Result<(), Unreadable> {
    // NFTA_SET_ELEM_LIST_ELEMENTS
    let Some(list) = first(Slices(body), 3)? else { return Ok(()) };
    for one in list.nested() {
        // NFTA_SET_ELEM_KEY, DATA, FLAGS, KEY_END; of each value NFTA_DATA_VALUE
        let (mut key, mut last, mut data, mut otherwise) = (None, None, Data::Nothing, false);
        for attribute in one?.nested() {
            let attribute = attribute?;
            match attribute.kind {
                1 => key = first(attribute.nested(), 1)?,
                2 => data = verdict(attribute.nested())?,
                3 => otherwise = attribute.u32()? & 0x2 != 0,
                10 => last = first(attribute.nested(), 1)?,
                _ => {}
            }
        }
        let key = match (otherwise, key, last) {
            (true, ..) => Named::Otherwise,
            (false, Some(first), Some(last)) => Named::Range(first.value, last.value),
            (false, Some(exact), None) => Named::Exact(exact.value),
            (false, None, _) => return Err(Unreadable("an element without a key")),
        };
        element(key, data);
    }
    Ok(())
}

/// What the last of these elements carries; `None`: there is none.
pub(super) fn carried(body: &[u8]) -> Result<Option<Data<String>>, Unreadable> {
    let mut last = None;
    each(body, |_, data| last = Some(Data::of(data)))?;
    Ok(last)
}

fn first(attributes: Slices<'_>, kind: u16) -> Result<Option<Slice<'_>>, Unreadable> {
    for attribute in attributes {
        let attribute = attribute?;
        if attribute.kind == kind {
            return Ok(Some(attribute));
        }
    }
    Ok(None)
}

/// NFTA_DATA_VERDICT; NFTA_VERDICT_CODE, CHAIN
fn verdict(data: Slices<'_>) -> Result<Here<'_>, Unreadable> {
    let without = Unreadable("an element of a map without a verdict");
    let verdict = first(data, 2)?.ok_or(without)?;
    let code = first(verdict.nested(), 1)?.ok_or(without)?.u32()?;
    let chain = first(verdict.nested(), 2)?.map(|chain| chain.value.split(|&byte| byte == 0).next().unwrap_or_default());
    Ok(Data::Verdict(code, chain.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::super::transaction;
    use super::*;

    /// As the kernel lists them, in this order.
    fn listed(elements: &[(Key, Value)]) -> Bodies {
        let mut list = Vec::new();
        elements.iter().for_each(|(key, value)| transaction::element(&mut list, key, Some(*value)));
        let mut body = Vec::new();
        super::super::attribute::put(&mut body, 3, &list);
        let mut bodies = Bodies::default();
        bodies.push(&body);
        bodies
    }

    #[test]
    fn a_set_is_as_wanted_in_any_order_and_not_with_one_thing_different() {
        let (jump, other) = (Value::Verdict(Verdict::Jump("judge")), Value::Verdict(Verdict::Jump("log")));
        let all = [
            (Key::exact(&[1; 20]), jump),
            (Key::exact(&[2; 44]), Value::Verdict(Verdict::Drop)),
            (Key::range(&[3; 4], &[4; 4]), Value::Nothing),
            (Key::Otherwise, jump),
        ];
        let set = Set { elements: all.iter().cloned().collect(), ..Set::of(&[], "") };
        let is = |elements: &[(Key, Value)]| same(&listed(elements), &set).unwrap();
        let [a, b, c, d] = all.clone();
        assert!(is(&all) && is(&[d.clone(), b.clone(), a.clone(), c.clone()]));
        assert!(!is(&[a.clone(), b.clone(), c.clone()]), "one is gone");
        assert!(!is(&[a.clone(), b.clone(), c.clone(), c.clone()]), "one is listed twice in the place of another");
        assert!(!is(&[a.clone(), b.clone(), c.clone(), d.clone(), (Key::exact(&[9; 4]), Value::Nothing)]), "a foreign one");
        assert!(!is(&[(a.0.clone(), other), b.clone(), c.clone(), d.clone()]), "another chain");
        assert!(!is(&[a, (b.0, jump), c.clone(), d.clone()]), "another verdict");
        let held = kept(&listed(&[(Key::exact(&[1; 20]), other), c.clone(), c, d, (Key::exact(&[9; 4]), jump)]), "").unwrap();
        let found: Vec<_> = differences(&set, &held).map(|(key, what)| (key.clone(), what)).collect();
        let expected = [(Key::exact(&[1; 20]), OTHER), (Key::exact(&[2; 44]), GONE), (Key::exact(&[9; 4]), FOREIGN)];
        assert_eq!(found, expected);
    }
}
