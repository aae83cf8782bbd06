//! The enforcer of the node: nftables through nfnetlink.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use policy::Ruleset;
use policy::ruleset::Change;

use super::change::Edits;
use super::elements::{self, Shape};
use super::kernel::{self, Drift, Forms};
use super::links::{LinkReader, Links};
use super::model::Family;
use super::socket::{Message, NftSocket, SocketError};
use super::stations::{self, Station};
use super::{Applied, EnforceError, Enforcer, Ownership, TABLE, Tables, change, changed, compile, count, learned, refused, transaction};

/// A difference of at most so many elements is read back one by one; a larger one by a full compare, which is then cheaper.
const READ_BACK_SINGLY: usize = 256;

/// How long the owner of the tables may take to be gone, once another process wants them.
const OWNER_GOES_WITHIN: Duration = Duration::from_secs(1);

/// The kernel writes an entry's port first and then that it is sticky: a frame that comes between them moves it for good, and of the
/// floods that tried, three in a hundred did (`no_flood_wins_the_race_for_a_mac_address_while_its_port_is_tied`). An entry that is sticky
/// already has no such moment, so the second time is mostly the last.
const TIED_ANEW: usize = 3;

/// What the kernel holds after our last transaction.
#[derive(Debug)]
struct Held {
    tables: Tables,
    forms: [Forms; 3],
    /// Bridges that the elements name, with the indices that they are named by; `None`: not there.
    bridges: BTreeMap<String, Option<u32>>,
    /// Bound ports, likewise.
    ports: BTreeMap<String, Option<u32>>,
}

/// Which interface a name is now.
fn indexed<'a>(names: impl IntoIterator<Item = &'a String>, links: &Links) -> BTreeMap<String, Option<u32>> {
    names.into_iter().map(|name| (name.clone(), links.index(name))).collect()
}

impl Held {
    /// Of the bridges, and of the ports of a change.
    fn links(&self, change: &Change) -> Links {
        let ports = change.pins.keys().filter_map(|port| self.ports.get_key_value(port));
        Links::of(self.bridges.iter().chain(ports).filter_map(|(name, index)| Some((name.as_str(), (*index)?))))
    }

    fn absent(&self) -> BTreeSet<String> {
        self.bridges.iter().filter(|(_, index)| index.is_none()).map(|(name, _)| name.clone()).collect()
    }
}

/// What of the bridges is still to follow the tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Unsettled {
    /// Ports came or went.
    ports: bool,
    /// Bridges came or went, or are treated otherwise.
    bridges: bool,
}

/// The enforcer of the node: what it holds and by which sockets.
#[derive(Debug)]
pub struct Nftables {
    socket: NftSocket,
    links: LinkReader,
    shape: Shape,
    held: Option<Held>,
    /// What was tied to its port and is to stay so.
    stations: BTreeSet<Station>,
    /// Ports that could not be tied, the last time.
    adrift: BTreeSet<String>,
    /// What [`Nftables::begin`] left to [`Nftables::settle`].
    unsettled: Unsettled,
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
            adrift: BTreeSet::new(),
            unsettled: Unsettled::default(),
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
        self.socket.commit(anew).map_err(refused)?;
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
    fn difference(&self, wanted: &Tables) -> Option<Vec<Message>> {
        let held = self.held.as_ref()?;
        let pairs = || held.tables.all().into_iter().zip(wanted.all());
        pairs()
            .all(|(old, new)| transaction::can_change(old, new))
            .then(|| pairs().flat_map(|(old, new)| transaction::change(old, new)).collect())
    }

    /// Whether a table of ours is there, whoever owns it.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn is_there(&mut self) -> Result<bool, EnforceError> {
        for family in [Family::Inet, Family::Bridge, Family::Arp] {
            if kernel::table_state(&mut self.socket, family).map_err(refused)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
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
            let mut written = self.socket.commit(in_place.collect());
            // A table with other flags, or of a form that cannot be turned into ours.
            if written.is_err() && replaces {
                let anew = tables().flat_map(|(table, frame)| transaction::create(table, frame.is_some(), most.flags()));
                written = self.socket.commit(anew.collect());
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

    fn read_all(&mut self, wanted: Tables, [bridges, ports]: [BTreeMap<String, Option<u32>>; 2]) -> Result<(), EnforceError> {
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
        self.held = Some(Held { tables: wanted, forms, bridges, ports });
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
            count::rows(&mut self.socket, &mut counts).map_err(EnforceError::Unreadable)?;
            self.counted.clone_from(&counts.total);
        }
        Ok(counts)
    }

    /// What was counted last could not be taken up: its rows are to be given again.
    pub fn count_again(&mut self) {
        self.counted.clear();
    }

    fn result(&mut self, changed: usize, rules_written: bool, absent: BTreeSet<String>) -> Result<Applied, EnforceError> {
        let generation_id = kernel::generation(&mut self.socket).map_err(EnforceError::Unreadable)?;
        Ok(Applied { changed, rules_written, generation_id, ownership: self.ownership, absent, adrift: BTreeSet::new() })
    }

    /// The tables of a ruleset, in one transaction, read back.
    fn write(&mut self, ruleset: &Ruleset, links: &Links) -> Result<Applied, EnforceError> {
        let bridges = indexed(elements::named_bridges(ruleset), links);
        let ports = indexed(ruleset.pins.keys(), links);
        let absent = bridges.iter().filter(|(_, index)| index.is_none()).map(|(name, _)| name.clone()).collect();
        let wanted = compile(ruleset, links, &mut self.shape);
        let Some(messages) = self.difference(&wanted) else {
            let changed = changed(None, &wanted);
            self.write_all(&wanted)?;
            self.read_all(wanted, [bridges, ports])?;
            return self.result(changed, true, absent);
        };
        if messages.is_empty() {
            if let Some(held) = &mut self.held {
                (held.bridges, held.ports) = (bridges, ports);
            }
            return self.result(0, false, absent);
        }
        if let Err(error) = self.socket.commit(messages) {
            return self.refused_or_anew(error, ruleset, links);
        }
        let held = self.held.take();
        let old = held.as_ref().map(|held| &held.tables);
        let count = changed(old, &wanted);
        let rules_written = old.is_none_or(|old| old.all().into_iter().zip(wanted.all()).any(|(old, new)| old.chains != new.chains));
        match held {
            Some(held) if !rules_written && count <= READ_BACK_SINGLY => {
                let edits = Edits::between(&held.tables, &wanted);
                let (_, drift) = kernel::compare_edits(&mut self.socket, &wanted, &edits).map_err(EnforceError::Unreadable)?;
                if !drift.is_empty() {
                    return Err(EnforceError::NotAsWritten { drift });
                }
                self.held = Some(Held { tables: wanted, forms: held.forms, bridges, ports });
            }
            Some(_) | None => self.read_all(wanted, [bridges, ports])?,
        }
        self.result(count, rules_written, absent)
    }

    /// Somebody took away what the difference builds upon: everything anew, still in one transaction.
    fn refused_or_anew(&mut self, error: SocketError, ruleset: &Ruleset, links: &Links) -> Result<Applied, EnforceError> {
        match error.code() {
            Some(nix::libc::ENOENT | nix::libc::EEXIST) => {
                self.held = None;
                self.write(ruleset, links)
            }
            _ => Err(refused(error)),
        }
    }

    /// The elements of a change in one transaction, read back. `None`: all of the ruleset has to be looked at.
    fn edit(&mut self, ruleset: &Ruleset, change: &Change) -> Result<Option<Applied>, EnforceError> {
        let Some(held) = &mut self.held else { return Ok(None) };
        for name in change::named_bridges(change) {
            held.bridges.entry(name.clone()).or_insert(self.links.index(name).map_err(EnforceError::Links)?);
        }
        for port in change.pins.keys() {
            held.ports.entry(port.clone()).or_insert(self.links.index(port).map_err(EnforceError::Links)?);
        }
        // Those that go are known by what they were.
        let staying = change.pins.iter().filter(|(_, turn)| turn.after.is_some());
        let ports = staying.filter_map(|(port, _)| held.ports.get_key_value(port));
        for (name, index) in held.bridges.iter().chain(ports) {
            // Made anew under its name: every element that names it is another one.
            if self.links.index(name).map_err(EnforceError::Links)? != *index {
                return Ok(None);
            }
        }
        let Some(edits) = change::edits(&held.tables, change, ruleset, &held.links(change)) else { return Ok(None) };
        let changed = edits.len();
        if changed == 0 {
            let absent = held.absent();
            return self.result(0, false, absent).map(Some);
        }
        match self.socket.commit(edits.messages(&held.tables)) {
            Ok(()) => {}
            Err(error) if matches!(error.code(), Some(nix::libc::ENOENT | nix::libc::EEXIST)) => {
                self.held = None;
                return Ok(None);
            }
            Err(error) => return Err(refused(error)),
        }
        let absent = held.absent();
        let read = kernel::compare_edits(&mut self.socket, &held.tables, &edits);
        let outcome = read.map_err(EnforceError::Unreadable).and_then(|(generation_id, drift)| match drift.is_empty() {
            true => Ok(generation_id),
            false => Err(EnforceError::NotAsWritten { drift }),
        });
        match outcome {
            Ok(generation_id) => {
                edits.carry_out(&mut held.tables);
                for port in change.pins.iter().filter(|(_, turn)| turn.after.is_none()).map(|(port, _)| port) {
                    held.ports.remove(port);
                }
                let ownership = self.ownership;
                Ok(Some(Applied { changed, rules_written: false, generation_id, ownership, absent, adrift: BTreeSet::new() }))
            }
            Err(error) => {
                // What the kernel holds is not known any more.
                self.held = None;
                Err(error)
            }
        }
    }

    /// What is tied to ports, by an earlier process or in tables that somebody took away. The set of MAC addresses in the kernel is the
    /// record of it, but for who was unbound a moment before: there the port tells, and where it has more than one such entry, nobody
    /// can say which is ours.
    fn left_behind(&mut self, links: &Links) -> Result<BTreeSet<Station>, EnforceError> {
        let pinned = kernel::pinned(&mut self.socket).map_err(EnforceError::Unreadable)?;
        let sticky = stations::read(&self.links).map_err(EnforceError::Links)?.sticky;
        let learning = stations::learning(&self.links).map_err(EnforceError::Links)?;
        let ours = pinned.into_iter().filter_map(|(port, mac)| Some(Station { port: links.index(&port)?, mac }));
        let whole = |station: &Station| sticky.contains(station) && !learning.contains(&station.port);
        let (mut tied, loose): (_, BTreeSet<Station>) = ours.partition(whole);
        for station in &loose {
            // Somebody took the entry alone, or let the port learn again.
            stations::learns(&self.links, station.port, true).map_err(EnforceError::Links)?;
        }
        let bound: BTreeSet<u32> = tied.iter().chain(&loose).map(|station| station.port).collect();
        let mut unbound: BTreeMap<u32, Vec<Station>> = BTreeMap::new();
        for station in sticky.iter().filter(|station| !bound.contains(&station.port)) {
            unbound.entry(station.port).or_default().push(*station);
        }
        let alone = unbound.into_iter().filter(|(port, stations)| !learning.contains(port) && stations.len() == 1);
        tied.extend(alone.flat_map(|(_, stations)| stations));
        Ok(tied)
    }

    /// Ties MAC addresses to their ports. Returns the ports where that was refused; the tables hold without it.
    fn moor(&mut self, ruleset: &Ruleset, links: &Links, before: &BTreeSet<Station>) -> Result<BTreeSet<String>, EnforceError> {
        let wanted = stations::wanted(ruleset, links);
        for station in before.difference(&wanted) {
            stations::release(&self.links, *station).map_err(EnforceError::Links)?;
        }
        self.stations = wanted.intersection(before).copied().collect();
        let mut new: Vec<Station> = wanted.difference(before).copied().collect();
        let read = || stations::read(&self.links).map_err(EnforceError::Links);
        let mut held = if new.is_empty() { stations::Held::default() } else { read()? };
        // The first time all of them, whatever is there: the ports are to learn nothing.
        let mut loose = new.clone();
        for _ in 0..=TIED_ANEW {
            if loose.is_empty() {
                break;
            }
            let refused: Vec<Station> = loose.into_iter().filter(|station| stations::hold(&self.links, &held, *station).is_err()).collect();
            new.retain(|station| !refused.contains(station));
            held = read()?;
            loose = new.iter().filter(|station| !held.sticky.contains(station)).copied().collect();
        }
        self.stations.extend(new.into_iter().filter(|station| held.sticky.contains(station)));
        let ports: BTreeSet<u32> = self.stations.iter().map(|station| station.port).collect();
        let tied = |name: &str| links.index(name).is_none_or(|port| ports.contains(&port));
        self.adrift = ruleset.pins.keys().filter(|name| !tied(name)).cloned().collect();
        Ok(self.adrift.clone())
    }

    /// The tables of a change, so that what is bound may send and receive, and nothing of the bridges: that waits for the lock of all
    /// the node's interfaces, which the engine holds again and again while containers start. [`Nftables::settle`] is to follow.
    ///
    /// # Errors
    /// As [`Enforcer::change`].
    pub fn begin(&mut self, ruleset: &Ruleset, change: &Change) -> Result<Applied, EnforceError> {
        let Some(applied) = self.edit(ruleset, change)? else { return self.apply(ruleset) };
        self.unsettled.ports |= !change.pins.is_empty();
        self.unsettled.bridges |= !change.watched.is_empty();
        Ok(Applied { adrift: self.adrift.clone(), ..applied })
    }

    /// Whether [`Nftables::settle`] has anything to do.
    pub fn is_settled(&self) -> bool {
        self.unsettled == Unsettled::default()
    }

    /// The bridges follow the tables: ports are tied to their MAC addresses, or are free again. `ruleset` is the one in force. Returns
    /// the ports where that was refused.
    ///
    /// # Errors
    /// The interfaces cannot be read or changed; it is still to be done.
    pub fn settle(&mut self, ruleset: &Ruleset) -> Result<BTreeSet<String>, EnforceError> {
        if self.is_settled() {
            return Ok(self.adrift.clone());
        }
        let links = self.links.read().map_err(EnforceError::Links)?;
        if self.unsettled.bridges {
            learned::bound(&self.links, &guarded(ruleset, &links)).map_err(EnforceError::Links)?;
        }
        let before = self.stations.clone();
        let adrift = self.moor(ruleset, &links, &before)?;
        self.unsettled = Unsettled::default();
        Ok(adrift)
    }
}

/// The guarded bridges that are there.
fn guarded(ruleset: &Ruleset, links: &Links) -> BTreeSet<u32> {
    ruleset.guarded().iter().filter_map(|bridge| links.index(bridge)).collect()
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
        learned::bound(&self.links, &guarded(ruleset, &links)).map_err(EnforceError::Links)?;
        let adrift = self.moor(ruleset, &links, &before)?;
        self.unsettled = Unsettled::default();
        Ok(Applied { adrift, ..applied })
    }

    fn change(&mut self, ruleset: &Ruleset, change: &Change) -> Result<Applied, EnforceError> {
        let applied = self.begin(ruleset, change)?;
        Ok(Applied { adrift: self.settle(ruleset)?, ..applied })
    }

    fn verify(&mut self) -> Result<Vec<Drift>, EnforceError> {
        let Some(held) = &self.held else { return Ok(Vec::new()) };
        let mut all = Vec::new();
        for (table, forms) in held.tables.all().into_iter().zip(&held.forms) {
            match kernel::compare(&mut self.socket, table, Some(forms)) {
                Ok((_, drift)) => all.extend(drift),
                // What was found in another one is reason enough to write all of it anew.
                Err(_) if !all.is_empty() => return Ok(all),
                Err(error) => return Err(EnforceError::Unreadable(error)),
            }
        }
        let sticky = stations::read(&self.links).map_err(EnforceError::Links)?.sticky;
        let links = self.links.read().map_err(EnforceError::Links)?;
        let moved = held.ports.iter().filter(|(port, index)| links.index(port).is_some_and(|now| Some(now) != **index));
        all.extend(moved.map(|(port, _)| Drift::Port { port: port.clone() }));
        let names = links.names();
        let learning = stations::learning(&self.links).map_err(EnforceError::Links)?;
        let learns = self.stations.iter().filter(|station| learning.contains(&station.port));
        all.extend(learns.filter_map(|station| Some(Drift::Learns { port: names.get(&station.port)?.clone() })));
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
        self.socket.commit(messages).map_err(refused)?;
        for station in tied {
            stations::release(&self.links, station).map_err(EnforceError::Links)?;
        }
        learned::bound(&self.links, &BTreeSet::new()).map_err(EnforceError::Links)?;
        self.stations.clear();
        self.unsettled = Unsettled::default();
        self.held = None;
        self.shape.clear();
        Ok(tables)
    }
}
