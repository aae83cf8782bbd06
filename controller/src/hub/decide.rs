//! From a person's request to what is recorded and in force. Pure: the task writes it into the store.

mod segment;

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};
use policy::evaluate::Scene;
use policy::guardrail;
use policy::learn::Rejected;
use policy::policy_set::{Direction, Quarantine};
use policy::review::{self, Action, Choice, Edge, Reading, Refused, Reviewed};
use policy::{Mode, Peer, PolicySet, Workload, WorkloadPolicy, check};

pub(crate) use self::segment::{implicit, to_be_enforced, to_enforce};
use self::segment::{loosened, must_be_foreseen, promoted, refuse_unlearned, switched, with_members, without_members};
use super::state::State;
use super::{HubError, documents};
use crate::api::ask::{Allow, Apply, Comment, Delete, Edit, Members, OfWorkload, Revert, Review, Switch};
use crate::store::Revision;

/// What may be decided.
#[derive(Clone, Debug)]
pub enum Request {
    /// Approve or reject a suggestion.
    Review(Review),
    /// Allow an edge by hand.
    Allow(Allow),
    /// Put a hand-written policy in force.
    Edit(Workload, Edit),
    /// Back to an earlier policy.
    Revert(Revert),
    /// Members of a segment.
    Members(Members),
    /// Another mode.
    Switch(Switch),
    /// Cut off.
    Quarantine(OfWorkload),
    /// Give back.
    Release(OfWorkload),
    /// Documents.
    Apply(Apply),
    /// Take a guardrail out.
    Delete(Delete),
    /// Take nodes over from another store.
    Adopt(Comment),
    /// Note that the protection was taken down.
    Down(Comment),
    /// Take out rules whose time is over.
    Expire,
    /// An operator's rule promotes a segment to Enforce.
    Promote {
        /// Which.
        segment: String,
        /// What was observed, for the record.
        why: String,
    },
}

/// A decision that may be recorded.
#[derive(Clone, Debug)]
pub(crate) struct Decided {
    /// What is in force with it.
    pub(crate) set: PolicySet,
    pub(crate) remember: BTreeSet<Rejected>,
    pub(crate) forget: BTreeSet<Rejected>,
    pub(crate) action: Action,
    pub(crate) subject: String,
    pub(crate) digest: Option<String>,
    pub(crate) rules: Vec<String>,
    pub(crate) comment: String,
    /// What the person is told.
    pub(crate) notes: Vec<String>,
    /// Recorded although it changes nothing.
    pub(crate) always: bool,
    /// Nodes of other stores take the plan.
    pub(crate) adopt: bool,
    /// Only said, not done.
    pub(crate) dry_run: bool,
}

impl Decided {
    fn new(set: PolicySet, action: Action, subject: impl ToString, comment: &str) -> Self {
        Self {
            set,
            remember: BTreeSet::new(),
            forget: BTreeSet::new(),
            action,
            subject: subject.to_string(),
            digest: None,
            rules: Vec::new(),
            comment: comment.to_owned(),
            notes: Vec::new(),
            always: false,
            adopt: false,
            dry_run: false,
        }
    }

    fn reviewed(reviewed: Reviewed, action: Action, subject: impl ToString, comment: &str) -> Self {
        let Reviewed { set, changed: _, remember, forget, rules, notes } = reviewed;
        Self { remember, forget, rules, notes, ..Self::new(set, action, subject, comment) }
    }

    /// Nothing is recorded of it, unless it is to be recorded always.
    pub(crate) fn changes_nothing(&self, state: &State) -> bool {
        self.set == state.set && self.remember.is_empty() && self.forget.is_empty()
    }

    fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }
}

/// What a decision would make, for its forecast.
#[derive(Clone, Debug)]
pub(crate) struct Would {
    /// What would be in force.
    pub(crate) set: PolicySet,
    /// What is different in it.
    pub(crate) changes: Vec<String>,
    /// Made from what is in force since this generation.
    pub(crate) generation: u64,
}

impl Would {
    pub(crate) fn of(state: &State, decided: Decided) -> Self {
        let changes = documents::changes(&state.set, &decided.set);
        Self { set: decided.set, changes, generation: state.generation }
    }
}

/// Whether what such a change would cut is told before it is made: something is in Enforce with it; of members, somebody who was not.
pub(crate) fn is_foretold(state: &State, request: &Request, after: &PolicySet) -> bool {
    match request {
        Request::Members(_) => segment::brings_under_enforce(state, after),
        _ => enforces(&state.set, after),
    }
}

fn enforces(before: &PolicySet, after: &PolicySet) -> bool {
    before != after && after.segments.values().any(|segment| segment.mode == Mode::Enforce)
}

/// That what changes a policy while something is in Enforce with it is what was foreseen: its request names the generation of the
/// forecast. Asked at the decision itself, since between a look at what is in force and the decision a segment may go to Enforce.
pub(crate) fn must_be_confirmed(state: &State, request: &Request, decided: &Decided) -> Result<(), HubError> {
    let confirm = match request {
        Request::Edit(_, edit) => edit.confirm,
        Request::Revert(revert) => revert.confirm,
        // Who is put under a segment that enforces, or taken out of one whose project's does.
        Request::Members(members) => members.confirm,
        // A document may be a review too, which is told to whoever reads the suggestion.
        Request::Apply(apply) if decided.action == Action::Edit => apply.confirm,
        _ => return Ok(()),
    };
    if confirm.is_some() || is_foretold(state, request, &decided.set) { must_be_foreseen(state, confirm) } else { Ok(()) }
}

const NOTHING_DIFFERENT: &str = "Nothing is different.";

/// What is different, a sentence each, or that nothing is.
fn told(changes: &[String]) -> Vec<String> {
    if changes.is_empty() { vec![NOTHING_DIFFERENT.to_owned()] } else { changes.to_vec() }
}

impl From<Refused> for HubError {
    fn from(refused: Refused) -> Self {
        let what = refused.to_string();
        match refused {
            Refused::Moved { workload, .. } => {
                HubError::refused(what, format!("`bulkhead describe suggestion {workload}` shows it as it is now."))
            }
            Refused::NoSuchRule { workload, .. } => {
                HubError::not_found(what, format!("`bulkhead describe suggestion {workload}` lists the rules."))
            }
            Refused::UnknownWorkload { .. } => HubError::not_found(what, "`bulkhead get workloads` lists those that run."),
            Refused::NoSuchSegment { .. } => HubError::not_found(what, "`bulkhead get segments` lists them."),
            Refused::NoWorkload { .. } | Refused::Past { .. } | Refused::NothingChosen { .. } => HubError::invalid(what, ""),
            Refused::Forbidden { .. } => {
                let next = "Nothing was changed. To approve the rest of a suggestion, reject this rule first: `bulkhead reject WORKLOAD \
                            --rule ID`. `bulkhead get guardrails` lists what is forbidden.";
                HubError::refused(what, next)
            }
            Refused::Blocked { .. } | Refused::Enforced { .. } | Refused::Unlearned { .. } => HubError::refused(what, ""),
        }
    }
}

/// What the task read from the store for a request.
#[derive(Debug, Default)]
pub(crate) struct History {
    /// Every policy that the workload of a revert ever had.
    pub(crate) revisions: Vec<Revision>,
}

/// What a request makes of what is in force.
///
/// # Errors
/// Why it is refused.
pub(crate) fn decide(state: &State, request: &Request, history: &History) -> Result<Decided, HubError> {
    let mut decided = match request {
        Request::Review(review) => reviewed(state, review)?,
        Request::Allow(allow) => allowed(state, allow)?,
        Request::Edit(workload, edit) => edited(state, workload, edit)?,
        Request::Revert(revert) => reverted(state, revert, history)?,
        Request::Members(members) if members.remove => without_members(state, members)?,
        Request::Members(members) => with_members(state, members)?,
        Request::Switch(switch) => switched(state, switch)?,
        Request::Quarantine(of) => quarantined(state, of)?,
        Request::Release(of) => released(state, of)?,
        Request::Apply(apply) => applied(state, apply)?,
        Request::Delete(delete) => deleted(state, delete)?,
        Request::Adopt(Comment { comment, .. }) => {
            let mut decided = Decided::new(state.set.clone(), Action::Adopt, format!("store {}", state.store), comment);
            (decided.always, decided.adopt) = (true, true);
            decided.note("Every node that is connected takes its policy from this store from now on.")
        }
        Request::Down(Comment { comment, subject }) => {
            let subject = if subject.is_empty() { "all nodes" } else { subject };
            let mut decided = Decided::new(state.set.clone(), Action::Down, subject, comment);
            decided.always = true;
            decided
        }
        Request::Expire => expired(state),
        Request::Promote { segment, why } => promoted(state, segment, why)?,
    };
    decided.remember.retain(|rejected| !state.rejected.contains(rejected));
    decided.forget.retain(|rejected| state.rejected.contains(rejected));
    // What they say is so from now on was so before.
    if decided.changes_nothing(state) && matches!(decided.action, Action::Approve | Action::Reject | Action::Allow) {
        decided.notes.insert(0, NOTHING_DIFFERENT.to_owned());
    }
    Ok(decided)
}

/// How the segment of a workload stands, for the hint what to do next.
fn hint(state: &State, set: &PolicySet, workload: &Workload) -> Option<String> {
    let scene = Scene { set, ..state.scene() };
    let (name, mode) = match scene.segment(workload) {
        Some(segment) => (segment.name.clone(), segment.mode),
        None if !workload.namespace().is_empty() => (workload.namespace().to_owned(), Mode::Learn),
        None => return Some(format!("{workload} is in no segment, so nothing is denied: `bulkhead segment add {workload}`.")),
    };
    match mode {
        Mode::Learn => Some(format!("Segment {name} is in Learn, nothing is denied: `bulkhead mode {name} audit` logs what would be.")),
        Mode::Audit => Some(format!("Segment {name} is in Audit, nothing is denied: `bulkhead audit` shows what would be.")),
        Mode::Enforce => None,
    }
}

/// Edges of the workload that one side allows so far, but for those whose other side is decided next.
fn halves(set: &PolicySet, workload: &Workload, later: &[Workload], now: Timestamp) -> Vec<String> {
    let halves = check::half_approved(&set.policies, now);
    let its = halves.iter().filter(|half| half.from == *workload || half.to == *workload);
    its.filter(|half| !later.contains(&half.from) && !later.contains(&half.to)).map(ToString::to_string).collect()
}

fn reviewed(state: &State, request: &Review) -> Result<Decided, HubError> {
    let Review { workload, digest, rules, accept, comment, approve, later } = request;
    let suggestion = state.suggestion(workload)?;
    // People name a digest by its beginning, as they do with commits.
    if digest.len() < 8 || !digest.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(HubError::invalid(format_args!("\"{digest}\" is not a digest"), "Name at least its first 8 characters (0-9, a-f)."));
    }
    let digest = if suggestion.digest.starts_with(&digest.to_ascii_lowercase()) { suggestion.digest.clone() } else { digest.clone() };
    let choice = if rules.is_empty() { Choice::Whole } else { Choice::Rules(rules.iter().cloned().collect()) };
    let reading = Reading { digest: digest.clone(), choice, accept: accept.iter().cloned().collect() };
    let (reviewed, action) = if *approve {
        (review::approve(&state.set, &suggestion, &reading)?, Action::Approve)
    } else {
        (review::reject(&state.set, &suggestion, &reading)?, Action::Reject)
    };
    let mut decided = Decided::reviewed(reviewed, action, workload, comment);
    decided.digest = Some(digest);
    if *approve {
        let policy = decided.set.policies.get(workload);
        let (ingress, egress) = policy.map_or((0, 0), |policy| (policy.ingress.len(), policy.egress.len()));
        decided.notes.insert(0, format!("{workload}: {ingress} ingress and {egress} egress rules in force."));
        let halves = halves(&decided.set, workload, later, state.now);
        if !halves.is_empty() {
            decided.notes.push("Approved on one side only; under Enforce they pass when both ends allow them:".to_owned());
            decided.notes.extend(halves.into_iter().map(|half| format!("  {half}")));
        }
        if later.is_empty() {
            decided.notes.extend(hint(state, &decided.set, workload));
        }
    } else {
        let n = decided.rules.len();
        let plural = if n == 1 { "rule" } else { "rules" };
        decided.notes.insert(0, format!("{workload}: {n} {plural} rejected; they don't come back by themselves."));
    }
    Ok(decided)
}

fn allowed(state: &State, request: &Allow) -> Result<Decided, HubError> {
    let Allow { from, to, ports, seconds, comment } = request;
    let until = match seconds {
        None => None,
        Some(seconds) => {
            let span = i64::try_from(*seconds).map(SignedDuration::from_secs);
            let until = span.ok().and_then(|span| state.now.checked_add(span).ok());
            // To the second: the moment is shown to people and compared by them.
            let until = until.and_then(|until| Timestamp::from_second(until.as_second()).ok());
            Some(until.ok_or_else(|| HubError::invalid("this time span ends after the calendar", ""))?)
        }
    };
    for peer in [from, to] {
        if let Peer::Workload(workload) = peer {
            state.must_know(workload)?;
        }
    }
    let edge = Edge { from: from.clone(), to: to.clone(), ports: *ports, until };
    let reviewed = review::allow(&state.set, &edge, &state.known(), state.now)?;
    let decided = Decided::reviewed(reviewed, Action::Allow, format_args!("{from} -> {to} {ports}"), comment);
    Ok(match until {
        Some(until) => decided.note(format!("{from} may reach {to} on {ports} until {until}.")),
        None => decided.note(format!("{from} may reach {to} on {ports}.")),
    })
}

fn edited(state: &State, workload: &Workload, request: &Edit) -> Result<Decided, HubError> {
    let policy = documents::read_policy(workload, &request.document)?;
    let revision = state.revisions.get(workload).map_or(0, |(revision, _)| *revision);
    if revision != request.revision {
        let what = format!("the policy of {workload} changed meanwhile: revision {} was edited, {revision} is there now", request.revision);
        return Err(HubError::refused(what, format!("`bulkhead edit {workload}` starts from it.")));
    }
    state.must_know(workload)?;
    let mut decided = Decided::reviewed(review::edit(&state.set, policy, &state.known())?, Action::Edit, workload, &request.comment);
    decided.notes.splice(..0, told(&documents::changes(&state.set, &decided.set)));
    decided.notes.extend(hint(state, &decided.set, workload));
    Ok(decided)
}

fn reverted(state: &State, request: &Revert, history: &History) -> Result<Decided, HubError> {
    let Revert { workload, to, comment, confirm: _ } = request;
    let revisions = &history.revisions;
    let Some(current) = revisions.last() else {
        state.must_know(workload)?;
        return Err(HubError::not_found(format_args!("{workload} never had a policy"), "There is nothing to go back to."));
    };
    let wanted = to.unwrap_or_else(|| current.revision.saturating_sub(1));
    let earlier: Option<&WorkloadPolicy> = match revisions.iter().find(|revision| revision.revision == wanted) {
        Some(revision) => revision.policy.as_ref(),
        // Before the first there was none.
        None if wanted == 0 => None,
        None => {
            let what = format!("the policy of {workload} has no revision {wanted}");
            return Err(HubError::not_found(what, format!("It has 1 to {}; 0 is the time before it had one.", current.revision)));
        }
    };
    if earlier.is_none() && !state.networks.contains_key(workload) && state.set.segments.values().any(|s| s.mode == Mode::Enforce) {
        // Whether somebody of that name runs must not be judged by a list that is still to come.
        state.must_see_nodes()?;
    }
    let reviewed = review::revert(&state.set, workload, earlier, &state.networks, state.now)?;
    let note = match earlier {
        Some(_) => format!("{workload}: revision {wanted} is in force again."),
        None if state.scene().segment(workload).is_some_and(|segment| segment.mode == Mode::Enforce) => {
            format!("{workload} has no policy any more: should one of that name come, all of its traffic is denied.")
        }
        None => format!("{workload} has no policy any more."),
    };
    let mut decided = Decided::reviewed(reviewed, Action::Revert, format_args!("{workload} to revision {wanted}"), comment);
    decided.notes.splice(..0, told(&documents::changes(&state.set, &decided.set)));
    Ok(if decided.set == state.set { decided } else { decided.note(note) })
}

fn quarantined(state: &State, request: &OfWorkload) -> Result<Decided, HubError> {
    let OfWorkload { workload, comment } = request;
    state.must_know(workload)?;
    let mut set = state.set.clone();
    if set.quarantines.contains_key(workload) {
        return Ok(Decided::new(set, Action::Quarantine, workload, comment).note(format!("{workload} is in quarantine already.")));
    }
    set.quarantines.insert(workload.clone(), Quarantine { workload: workload.clone(), comment: comment.clone() });
    let decided = Decided::new(set, Action::Quarantine, workload, comment);
    let decided = decided.note(format!("{workload} is cut off, living connections too. Give it back: `bulkhead release {workload}`."));
    Ok(match state.networks.contains_key(workload) {
        true => decided,
        false => decided.note(format!("No node reports that {workload} runs now; it is cut off from its first packet when it comes.")),
    })
}

fn released(state: &State, request: &OfWorkload) -> Result<Decided, HubError> {
    let OfWorkload { workload, comment } = request;
    let mut set = state.set.clone();
    if set.quarantines.remove(workload).is_none() {
        return Err(HubError::not_found(format_args!("{workload} is not in quarantine"), "`bulkhead get quarantines` lists who is."));
    }
    Ok(Decided::new(set, Action::Release, workload, comment).note(format!("{workload} is back under its segment.")))
}

/// Documents before they are applied: the set they would make, if that enforces something; then it must be foreseen.
pub(crate) fn to_apply(state: &State, request: &Apply) -> Result<Option<PolicySet>, HubError> {
    let documents::Wanted::Set(set, _) = documents::read(state, &request.documents)? else { return Ok(None) };
    if !enforces(&state.set, &set) {
        return Ok(None);
    }
    if !to_be_enforced(&state.set, &set).is_empty() {
        state.must_see_nodes()?;
    }
    review::within_guardrails(&state.set, &set)?;
    refuse_unlearned(state, &set, &request.deny_unlearned)?;
    Ok(Some(set))
}

fn applied(state: &State, request: &Apply) -> Result<Decided, HubError> {
    let (set, about) = match documents::read(state, &request.documents)? {
        documents::Wanted::Set(set, about) => (set, about),
        documents::Wanted::Review(mut review) => {
            if review.comment.is_empty() {
                review.comment.clone_from(&request.comment);
            }
            return Ok(Decided { dry_run: request.dry_run, ..reviewed(state, &review)? });
        }
    };
    review::within_guardrails(&state.set, &set)?;
    let changes = documents::changes(&state.set, &set);
    let notes = refuse_unlearned(state, &set, &request.deny_unlearned)?;
    let mut decided = Decided::new(set, Action::Edit, about, &request.comment);
    decided.notes = told(&changes);
    decided.notes.extend(notes);
    decided.notes.extend(never_seen(state, &decided.set));
    decided.notes.extend(loosened(state, &decided.set));
    if decided.set.guardrails != state.set.guardrails {
        let breaches = guardrail::in_force(&decided.set, state.now);
        let older = breaches.into_iter().map(|breach| format!("In force from before, and stays so until somebody takes it out: {breach}."));
        decided.notes.extend(older);
    }
    decided.rules = changes;
    decided.dry_run = request.dry_run;
    if request.dry_run {
        decided.notes.push("Dry run: nothing was changed.".to_owned());
    }
    Ok(decided)
}

/// So many names are told one by one; beyond them it is a host that is set up before its workloads come.
const REMARKED: usize = 5;

/// Policies that a document brings for workloads of which nothing was ever seen: they may come, or be mistyped.
fn never_seen(state: &State, set: &PolicySet) -> Vec<String> {
    let seen = state.seen();
    let changed = set.policies.iter().filter(|(workload, policy)| state.set.policies.get(*workload) != Some(*policy));
    let unseen: Vec<&Workload> = changed.map(|(workload, _)| workload).filter(|workload| !seen.contains(workload)).collect();
    if unseen.len() > REMARKED {
        return vec![format!("{} of these policies wait for workloads that were never seen here: {}, ...", unseen.len(), unseen[0])];
    }
    let note = |workload: &Workload| {
        let alike = state.alike(workload);
        let meant = if alike.is_empty() { String::new() } else { format!(" Did you mean {}?", alike.join(" or ")) };
        format!(
            "no workload {workload} was ever seen here: its policy waits for one of that name, and `bulkhead revert {workload} --to 0` takes \
             it out.{meant}"
        )
    };
    unseen.into_iter().map(note).collect()
}

fn deleted(state: &State, request: &Delete) -> Result<Decided, HubError> {
    let Delete { guardrail, comment } = request;
    let mut set = state.set.clone();
    if set.guardrails.remove(guardrail).is_none() {
        return Err(HubError::not_found(format_args!("there is no guardrail \"{guardrail}\""), "`bulkhead get guardrails` lists them."));
    }
    let decided = Decided::new(set, Action::Delete, format_args!("guardrail {guardrail}"), comment);
    Ok(decided.note(format!("Guardrail {guardrail} is gone: what it forbade may be approved. It allows nothing by itself.")))
}

/// Rules whose time is over go out of what is in force. Whoever allowed them wrote the end down, so this needs no person; the
/// record says that it happened.
fn expired(state: &State) -> Decided {
    let mut set = state.set.clone();
    let mut gone = Vec::new();
    for policy in set.policies.values_mut() {
        for direction in [Direction::Ingress, Direction::Egress] {
            let workload = policy.workload.clone();
            policy.rules_mut(direction).retain(|rule| {
                let holds = rule.in_force(state.now);
                if !holds {
                    gone.push(format!("{workload} {direction} {rule}"));
                }
                holds
            });
        }
    }
    let mut decided = Decided::new(set, Action::Expire, "rules whose time is over", "");
    decided.rules = gone;
    decided
}

/// When the next rule runs out, if any.
pub(crate) fn next_expiry(set: &PolicySet) -> Option<Timestamp> {
    let rules = set.policies.values().flat_map(|policy| policy.ingress.iter().chain(&policy.egress));
    rules.filter_map(|rule| rule.until).min()
}
