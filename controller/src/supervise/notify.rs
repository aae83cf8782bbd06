//! What a service says to who started it: READY=1, and descriptors to be kept for the next process of its kind. The words are those
//! of sd_notify(3), so that the services need not know whether systemd listens or `bulkhead up`.

use std::fs;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::lchown;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Gid, Uid};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::time::sleep;
use tracing::warn;

use super::{SuperviseError, io_at};

/// A socket that hears a service.
pub(super) struct Notices {
    pub(super) path: PathBuf,
    socket: UnixDatagram,
}

/// What it said at once.
#[derive(Debug, Default)]
pub(super) struct Notice {
    /// READY=1
    pub(super) ready: bool,
    /// FDNAME=
    pub(super) name: String,
    /// FDSTORE=1, with the descriptors, in the place of those of that name.
    pub(super) keep: Vec<OwnedFd>,
    /// FDSTOREREMOVE=1
    pub(super) forget: bool,
}

impl Notices {
    /// Listens under a path; `owner`: who may speak, besides root.
    pub(super) fn listen(path: &Path, owner: Option<(Uid, Gid)>) -> Result<Self, SuperviseError> {
        let at = || format!("listen on {}", path.display());
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_at(at())(e)),
            Ok(()) | Err(_) => {}
        }
        let socket = UnixDatagram::bind(path).map_err(io_at(at()))?;
        if let Some((uid, gid)) = owner {
            // The owner of the folder may have put a link in its place.
            lchown(path, Some(uid.as_raw()), Some(gid.as_raw())).map_err(io_at(at()))?;
        }
        Ok(Self { path: path.to_owned(), socket })
    }

    /// The next notice. Cancel safe.
    pub(super) async fn next(&self) -> Notice {
        loop {
            match self.socket.async_io(Interest::READABLE, || self.read()).await {
                Ok(notice) => return notice,
                Err(error) => {
                    warn!(%error, "a service cannot be heard");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// What waits already.
    pub(super) fn waiting(&self) -> Option<Notice> {
        self.read().ok()
    }

    fn read(&self) -> io::Result<Notice> {
        let mut text = [0; 1024];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let length = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut text)], &mut beside, flags)?.bytes;
        let descriptors: Vec<OwnedFd> = beside
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        let lines = || text[..length.min(text.len())].split(|&b| b == b'\n');
        let says = |word: &[u8]| lines().any(|line| line == word);
        let name = lines().find_map(|line| line.strip_prefix(b"FDNAME=")).unwrap_or_default();
        Ok(Notice {
            ready: says(b"READY=1"),
            name: String::from_utf8_lossy(name).into_owned(),
            keep: if says(b"FDSTORE=1") { descriptors } else { Vec::new() },
            forget: says(b"FDSTOREREMOVE=1"),
        })
    }
}

impl Drop for Notices {
    fn drop(&mut self) {
        // It may be gone with the directory; there is nothing more to do about it.
        let _ = fs::remove_file(&self.path);
    }
}
