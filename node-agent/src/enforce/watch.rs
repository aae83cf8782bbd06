//! Who else changes nftables: a stream that tells when to verify.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;

use netlink_packet_core::NetlinkPayload;
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

use super::TABLE;
use super::attribute::{as_be32, as_text, find, read};
use super::socket::{Raw, answers};

/// Multicast group of nf_tables' changes (NFNLGRP_NFTABLES).
const NFNLGRP_NFTABLES: u32 = 7;
const NFNL_SUBSYS_NFTABLES: u16 = 10;

/// A transaction that named a table of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Netlink address of the socket that made it; `None`: notices were lost, anything may have happened.
    pub by: Option<u32>,
    /// Process that made it, as the kernel noted it: id and name.
    pub process: (u32, String),
    /// The generation after it.
    pub generation_id: u32,
}

/// Bytes of the kernel's buffer for notices.
const BUFFER: usize = 8 * 1024 * 1024;

const LOST: Change = Change { by: None, process: (0, String::new()), generation_id: 0 };

/// Listens for transactions that touch tables named `bulkhead`, our own included.
pub struct Watcher {
    socket: TokioSocket,
    touched: bool,
    ready: VecDeque<Change>,
}

impl Watcher {
    /// Listens in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The socket cannot be opened, or there is no tokio runtime.
    pub fn open() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
        // Each rule and element of a transaction is a notice of its own: the first write of all tables must not overrun it.
        setsockopt(&socket.socket_ref().as_fd(), sockopt::RcvBufForce, &BUFFER)?;
        socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
        socket.socket_mut().add_membership(NFNLGRP_NFTABLES)?;
        Ok(Self { socket, touched: false, ready: VecDeque::new() })
    }

    /// The next change. Verify after each that is not the enforcer's own (`Nftables::owner`). Cancel safe.
    ///
    /// # Errors
    /// The socket failed.
    pub async fn changed(&mut self) -> io::Result<Change> {
        loop {
            if let Some(change) = self.ready.pop_front() {
                return Ok(change);
            }
            match self.socket.recv_from_full().await {
                Ok((datagram, _)) => self.take(&datagram),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(LOST),
                Err(error) => return Err(error),
            }
        }
    }

    fn take(&mut self, datagram: &[u8]) {
        let Ok(messages) = answers(datagram, "a change") else {
            self.ready.push_back(LOST);
            return;
        };
        for message in messages {
            if message.header.message_type >> 8 != NFNL_SUBSYS_NFTABLES {
                continue;
            }
            let by = Some(message.header.port_number);
            let NetlinkPayload::InnerMessage(Raw(payload)) = message.payload else { continue };
            let Some(attributes) = read(payload.get(4..).unwrap_or_default()) else { continue };
            if i32::from(message.header.message_type & 0xff) != libc::NFT_MSG_NEWGEN {
                // In every other message the first attribute is the name of the table.
                self.touched |= find(&attributes, 1).map(as_text).as_deref() == Some(TABLE);
                continue;
            }
            // NFTA_GEN_ID, PROC_PID, PROC_NAME end a transaction.
            if std::mem::take(&mut self.touched) {
                let number = |kind| find(&attributes, kind).and_then(as_be32).unwrap_or(0);
                let process = (number(2), find(&attributes, 3).map(as_text).unwrap_or_default());
                self.ready.push_back(Change { by, process, generation_id: number(1) });
            }
        }
    }
}
