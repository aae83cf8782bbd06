//! Everything that the engine lists, taken in the place of what its events told.

use std::collections::BTreeMap;
use std::sync::Arc;

use bollard::errors::Error as EngineError;
use jiff::Timestamp;
use tracing::debug;

use super::super::engine::Engine;
use super::super::facts::{ContainerFact, Links, NetworkFact};
use super::super::inspects::Inspect;
use super::{SessionError, Task, keep_details};

/// What the engine listed.
pub(super) struct Listed {
    /// When it was asked, and the links of then.
    pub(super) started: (Timestamp, Arc<Links>),
    networks: BTreeMap<String, NetworkFact>,
    containers: BTreeMap<String, ContainerFact>,
}

impl Task {
    /// Lists everything anew; whether that is anything new.
    pub(super) async fn resync(&mut self, engine: &Engine, inspect: Inspect) -> Result<bool, SessionError> {
        let listed = self.list(engine).await?;
        Ok(self.take_listing(engine, listed, inspect))
    }

    pub(super) async fn list(&mut self, engine: &Engine) -> Result<Listed, SessionError> {
        self.catch_up();
        let (started, links) = (Timestamp::now(), Arc::clone(&self.links.borrow().links));
        let (networks, containers) = self.listing(engine).await?;
        debug!(networks = networks.len(), containers = containers.len(), after = %Timestamp::now().duration_since(started), "listed");
        self.catch_up();
        Ok(Listed { started: (started, links), networks, containers })
    }

    pub(super) fn take_listing(&mut self, engine: &Engine, listed: Listed, inspect: Inspect) -> bool {
        let Listed { started: (started, before), networks, mut containers } = listed;
        for (id, fact) in &mut containers {
            keep_details(fact, self.facts.containers.get(id));
        }
        // Ports, resolvers and process ids change without an event where the engine reloads or restarts.
        let due = self.inspects.due(inspect, &containers, &self.facts.containers);
        let news = self.facts.networks != networks || self.facts.containers != containers;
        self.facts.networks = networks;
        self.facts.containers = containers;
        let links = self.links.borrow().links.clone();
        self.ahead.listed(&mut self.facts, &links, started);
        self.look_since(&before);
        self.synced = started;
        self.facts.userland_proxy = self.about.userland_proxy;
        self.facts.engine_unmanaged.clone_from(&self.about.unmanaged);
        self.inspects.list(engine, &self.about.configured, due);
        news
    }

    /// What the engine lists. While many containers start that takes seconds, in which those that join are seen ahead of its word as ever.
    async fn listing(&mut self, engine: &Engine) -> Result<(BTreeMap<String, NetworkFact>, BTreeMap<String, ContainerFact>), EngineError> {
        self.following_links(async { tokio::try_join!(engine.networks(), engine.containers(&[])) }).await
    }

    /// Waits for the engine's answer, however long that takes, and takes in what moves among the ports meanwhile.
    pub(super) async fn following_links<T>(&mut self, asked: impl Future<Output = T>) -> T {
        tokio::pin!(asked);
        loop {
            tokio::select! {
                biased;
                answer = &mut asked => return answer,
                Ok(()) = self.links.changed() => self.links_moved(),
            }
        }
    }
}
