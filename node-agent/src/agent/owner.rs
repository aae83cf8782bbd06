//! The socket that owns the tables, over the agent's end: whoever starts the agent keeps a copy and gives it to the next one. Systemd
//! does so with its store of descriptors, `bulkhead up` listens to the same words (sd_notify(3), FDSTORE=1).
//!
//! # Why
//! Ownership follows the socket. While a copy lives the tables are nobody else's to change, also in the moments without an agent, and
//! on kernels without persistence they stay at all.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use sd_notify::NotifyState;
use tracing::{info, warn};

use crate::enforce::{EnforceError, Nftables, Ownership};

/// The name under which the socket is kept.
const NAME: &str = "nftables";

/// The name under which is kept what keeps out packets with sums yet to be written ([`crate::enforce::sums`]).
const SUMS: &str = "sums";

/// The first descriptor that systemd hands over (SD_LISTEN_FDS_START).
const FIRST: RawFd = 3;

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn number(name: &str) -> Option<i32> {
    variable(name)?.parse().ok()
}

/// The numbers of what systemd hands over under this name.
fn numbered<'a>(pid: i32, number: &impl Fn(&str) -> Option<i32>, names: &'a str, wanted: &'a str) -> impl Iterator<Item = RawFd> + 'a {
    let count = number("LISTEN_FDS").filter(|_| number("LISTEN_PID") == Some(pid)).and_then(|count| usize::try_from(count).ok());
    let of_ours = names.split(':').take(count.unwrap_or(0)).enumerate().filter(move |(_, name)| *name == wanted);
    of_ours.filter_map(|(index, _)| Some(FIRST + RawFd::try_from(index).ok()?))
}

/// The descriptor that holds our socket: `up` names it, systemd counts from three (sd_listen_fds(3)).
fn handed_over(pid: i32, number: impl Fn(&str) -> Option<i32>, names: &str) -> Option<RawFd> {
    if let Some(fd) = number("BULKHEAD_OWNER_FD") {
        return Some(fd);
    }
    // The latest, if there are several.
    numbered(pid, &number, names, NAME).last()
}

/// The socket that an earlier agent left with who started this one. To be called once, before another process is started: from then
/// on no child inherits it.
pub(super) fn inherited() -> Option<OwnedFd> {
    let (pid, names) = (i32::try_from(std::process::id()).ok()?, variable("LISTEN_FDNAMES").unwrap_or_default());
    for fd in numbered(pid, &number, &names, SUMS) {
        // This agent hangs up its own; these are the store's.
        // SAFETY: as below.
        #[allow(unsafe_code)]
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    let fd = handed_over(pid, number, &names)?;
    if fd < FIRST {
        return None;
    }
    // SAFETY: the descriptor was made for us by who started us; nothing else in this process knows of it. A number that is none is
    // not kept, since the next call fails.
    #[allow(unsafe_code)]
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    match fcntl(&socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        Ok(_) => Some(socket),
        Err(errno) => {
            warn!(fd, %errno, "no socket was handed over under this number");
            std::mem::forget(socket);
            None
        }
    }
}

/// Whether somebody keeps descriptors for us. Systemd says so itself since version 254, our unit and `up` always do: one that drops
/// them in silence is not trusted with tables that would go with the socket.
fn is_kept() -> bool {
    variable("NOTIFY_SOCKET").is_some() && number("FDSTORE").is_some_and(|room| room > 0)
}

/// Leaves a copy with who started us. It is on its way as soon as this returns, and outlives this process already.
fn leave(enforcer: &Nftables) -> io::Result<()> {
    let forget = [NotifyState::FdStoreRemove, NotifyState::FdName(NAME)];
    sd_notify::notify(&forget)?;
    // Unpolled: an overrun is an error on the socket, for which systemd would throw it away.
    let keep = [NotifyState::FdStore, NotifyState::FdName(NAME), NotifyState::Custom("FDPOLL=0")];
    sd_notify::notify_with_fds(&keep, &[enforcer.socket()])
}

/// Leaves copies of what keeps packets out too, in the place of an earlier agent's: it stays while no agent lives.
pub(super) fn leave_sums(sums: &[OwnedFd]) {
    if !is_kept() {
        return;
    }
    let forget = [NotifyState::FdStoreRemove, NotifyState::FdName(SUMS)];
    let keep = [NotifyState::FdStore, NotifyState::FdName(SUMS), NotifyState::Custom("FDPOLL=0")];
    let borrowed: Vec<_> = sums.iter().map(AsFd::as_fd).collect();
    if let Err(error) = sd_notify::notify(&forget).and_then(|()| sd_notify::notify_with_fds(&keep, &borrowed)) {
        warn!(%error, "nobody keeps what looks at checksums: while no agent lives, nothing does");
    }
}

/// The enforcer over the socket that was left, or over a new one, of which a copy is left.
pub(super) fn enforcer(inherited: Option<OwnedFd>, most: Ownership) -> Result<Nftables, EnforceError> {
    if let Some(socket) = inherited {
        let fd = socket.as_raw_fd();
        match Nftables::resume(socket) {
            Ok(enforcer) => {
                info!(owner = enforcer.owner(), "goes on with the socket that an earlier agent left");
                return Ok(enforcer.at_most(most).kept());
            }
            Err(error) => warn!(fd, error = %crate::chain::chain(&error), "the socket that was left is of no use"),
        }
    }
    let enforcer = Nftables::open()?.at_most(most);
    if !is_kept() {
        return Ok(enforcer);
    }
    match leave(&enforcer) {
        Ok(()) => Ok(enforcer.kept()),
        Err(error) => {
            warn!(%error, "nobody keeps the socket that owns the tables");
            Ok(enforcer)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, i32)], names: &str) -> Option<RawFd> {
        handed_over(7, |name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| *value), names)
    }

    #[test]
    fn the_socket_is_found_by_its_name_and_only_if_it_is_meant_for_this_process() {
        assert_eq!(of(&[], ""), None);
        assert_eq!(of(&[("LISTEN_PID", 7), ("LISTEN_FDS", 2)], "other:nftables"), Some(4));
        assert_eq!(of(&[("LISTEN_PID", 7), ("LISTEN_FDS", 3)], "nftables:other:nftables"), Some(5), "the latest");
        assert_eq!(of(&[("LISTEN_PID", 7), ("LISTEN_FDS", 1)], "other:nftables"), None, "beyond what was handed over");
        assert_eq!(of(&[("LISTEN_PID", 8), ("LISTEN_FDS", 1)], "nftables"), None, "meant for a parent");
        assert_eq!(of(&[("BULKHEAD_OWNER_FD", 11)], ""), Some(11));
    }
}
