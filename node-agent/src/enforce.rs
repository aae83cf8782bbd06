//! A ruleset into the kernel, in one transaction, read back; and out again.
//!
//! Three tables of ours, all named `bulkhead`: `inet` decides ([`filter`]), `bridge` ties addresses to ports and closes a bridge
//! whose packets the filter doesn't see ([`guard`]), `arp` says whom the node believes ([`arp`]). Beside them each bound MAC address
//! is tied to its port in the bridge's own table ([`stations`]). Nothing else on the host is touched. What a ruleset means is decided in
//! `policy`; here it becomes sets and rules, the difference to what the kernel holds becomes one transaction, and what the
//! kernel says afterwards is compared with it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use policy::Ruleset;

mod anew;
mod arp;
mod attribute;
mod build;
pub mod count;
mod dry_run;
mod elements;
mod expression;
mod filter;
mod guard;
mod kernel;
mod links;
pub mod living;
mod model;
mod socket;
mod stations;
mod transaction;
pub mod watch;

pub use dry_run::DryRun;
pub use kernel::Drift;
pub use links::Links;
pub use socket::SocketError;

use elements::Shape;
use kernel::Forms;
use links::LinkReader;
use model::{Family, Table};
use socket::NftSocket;
use stations::Station;

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

/// How long the owner of the tables may take to be gone, once another process wants them.
const OWNER_GOES_WITHIN: Duration = Duration::from_secs(1);

/// A change of at most so many elements is read back one by one; a larger one by a full compare, which is then cheaper.
const READ_BACK_SINGLY: usize = 256;

/// Puts rulesets where they take effect.
pub trait Enforcer {
    /// Makes the ruleset so, in one transaction; the same ruleset again writes nothing.
    ///
    /// # Errors
    /// Each [`EnforceError`]; but for [`EnforceError::NotAsWritten`], and [`EnforceError::Links`] where a bridge refuses, nothing was changed.
    fn apply(&mut self, ruleset: &Ruleset) -> Result<Applied, EnforceError>;

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
}

/// Ruleset and interface indices -> tables. `shape` only grows, so that sets come and go with restarts and not with rules.
fn compile(ruleset: &Ruleset, links: &Links, shape: &mut Shape) -> Tables {
    let pairs = elements::pairs(ruleset, links);
    shape.extend(pairs.keys().copied());
    let mut inet = filter::table(shape);
    for (name, keys) in pairs {
        if let Some(set) = inet.sets.get_mut(&name.to_string()) {
            set.elements.extend(keys.into_iter().map(|key| (key, model::Value::Nothing)));
        }
    }
    elements::fill(&mut inet, ruleset, links);
    Tables { inet, bridge: guard::table(ruleset), arp: arp::table(ruleset) }
}

/// What the kernel holds after our last transaction.
#[derive(Debug)]
struct Held {
    tables: Tables,
    forms: [Forms; 3],
}

/// The enforcer of the node: nftables through nfnetlink.
#[derive(Debug)]
pub struct Nftables {
    socket: NftSocket,
    links: LinkReader,
    shape: Shape,
    held: Option<Held>,
    /// What was tied to its port and is to stay so.
    stations: BTreeSet<Station>,
    /// Of the tables as they were written last.
    ownership: Ownership,
    /// The best that is still to be tried.
    most: Ownership,
    /// Somebody keeps a copy of the socket.
    kept: bool,
    /// The sums when rows were read last.
    counted: BTreeMap<(count::Reason, u8), u64>,
}

impl Nftables {
    /// Opens sockets in the network namespace of the calling thread; they stay there.
    ///
    /// # Errors
    /// No netfilter in the kernel, or no privilege.
    pub fn open() -> Result<Self, EnforceError> {
        Self::over(NftSocket::open().map_err(EnforceError::Open)?)
    }

    /// Goes on with the socket of an earlier process ([`Nftables::socket`]), and so with the ownership of its tables. What the
    /// kernel still had to say to that process is thrown away.
    ///
    /// # Errors
    /// The descriptor is no netfilter socket, or one of another network namespace; or no privilege.
    pub fn resume(socket: OwnedFd) -> Result<Self, EnforceError> {
        Self::over(NftSocket::from_fd(socket).map_err(EnforceError::Open)?)
    }

    fn over(socket: NftSocket) -> Result<Self, EnforceError> {
        let links = LinkReader::open().map_err(EnforceError::Open)?;
        Ok(Self {
            socket,
            links,
            shape: Shape::new(),
            held: None,
            stations: BTreeSet::new(),
            ownership: Ownership::Shared,
            most: Ownership::OwnedPersistent,
            kept: false,
            counted: BTreeMap::new(),
        })
    }

    /// Never asks for more than this, as on kernels that know no more.
    pub fn at_most(mut self, most: Ownership) -> Self {
        self.most = most;
        self
    }

    /// [`Nftables::at_most`] shared.
    pub fn shared(self) -> Self {
        self.at_most(Ownership::Shared)
    }

    /// Somebody keeps a copy of [`Nftables::socket`] for the next process: ownership that ends with the socket may be asked for too.
    pub fn kept(mut self) -> Self {
        self.kept = true;
        self
    }

    /// Before the last copy of the socket goes: tables that would go with it are made shared, so that they stay. Others stay anyway.
    ///
    /// # Errors
    /// The kernel refuses; nothing was changed.
    pub fn let_go(&mut self) -> Result<(), EnforceError> {
        let (Ownership::Owned, Some(held)) = (self.ownership, &self.held) else { return Ok(()) };
        // The kernel takes no owner away from a table that is there.
        let tables = held.tables.all().into_iter();
        let anew: Vec<_> = tables.flat_map(|table| transaction::create(table, true, Ownership::Shared.flags())).collect();
        self.socket.commit(&anew).map_err(refused)?;
        (self.ownership, self.most) = (Ownership::Shared, Ownership::Shared);
        Ok(())
    }

    /// The socket that owns the tables: while a copy of it lives, nobody else can change them.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The netlink address of that socket, by which the kernel names the owner.
    pub fn owner(&self) -> u32 {
        self.socket.port()
    }

    /// The difference as a transaction; `None`: it needs a new start.
    fn difference(&self, wanted: &Tables) -> Option<Vec<socket::Message>> {
        let held = self.held.as_ref()?;
        let pairs = || held.tables.all().into_iter().zip(wanted.all());
        pairs()
            .all(|(old, new)| transaction::can_change(old, new))
            .then(|| pairs().flat_map(|(old, new)| transaction::change(old, new)).collect())
    }

    /// The state of a table that is ours or nobody's. An owner that has just died is waited for: its socket lives on for as long as
    /// a process that was being forked meanwhile holds a copy.
    fn free_table(&mut self, family: Family) -> Result<Option<(u32, Option<u32>)>, EnforceError> {
        let begun = Instant::now();
        loop {
            let state = kernel::table_state(&mut self.socket, family).map_err(refused)?;
            match state {
                Some((_, Some(owner))) if owner != self.socket.port() => {
                    if begun.elapsed() > OWNER_GOES_WITHIN {
                        return Err(EnforceError::OwnedByAnother { table: format!("{family} {TABLE}"), owner });
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                Some(_) | None => return Ok(state),
            }
        }
    }

    fn write_all(&mut self, wanted: &Tables) -> Result<(), EnforceError> {
        let mut frames = [None, None, None];
        for (table, frame) in wanted.all().into_iter().zip(&mut frames) {
            let state = self.free_table(table.family)?;
            if state.is_some() {
                *frame = Some(kernel::frame(&mut self.socket, table).map_err(refused)?);
            }
        }
        let mut most = if self.most == Ownership::Owned && !self.kept { Ownership::Shared } else { self.most };
        let replaces = frames.iter().any(Option::is_some);
        loop {
            let tables = || wanted.all().into_iter().zip(&frames);
            let in_place = tables().flat_map(|(table, frame)| match frame {
                Some(frame) => transaction::rewrite(table, frame, most.flags()),
                None => transaction::create(table, false, most.flags()),
            });
            let mut written = self.socket.commit(&in_place.collect::<Vec<_>>());
            // A table with other flags, or of a form that cannot be turned into ours.
            if written.is_err() && replaces {
                let anew = tables().flat_map(|(table, frame)| transaction::create(table, frame.is_some(), most.flags()));
                written = self.socket.commit(&anew.collect::<Vec<_>>());
            }
            match (written, most.next(self.kept)) {
                (Ok(()), _) => break,
                // Before 5.12 the kernel knows no owner, before 6.9 no persistence.
                (Err(error), Some(less)) if matches!(error.code(), Some(nix::libc::EOPNOTSUPP | nix::libc::EINVAL)) => most = less,
                (Err(error), _) => return Err(refused(error)),
            }
        }
        (self.ownership, self.most) = (most, most);
        Ok(())
    }

    fn read_all(&mut self, wanted: Tables) -> Result<(), EnforceError> {
        let mut forms = [Forms::new(), Forms::new(), Forms::new()];
        let mut all = Vec::new();
        for (table, form) in wanted.all().into_iter().zip(&mut forms) {
            let (read, drift) = kernel::compare(&mut self.socket, table, None).map_err(EnforceError::Unreadable)?;
            *form = read;
            all.extend(drift);
        }
        if !all.is_empty() {
            return Err(EnforceError::NotAsWritten { drift: all });
        }
        self.held = Some(Held { tables: wanted, forms });
        Ok(())
    }

    /// What was denied so far, as the kernel counts it; without rows if that is what it was the last time. Nothing before the
    /// first apply.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn counts(&mut self) -> Result<count::Counts, EnforceError> {
        if self.held.is_none() {
            return Ok(count::Counts::default());
        }
        let mut counts = count::totals(&mut self.socket).map_err(EnforceError::Unreadable)?;
        // Mostly nothing was denied, and thousands of rows need not be read to know it.
        if counts.total != self.counted {
            self.counted.clone_from(&counts.total);
            count::rows(&mut self.socket, &mut counts).map_err(EnforceError::Unreadable)?;
        }
        Ok(counts)
    }

    fn result(&mut self, changed: usize, rules_written: bool, absent: BTreeSet<String>) -> Result<Applied, EnforceError> {
        let generation_id = kernel::generation(&mut self.socket).map_err(EnforceError::Unreadable)?;
        Ok(Applied { changed, rules_written, generation_id, ownership: self.ownership, absent, adrift: BTreeSet::new() })
    }

    /// The tables of a ruleset, in one transaction, read back.
    fn write(&mut self, ruleset: &Ruleset, links: &Links) -> Result<Applied, EnforceError> {
        let absent = elements::absent(ruleset, links);
        let wanted = compile(ruleset, links, &mut self.shape);
        let Some(messages) = self.difference(&wanted) else {
            let changed = changed(None, &wanted);
            self.write_all(&wanted)?;
            self.read_all(wanted)?;
            return self.result(changed, true, absent);
        };
        if messages.is_empty() {
            return self.result(0, false, absent);
        }
        if let Err(error) = self.socket.commit(&messages) {
            // Somebody took away what the difference builds upon: everything anew, still in one transaction.
            return match error.code() {
                Some(nix::libc::ENOENT | nix::libc::EEXIST) => {
                    self.held = None;
                    self.write(ruleset, links)
                }
                _ => Err(refused(error)),
            };
        }
        let held = self.held.take();
        let old = held.as_ref().map(|held| &held.tables);
        let count = changed(old, &wanted);
        let rules_written = old.is_none_or(|old| old.all().into_iter().zip(wanted.all()).any(|(old, new)| old.chains != new.chains));
        match held {
            Some(held) if !rules_written && count <= READ_BACK_SINGLY => {
                let mut drift = Vec::new();
                for (old, new) in held.tables.all().into_iter().zip(wanted.all()) {
                    drift.extend(kernel::compare_changed(&mut self.socket, old, new).map_err(EnforceError::Unreadable)?);
                }
                if !drift.is_empty() {
                    return Err(EnforceError::NotAsWritten { drift });
                }
                self.held = Some(Held { tables: wanted, forms: held.forms });
            }
            Some(_) | None => self.read_all(wanted)?,
        }
        self.result(count, rules_written, absent)
    }

    /// What an earlier process tied to ports: the set of MAC addresses in the kernel is the record of it.
    fn left_behind(&mut self, links: &Links) -> Result<BTreeSet<Station>, EnforceError> {
        let pinned = kernel::pinned(&mut self.socket).map_err(EnforceError::Unreadable)?;
        if pinned.is_empty() {
            return Ok(BTreeSet::new());
        }
        let sticky = stations::read(&self.links).map_err(EnforceError::Links)?.sticky;
        let ours = pinned.into_iter().filter_map(|(port, mac)| Some(Station { port: links.index(&port)?, mac }));
        Ok(ours.filter(|station| sticky.contains(station)).collect())
    }

    /// Ties MAC addresses to their ports. Returns the ports where that was refused; the tables hold without it.
    fn moor(&mut self, ruleset: &Ruleset, links: &Links, before: &BTreeSet<Station>) -> Result<BTreeSet<String>, EnforceError> {
        let wanted = stations::wanted(ruleset, links);
        for station in before.difference(&wanted) {
            stations::release(&self.links, *station).map_err(EnforceError::Links)?;
        }
        self.stations = wanted.intersection(before).copied().collect();
        if self.stations.len() < wanted.len() {
            let held = stations::read(&self.links).map_err(EnforceError::Links)?;
            let new = wanted.difference(before).copied();
            self.stations.extend(new.filter(|station| stations::hold(&self.links, &held, *station).is_ok()));
        }
        let tied = |name: &str| links.index(name).is_none_or(|port| self.stations.iter().any(|station| station.port == port));
        Ok(ruleset.pins.keys().filter(|name| !tied(name)).cloned().collect())
    }
}

fn refused(error: SocketError) -> EnforceError {
    match error.code() {
        Some(nix::libc::EPERM | nix::libc::EACCES) => EnforceError::NotPermitted(error),
        _ => EnforceError::Refused(error),
    }
}

/// Elements of all sets that come and go between two states.
fn changed(old: Option<&Tables>, new: &Tables) -> usize {
    let none = |family: Family| Table { family, sets: Default::default(), chains: Default::default() };
    new.all()
        .into_iter()
        .enumerate()
        .map(|(index, table)| match old {
            Some(old) => transaction::elements_changed(old.all()[index], table),
            None => transaction::elements_changed(&none(table.family), table),
        })
        .sum()
}

impl Enforcer for Nftables {
    fn apply(&mut self, ruleset: &Ruleset) -> Result<Applied, EnforceError> {
        let links = self.links.read().map_err(EnforceError::Links)?;
        let before = match &self.held {
            Some(_) => std::mem::take(&mut self.stations),
            None => self.left_behind(&links)?,
        };
        // Should the write fail, what is tied stays tied.
        self.stations.clone_from(&before);
        let applied = self.write(ruleset, &links)?;
        Ok(Applied { adrift: self.moor(ruleset, &links, &before)?, ..applied })
    }

    fn verify(&mut self) -> Result<Vec<Drift>, EnforceError> {
        let Some(held) = &self.held else { return Ok(Vec::new()) };
        let mut all = Vec::new();
        for (table, forms) in held.tables.all().into_iter().zip(&held.forms) {
            let (_, drift) = kernel::compare(&mut self.socket, table, Some(forms)).map_err(EnforceError::Unreadable)?;
            all.extend(drift);
        }
        let sticky = stations::read(&self.links).map_err(EnforceError::Links)?.sticky;
        let names = self.links.read().map_err(EnforceError::Links)?.names();
        // A port that is gone took its entry along, and a bound one that is gone is unbound in a moment.
        let loose = self.stations.difference(&sticky).filter_map(|station| Some((names.get(&station.port)?, station.mac)));
        all.extend(loose.map(|(port, mac)| Drift::Station { port: port.clone(), mac }));
        Ok(all)
    }

    fn repair(&mut self, ruleset: &Ruleset) -> Result<Applied, EnforceError> {
        self.held = None;
        self.apply(ruleset)
    }

    fn remove(&mut self) -> Result<Vec<String>, EnforceError> {
        let mut messages = Vec::new();
        let mut tables = Vec::new();
        let links = self.links.read().map_err(EnforceError::Links)?;
        let tied = self.left_behind(&links)?;
        for family in [Family::Inet, Family::Bridge, Family::Arp] {
            match self.free_table(family)? {
                None => continue,
                Some(_) => {
                    messages.push(transaction::remove(family));
                    tables.push(format!("{family} {TABLE}"));
                }
            }
        }
        self.socket.commit(&messages).map_err(refused)?;
        for station in tied {
            stations::release(&self.links, station).map_err(EnforceError::Links)?;
        }
        self.stations.clear();
        self.held = None;
        self.shape.clear();
        Ok(tables)
    }
}
