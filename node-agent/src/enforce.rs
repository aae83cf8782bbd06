//! A ruleset into the kernel, in one transaction, read back; and out again.
//!
//! Three tables of ours, all named `bulkhead`: `inet` decides ([`filter`]), `bridge` ties addresses to ports and closes a bridge
//! whose packets the filter doesn't see ([`guard`]), `arp` says whom the node believes ([`arp`]). Beside them each bound MAC address
//! is tied to its port in the bridge's own table ([`stations`]), and what the bridge learns beside is bounded ([`learned`]). Nothing else on the host is touched. What a ruleset means is decided in
//! `policy`; here it becomes sets and rules, the difference to what the kernel holds becomes one transaction, and what the
//! kernel says afterwards is compared with it.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::time::Duration;

use policy::Ruleset;
use policy::ruleset::Change;

mod anew;
mod arp;
mod attribute;
mod build;
mod change;
pub mod count;
mod dry_run;
mod elements;
mod entries;
mod expression;
mod filter;
mod guard;
mod held;
mod kernel;
mod key;
mod learned;
mod links;
pub mod living;
mod model;
mod nftables;
mod socket;
mod stations;
pub mod sums;
mod transaction;
pub mod watch;

pub use dry_run::DryRun;
pub use kernel::Drift;
pub use links::Links;
pub use nftables::Nftables;
pub use socket::SocketError;

use elements::Shape;
use model::{Family, Set, Table};

/// The name of our tables.
pub const TABLE: &str = "bulkhead";

/// Bit of a packet's mark: the guard found the sender's addresses to be its own. High bits, since engines, proxies and VPNs
/// use low ones; only these two are ever changed, and they are gone when a packet leaves the host's namespace.
pub const PINNED: u32 = 0x1000_0000;
/// Bit of a packet's mark: the filter let it pass.
pub const ACCEPTED: u32 = 0x2000_0000;

/// How long after a UDP flow began its late answers still pass, if the policy allows the flow: conntrack forgets after 30 to
/// 120 s (nf_conntrack_udp_timeout, _stream), long polls and keep-alives are slower than that.
pub const UDP_ANSWER_WINDOW: Duration = Duration::from_secs(600);

/// Puts rulesets where they take effect.
pub trait Enforcer {
    /// Makes the ruleset so, in one transaction; the same ruleset again writes nothing.
    ///
    /// # Errors
    /// Each [`EnforceError`]; but for [`EnforceError::NotAsWritten`], and [`EnforceError::Links`] where a bridge refuses, nothing was changed.
    fn apply(&mut self, ruleset: &Ruleset) -> Result<Applied, EnforceError>;

    /// The same, where it is known in what the ruleset differs from the one applied last: nothing else is looked at. Does what
    /// [`Enforcer::apply`] does where that is not enough.
    ///
    /// # Errors
    /// As [`Enforcer::apply`].
    fn change(&mut self, ruleset: &Ruleset, change: &Change) -> Result<Applied, EnforceError>;

    /// Everything in which the kernel differs from what was applied last. Empty before the first apply.
    ///
    /// # Errors
    /// The kernel does not answer.
    fn verify(&mut self) -> Result<Vec<Drift>, EnforceError>;

    /// Writes everything anew, whatever is there, in one transaction.
    ///
    /// # Errors
    /// As [`Enforcer::apply`].
    fn repair(&mut self, ruleset: &Ruleset) -> Result<Applied, EnforceError>;

    /// Takes everything away, also what an earlier process left. Returns the tables that were there.
    ///
    /// # Errors
    /// The kernel refuses, for example because another process owns the tables.
    fn remove(&mut self) -> Result<Vec<String>, EnforceError>;
}

/// Who may change the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// Only this socket and its copies; the tables outlive them (kernel 6.9 and later).
    OwnedPersistent,
    /// Only this socket and its copies; the tables go with the last of them (kernels 5.12 to 6.8). Only where somebody keeps a copy.
    Owned,
    /// Anybody with CAP_NET_ADMIN, as the kernel knows no better: watched, and written again.
    Shared,
}

impl Ownership {
    /// The table's flags.
    fn flags(self) -> u32 {
        match self {
            Self::OwnedPersistent => transaction::OWNER | transaction::PERSIST,
            Self::Owned => transaction::OWNER,
            Self::Shared => 0,
        }
    }

    /// What is left to try where the kernel does not know this; `kept`: somebody keeps a copy of the socket.
    fn next(self, kept: bool) -> Option<Self> {
        match self {
            // Without a copy elsewhere the tables would go with a killed agent, and everything would be open.
            Self::OwnedPersistent if kept => Some(Self::Owned),
            Self::OwnedPersistent | Self::Owned => Some(Self::Shared),
            Self::Shared => None,
        }
    }
}

impl fmt::Display for Ownership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OwnedPersistent => "owned, outlives the agent",
            Self::Owned => "owned, a copy of the socket is kept",
            Self::Shared => "shared, watched for changes",
        })
    }
}

/// What an apply did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Elements added and removed.
    pub changed: usize,
    /// Chains and rules were written too: the first apply, a repair, or a kind of rule not used before.
    pub rules_written: bool,
    /// The kernel's generation of all rules after it.
    pub generation_id: u32,
    /// Who may change the tables.
    pub ownership: Ownership,
    /// Bridges that the ruleset names and the node lacks: nothing is bound there, and where guarded, nothing passes.
    pub absent: BTreeSet<String>,
    /// Ports whose MAC address could not be tied to them: a neighbour can keep their packets from arriving, not read them.
    pub adrift: BTreeSet<String>,
}

/// Why a ruleset is not in force.
#[derive(Debug, thiserror::Error)]
pub enum EnforceError {
    /// Sockets cannot be opened.
    #[error("cannot talk to the kernel's netfilter")]
    Open(#[source] io::Error),
    /// Interfaces or bridges cannot be read or changed.
    #[error("cannot read or change the network interfaces")]
    Links(#[source] io::Error),
    /// No privilege.
    #[error("changing nftables needs CAP_NET_ADMIN in this network namespace: run as root")]
    NotPermitted(#[source] SocketError),
    /// Another process owns the tables.
    #[error("table {table} belongs to another process (netlink port {owner}): is another agent running?")]
    OwnedByAnother {
        /// Which table.
        table: String,
        /// Its owner's netlink address, which mostly is its process id.
        owner: u32,
    },
    /// The kernel refused; nothing was changed.
    #[error("the ruleset was not applied, nothing was changed")]
    Refused(#[source] SocketError),
    /// The kernel cannot be read.
    #[error("the ruleset in the kernel cannot be read")]
    Unreadable(#[source] SocketError),
    /// Written, and read back differently.
    #[error("the kernel does not hold what was written: {}", drift.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    NotAsWritten {
        /// How.
        drift: Vec<Drift>,
    },
}

/// All tables.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tables {
    inet: Table,
    bridge: Table,
    arp: Table,
}

impl Tables {
    fn all(&self) -> [&Table; 3] {
        [&self.inet, &self.bridge, &self.arp]
    }

    fn of(&self, family: Family) -> &Table {
        match family {
            Family::Inet => &self.inet,
            Family::Bridge => &self.bridge,
            Family::Arp => &self.arp,
        }
    }

    fn set(&self, family: Family, name: &str) -> Option<&Set> {
        self.of(family).sets.get(name)
    }

    fn set_mut(&mut self, family: Family, name: &str) -> Option<&mut Set> {
        let table = match family {
            Family::Inet => &mut self.inet,
            Family::Bridge => &mut self.bridge,
            Family::Arp => &mut self.arp,
        };
        table.sets.get_mut(name)
    }
}

/// Ruleset and interface indices -> tables. `shape` only grows, so that sets come and go with restarts and not with rules.
fn compile(ruleset: &Ruleset, links: &Links, shape: &mut Shape) -> Tables {
    let pairs = elements::pairs(ruleset, links);
    shape.extend(pairs.keys().copied());
    let mut tables = Tables { inet: filter::table(shape), bridge: guard::table(), arp: arp::table() };
    for (name, keys) in pairs {
        if let Some(set) = tables.set_mut(Family::Inet, &name.to_string()) {
            set.elements.append(&mut keys.into_iter().map(|key| (key, model::Value::Nothing)).collect());
        }
    }
    for ((family, name), elements) in elements::others(ruleset, links) {
        if let Some(set) = tables.set_mut(family, name) {
            // Made of all of them at once: one after the other takes five times as long.
            set.elements.append(&mut elements.into_iter().collect());
        }
    }
    tables
}

fn refused(error: SocketError) -> EnforceError {
    match error.code() {
        Some(nix::libc::EPERM | nix::libc::EACCES) => EnforceError::NotPermitted(error),
        _ => EnforceError::Refused(error),
    }
}

/// Elements of all sets that come and go between two states.
fn changed(old: Option<&Tables>, new: &Tables) -> usize {
    let all = new.all().into_iter();
    match old {
        Some(old) => old.all().into_iter().zip(all).map(|(old, new)| transaction::elements_changed(old, new)).sum(),
        None => all.flat_map(|table| table.sets.values()).map(|set| set.elements.len()).sum(),
    }
}

/// See [`crate::fuzzing`].
#[cfg(any(fuzzing, test))]
pub(crate) use kernel::read_any;
