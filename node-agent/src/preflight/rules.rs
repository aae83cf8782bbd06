//! Whose rules are there already, and which of them would get into each other's way with ours. Reads tables and chains by
//! nfnetlink and judges them; nothing is written.

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nftables::{ChainAttribute, ChainMessage, Hook, NfTablesMessage, TableAttribute, TableMessage};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::{Check, chain};
use crate::enforce::TABLE;

/// Where nftables.service loads its rules from.
const NFTABLES_CONF: &str = "/etc/nftables.conf";

/// Hooks of the families ip, ip6 and inet (linux/netfilter.h).
const HOOKS: [&str; 5] = ["prerouting", "input", "forward", "output", "postrouting"];
/// Where our inet chains are: the engine's and iptables-nft's filters are at 0.
const PRIORITY: i32 = -10;

/// A table of somebody's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct TableFact {
    family: String,
    name: String,
    /// Netlink port of the socket that owns it.
    owner: Option<u32>,
}

/// A chain that packets enter by a hook.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ChainFact {
    family: String,
    table: String,
    name: String,
    kind: String,
    hook: u32,
    priority: i32,
    drops: bool,
}

pub(super) fn check() -> Vec<Check> {
    let (tables, chains, flowtables) = match read() {
        Ok(found) => found,
        Err(error) => return vec![Check::fail("other rules", format!("cannot be read: {}", chain(&error)), "run with sudo")],
    };
    let configured = std::fs::read_to_string(NFTABLES_CONF).unwrap_or_default();
    let enabled = ["sysinit", "multi-user"]
        .iter()
        .any(|target| std::fs::symlink_metadata(format!("/etc/systemd/system/{target}.target.wants/nftables.service")).is_ok());
    judge(&tables, &chains, flowtables, enabled.then_some(configured.as_str()))
}

fn judge(tables: &[TableFact], chains: &[ChainFact], flowtables: usize, loaded_at_start: Option<&str>) -> Vec<Check> {
    let name = "other rules";
    let mut checks = Vec::new();
    let mut warn = |what: String, remedy: &str| checks.push(Check::warn(name, what, remedy));
    for table in tables.iter().filter(|table| table.name == TABLE) {
        match table.owner {
            Some(owner) => warn(
                format!(
                    "table {} {TABLE} is owned by netlink port {owner}: an agent runs, or its socket is kept for the next one",
                    table.family
                ),
                "`bulkhead status` shows it",
            ),
            None => warn(
                format!("table {} {TABLE} was left by an agent that is gone", table.family),
                "the next agent takes it over; `bulkhead down` removes it",
            ),
        }
    }
    let others = || chains.iter().filter(|chain| chain.table != TABLE && chain.kind == "filter" && chain.family != "bridge");
    for chain in others().filter(|chain| (1..=3).contains(&chain.hook) && chain.priority == PRIORITY) {
        warn(
            format!("{chain} has the priority of our filter: which of the two is asked first is not defined"),
            "give it another priority; a drop of either counts, so nothing is opened by it",
        );
    }
    for chain in others().filter(|chain| chain.drops && chain.priority < PRIORITY && chain.hook == 2) {
        warn(
            format!("{chain} comes before our filter and drops by default: what it drops is never seen, learned or audited here"),
            "let it accept the engine's bridges if their traffic is to be learned",
        );
    }
    for chain in chains.iter().filter(|chain| chain.family == "bridge" && chain.table != TABLE) {
        warn(format!("{chain} filters bridges too: what it drops is never seen here"), "");
    }
    if tables.iter().any(|table| table.name == "firewalld") {
        warn(
            "firewalld is in charge of this host's rules: what it denies stays denied, and its reload rewrites its own table only"
                .to_owned(),
            "the engine's interfaces should be in firewalld's zone `docker`",
        );
    }
    if flowtables > 0 {
        warn(
            format!("{flowtables} flow tables: connections that are put into them pass by every filter, ours too"),
            "keep the engine's bridges out of them",
        );
    }
    if loaded_at_start.is_some_and(|text| text.lines().any(|line| line.trim() == "flush ruleset")) {
        warn(
            format!(
                "nftables.service begins {NFTABLES_CONF} with `flush ruleset`: a reload takes the engine's rules away, and ours where the kernel can't own tables"
            ),
            "flush only the tables of that file",
        );
    }
    if checks.is_empty() {
        let mut owners: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
        owners.sort_unstable();
        owners.dedup();
        let there = if owners.is_empty() { "none".to_owned() } else { owners.join(", ") };
        checks.push(Check::ok(name, format!("no conflict (tables: {there})")));
    }
    checks
}

impl std::fmt::Display for ChainFact {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hook = usize::try_from(self.hook).ok().and_then(|hook| HOOKS.get(hook)).copied().unwrap_or("another");
        let Self { family, table, name, priority, .. } = self;
        write!(f, "chain {family} {table} {name} (hook {hook}, priority {priority})")
    }
}

/// Tables, base chains and the number of flow tables.
fn read() -> io::Result<(Vec<TableFact>, Vec<ChainFact>, usize)> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    let mut tables = Vec::new();
    for (family, answer) in dump(&socket, NfTablesMessage::GetTable(TableMessage { attributes: Vec::new() }))? {
        if let NfTablesMessage::NewTable(message) = answer {
            let mut fact = TableFact { family, ..TableFact::default() };
            for attribute in message.attributes {
                match attribute {
                    TableAttribute::Name(name) => fact.name = name,
                    TableAttribute::Owner(owner) => fact.owner = Some(owner),
                    _ => {}
                }
            }
            tables.push(fact);
        }
    }
    let mut chains = Vec::new();
    for (family, answer) in dump(&socket, NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() }))? {
        if let NfTablesMessage::NewChain(message) = answer {
            chains.extend(base_chain(family, message));
        }
    }
    let flowtables = dump(&socket, NfTablesMessage::GetFlowTable(Vec::new()))?.len();
    Ok((tables, chains, flowtables))
}

fn base_chain(family: String, message: ChainMessage) -> Option<ChainFact> {
    let mut fact = ChainFact { family, ..ChainFact::default() };
    let mut hooked = false;
    for attribute in message.attributes {
        match attribute {
            ChainAttribute::Table(table) => fact.table = table,
            ChainAttribute::Name(name) => fact.name = name,
            ChainAttribute::Type(kind) => fact.kind = kind,
            // NF_DROP is 0, NF_ACCEPT 1.
            ChainAttribute::Policy(policy) => fact.drops = policy == 0,
            ChainAttribute::Hook(hook) => {
                hooked = true;
                for part in hook {
                    match part {
                        Hook::Number(number) => fact.hook = number.into(),
                        Hook::Priority(priority) => fact.priority = priority.cast_signed(),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    hooked.then_some(fact)
}

fn dump(socket: &Socket, question: NfTablesMessage) -> io::Result<Vec<(String, NfTablesMessage)>> {
    let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
    let mut message = NetlinkMessage::new(
        NetlinkHeader::default(),
        NetlinkPayload::from(NetfilterMessage::new(header, NetfilterMessageInner::NfTables(question))),
    );
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);
    socket.send_to(&buffer, &SocketAddr::new(0, 0), 0)?;
    let mut found = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while rest.len() >= 16 {
            let answer =
                NetlinkMessage::<NetfilterMessage>::deserialize(rest).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let length = usize::try_from(answer.header.length).unwrap_or(usize::MAX).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
            match answer.payload {
                NetlinkPayload::Done(_) => return Ok(found),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(NetfilterMessage { header, inner: NetfilterMessageInner::NfTables(message), .. }) => {
                    found.push((family(header.family).to_owned(), message));
                }
                _ => {}
            }
        }
    }
}

/// As nft writes it.
fn family(family: NetfilterProtoFamily) -> &'static str {
    match family {
        NetfilterProtoFamily::IPv4 => "ip",
        NetfilterProtoFamily::IPv6 => "ip6",
        NetfilterProtoFamily::Inet => "inet",
        NetfilterProtoFamily::Bridge => "bridge",
        NetfilterProtoFamily::ARP => "arp",
        NetfilterProtoFamily::NetDev => "netdev",
        _ => "another family",
    }
}

#[cfg(test)]
mod tests {
    use super::super::CheckState;
    use super::*;

    fn table(family: &str, name: &str, owner: Option<u32>) -> TableFact {
        TableFact { family: family.to_owned(), name: name.to_owned(), owner }
    }

    fn forward(table: &str, priority: i32, drops: bool) -> ChainFact {
        let of = |text: &str| text.to_owned();
        ChainFact { family: of("inet"), table: of(table), name: of("fwd"), kind: of("filter"), hook: 2, priority, drops }
    }

    #[test]
    fn the_engines_own_tables_are_no_conflict() {
        let tables = [table("ip", "filter", None), table("ip", "nat", None), table("ip", "docker-bridges", None)];
        let found = judge(&tables, &[forward("filter", 0, true)], 0, Some("add table inet x"));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].state, CheckState::Ok);
        assert!(found[0].what.contains("docker-bridges, filter, nat"), "{}", found[0]);
    }

    #[test]
    fn each_conflict_is_told_by_name() {
        let rows: [(&str, Vec<Check>); 6] = [
            ("owned by netlink port 7", judge(&[table("inet", TABLE, Some(7))], &[], 0, None)),
            ("left by an agent", judge(&[table("inet", TABLE, None)], &[], 0, None)),
            ("priority of our filter", judge(&[], &[forward("mine", PRIORITY, false)], 0, None)),
            ("drops by default", judge(&[], &[forward("strict", -100, true)], 0, None)),
            ("flow tables", judge(&[], &[], 1, None)),
            ("flush ruleset", judge(&[], &[], 0, Some("#!/usr/sbin/nft -f\nflush ruleset\n"))),
        ];
        for (words, found) in rows {
            assert_eq!(found.len(), 1, "{words}: {found:?}");
            assert!(found[0].state == CheckState::Warn && found[0].what.contains(words), "{words}: {}", found[0]);
        }
        let firewalld = judge(&[table("inet", "firewalld", None)], &[], 0, None);
        assert!(firewalld[0].what.contains("firewalld"));
    }
}
