//! What an apply would write, in words, without a kernel.

use policy::Ruleset;
use policy::ruleset::Change;

use super::elements::{self, Shape};
use super::model::{Family, Table};
use super::{Applied, Drift, EnforceError, Enforcer, Links, Ownership, Tables, changed, compile, transaction};

/// An enforcer that only says what it would do: for previews, and where there is no privilege.
#[derive(Debug)]
pub struct DryRun {
    links: Links,
    shape: Shape,
    held: Option<Tables>,
    said: Vec<String>,
}

impl DryRun {
    /// Starts from nothing, on a node with these interfaces.
    pub fn new(links: Links) -> Self {
        Self { links, shape: Shape::new(), held: None, said: Vec::new() }
    }

    /// The parts of the transactions so far, in order, one a line.
    pub fn said(&self) -> &[String] {
        &self.said
    }
}

impl Enforcer for DryRun {
    fn apply(&mut self, ruleset: &Ruleset) -> Result<Applied, EnforceError> {
        let wanted = compile(ruleset, &self.links, &mut self.shape);
        let none = |family| Table { family, sets: Default::default(), chains: Default::default() };
        let empty = Tables { inet: none(Family::Inet), bridge: none(Family::Bridge), arp: none(Family::Arp) };
        let old = self.held.as_ref().unwrap_or(&empty);
        let messages = old.all().into_iter().zip(wanted.all()).flat_map(|(old, new)| transaction::change(old, new));
        self.said.extend(messages.map(|message| message.what));
        let rules_written = old.all().into_iter().zip(wanted.all()).any(|(old, new)| old.chains != new.chains);
        let changed = changed(Some(old), &wanted);
        self.held = Some(wanted);
        let absent = elements::absent(ruleset, &self.links);
        Ok(Applied { changed, rules_written, generation_id: 0, ownership: Ownership::Shared, absent, adrift: Default::default() })
    }

    fn change(&mut self, ruleset: &Ruleset, _: &Change) -> Result<Applied, EnforceError> {
        self.apply(ruleset)
    }

    fn verify(&mut self) -> Result<Vec<Drift>, EnforceError> {
        Ok(Vec::new())
    }

    fn repair(&mut self, ruleset: &Ruleset) -> Result<Applied, EnforceError> {
        self.held = None;
        self.apply(ruleset)
    }

    fn remove(&mut self) -> Result<Vec<String>, EnforceError> {
        let tables = self.held.take().map(|tables| tables.all().map(|table| format!("{} {}", table.family, super::TABLE)).to_vec());
        self.said.extend(tables.iter().flatten().map(|table| format!("the removal of table {table}")));
        Ok(tables.unwrap_or_default())
    }
}
