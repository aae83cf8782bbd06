//! What wakes the worker besides what was read: another inventory, other bridges that are filtered. Whoever looked every tenth of a
//! second would find a new network later, and cost more while there is none.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Wake, Waker};

use futures::Stream;
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;

use super::reader::Batch;
use crate::inventory::Snapshot;

/// Rings with an empty batch, which wakes whoever waits for batches. Holds the way to it only as long as the reader does, whose end is
/// the worker's.
struct Bell(Weak<SyncSender<Batch>>);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        let Some(batches) = self.0.upgrade() else { return };
        match batches.try_send(Batch::none()) {
            // Full: it is awake, and will look.
            Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
        }
    }
}

/// Listens for both.
pub(super) struct Ring {
    bell: Waker,
    snapshots: WatchStream<Arc<Snapshot>>,
    filtered: WatchStream<BTreeSet<String>>,
}

impl Ring {
    pub(super) fn of(
        batches: &Arc<SyncSender<Batch>>,
        snapshots: &watch::Receiver<Arc<Snapshot>>,
        filtered: &watch::Receiver<BTreeSet<String>>,
    ) -> Self {
        let bell = Waker::from(Arc::new(Bell(Arc::downgrade(batches))));
        let (snapshots, filtered) = (WatchStream::from_changes(snapshots.clone()), WatchStream::from_changes(filtered.clone()));
        Self { bell, snapshots, filtered }
    }

    /// Whether anything changed since it was asked last; from here on the next change rings.
    pub(super) fn rang(&mut self) -> bool {
        let mut context = Context::from_waker(&self.bell);
        let snapshots = changed(&mut self.snapshots, &mut context);
        changed(&mut self.filtered, &mut context) || snapshots
    }
}

fn changed<T: Clone + Send + Sync + 'static>(stream: &mut WatchStream<T>, context: &mut Context<'_>) -> bool {
    let mut any = false;
    while let Poll::Ready(Some(_)) = Pin::new(&mut *stream).poll_next(context) {
        any = true;
    }
    any
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{RecvTimeoutError, sync_channel};
    use std::time::Duration;

    use super::*;

    #[test]
    fn another_inventory_wakes_who_waits_for_batches_and_its_end_is_the_readers() {
        let (batches, taken) = sync_channel(4);
        let batches = Arc::new(batches);
        let (snapshot, snapshots) = watch::channel(Arc::new(Snapshot::default()));
        let (_filter, filtered) = watch::channel(BTreeSet::new());
        let mut ring = Ring::of(&batches, &snapshots, &filtered);
        let waits = |for_ms| taken.recv_timeout(Duration::from_millis(for_ms)).map(drop);
        assert!(!ring.rang(), "nothing changed yet");
        assert_eq!(waits(10), Err(RecvTimeoutError::Timeout));
        snapshot.send_replace(Arc::default());
        assert_eq!(waits(10_000), Ok(()));
        assert!(ring.rang() && !ring.rang(), "told once");
        snapshot.send_replace(Arc::default());
        assert_eq!(waits(10_000), Ok(()), "and the next change again");
        drop(batches);
        assert_eq!(waits(10_000), Err(RecvTimeoutError::Disconnected));
        snapshot.send_replace(Arc::default());
    }
}
