//! The thread that empties the kernel's sockets: conntrack events and NFLOG records, read and handed on in batches.
//!
//! # Why
//! The cost of events is the wake-ups, not the reading (3.6 to 8.8 us an event that is waited for, 0.5 us one that is drained),
//! and they slow the workloads down. So it blocks while little happens and drains by timer above a rate. What the socket could
//! not hold is counted exactly by the kernel (SO_MEMINFO), so ENOBUFS, which only says that there was some, is switched off.

use std::collections::BTreeMap;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::thread;
use std::time::Duration;

use jiff::Timestamp;
use netlink_sys::Socket;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{MsgFlags, MultiHeaders, NetlinkAddr, recvmmsg, setsockopt, sockopt};
use policy::attribute::Denial;
use policy::track::{Entry, Kind};

use super::conntrack::{self, GROUP_DESTROY, GROUP_NEW, GROUP_UPDATE};
use super::links;
use super::netfilter::Channel;
use super::nflog;

/// Between two rounds of draining: 34.2 of 36.9 thousand connections a second remain, against 25.4 when each is waited for.
const PAUSE: Duration = Duration::from_millis(20);
/// Messages in one round from which on the next is by timer: some 1,000 a second.
const BUSY: usize = 20;
/// Entries in one batch at most: bounds the memory between the two threads, and fits the processor's second cache.
const BATCH: usize = 1024;
/// NFLOG hands over a page or more.
const RECEIVE: usize = 256 * 1024;
/// One event has some 300 bytes, each a datagram of its own; so many are asked for at once.
const EVENT: usize = 4096;
const AT_ONCE: usize = 32;

/// What was read since the last batch.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) read_at: Timestamp,
    pub(super) events: Vec<(Kind, Entry)>,
    pub(super) denials: Vec<Denial>,
    pub(super) skipped: BTreeMap<&'static str, u64>,
    /// Events and records that the kernel could not hand over.
    pub(super) lost_events: u64,
    pub(super) lost_records: u64,
    /// The socket itself failed; nothing more comes.
    pub(super) failed: Option<io::Error>,
}

/// The way to whoever takes the batches, and back.
#[derive(Debug)]
pub(super) struct Outlet {
    pub(super) batches: Arc<SyncSender<Batch>>,
    /// What batches were held in, to be filled again: no memory is asked for while much happens.
    pub(super) spare: Receiver<Vec<(Kind, Entry)>>,
}

impl Outlet {
    fn batch(&self) -> Batch {
        Batch::new(self.spare.try_recv().unwrap_or_default())
    }
}

impl Batch {
    /// Nothing was read: whoever takes it is to look around.
    pub(super) fn none() -> Self {
        Self::new(Vec::new())
    }

    fn new(events: Vec<(Kind, Entry)>) -> Self {
        Self {
            read_at: Timestamp::now(),
            events,
            denials: Vec::new(),
            skipped: BTreeMap::new(),
            lost_events: 0,
            lost_records: 0,
            failed: None,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.events.is_empty()
            && self.denials.is_empty()
            && self.skipped.is_empty()
            && self.lost_events == 0
            && self.lost_records == 0
            && self.failed.is_none()
    }
}

/// A socket with the kernel's count of what it could not take.
#[derive(Debug)]
struct Source {
    socket: Socket,
    dropped: u32,
}

impl Source {
    /// What was lost since the last question.
    fn lost(&mut self) -> u64 {
        let Some(dropped) = drops(&self.socket) else { return 0 };
        // The kernel's counter has 32 bits and goes round.
        let lost = dropped.wrapping_sub(self.dropped);
        self.dropped = dropped;
        u64::from(lost)
    }
}

/// `SO_MEMINFO`'s count of messages dropped at this socket (`SK_MEMINFO_DROPS`, linux/sock_diag.h).
#[expect(unsafe_code, reason = "nix has no SO_MEMINFO; a plain getsockopt into an array of the size that is passed")]
fn drops(socket: &Socket) -> Option<u32> {
    const DROPS: usize = 8;
    let mut values = [0_u32; DROPS + 1];
    let mut length = nix::libc::socklen_t::try_from(size_of_val(&values)).ok()?;
    // SAFETY: the pointers are to live values of the length given, and the descriptor is open.
    let result = unsafe {
        nix::libc::getsockopt(socket.as_raw_fd(), nix::libc::SOL_SOCKET, nix::libc::SO_MEMINFO, values.as_mut_ptr().cast(), &raw mut length)
    };
    (result == 0).then_some(values[DROPS])
}

/// The sockets, opened in the network namespace of the thread that calls.
#[derive(Debug)]
pub(super) struct Reader {
    events: Source,
    records: Option<Source>,
    /// Something is new about an interface: what, others read for themselves.
    notices: Socket,
}

impl Reader {
    /// Listens to conntrack's events with a buffer of this many bytes; NFLOG is for [`Reader::records`].
    pub(super) fn open(buffer: usize) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        // Beyond the limit for ordinary programs: CAP_NET_ADMIN may.
        setsockopt(&socket, sockopt::RcvBufForce, &buffer)?;
        socket.bind_auto()?;
        socket.set_no_enobufs(true)?;
        for group in [GROUP_NEW, GROUP_UPDATE, GROUP_DESTROY] {
            socket.add_membership(group)?;
        }
        socket.set_non_blocking(true)?;
        let mut notices = Socket::new(NETLINK_ROUTE)?;
        notices.bind_auto()?;
        notices.set_no_enobufs(true)?;
        notices.add_membership(links::GROUP)?;
        notices.set_non_blocking(true)?;
        Ok(Self { events: Source { socket, dropped: 0 }, records: None, notices })
    }

    /// Listens to the filter's records too.
    pub(super) fn records(&mut self, buffer: usize) -> io::Result<()> {
        let Channel { socket, .. } = nflog::listen()?;
        setsockopt(&socket, sockopt::RcvBufForce, &buffer)?;
        socket.set_no_enobufs(true)?;
        socket.set_non_blocking(true)?;
        self.records = Some(Source { socket, dropped: 0 });
        Ok(())
    }

    /// Reads until `stop` is raised or nobody takes the batches.
    pub(super) fn run(mut self, stop: &EventFd, outlet: &Outlet) {
        let mut buffer = Vec::with_capacity(RECEIVE);
        let mut datagrams = Datagrams::new();
        loop {
            let mut batch = outlet.batch();
            let read = self.drain(&mut datagrams, &mut buffer, &mut batch, outlet);
            batch.lost_events = self.events.lost();
            batch.lost_records = self.records.as_mut().map_or(0, Source::lost);
            let failed = read.is_err();
            let busy = match read {
                Ok(count) => count >= BUSY,
                Err(error) => {
                    batch.failed = Some(error);
                    false
                }
            };
            if !batch.is_empty() && outlet.batches.send(batch).is_err() || failed {
                return;
            }
            // A bridge's switch may be off.
            if self.noticed(&mut buffer) && outlet.batches.send(Batch::none()).is_err() {
                return;
            }
            if busy {
                thread::sleep(PAUSE);
            }
            // Told to stop, or something to read; while busy only the first is asked.
            if self.wait(stop, if busy { PollTimeout::ZERO } else { PollTimeout::NONE }) {
                return;
            }
        }
    }

    /// True: stop.
    fn wait(&self, stop: &EventFd, timeout: PollTimeout) -> bool {
        let mut waited = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        let sockets = [&self.events.socket, &self.notices].into_iter().chain(self.records.iter().map(|records| &records.socket));
        waited.extend(sockets.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        match poll(&mut waited, timeout) {
            Ok(_) => waited[0].any().unwrap_or(true),
            Err(Errno::EINTR) => false,
            Err(_) => true,
        }
    }

    /// Whether anything is new about an interface.
    fn noticed(&self, buffer: &mut Vec<u8>) -> bool {
        let mut any = false;
        while receive(&self.notices, buffer).unwrap_or(false) {
            any = true;
        }
        any
    }

    fn drain(&mut self, datagrams: &mut Datagrams, buffer: &mut Vec<u8>, batch: &mut Batch, outlet: &Outlet) -> io::Result<usize> {
        let mut count = 0;
        loop {
            let more = datagrams.receive(&self.events.socket, |datagram| {
                let Batch { events, skipped, .. } = &mut *batch;
                count += conntrack::take_events(datagram, events, |why| *skipped.entry(why.0).or_default() += 1);
            })?;
            if batch.events.len() >= BATCH {
                let full = std::mem::replace(batch, outlet.batch());
                if outlet.batches.send(full).is_err() {
                    return Ok(count);
                }
            }
            if !more {
                break;
            }
        }
        if let Some(records) = &self.records {
            while receive(&records.socket, buffer)? {
                for record in nflog::read_records(buffer, Timestamp::now()) {
                    count += 1;
                    match record {
                        Ok(denial) => batch.denials.push(denial),
                        Err(why) => *batch.skipped.entry(why.0).or_default() += 1,
                    }
                }
                if batch.denials.len() >= BATCH {
                    break;
                }
            }
        }
        Ok(count)
    }
}

/// Room for the datagrams of one call.
struct Datagrams {
    headers: MultiHeaders<NetlinkAddr>,
    room: Vec<u8>,
}

impl Datagrams {
    fn new() -> Self {
        Self { headers: MultiHeaders::preallocate(AT_ONCE, None), room: vec![0; AT_ONCE * EVENT] }
    }

    /// Gives datagrams that wait to `each`, as many as fit one call; whether there may be more.
    fn receive(&mut self, socket: &Socket, mut each: impl FnMut(&[u8])) -> io::Result<bool> {
        let mut rooms: Vec<[IoSliceMut<'_>; 1]> = self.room.chunks_mut(EVENT).map(|room| [IoSliceMut::new(room)]).collect();
        match recvmmsg(socket.as_raw_fd(), &mut self.headers, rooms.iter_mut(), MsgFlags::empty(), None) {
            Ok(received) => Ok(received.inspect(|datagram| datagram.iovs().for_each(&mut each)).count() == AT_ONCE),
            Err(Errno::EAGAIN) => Ok(false),
            // Loss is counted by `drops`; a kernel that reports it all the same is only to be asked again.
            Err(Errno::EINTR | Errno::ENOBUFS) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }
}

/// One datagram; false: there is none.
fn receive(socket: &Socket, buffer: &mut Vec<u8>) -> io::Result<bool> {
    loop {
        buffer.clear();
        match socket.recv(buffer, 0) {
            Ok(_) => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            // Loss is counted by `drops`; a kernel that reports it all the same is only to be asked again.
            Err(error) if error.kind() == io::ErrorKind::Interrupted || error.raw_os_error() == Some(nix::libc::ENOBUFS) => {}
            Err(error) => return Err(error),
        }
    }
}
