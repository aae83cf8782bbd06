//! In which network namespace a process is, by the id that this one has for it (RTM_GETNSID with NETNSA_PID, linux/net_namespace.h). It
//! needs no privilege, and no namespace is entered.
//!
//! # Why
//! A host's veth names its peer's namespace by the same id. A MAC address a container may change, if it is allowed to; whose
//! namespace it is in it may not.

use std::io;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// Where questions are asked.
pub(super) struct Asker(Socket);

impl Asker {
    /// # Errors
    /// No socket.
    pub(super) fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        Ok(Self(socket))
    }

    /// `None`: the namespace has no id here, as one has that no link leads to.
    ///
    /// # Errors
    /// The process is gone, or the kernel does not answer.
    pub(super) fn of_process(&mut self, pid: u32) -> io::Result<Option<i32>> {
        let mut question = NsidMessage::default();
        question.attributes.push(NsidAttribute::Pid(pid));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(question));
        request.header.flags = NLM_F_REQUEST;
        request.finalize();
        let mut buffer = vec![0; request.buffer_len()];
        request.serialize(&mut buffer);
        self.0.send_to(&buffer, &SocketAddr::new(0, 0), 0)?;
        let (answer, _) = self.0.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?;
        match answer.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(told)) => {
                let id = told.attributes.iter().find_map(|attribute| if let NsidAttribute::Id(id) = attribute { Some(*id) } else { None });
                // NETNSA_NSID_NOT_ASSIGNED is -1.
                Ok(id.filter(|&id| id >= 0))
            }
            NetlinkPayload::Error(error) => Err(error.to_io()),
            _ => Ok(None),
        }
    }
}

/// As [`Asker::of_process`], asked once.
///
/// # Errors
/// As there.
pub(super) fn of_process(pid: u32) -> io::Result<Option<i32>> {
    Asker::new()?.of_process(pid)
}
