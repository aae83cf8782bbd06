//! Who listens on a port in a network namespace, from /proc/PID/net: readable without privilege and without entering it. Needed
//! only for connections older than the agent, whose first packet nobody saw.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use policy::attribute::Listener;
use policy::service::{Protocol, Service};

/// `TCP_LISTEN`, and the state in which an unconnected UDP socket is shown (`TCP_CLOSE`); net/tcp_states.h.
const LISTEN: &str = "0A";
const UNCONNECTED: &str = "07";

/// The sockets of the namespaces that were asked for lately.
#[derive(Debug, Default)]
pub(super) struct Sockets(BTreeMap<(Listener, Protocol), Option<BTreeSet<u16>>>);

impl Sockets {
    /// Whether somebody listens there; `None`: it can't be known (the process is gone, or the protocol has no such list).
    pub(super) fn listens(&mut self, listener: Listener, service: Service) -> Option<bool> {
        let ports = self.0.entry((listener, service.protocol)).or_insert_with(|| read(listener, service.protocol));
        Some(ports.as_ref()?.contains(&service.port))
    }

    /// Asks afresh from now on.
    pub(super) fn forget(&mut self) {
        self.0.clear();
    }
}

fn read(listener: Listener, protocol: Protocol) -> Option<BTreeSet<u16>> {
    let (files, state) = match protocol {
        Protocol::Tcp => (["tcp", "tcp6"], LISTEN),
        Protocol::Udp => (["udp", "udp6"], UNCONNECTED),
        Protocol::Sctp | Protocol::Icmp | Protocol::Icmpv6 | Protocol::Other(_) => return None,
    };
    let process = match listener {
        // The namespace of this thread, which is the engine's.
        Listener::Host => "thread-self".to_owned(),
        Listener::Process(pid) => pid.to_string(),
    };
    let tables: Vec<String> = files.iter().filter_map(|file| fs::read_to_string(format!("/proc/{process}/net/{file}")).ok()).collect();
    // A kernel without IPv6 has only the first.
    if tables.is_empty() { None } else { Some(tables.iter().flat_map(|table| ports(table, state)).collect()) }
}

/// Local ports of the sockets in this state (Documentation/networking/proc_net_tcp.rst).
fn ports<'a>(table: &'a str, state: &'a str) -> impl Iterator<Item = u16> + 'a {
    table.lines().skip(1).filter_map(move |line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let local = fields.next()?;
        let found = fields.nth(1)?;
        let (_, port) = local.rsplit_once(':')?;
        (found == state).then(|| u16::from_str_radix(port, 16).ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sockets_that_listen_are_read() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
                     0: 00000000:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0 0 1\n\
                     1: 0100007F:D431 0100007F:1538 01 00000000:00000000 00:00000000 00000000  0 0 2\n\
                     nonsense\n";
        assert_eq!(ports(table, LISTEN).collect::<Vec<_>>(), [5432]);
    }

    #[test]
    fn a_process_that_is_gone_has_no_answer() {
        assert_eq!(Sockets::default().listens(Listener::Process(u32::MAX), Service::tcp(80)), None);
    }
}
