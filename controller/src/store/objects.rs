//! What is in force, and the record of who decided it. A decision and what it changes are one transaction.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use jiff::Timestamp;
use policy::guardrail::Guardrail;
use policy::policy_set::{Direction, Quarantine};
use policy::review::{Action, Decision, Who};
use policy::segment::Segment;
use policy::{Peer, PolicySet, Ports, Workload, WorkloadPolicy};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::{Connection, Row, Sqlite, SqliteConnection, Transaction};

use super::{Store, StoreError, from_db, to_db};

/// What is in force, and since which generation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InForce {
    /// Only grows; 0: nothing was ever decided.
    pub generation: u64,
    /// Segments, policies, quarantines, guardrails.
    pub set: PolicySet,
}

/// A rule that a person said no to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RejectedRule {
    /// For which workload it was proposed.
    pub workload: Workload,
    /// On which side.
    pub direction: Direction,
    /// The other end.
    pub peer: Peer,
    /// The ports.
    pub ports: Ports,
}

/// A decision before it has its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecisionDraft {
    /// When.
    pub time: Timestamp,
    /// Who.
    pub who: Who,
    /// What was done.
    pub action: Action,
    /// To what: a workload or a segment, printed.
    pub subject: String,
    /// The digest that was read, for decisions on a suggestion.
    pub digest: Option<String>,
    /// The rules concerned, printed; empty: the whole.
    pub rules: Vec<String>,
    /// Why, in the person's words.
    pub comment: String,
}

/// A decision with everything it changes.
#[derive(Clone, Debug)]
pub struct Change {
    /// What was in force when it was prepared: only what differs from it is written, as much else as there may be.
    pub before: InForce,
    /// What is in force from now on.
    pub set: PolicySet,
    /// The generation is this one at least; 0: it is the next.
    pub at_least: u64,
    /// Rules rejected by it.
    pub rejected: Vec<RejectedRule>,
    /// Rules rejected earlier and taken back by it.
    pub accepted: Vec<RejectedRule>,
    /// What goes into the record.
    pub decision: DecisionDraft,
}

/// One policy that a workload had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revision {
    /// From 1, in order.
    pub revision: u64,
    /// Generation that it came with.
    pub generation: u64,
    /// Number of the decision that made it.
    pub decision: u64,
    /// The policy; `None`: it was taken away.
    pub policy: Option<WorkloadPolicy>,
}

const SEGMENT: &str = "segment";
const POLICY: &str = "policy";
const QUARANTINE: &str = "quarantine";
const GUARDRAIL: &str = "guardrail";

type Objects = BTreeMap<(&'static str, String), String>;

/// A row that is to be another one.
struct Turn {
    kind: &'static str,
    name: String,
    /// `None`: it goes.
    json: Option<String>,
}

/// The rows that keep one set made those that keep another.
fn turns(before: &PolicySet, after: &PolicySet) -> Result<Vec<Turn>, StoreError> {
    // Taken apart by name: a field that is added asks here where it is kept.
    let PolicySet { segments, policies, quarantines, guardrails } = after;
    let mut turns = Vec::new();
    turn(&mut turns, SEGMENT, &before.segments, segments)?;
    turn(&mut turns, POLICY, &before.policies, policies)?;
    turn(&mut turns, QUARANTINE, &before.quarantines, quarantines)?;
    turn(&mut turns, GUARDRAIL, &before.guardrails, guardrails)?;
    Ok(turns)
}

fn turn<K: Ord + Display, T: PartialEq + Serialize>(
    turns: &mut Vec<Turn>,
    kind: &'static str,
    before: &BTreeMap<K, T>,
    after: &BTreeMap<K, T>,
) -> Result<(), StoreError> {
    let gone = before.keys().filter(|name| !after.contains_key(*name));
    turns.extend(gone.map(|name| Turn { kind, name: name.to_string(), json: None }));
    for (name, object) in after.iter().filter(|(name, object)| before.get(name) != Some(object)) {
        let name = name.to_string();
        let json = to_json(object).map_err(|e| StoreError::Unreadable { kind, name: name.clone(), why: e.to_string() })?;
        turns.push(Turn { kind, name, json: Some(json) });
    }
    Ok(())
}

fn to_json(object: &impl Serialize) -> Result<String, serde_json::Error> {
    serde_json::to_string(object)
}

fn from_json<T: DeserializeOwned>(kind: &'static str, name: &str, json: &str) -> Result<T, StoreError> {
    serde_json::from_str(json).map_err(|e| StoreError::Unreadable { kind, name: name.to_owned(), why: e.to_string() })
}

fn set_of(objects: &Objects) -> Result<PolicySet, StoreError> {
    let mut set = PolicySet::default();
    for ((kind, name), json) in objects {
        let misnamed = |found: &str| StoreError::Unreadable { kind, name: name.clone(), why: format!("it calls itself {found}") };
        match *kind {
            SEGMENT => {
                let segment: Segment = from_json(kind, name, json)?;
                if segment.name != *name {
                    return Err(misnamed(&segment.name));
                }
                set.segments.insert(name.clone(), segment);
            }
            POLICY => {
                let policy: WorkloadPolicy = from_json(kind, name, json)?;
                if policy.workload.to_string() != *name {
                    return Err(misnamed(&policy.workload.to_string()));
                }
                set.policies.insert(policy.workload.clone(), policy);
            }
            QUARANTINE => {
                let quarantine: Quarantine = from_json(kind, name, json)?;
                if quarantine.workload.to_string() != *name {
                    return Err(misnamed(&quarantine.workload.to_string()));
                }
                set.quarantines.insert(quarantine.workload.clone(), quarantine);
            }
            GUARDRAIL => {
                let guardrail: Guardrail = from_json(kind, name, json)?;
                if guardrail.name != *name {
                    return Err(misnamed(&guardrail.name));
                }
                set.guardrails.insert(name.clone(), guardrail);
            }
            other => return Err(StoreError::Unreadable { kind: "object", name: name.clone(), why: format!("its kind is {other:?}") }),
        }
    }
    Ok(set)
}

async fn generation_in(tx: &mut Transaction<'_, Sqlite>) -> Result<u64, StoreError> {
    let fail = || StoreError::database("read what is in force");
    let generation: String =
        sqlx::query_scalar("SELECT value FROM meta WHERE name = 'generation'").fetch_one(&mut **tx).await.map_err(fail())?;
    generation.parse().map_err(|_| StoreError::Unreadable {
        kind: "generation",
        name: generation.clone(),
        why: "it is not a number".to_owned(),
    })
}

async fn read_objects(connection: &mut SqliteConnection) -> Result<(u64, Objects), StoreError> {
    let fail = || StoreError::database("read what is in force");
    let mut tx = connection.begin().await.map_err(fail())?;
    let generation = generation_in(&mut tx).await?;
    let mut objects = Objects::new();
    for row in sqlx::query("SELECT kind, name, json FROM objects").fetch_all(&mut *tx).await.map_err(fail())? {
        let (kind, name): (String, String) = (row.try_get(0).map_err(fail())?, row.try_get(1).map_err(fail())?);
        let kind = [SEGMENT, POLICY, QUARANTINE, GUARDRAIL]
            .into_iter()
            .find(|known| *known == kind)
            .ok_or_else(|| StoreError::Unreadable { kind: "object", name: name.clone(), why: format!("its kind is {kind:?}") })?;
        objects.insert((kind, name), row.try_get(2).map_err(fail())?);
    }
    tx.commit().await.map_err(fail())?;
    Ok((generation, objects))
}

impl Store {
    /// What is in force.
    ///
    /// # Errors
    /// The database says no, or one object cannot be read: then nothing is returned, so that a set without it is never taken for
    /// the whole.
    pub async fn load_policy_set(&self) -> Result<InForce, StoreError> {
        let mut connection = self.writer("read what is in force").await?;
        let outcome = read_objects(&mut connection).await;
        let (generation, objects) = self.settle(connection, outcome).await?;
        Ok(InForce { generation, set: set_of(&objects)? })
    }

    /// Records a decision together with what it changes. The generation grows by one if the set in force changes, and stays if it
    /// doesn't (a rejection, for example). Returns the decision with its number.
    ///
    /// # Errors
    /// `Moved` if something was decided in between; the database says no: nothing is changed then.
    pub async fn commit_decision(&self, change: &Change) -> Result<Decision, StoreError> {
        let mut connection = self.writer("record a decision").await?;
        let outcome = commit(&mut connection, change).await;
        self.settle(connection, outcome).await
    }

    /// The record, oldest first.
    ///
    /// # Errors
    /// The database says no, or a line of the record cannot be read.
    pub async fn decisions(&self) -> Result<Vec<Decision>, StoreError> {
        let fail = || StoreError::database("read the record of decisions");
        let rows = sqlx::query("SELECT number, json FROM decisions ORDER BY number").fetch_all(&self.inner.pool).await.map_err(fail())?;
        rows.iter()
            .map(|row| {
                let (number, json): (i64, String) = (row.try_get(0).map_err(fail())?, row.try_get(1).map_err(fail())?);
                from_json("decision", &number.to_string(), &json)
            })
            .collect()
    }

    /// Rules that people said no to.
    ///
    /// # Errors
    /// The database says no, or a rule cannot be read.
    pub async fn rejected(&self) -> Result<BTreeSet<RejectedRule>, StoreError> {
        let fail = || StoreError::database("read the rejected rules");
        let rows = sqlx::query("SELECT workload, direction, peer, ports FROM rejected").fetch_all(&self.inner.pool).await.map_err(fail())?;
        let mut rejected = BTreeSet::new();
        for row in rows {
            let text = |column: usize| row.try_get::<String, _>(column).map_err(fail());
            let (workload, direction, peer, ports) = (text(0)?, text(1)?, text(2)?, text(3)?);
            let unreadable = |why: String| StoreError::Unreadable { kind: "rejected rule", name: workload.clone(), why };
            rejected.insert(RejectedRule {
                workload: workload.parse().map_err(|e: policy::workload::NotAWorkload| unreadable(e.to_string()))?,
                direction: [Direction::Ingress, Direction::Egress]
                    .into_iter()
                    .find(|d| d.to_string() == direction)
                    .ok_or_else(|| unreadable(format!("{direction:?} is not a side")))?,
                peer: peer.parse().map_err(|e: policy::policy_set::NotAPeer| unreadable(e.to_string()))?,
                ports: ports.parse().map_err(|e: policy::service::NotAService| unreadable(e.to_string()))?,
            });
        }
        Ok(rejected)
    }

    /// Every policy that a workload ever had, oldest first.
    ///
    /// # Errors
    /// The database says no, or a policy cannot be read.
    pub async fn revisions(&self, workload: &Workload) -> Result<Vec<Revision>, StoreError> {
        let fail = || StoreError::database("read earlier policies");
        let name = workload.to_string();
        let rows = sqlx::query("SELECT revision, generation, decision, json FROM policy_history WHERE workload = $1 ORDER BY revision")
            .bind(&name)
            .fetch_all(&self.inner.pool)
            .await
            .map_err(fail())?;
        rows.iter()
            .map(|row| {
                let number = |column: usize| from_db("revision", &name, row.try_get(column).map_err(fail())?);
                let json: Option<String> = row.try_get(3).map_err(fail())?;
                let policy = json.map(|json| from_json("earlier policy", &name, &json)).transpose()?;
                Ok(Revision { revision: number(0)?, generation: number(1)?, decision: number(2)?, policy })
            })
            .collect()
    }

    /// Revision and digest of the suggestion last shown, by workload.
    ///
    /// # Errors
    /// The database says no, or a row cannot be read.
    pub async fn suggestion_revisions(&self) -> Result<BTreeMap<Workload, (u64, String)>, StoreError> {
        let fail = || StoreError::database("read the revisions of suggestions");
        let rows = sqlx::query("SELECT workload, revision, digest FROM suggestions").fetch_all(&self.inner.pool).await.map_err(fail())?;
        let mut revisions = BTreeMap::new();
        for row in rows {
            let name: String = row.try_get(0).map_err(fail())?;
            let revision = from_db("suggestion", &name, row.try_get(1).map_err(fail())?)?;
            let workload = name.parse().map_err(|e: policy::workload::NotAWorkload| StoreError::Unreadable {
                kind: "suggestion",
                name: name.clone(),
                why: e.to_string(),
            })?;
            revisions.insert(workload, (revision, row.try_get(2).map_err(fail())?));
        }
        Ok(revisions)
    }

    /// Notes revision and digest of suggestions, all or none.
    ///
    /// # Errors
    /// The database says no.
    pub async fn save_suggestion_revisions<'a>(
        &self,
        revisions: impl IntoIterator<Item = (&'a Workload, u64, &'a str)>,
    ) -> Result<(), StoreError> {
        let mut connection = self.writer("note the revisions of suggestions").await?;
        let outcome = note_revisions(&mut connection, revisions).await;
        self.settle(connection, outcome).await
    }
}

async fn note_revisions<'a>(
    connection: &mut SqliteConnection,
    revisions: impl IntoIterator<Item = (&'a Workload, u64, &'a str)>,
) -> Result<(), StoreError> {
    let fail = || StoreError::database("note the revisions of suggestions");
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await.map_err(fail())?;
    for (workload, revision, digest) in revisions {
        sqlx::query(
            "INSERT INTO suggestions (workload, revision, digest) VALUES ($1, $2, $3) \
                 ON CONFLICT (workload) DO UPDATE SET revision = excluded.revision, digest = excluded.digest",
        )
        .bind(workload.to_string())
        .bind(to_db("revision", revision)?)
        .bind(digest)
        .execute(&mut *tx)
        .await
        .map_err(fail())?;
    }
    tx.commit().await.map_err(fail())
}

async fn commit(connection: &mut SqliteConnection, change: &Change) -> Result<Decision, StoreError> {
    let fail = || StoreError::database("record a decision");
    let turns = turns(&change.before.set, &change.set)?;
    // A decision that was acknowledged outlives a loss of power: an agent may have it on disk by then. Edges come again from the agents.
    sqlx::query("PRAGMA synchronous = FULL").execute(&mut *connection).await.map_err(fail())?;
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await.map_err(fail())?;
    // Each change of the objects comes with another generation: these are the rows of that set.
    let found = generation_in(&mut tx).await?;
    if found != change.before.generation {
        return Err(StoreError::Moved { expected: change.before.generation, found });
    }
    let generation = if turns.is_empty() { found } else { found + 1 }.max(change.at_least);
    let number: i64 = sqlx::query_scalar("SELECT COALESCE(MAX(number), 0) + 1 FROM decisions").fetch_one(&mut *tx).await.map_err(fail())?;
    let DecisionDraft { time, who, action, subject, digest, rules, comment } = change.decision.clone();
    let number = from_db("decision", "the next", number)?;
    let decision = Decision { number, time, who, action, subject, digest, rules, comment, generation };
    write_objects(&mut tx, &turns, &decision).await?;
    for (rule, rejected) in change.accepted.iter().map(|r| (r, false)).chain(change.rejected.iter().map(|r| (r, true))) {
        let query = sqlx::query(if rejected {
            "INSERT INTO rejected (workload, direction, peer, ports, decision) VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING"
        } else {
            "DELETE FROM rejected WHERE workload = $1 AND direction = $2 AND peer = $3 AND ports = $4"
        });
        let query =
            query.bind(rule.workload.to_string()).bind(rule.direction.to_string()).bind(rule.peer.to_string()).bind(rule.ports.to_string());
        let query = if rejected { query.bind(to_db("decision", number)?) } else { query };
        query.execute(&mut *tx).await.map_err(fail())?;
    }
    let json = to_json(&decision).map_err(|e| StoreError::Unreadable { kind: "decision", name: number.to_string(), why: e.to_string() })?;
    sqlx::query("INSERT INTO decisions (number, time_us, generation, json) VALUES ($1, $2, $3, $4)")
        .bind(to_db("decision", number)?)
        .bind(decision.time.as_microsecond())
        .bind(to_db("generation", generation)?)
        .bind(json)
        .execute(&mut *tx)
        .await
        .map_err(fail())?;
    tx.commit().await.map_err(fail())?;
    sqlx::query("PRAGMA synchronous = NORMAL").execute(connection).await.map_err(fail())?;
    Ok(decision)
}

async fn write_objects(tx: &mut Transaction<'_, Sqlite>, turns: &[Turn], decision: &Decision) -> Result<(), StoreError> {
    let fail = || StoreError::database("record a decision");
    let (generation, number) = (to_db("generation", decision.generation)?, to_db("decision", decision.number)?);
    for Turn { kind, name, json } in turns {
        let query = match json {
            Some(json) => sqlx::query(
                "INSERT INTO objects (kind, name, generation, json) VALUES ($1, $2, $3, $4) \
                 ON CONFLICT (kind, name) DO UPDATE SET generation = excluded.generation, json = excluded.json",
            )
            .bind(kind)
            .bind(name)
            .bind(generation)
            .bind(json),
            None => sqlx::query("DELETE FROM objects WHERE kind = $1 AND name = $2").bind(kind).bind(name),
        };
        query.execute(&mut **tx).await.map_err(fail())?;
        if *kind == POLICY {
            sqlx::query(
                "INSERT INTO policy_history (workload, revision, generation, decision, json) VALUES \
                 ($1, (SELECT COALESCE(MAX(revision), 0) + 1 FROM policy_history WHERE workload = $1), $2, $3, $4)",
            )
            .bind(name)
            .bind(generation)
            .bind(number)
            .bind(json)
            .execute(&mut **tx)
            .await
            .map_err(fail())?;
        }
    }
    sqlx::query("UPDATE meta SET value = $1 WHERE name = 'generation' AND value <> $1")
        .bind(decision.generation.to_string())
        .execute(&mut **tx)
        .await
        .map_err(fail())?;
    Ok(())
}
