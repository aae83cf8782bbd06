//! The rules of one side of a policy.

use std::collections::{BTreeSet, btree_set};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Rule;

/// Rules in their order, each once. Used as the [`BTreeSet`] that it is.
///
/// # Why
/// Each decision makes the next set that is in force from the one before, keeps both for a while, and looks for what is otherwise. Copies
/// share their rules until one of them is changed, and what is shared is known to be the same: a quarantine among a hundred thousand
/// rules copies and compares none of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rules(Arc<BTreeSet<Rule>>);

impl Deref for Rules {
    type Target = BTreeSet<Rule>;

    fn deref(&self) -> &BTreeSet<Rule> {
        &self.0
    }
}

impl DerefMut for Rules {
    fn deref_mut(&mut self) -> &mut BTreeSet<Rule> {
        Arc::make_mut(&mut self.0)
    }
}

impl From<BTreeSet<Rule>> for Rules {
    fn from(rules: BTreeSet<Rule>) -> Self {
        Self(Arc::new(rules))
    }
}

impl<const N: usize> From<[Rule; N]> for Rules {
    fn from(rules: [Rule; N]) -> Self {
        BTreeSet::from(rules).into()
    }
}

impl FromIterator<Rule> for Rules {
    fn from_iter<T: IntoIterator<Item = Rule>>(rules: T) -> Self {
        rules.into_iter().collect::<BTreeSet<_>>().into()
    }
}

impl<'a> IntoIterator for &'a Rules {
    type Item = &'a Rule;
    type IntoIter = btree_set::Iter<'a, Rule>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl IntoIterator for Rules {
    type Item = Rule;
    type IntoIter = btree_set::IntoIter<Rule>;

    fn into_iter(self) -> Self::IntoIter {
        Arc::unwrap_or_clone(self.0).into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy_set::Peer;
    use crate::service::Ports;

    #[test]
    fn copies_share_their_rules_until_one_of_them_is_changed() {
        let rule = |ports: &str| Rule { peer: Peer::Host, ports: ports.parse::<Ports>().unwrap(), until: None };
        let first = Rules::from([rule("tcp/80")]);
        let mut second = first.clone();
        assert!(Arc::ptr_eq(&first.0, &second.0));
        second.insert(rule("tcp/81"));
        assert_eq!((first.len(), second.len()), (1, 2));
        second.remove(&rule("tcp/81"));
        assert_eq!(first, second, "the same rules are the same, wherever they are");
    }
}
