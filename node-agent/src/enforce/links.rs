//! Interface names and indices of the namespace that the enforcer's sockets are in.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::libc;

/// `struct ifreq` (linux/if.h) with its index: 16 bytes of name, then a union of 24.
#[repr(C)]
#[derive(Debug)]
struct InterfaceIndex {
    name: [u8; libc::IFNAMSIZ],
    index: i32,
    rest: [u8; 20],
}

const _: () = assert!(size_of::<InterfaceIndex>() >= size_of::<libc::ifreq>());

nix::ioctl_readwrite_bad!(interface_index, libc::SIOCGIFINDEX, InterfaceIndex);

/// Indices by name, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Links(BTreeMap<String, u32>);

impl Links {
    /// Links by name and index, as data.
    pub fn of<'a>(links: impl IntoIterator<Item = (&'a str, u32)>) -> Self {
        Self(links.into_iter().map(|(name, index)| (name.to_owned(), index)).collect())
    }

    /// The index of an interface, if it is there.
    pub fn index(&self, name: &str) -> Option<u32> {
        self.0.get(name).copied()
    }
}

impl Links {
    /// The links of the calling thread's network namespace.
    ///
    /// # Errors
    /// The socket's.
    pub fn read() -> io::Result<Self> {
        LinkReader::open()?.read()
    }

    /// Names by index.
    pub fn names(&self) -> BTreeMap<u32, String> {
        self.0.iter().map(|(name, &index)| (index, name.clone())).collect()
    }
}

/// Asks the kernel about links and ports, always in the namespace it was opened in.
#[derive(Debug)]
pub(super) struct LinkReader {
    socket: Socket,
}

impl LinkReader {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        Ok(Self { socket })
    }

    /// What the kernel says of each link.
    pub(super) fn all(&self) -> io::Result<impl Iterator<Item = LinkMessage>> {
        let answers = self.ask(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)?;
        Ok(answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        }))
    }

    /// All links as they are now.
    pub(super) fn read(&self) -> io::Result<Links> {
        let mut links = BTreeMap::new();
        for link in self.all()? {
            let name = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            });
            if let Some(name) = name {
                links.insert(name, link.header.index);
            }
        }
        Ok(Links(links))
    }

    /// The index of one interface, if it is there: a system call instead of a list of all (SIOCGIFINDEX, netdevice(7)).
    pub(super) fn index(&self, name: &str) -> io::Result<Option<u32>> {
        let mut request = InterfaceIndex { name: [0; libc::IFNAMSIZ], index: 0, rest: [0; 20] };
        // The name ends with a zero; a longer one is no interface's.
        let Some(room) = request.name.get_mut(..name.len()).filter(|_| name.len() < libc::IFNAMSIZ) else { return Ok(None) };
        room.copy_from_slice(name.as_bytes());
        // SAFETY: the request is as long as the kernel's `struct ifreq` and outlives the call.
        #[allow(unsafe_code)]
        let outcome = unsafe { interface_index(self.socket.as_raw_fd(), &mut request) };
        match outcome {
            Ok(_) => Ok(u32::try_from(request.index).ok()),
            Err(Errno::ENODEV) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Sends one request, and waits for all of the answer.
    pub(super) fn ask(&self, request: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut request = NetlinkMessage::from(request);
        request.header.flags = NLM_F_REQUEST | flags;
        request.finalize();
        let mut buffer = vec![0; request.buffer_len()];
        request.serialize(&mut buffer);
        self.socket.send_to(&buffer, &SocketAddr::new(0, 0), 0)?;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while rest.len() >= 16 {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
                let length = (message.header.length as usize).next_multiple_of(4).clamp(16, rest.len());
                rest = &rest[length..];
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    NetlinkPayload::Done(_) => return Ok(answers),
                    // An acknowledgement is an error of zero.
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }
}
