//! Packets of which the sender leaves the checksum to whoever sends them on, at another place than their own: dropped, before
//! anything else looks at them.
//!
//! # Why
//! A packet socket may say where a sum of what follows is still to be written (PACKET_VNET_HDR, packet(7)), which a default container can.
//! Nobody writes it while the packet crosses a bridge; the network card does, or the kernel when it cuts the packet in pieces
//! (`skb_checksum_help`): behind every filter. So two bytes of the sender's choice change there: the port, half of an address. nf_tables
//! cannot see that a sum is to be written. A BPF program of netfilter can (`BPF_PROG_TYPE_NETFILTER`, since Linux 6.4), which is loaded at
//! the start, while the agent still may, and asks for nothing afterwards. Where a kernel has none, `status` says whose packets these may be.

mod program;
mod types;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::libc;

pub use types::TypesError;

/// Before everything of netfilter that looks at a packet: defragmentation (NF_IP_PRI_CONNTRACK_DEFRAG) is at -400, our tables at -450.
/// Two programs cannot have one priority: while an agent takes over from another one there are two.
const PRIORITIES: std::ops::Range<i32> = -480..-460;

/// Room for what the verifier says.
const SAID: usize = 256 * 1024;

/// Why packets cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum SumsError {
    /// The kernel does not say how it lays out a packet.
    #[error("the kernel's types cannot be read")]
    Types(#[from] TypesError),
    /// The program is refused.
    #[error("the kernel takes no program of netfilter: {said}")]
    Refused {
        /// What its verifier said last.
        said: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The program cannot be hung up.
    #[error("the kernel hangs up no program in netfilter")]
    Link(#[source] io::Error),
}

/// Keeps such packets out of the network namespace of the calling thread for as long as a copy of what is returned lives. Concerned is
/// only what the guard let in from a port of a guarded bridge.
///
/// # Errors
/// No types (CONFIG_DEBUG_INFO_BTF), no such programs (CONFIG_NETFILTER_BPF_LINK, Linux 6.4), or no privilege (CAP_BPF, CAP_PERFMON,
/// CAP_NET_ADMIN).
pub fn keep_out() -> Result<Vec<OwnedFd>, SumsError> {
    let layout = types::layout(&std::fs::read(types::PLACE).map_err(TypesError::Read)?)?;
    let program = load(&program::instructions(&layout, super::PINNED))?;
    let families = [libc::NFPROTO_IPV4, libc::NFPROTO_IPV6];
    families.into_iter().map(|family| hang_up(&program, family as u32)).collect()
}

/// What the kernel is asked with `bpf`(2), to load a program; the fields behind are zero.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach: u32,
}

/// And to hang one up in netfilter.
#[repr(C)]
struct Link {
    program: u32,
    target: u32,
    attach: u32,
    flags: u32,
    family: u32,
    hook: u32,
    priority: i32,
    more: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_NETFILTER: u32 = 32;
const BPF_NETFILTER: u32 = 45;

fn bpf<T>(command: libc::c_int, asked: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads as much as is said, which lives, and what it points to lives in the caller. It returns a new descriptor.
    #[allow(unsafe_code)]
    unsafe {
        let fd = libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(asked), size_of::<T>());
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd as i32)) }
    }
}

fn load(instructions: &[u64]) -> Result<OwnedFd, SumsError> {
    let mut name = [0; 16];
    name[..13].copy_from_slice(b"bulkhead_sums");
    let mut log = vec![0_u8; SAID];
    let asked = Load {
        kind: BPF_PROG_TYPE_NETFILTER,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        // What the kernel asks for before a program may read its memory.
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: 1,
        log_size: SAID as u32,
        log: log.as_mut_ptr() as u64,
        version: 0,
        flags: 0,
        name,
        interface: 0,
        attach: BPF_NETFILTER,
    };
    bpf(BPF_PROG_LOAD, &asked).map_err(|source| {
        let text = String::from_utf8_lossy(log.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned();
        let said = text.lines().rev().find(|line| !line.starts_with("processed ")).unwrap_or("nothing was said").to_owned();
        SumsError::Refused { said, source }
    })
}

fn hang_up(program: &OwnedFd, family: u32) -> Result<OwnedFd, SumsError> {
    let mut last = io::Error::from(io::ErrorKind::Other);
    for priority in PRIORITIES {
        let asked = Link {
            program: program.as_raw_fd() as u32,
            target: 0,
            attach: BPF_NETFILTER,
            flags: 0,
            family,
            hook: libc::NF_INET_PRE_ROUTING as u32,
            priority,
            more: 0,
        };
        match bpf(BPF_LINK_CREATE, &asked) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => last = error,
            done => return done.map_err(SumsError::Link),
        }
    }
    Err(SumsError::Link(last))
}
