//! A shortcut that Bulkhead does not take: an eBPF program at a port's ingress that hands packets of a known flow straight to the
//! receiver (`bpf_redirect_peer`), past the bridge, netfilter and connection tracking.
//!
//! Written by hand, so that the benchmark needs no compiler for it. Linux 6.6 (tcx).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use lab::{Member, Netns};
use nix::libc;

/// Commands of bpf(2), and what they take (linux/bpf.h).
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROGRAM_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const MAP_TYPE_HASH: u32 = 1;
const PROGRAM_TYPE_SCHED_CLS: u32 = 3;
const TCX_INGRESS: u32 = 46;
const LOOK_UP: i32 = 1;
const REDIRECT_PEER: i32 = 155;

/// The key, from the frame pointer down: port, destination and source MAC, source and destination IPv4 address, the service's port,
/// the protocol.
const KEY: i16 = 28;

/// Instructions of eBPF (kernel document bpf/standardization/instruction-set.rst).
struct Program(Vec<u64>);

impl Program {
    fn put(&mut self, code: u8, to: u8, from: u8, offset: i16, constant: i32) {
        let (offset, constant) = (offset.to_ne_bytes(), constant.to_ne_bytes());
        let registers = to | from << 4;
        let bytes = [code, registers, offset[0], offset[1], constant[0], constant[1], constant[2], constant[3]];
        self.0.push(u64::from_ne_bytes(bytes));
    }

    /// `to = from`, or a constant.
    fn copy(&mut self, to: u8, from: u8) {
        self.put(0xbf, to, from, 0, 0);
    }

    fn set(&mut self, to: u8, constant: i32) {
        self.put(0xb7, to, 0, 0, constant);
    }

    fn add(&mut self, to: u8, constant: i32) {
        self.put(0x07, to, 0, 0, constant);
    }

    /// Loads so many bytes.
    fn load(&mut self, bytes: u8, to: u8, from: u8, offset: i16) {
        self.put(size(bytes) | 0x61, to, from, offset, 0);
    }

    fn store(&mut self, bytes: u8, from: u8, offset: i16) {
        self.put(size(bytes) | 0x63, 10, from, offset, 0);
    }

    /// To the end unless register 2 is this; where to is filled in later.
    fn unless(&mut self, constant: i32) {
        self.put(0x55, 2, 0, i16::MAX, constant);
    }

    fn call(&mut self, helper: i32) {
        self.put(0x85, 0, 0, 0, helper);
    }

    fn exit(&mut self) {
        self.put(0x95, 0, 0, 0, 0);
    }

    /// Points every jump that has no end yet to what comes next.
    fn land(&mut self) {
        let end = self.0.len();
        for (at, word) in self.0.iter_mut().enumerate() {
            let mut bytes = word.to_ne_bytes();
            if i16::from_ne_bytes([bytes[2], bytes[3]]) == i16::MAX {
                [bytes[2], bytes[3]] = ((end - at - 1) as i16).to_ne_bytes();
                *word = u64::from_ne_bytes(bytes);
            }
        }
    }
}

/// The size of a load or store in its code.
fn size(bytes: u8) -> u8 {
    match bytes {
        1 => 0x10,
        2 => 0x08,
        _ => 0x00,
    }
}

/// The program of one port. `service`: where in the frame the service's port is.
fn program(flows: i32, service: i16) -> Vec<u64> {
    let mut p = Program(Vec::new());
    p.copy(6, 1);
    // struct __sk_buff: data, data_end.
    p.load(4, 7, 6, 76);
    p.load(4, 8, 6, 80);
    p.copy(2, 7);
    p.add(2, 42);
    // To the end if that is beyond the packet.
    p.put(0x2d, 2, 8, i16::MAX, 0);
    // IPv4, without options, no fragment.
    for (bytes, offset, mask, wanted) in
        [(2, 12, !0, i32::from(0x0800_u16.to_be())), (1, 14, !0, 0x45), (2, 20, i32::from(0x3fff_u16.to_be()), 0)]
    {
        p.load(bytes, 2, 7, offset);
        if mask != !0 {
            p.put(0x57, 2, 0, 0, mask);
        }
        p.unless(wanted);
    }
    // __sk_buff: ifindex.
    p.load(4, 2, 6, 40);
    p.store(4, 2, -KEY);
    for (bytes, from, to) in [(4, 0, -24), (4, 4, -20), (4, 8, -16), (4, 26, -12), (4, 30, -8), (2, service, -4), (1, 23, -2)] {
        p.load(bytes, 2, 7, from);
        p.store(bytes.max(2), 2, to);
    }
    // A map's descriptor takes two words.
    p.put(0x18, 1, 1, 0, flows);
    p.put(0, 0, 0, 0, 0);
    p.copy(2, 10);
    p.add(2, -i32::from(KEY));
    p.call(LOOK_UP);
    p.put(0x15, 0, 0, i16::MAX, 0);
    p.load(4, 1, 0, 0);
    p.set(2, 0);
    p.call(REDIRECT_PEER);
    p.exit();
    p.land();
    // TCX_NEXT: the usual way.
    p.set(0, -1);
    p.exit();
    p.0
}

fn bpf(command: libc::c_int, words: &[u64]) -> io::Result<libc::c_int> {
    // SAFETY: the kernel only reads the attributes; they, and whatever they point to, outlive the call.
    #[allow(unsafe_code)]
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, words.as_ptr(), size_of_val(words)) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer as libc::c_int) }
}

fn made(command: libc::c_int, words: &[u64]) -> io::Result<OwnedFd> {
    let fd = bpf(command, words)?;
    // SAFETY: the kernel has just made it for us.
    #[allow(unsafe_code)]
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Two numbers side by side in the attributes.
fn pair(first: u32, second: u32) -> u64 {
    let (first, second) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([first[0], first[1], first[2], first[3], second[0], second[1], second[2], second[3]])
}

/// What keeps the programs where they are.
pub(crate) struct Shortcut {
    _kept: Vec<OwnedFd>,
}

/// Sends what a client says to services of a server, and the answers, on the short way.
///
/// # Errors
/// A kernel without tcx.
pub(crate) fn between(host: &Netns, client: &Member, server: &Member, services: &[(&str, u16)]) -> io::Result<Shortcut> {
    let index = |member: &Member| host.run(|| nix::net::if_::if_nametoindex(member.port.as_str()).expect("a port"));
    let flows = made(MAP_CREATE, &[pair(MAP_TYPE_HASH, KEY as u32), pair(4, 4096), 0, 0, 0, 0, 0, 0, 0])?;
    let mut kept = Vec::new();
    // A destination's port is at 36, a source's at 34.
    for (from, to, place) in [(client, server, 36), (server, client, 34)] {
        for (protocol, port) in services {
            let protocol = if *protocol == "tcp" { 6_u16 } else { 17 };
            let mut key = index(from).to_ne_bytes().to_vec();
            for part in [&to.mac[..], &from.mac, &from.v4.octets(), &to.v4.octets(), &port.to_be_bytes(), &protocol.to_ne_bytes()] {
                key.extend(part);
            }
            let value = index(to).to_ne_bytes();
            bpf(MAP_UPDATE, &[pair(flows.as_raw_fd() as u32, 0), key.as_ptr() as u64, value.as_ptr() as u64, 0])?;
        }
        let code = program(flows.as_raw_fd(), place);
        let licence = c"Dual MIT/GPL";
        let mut attributes = [0_u64; 9];
        attributes[0] = pair(PROGRAM_TYPE_SCHED_CLS, code.len() as u32);
        (attributes[1], attributes[2]) = (code.as_ptr() as u64, licence.as_ptr() as u64);
        // The last half: expected_attach_type.
        attributes[8] = pair(0, TCX_INGRESS);
        let program = made(PROGRAM_LOAD, &attributes)?;
        let link = [pair(program.as_raw_fd() as u32, index(from)), pair(TCX_INGRESS, 0), 0, 0];
        kept.push(host.run(|| made(LINK_CREATE, &link))?);
        kept.push(program);
    }
    kept.push(flows);
    Ok(Shortcut { _kept: kept })
}
