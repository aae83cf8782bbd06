//! What the worker keeps switched on, and what it lets go of when the connection table runs full.

use std::collections::BTreeSet;
use std::sync::Arc;

use tracing::{info, warn};

use super::super::switches::{Found, Gauges};
use super::{Parts, Worker};
use crate::chain::chain;

impl Worker {
    /// Stops what tracks connections for learning alone when the connection table runs full, and begins again when there is room.
    pub(super) fn restrain(&mut self) {
        if let Some(room) = self.gauges.as_ref().and_then(Gauges::room) {
            self.room = room;
        }
        let before = self.restrained;
        self.restrained = self.parts.limits.restrain(before, self.room);
        if before && !self.restrained {
            info!(entries = self.room.0, "there is room in the connection table again; networks in Learn are tracked");
            self.wrong.remove("room");
            // The table first: what begins from now on is seen, what lives on is read.
            self.keep_table(false);
            self.loss_to_repair = true;
        }
        if !self.restrained {
            return;
        }
        let (used, room) = self.room;
        if !before {
            warn!(used, room, "the connection table runs full; connections are not tracked for learning alone");
        }
        let text = format!(
            "the connection table runs full ({used} of {room} entries): networks that are neither enforced nor audited are not tracked \
             for now, and nothing is learned there. Raise net.netfilter.nf_conntrack_max"
        );
        // Said once: the numbers move all the time, and each change would be news.
        self.wrong.entry("room".to_owned()).or_insert(text);
        let filtered = self.parts.filtered.borrow().clone();
        let Parts { originals, links, table, keep, .. } = &mut self.parts;
        let changed: Vec<String> = originals.bridges.keys().filter(|bridge| !filtered.contains(*bridge)).cloned().collect();
        for bridge in changed {
            if let Err(error) = originals.let_go(links, &bridge, keep) {
                warn!(bridge, error = chain(&error), "a bridge's switch could not be put back");
            }
        }
        if filtered.is_empty()
            && let Err(error) = table.lift()
        {
            warn!(%error, "the observation table could not be taken out");
        }
    }

    /// Whether a bridge's connections are left alone for want of room.
    fn leaves_alone(&self, bridge: &str) -> bool {
        self.restrained && !self.parts.filtered.borrow().contains(bridge)
    }

    /// Switches netfilter on for every bridge of the engine.
    pub(super) fn lead_bridges_through(&mut self) {
        let snapshot = Arc::clone(&self.parts.snapshots.borrow());
        let bridges: BTreeSet<&str> = snapshot.inventory.networks.values().filter_map(|network| network.bridge.as_deref()).collect();
        self.wrong.retain(|what, _| what.strip_prefix("bridge ").is_none_or(|bridge| bridges.contains(bridge)));
        for &bridge in &bridges {
            if self.leaves_alone(bridge) {
                continue;
            }
            let Parts { links, originals, keep, kept, .. } = &mut self.parts;
            let place = format!("bridge {bridge}");
            match originals.lead_through(links, bridge, keep) {
                Ok(Found::On) => {}
                Ok(Found::Off) => {
                    self.wrong.remove(&place);
                    kept.send_replace(originals.clone());
                }
                Ok(Found::SwitchedOff) => {
                    self.wrong.remove(&place);
                    warn!(bridge, "somebody switched netfilter off for a bridge; switched on again");
                    *self.repaired.entry(format!("netfilter of {place}")).or_default() += 1;
                }
                Err(error) => {
                    let text = format!("traffic within {place} is not seen: {}", chain(&error));
                    self.wrong.insert(place, text);
                }
            }
        }
        let Parts { links, originals, keep, .. } = &mut self.parts;
        if let Err(error) = originals.note_on(links, &bridges, keep) {
            warn!(error = chain(&error), "what is switched off while no agent lives would not be told");
        }
    }

    /// Puts the observation table back where it is gone; `foul`: nobody of us took it out.
    pub(super) fn keep_table(&mut self, foul: bool) {
        match self.parts.table.repair() {
            Ok(false) => {
                self.wrong.remove("table");
            }
            Ok(true) if !foul => {}
            Ok(true) => {
                warn!("somebody removed the observation table; it is back");
                *self.repaired.entry("the observation table".to_owned()).or_default() += 1;
                self.loss_to_repair = true;
            }
            Err(error) => {
                self.wrong.insert("table".to_owned(), format!("connections are not tracked: {error}"));
            }
        }
    }
}
