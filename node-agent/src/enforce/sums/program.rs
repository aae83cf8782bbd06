//! The program: instructions of the kernel's virtual machine (RFC 9669), written down by hand since a compiler for it is no part of a
//! Rust toolchain.

use std::collections::BTreeMap;

use nix::libc;

use super::types::Layout;

/// `ip_summed` of a packet whose sum is yet to be written (CHECKSUM_PARTIAL, linux/skbuff.h).
const PARTIAL: i32 = 3;
/// `long bpf_probe_read_kernel(void *to, u32 size, const void *from)`.
const PROBE_READ_KERNEL: i32 = 113;
/// Where the packet is in what the program is given (struct bpf_nf_ctx).
const PACKET: i16 = 8;

/// Verdicts of the program.
const DROP: i32 = libc::NF_DROP;
const ACCEPT: i32 = libc::NF_ACCEPT;

/// Registers: r1 to r5 are lost by a call, r6 to r9 stay, r10 is the end of the stack.
#[derive(Clone, Copy)]
#[repr(u8)]
enum R {
    R0 = 0,
    R1 = 1,
    R2 = 2,
    R3 = 3,
    Packet = 6,
    /// The address of the IP header.
    Header = 7,
    /// The protocol that follows.
    Protocol = 8,
    /// Where the sum begins, from the IP header on.
    Start = 9,
    Stack = 10,
}

/// Sizes of loads and stores.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Size {
    Byte = 0x10,
    Half = 0x08,
    Word = 0x00,
    Double = 0x18,
}

/// Conditions of jumps.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Is {
    Equal = 0x10,
    Not = 0x50,
    /// As a signed number.
    Less = 0xc0,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Accept,
    Drop,
    Ipv4,
    Ipv6,
    Judge,
    Behind,
    /// The n-th extension header is one to read over.
    Over(u8),
    /// The one behind it.
    Next(u8),
}

/// Places on the stack.
const OFFSET: i16 = -8;
const LINEAR: i16 = -16;
const BEGINS: i16 = -24;
const EXTENSION: i16 = -32;
const IP: i16 = -72;
/// Bytes of an IPv6 header.
const IP_LENGTH: i32 = 40;

#[derive(Default)]
struct Code {
    instructions: Vec<u64>,
    /// Jumps that are to lead to a place.
    jumps: Vec<(usize, Place)>,
    places: BTreeMap<Place, usize>,
}

impl Code {
    fn put(&mut self, code: u8, to: R, from: R, offset: i16, immediate: i32) {
        let registers = (to as u8) | (from as u8) << 4;
        let bytes = [&[code, registers][..], &offset.to_ne_bytes(), &immediate.to_ne_bytes()].concat();
        self.instructions.push(bytes.iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte)));
    }

    fn load(&mut self, size: Size, to: R, from: R, offset: i16) {
        self.put(0x61 | size as u8, to, from, offset, 0);
    }

    fn store(&mut self, offset: i16, from: R) {
        self.put(0x63 | Size::Double as u8, R::Stack, from, offset, 0);
    }

    fn set(&mut self, to: R, value: i32) {
        self.put(0xb7, to, R::R0, 0, value);
    }

    fn copy(&mut self, to: R, from: R) {
        self.put(0xbf, to, from, 0, 0);
    }

    fn add(&mut self, to: R, value: i32) {
        self.put(0x07, to, R::R0, 0, value);
    }

    fn add_register(&mut self, to: R, from: R) {
        self.put(0x0f, to, from, 0, 0);
    }

    fn subtract_register(&mut self, to: R, from: R) {
        self.put(0x1f, to, from, 0, 0);
    }

    fn and(&mut self, to: R, value: i32) {
        self.put(0x57, to, R::R0, 0, value);
    }

    fn left(&mut self, to: R, bits: i32) {
        self.put(0x67, to, R::R0, 0, bits);
    }

    fn right(&mut self, to: R, bits: i32) {
        self.put(0x77, to, R::R0, 0, bits);
    }

    fn jump(&mut self, to: Place) {
        self.jumps.push((self.instructions.len(), to));
        self.put(0x05, R::R0, R::R0, 0, 0);
    }

    fn jump_if(&mut self, this: R, is: Is, value: i32, to: Place) {
        self.jumps.push((self.instructions.len(), to));
        self.put(0x05 | is as u8, this, R::R0, 0, value);
    }

    fn jump_if_register(&mut self, this: R, is: Is, other: R, to: Place) {
        self.jumps.push((self.instructions.len(), to));
        self.put(0x0d | is as u8, this, other, 0, 0);
    }

    fn place(&mut self, place: Place) {
        self.places.insert(place, self.instructions.len());
    }

    fn leave(&mut self, place: Place, verdict: i32) {
        self.place(place);
        self.set(R::R0, verdict);
        self.put(0x95, R::R0, R::R0, 0, 0);
    }

    /// So many bytes from an address in r3 to the stack; dropped where that cannot be read.
    fn read(&mut self, to: i16, length: i32) {
        self.copy(R::R1, R::Stack);
        self.add(R::R1, i32::from(to));
        self.set(R::R2, length);
        self.put(0x85, R::R0, R::R0, 0, PROBE_READ_KERNEL);
        self.jump_if(R::R0, Is::Not, 0, Place::Drop);
    }

    fn done(mut self) -> Vec<u64> {
        for (at, place) in self.jumps {
            let distance = (self.places[&place] as i64 - at as i64 - 1) as i16;
            self.instructions[at] |= u64::from(distance as u16) << 16;
        }
        self.instructions
    }
}

/// Accepts everything but what came from a guarded port with a sum yet to be written at a place that the filter has judged, or will: in
/// the IP header, in what says the ports, the flags or the type, or in a piece of a packet (no kernel sends one so).
pub(super) fn instructions(layout: &Layout, guarded: u32) -> Vec<u64> {
    let mut code = Code::default();
    code.load(Size::Double, R::Packet, R::R1, PACKET);
    code.load(Size::Word, R::R1, R::Packet, layout.mark);
    code.and(R::R1, guarded as i32);
    code.jump_if(R::R1, Is::Equal, 0, Place::Accept);
    let (summed, shift) = layout.summed;
    code.load(Size::Byte, R::R1, R::Packet, summed);
    code.and(R::R1, PARTIAL << shift);
    code.jump_if(R::R1, Is::Not, PARTIAL << shift, Place::Accept);

    code.load(Size::Double, R::Header, R::Packet, layout.head);
    code.load(Size::Half, R::Protocol, R::Packet, layout.network_header);
    code.load(Size::Half, R::Start, R::Packet, layout.csum_start);
    code.subtract_register(R::Start, R::Protocol);
    code.load(Size::Half, R::R1, R::Packet, layout.csum_offset);
    code.store(OFFSET, R::R1);
    // How much lies in one piece from the IP header on.
    code.load(Size::Word, R::R1, R::Packet, layout.tail);
    code.subtract_register(R::R1, R::Protocol);
    code.store(LINEAR, R::R1);
    code.add_register(R::Header, R::Protocol);
    code.copy(R::R3, R::Header);
    code.read(IP, IP_LENGTH);
    code.load(Size::Byte, R::R1, R::Stack, IP);
    code.right(R::R1, 4);
    code.jump_if(R::R1, Is::Equal, 4, Place::Ipv4);
    code.jump_if(R::R1, Is::Equal, 6, Place::Ipv6);
    code.jump(Place::Drop);

    code.place(Place::Ipv4);
    code.load(Size::Double, R::R1, R::Stack, LINEAR);
    code.jump_if(R::R1, Is::Less, 20, Place::Drop);
    // More fragments, and the offset (RFC 791, 3.1).
    code.load(Size::Half, R::R1, R::Stack, IP + 6);
    code.and(R::R1, i32::from(u16::from_ne_bytes([0x3f, 0xff])));
    code.jump_if(R::R1, Is::Not, 0, Place::Drop);
    code.load(Size::Byte, R::Protocol, R::Stack, IP + 9);
    code.load(Size::Byte, R::R2, R::Stack, IP);
    code.and(R::R2, 15);
    code.left(R::R2, 2);
    code.jump(Place::Judge);

    ipv6(&mut code);

    // Where what follows IP begins is in r2.
    code.place(Place::Judge);
    code.load(Size::Double, R::R3, R::Stack, OFFSET);
    code.jump_if_register(R::Start, Is::Not, R::R2, Place::Behind);
    own_place(&mut code);

    // Within a tunnel, of which the filter reads the outer headers alone: whatever has nothing more that is judged there.
    code.place(Place::Behind);
    code.add(R::R2, 8);
    code.jump_if_register(R::Start, Is::Less, R::R2, Place::Drop);
    // Flags, types, what an error quotes; and what connection tracking reads behind an authentication header.
    for judged in [libc::IPPROTO_TCP, libc::IPPROTO_SCTP, libc::IPPROTO_DCCP, libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6, libc::IPPROTO_AH] {
        code.jump_if(R::Protocol, Is::Equal, judged, Place::Drop);
    }
    code.jump(Place::Accept);
    code.leave(Place::Drop, DROP);
    code.leave(Place::Accept, ACCEPT);
    code.done()
}

/// Over extension headers; four of them is more than anybody sends.
fn ipv6(code: &mut Code) {
    const MOST: u8 = 4;
    code.place(Place::Ipv6);
    code.load(Size::Double, R::R1, R::Stack, LINEAR);
    code.jump_if(R::R1, Is::Less, IP_LENGTH, Place::Drop);
    code.load(Size::Byte, R::Protocol, R::Stack, IP + 6);
    code.set(R::R2, IP_LENGTH);
    for n in 0..=MOST {
        code.place(Place::Next(n));
        code.jump_if(R::Protocol, Is::Equal, libc::IPPROTO_FRAGMENT, Place::Drop);
        for extension in [libc::IPPROTO_HOPOPTS, libc::IPPROTO_ROUTING, libc::IPPROTO_DSTOPTS] {
            code.jump_if(R::Protocol, Is::Equal, extension, if n < MOST { Place::Over(n) } else { Place::Drop });
        }
        code.jump(Place::Judge);
        if n < MOST {
            code.place(Place::Over(n));
            code.store(BEGINS, R::R2);
            code.load(Size::Double, R::R1, R::Stack, LINEAR);
            code.subtract_register(R::R1, R::R2);
            code.jump_if(R::R1, Is::Less, 2, Place::Drop);
            code.copy(R::R3, R::Header);
            code.add_register(R::R3, R::R2);
            code.read(EXTENSION, 2);
            code.load(Size::Byte, R::Protocol, R::Stack, EXTENSION);
            // In eights of bytes, the first not counted (RFC 8200, 4.3).
            code.load(Size::Byte, R::R1, R::Stack, EXTENSION + 1);
            code.add(R::R1, 1);
            code.left(R::R1, 3);
            code.load(Size::Double, R::R2, R::Stack, BEGINS);
            code.add_register(R::R2, R::R1);
        }
    }
}

/// The sum of all that follows IP, where that protocol has it.
fn own_place(code: &mut Code) {
    const AT: [(i32, i32); 7] = [
        (libc::IPPROTO_TCP, 16),
        (libc::IPPROTO_UDP, 6),
        (libc::IPPROTO_UDPLITE, 6),
        (libc::IPPROTO_DCCP, 6),
        (libc::IPPROTO_SCTP, 8),
        (libc::IPPROTO_ICMP, 2),
        (libc::IPPROTO_ICMPV6, 2),
    ];
    for (protocol, at) in AT {
        // Two conditions: over the second where the first is not met.
        code.put(0x05 | Is::Not as u8, R::Protocol, R::R0, 1, protocol);
        code.jump_if(R::R3, Is::Equal, at, Place::Accept);
    }
    code.jump(Place::Drop);
}
