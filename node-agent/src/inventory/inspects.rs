//! What only container inspect tells: of whom it is asked, and the answers as they come. It waits for a container that starts.

use std::collections::BTreeMap;
use std::time::Duration;

use bollard::errors::Error as EngineError;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt};
use tokio::task::JoinSet;
use tracing::warn;

use super::engine::Engine;
use super::facts::{ContainerFact, Details};
use super::resolvers::Configured;

/// Inspects of a listing under way at the same time: each is a connection with buffers of its own, and a thousand of them are memory that
/// is kept. More than a machine that boots has starting containers, whose inspects wait.
const ABREAST: usize = 64;
/// Of the containers that a regular listing shows as they were, so many are inspected, or one in so many if that is more: what only
/// inspect tells changes without an event only where the engine itself does.
const AGAIN: (usize, usize) = (32, 32);

/// What inspect told of a container.
pub(super) type Answer = (String, Result<Option<Details>, EngineError>);

/// Which of the containers that run a listing inspects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inspect {
    All,
    /// Those that are not as they were, and a share of the rest in turn.
    Some,
}

/// Inspects under way.
pub(super) struct Inspects {
    asked: JoinSet<Answer>,
    /// Those of a listing, which come after those of events.
    listed: BoxStream<'static, Answer>,
    /// The container that a regular listing inspected last.
    last: String,
}

impl Default for Inspects {
    fn default() -> Self {
        Self { asked: JoinSet::new(), listed: stream::empty().boxed(), last: String::new() }
    }
}

impl Inspects {
    /// Of whom a listing that told of these containers asks; `known` is what was known before.
    pub(super) fn due(
        &mut self,
        inspect: Inspect,
        containers: &BTreeMap<String, ContainerFact>,
        known: &BTreeMap<String, ContainerFact>,
    ) -> Vec<String> {
        let running = containers.iter().filter(|(_, fact)| fact.running);
        match inspect {
            Inspect::All => running.map(|(id, _)| id.clone()).collect(),
            Inspect::Some => {
                let as_it_was = |id: &String, fact| known.get(id) == Some(fact) && fact.details.is_some();
                let (known, news): (Vec<_>, Vec<_>) = running.partition(|(id, fact)| as_it_was(id, *fact));
                let known: Vec<&String> = known.into_iter().map(|(id, _)| id).collect();
                let again = next_of(&known, &self.last, AGAIN.0.max(known.len().div_ceil(AGAIN.1)));
                if let Some(last) = again.last() {
                    self.last.clone_from(last);
                }
                news.into_iter().map(|(id, _)| id.clone()).chain(again).collect()
            }
        }
    }

    /// Asks about these, some at a time. An earlier listing, which mostly is done by then, is given up: the rest comes in its turn.
    pub(super) fn list(&mut self, engine: &Engine, configured: &Configured, due: Vec<String>) {
        let (engine, configured) = (engine.clone(), configured.clone());
        let one = move |id: String| {
            let (engine, configured) = (engine.clone(), configured.clone());
            async move {
                let answer = engine.details(&id, &configured).await;
                (id, answer)
            }
        };
        self.listed = stream::iter(due).map(one).buffer_unordered(ABREAST).boxed();
    }

    /// Asks about one, before whatever a listing asks.
    pub(super) fn ask(&mut self, engine: &Engine, configured: &Configured, id: String) {
        let (engine, configured) = (engine.clone(), configured.clone());
        self.asked.spawn(async move {
            let answer = engine.details(&id, &configured).await;
            (id, answer)
        });
    }

    /// The next answers, as many as there are. Waits for the first, for ever if none is due. Nothing is lost if it is given up.
    pub(super) async fn answers(&mut self) -> Vec<Answer> {
        let mut answers = Vec::new();
        tokio::select! {
            biased;
            Some(first) = self.asked.join_next(), if !self.asked.is_empty() => answers.extend(finished(first)),
            Some(first) = self.listed.next() => answers.push(first),
            else => std::future::pending().await,
        }
        while let Some(next) = self.asked.try_join_next() {
            answers.extend(finished(next));
        }
        while let Some(Some(next)) = self.listed.next().now_or_never() {
            answers.push(next);
        }
        answers
    }

    /// Answers of a listing, until it is over or time is.
    pub(super) async fn listed_within(&mut self, time: Duration) -> Vec<Answer> {
        let mut answers = Vec::new();
        let _ = tokio::time::timeout(time, async {
            while let Some(answer) = self.listed.next().await {
                answers.push(answer);
            }
        })
        .await;
        answers
    }
}

fn finished(answer: Result<Answer, tokio::task::JoinError>) -> Option<Answer> {
    answer.inspect_err(|error| warn!(error = error as &dyn std::error::Error, "container not inspected")).ok()
}

/// So many of these, which are in order, from the first behind `last` on and around.
fn next_of(ids: &[&String], last: &str, most: usize) -> Vec<String> {
    let begin = ids.partition_point(|id| id.as_str() <= last);
    ids.iter().cycle().skip(begin).take(most.min(ids.len())).map(|id| (*id).clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regular_listings_inspect_everybody_in_turn_and_nobody_twice_at_once() {
        let ids: Vec<String> = (0..10).map(|n| n.to_string()).collect();
        let ids: Vec<&String> = ids.iter().collect();
        assert_eq!(next_of(&ids, "", 4), ["0", "1", "2", "3"]);
        assert_eq!(next_of(&ids, "3", 4), ["4", "5", "6", "7"]);
        assert_eq!(next_of(&ids, "7", 4), ["8", "9", "0", "1"], "around");
        assert_eq!(next_of(&ids, "55", 2), ["6", "7"], "the last one may be gone");
        assert_eq!(next_of(&ids, "9", 64).len(), 10);
        assert!(next_of(&[], "9", 64).is_empty());
    }
}
