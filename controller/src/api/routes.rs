//! Paths and what answers them. Each is a look at the hub's state or one decision; nothing is decided here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Path, State};
use axum::http::{StatusCode, request::Parts};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use policy::review::{self, Foreseen};
use policy::{Mode, PolicySet, Scene, Workload};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Served;
use super::ask::{
    Allow, Apply, Comment, Delete, Edit, Export, GraphFilter, LARGEST_REQUEST, Members, OfWorkload, Question, Revert, Review, Switch,
};
use super::peer::{Asking, Gate, check};
use super::stream::flows;
use super::view::{Failure, FailureCode, Forecast, Outcome, VersionView};
use crate::hub::{HubError, Request, State as Known, Would, documents, explain, is_foretold, to_apply, to_be_enforced, to_enforce, view};

/// How long a decision waits for the nodes to have it in force. They do within some ten milliseconds; one that hangs keeps nobody waiting.
const IN_FORCE: Duration = Duration::from_secs(1);
/// How long a node may think about a preview.
const PREVIEW: Duration = Duration::from_secs(5);

/// A failure as an answer.
pub(super) struct Problem(pub(super) Failure);

impl From<HubError> for Problem {
    fn from(error: HubError) -> Self {
        Self(error.into())
    }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        Self(failure)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = match self.0.code {
            FailureCode::Invalid => StatusCode::BAD_REQUEST,
            FailureCode::Refused => StatusCode::CONFLICT,
            FailureCode::NotFound => StatusCode::NOT_FOUND,
            FailureCode::Forbidden => StatusCode::FORBIDDEN,
            FailureCode::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self.0)).into_response()
    }
}

fn invalid(what: String) -> Problem {
    Problem(Failure { error: what, code: FailureCode::Invalid, next: String::new() })
}

type Answer<T> = Result<Json<T>, Problem>;

/// A body in JSON whose refusal is one of our failures.
struct Body<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: axum::extract::Request, state: &S) -> Result<Self, Problem> {
        let body: Result<Json<T>, JsonRejection> = Json::from_request(request, state).await;
        body.map(|Json(value)| Self(value)).map_err(|e| invalid(e.body_text()))
    }
}

/// A query whose refusal is one of our failures.
pub(super) struct Query<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let query: Result<axum::extract::Query<T>, QueryRejection> = axum::extract::Query::from_request_parts(parts, state).await;
        query.map(|axum::extract::Query(value)| Self(value)).map_err(|e| invalid(e.body_text()))
    }
}

fn workload(text: &str) -> Result<Workload, Problem> {
    text.parse().map_err(|e: policy::workload::NotAWorkload| invalid(e.to_string()))
}

/// Looks at the state; suggestions are up to date.
async fn look<T: Send + 'static>(served: &Served, look: impl FnOnce(&Known) -> Result<T, HubError> + Send + 'static) -> Answer<T> {
    Ok(Json(served.hub.read_learned(look).await??))
}

pub(super) fn routes(served: Served, gate: Gate) -> Router {
    let v1 = Router::new()
        .route("/version", get(version))
        // Says nothing of suggestions, so it waits for none.
        .route("/status", get(|State(s): State<Served>| async move { Ok::<_, Problem>(Json(s.hub.read(view::status).await?)) }))
        .route("/graph", get(graph))
        .route("/flows", get(flows))
        .route("/audit", get(audit))
        .route("/explain", get(explained))
        .route("/suggestions", get(|State(s): State<Served>| async move { look(&s, |state| Ok(view::suggestions(state))).await }))
        .route("/suggestions/{*workload}", get(suggestion))
        .route("/diff/{*workload}", get(diff))
        .route("/policies", get(|State(s): State<Served>| async move { look(&s, view::policies).await }))
        .route("/policies/{*workload}", get(policy))
        .route("/segments", get(|State(s): State<Served>| async move { look(&s, |state| Ok(view::segments(state))).await }).post(members))
        .route("/workloads", get(|State(s): State<Served>| async move { look(&s, |state| Ok(view::workloads(state))).await }))
        .route("/workloads/{*workload}", get(one_workload))
        .route("/networks", get(|State(s): State<Served>| async move { look(&s, |state| Ok(view::networks(state))).await }))
        .route("/decisions", get(|State(s): State<Served>| async move { look(&s, |state| Ok(state.decisions.clone())).await }))
        .route("/quarantines", get(|State(s): State<Served>| async move { look(&s, |state| Ok(view::quarantines(state))).await }))
        .route("/guardrails", get(|State(s): State<Served>| async move { look(&s, |state| Ok(view::guardrails(state))).await }))
        .route("/objects", get(objects))
        .route("/export", get(export))
        .route("/reviews", post(|s, who, Body(b): Body<Review>| decide(s, who, Request::Review(b))))
        .route("/allow", post(|s, who, Body(b): Body<Allow>| decide(s, who, Request::Allow(b))))
        .route("/edit/{*workload}", get(to_edit).post(edit))
        .route("/revert", post(revert))
        .route("/mode", post(mode))
        .route("/quarantine", post(|s, who, Body(b): Body<OfWorkload>| decide(s, who, Request::Quarantine(b))))
        .route("/release", post(|s, who, Body(b): Body<OfWorkload>| decide(s, who, Request::Release(b))))
        .route("/apply", post(apply))
        .route("/delete", post(|s, who, Body(b): Body<Delete>| decide(s, who, Request::Delete(b))))
        .route("/adopt", post(adopt))
        .route("/down", post(|s, who, Body(b): Body<Comment>| decide(s, who, Request::Down(b))))
        .with_state(served);
    Router::new()
        .nest("/api/v1", v1)
        .fallback(unknown)
        .layer(DefaultBodyLimit::max(LARGEST_REQUEST))
        .layer(middleware::from_fn_with_state(gate, check))
}

async fn unknown(uri: axum::http::Uri) -> Problem {
    let next = "The command line and the controller may be of different versions: `bulkhead version` shows both.".to_owned();
    Problem(Failure { error: format!("the controller knows nothing at {}", uri.path()), code: FailureCode::NotFound, next })
}

async fn version(State(served): State<Served>) -> Answer<VersionView> {
    look(&served, |state| Ok(VersionView { version: env!("CARGO_PKG_VERSION").to_owned(), store: state.store.clone() })).await
}

async fn graph(State(served): State<Served>, Query(filter): Query<GraphFilter>) -> Answer<super::view::GraphView> {
    look(&served, move |state| view::graph(state, &filter)).await
}

async fn audit(State(served): State<Served>, Query(filter): Query<GraphFilter>) -> Answer<Vec<super::view::AuditLine>> {
    look(&served, move |state| view::audit(state, &filter)).await
}

async fn explained(State(served): State<Served>, Query(question): Query<Question>) -> Answer<super::view::Explanation> {
    look(&served, move |state| explain::explain(state, &question)).await
}

async fn suggestion(State(served): State<Served>, Path(name): Path<String>) -> Answer<policy::suggestion::Suggestion> {
    let workload = workload(&name)?;
    Ok(Json(served.hub.suggestion(workload).await?))
}

async fn diff(State(served): State<Served>, Path(name): Path<String>) -> Answer<policy::diff::SuggestionDiff> {
    let workload = workload(&name)?;
    look(&served, move |state| view::diff(state, &workload)).await
}

async fn policy(State(served): State<Served>, Path(name): Path<String>) -> Answer<super::view::PolicyView> {
    let workload = workload(&name)?;
    look(&served, move |state| view::policy(state, &workload)).await
}

async fn one_workload(State(served): State<Served>, Path(name): Path<String>) -> Answer<super::view::WorkloadView> {
    let workload = workload(&name)?;
    look(&served, move |state| view::workload(state, &workload)).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Objects {
    kind: String,
    #[serde(default)]
    names: String,
    #[serde(default)]
    json: bool,
}

async fn objects(State(served): State<Served>, Query(Objects { kind, names, json }): Query<Objects>) -> Answer<String> {
    let names: Vec<String> = names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
    look(&served, move |state| documents::of_kind(state, &kind, &names, json)).await
}

async fn export(State(served): State<Served>, Query(wanted): Query<Export>) -> Answer<Vec<super::view::Document>> {
    look(&served, move |state| documents::export(state, &wanted)).await
}

async fn decide(State(served): State<Served>, Asking(who): Asking, request: Request) -> Answer<Outcome> {
    // Whoever decides on the next one in a moment waits then.
    let more = matches!(&request, Request::Review(review) if !review.later.is_empty());
    let mut outcome = served.hub.decide(request, who).await?;
    if outcome.recorded.is_some() && !more {
        outcome.nodes = served.hub.in_force(outcome.generation, IN_FORCE).await?;
    }
    Ok(Json(outcome))
}

async fn members(served: State<Served>, who: Asking, Body(body): Body<Members>) -> Answer<Outcome> {
    let confirm = body.confirm;
    change(served, who, Request::Members(body), confirm).await
}

async fn to_edit(State(served): State<Served>, Path(name): Path<String>) -> Answer<Edit> {
    let workload = workload(&name)?;
    look(&served, move |state| {
        let (document, revision) = documents::to_edit(state, &workload)?;
        Ok(Edit { document, revision, comment: String::new(), confirm: None })
    })
    .await
}

async fn edit(served: State<Served>, who: Asking, Path(name): Path<String>, Body(body): Body<Edit>) -> Answer<Outcome> {
    let confirm = body.confirm;
    change(served, who, Request::Edit(workload(&name)?, body), confirm).await
}

async fn revert(served: State<Served>, who: Asking, Body(body): Body<Revert>) -> Answer<Outcome> {
    let confirm = body.confirm;
    change(served, who, Request::Revert(body), confirm).await
}

/// A change of a policy that leaves something in Enforce is answered with what is different and its forecast, unless one is confirmed.
async fn change(served: State<Served>, who: Asking, request: Request, confirm: Option<u64>) -> Answer<Outcome> {
    if confirm.is_some() {
        return decide(served, who, request).await;
    }
    let Would { set, changes, generation } = served.hub.would(request.clone()).await?;
    let asked = request.clone();
    let forecast = forecast(&served, move |state| match state.generation == generation {
        true => Ok(is_foretold(state, &asked, &set).then_some(set)),
        false => Err(HubError::refused("what is in force has changed meanwhile: nothing was changed", "Try again.")),
    });
    let Some(forecast) = forecast.await? else { return decide(served, who, request).await };
    Ok(Json(Outcome { generation, notes: changes, forecast: Some(forecast), ..Outcome::default() }))
}

/// Only root moves nodes from one store to another.
async fn adopt(served: State<Served>, who: Asking, Body(body): Body<Comment>) -> Answer<Outcome> {
    if who.0.uid != 0 {
        let next = "Use sudo.".to_owned();
        return Err(Problem(Failure {
            error: "only root may adopt nodes of another store".to_owned(),
            code: FailureCode::Forbidden,
            next,
        }));
    }
    decide(served, who, Request::Adopt(body)).await
}

/// A switch to Enforce without a confirmation is answered with its forecast.
async fn mode(served: State<Served>, who: Asking, Body(switch): Body<Switch>) -> Answer<Outcome> {
    if switch.mode != Mode::Enforce || switch.confirm.is_some() {
        return decide(served, who, Request::Switch(switch)).await;
    }
    let forecast = forecast(&served, move |state| {
        if state.set.segments.get(&switch.segment).is_some_and(|segment| segment.mode == Mode::Enforce) {
            return Ok(None);
        }
        to_enforce(state, &switch).map(Some)
    })
    .await?;
    let generation = forecast.as_ref().map_or(0, |forecast| forecast.generation);
    let notes = if forecast.is_none() { vec!["It is in Enforce already.".to_owned()] } else { Vec::new() };
    Ok(Json(Outcome { generation, notes, forecast, ..Outcome::default() }))
}

/// Documents that leave something in Enforce are answered with their forecast, unless one is confirmed.
async fn apply(served: State<Served>, who: Asking, Body(request): Body<Apply>) -> Answer<Outcome> {
    if request.confirm.is_some() {
        return decide(served, who, Request::Apply(request)).await;
    }
    let asked = request.clone();
    let forecast = forecast(&served, move |state| to_apply(state, &asked)).await?;
    let Some(forecast) = forecast else { return decide(served, who, Request::Apply(request)).await };
    // Dry, it only tells: what is different, then what that would cut.
    let Json(told) = decide(served, who, Request::Apply(Apply { dry_run: true, ..request })).await?;
    Ok(Json(Outcome { generation: forecast.generation, forecast: Some(forecast), ..told }))
}

/// What a set that is not in force would cut: of the graph, and of the connections that live on the nodes. `None`: there is
/// nothing to foresee.
async fn forecast(
    served: &Served,
    wanted: impl FnOnce(&Known) -> Result<Option<PolicySet>, HubError> + Send + 'static,
) -> Result<Option<Forecast>, Problem> {
    let prepared = served.hub.read_learned(move |state| {
        let Some(set) = wanted(state)? else { return Ok(None) };
        let foreseen = review::foresee_change(&state.set, &set, &state.graph, &state.networks, state.now);
        let switched = to_be_enforced(&state.set, &set);
        let after = Scene { set: &set, networks: &state.networks, now: state.now };
        let comes = |workload: &Workload| after.segment(workload).is_some_and(|segment| switched.contains(&segment.name));
        let unlisted = state.unlisted().into_iter().filter(|(workload, _)| comes(workload)).collect();
        let forecast = Forecast { generation: state.generation, switched, unlisted, ..Forecast::default() };
        Ok::<_, HubError>(Some((foreseen, state.plan_of(set, state.generation + 1), forecast)))
    });
    let Some((foreseen, plan, mut forecast)) = prepared.await?? else { return Ok(None) };
    let answers = served.hub.preview(Arc::new(plan)).await?;
    let deadline = tokio::time::Instant::now() + PREVIEW;
    let mut ended = BTreeMap::new();
    for (node, answer) in answers {
        match tokio::time::timeout_at(deadline, answer).await {
            Ok(Ok(Ok(preview))) => {
                forecast.unlearned.extend(preview.unlearned);
                ended.insert(node, preview.ended);
            }
            Ok(Ok(Err(why))) => drop(forecast.silent.insert(node, why)),
            Ok(Err(_)) => drop(forecast.silent.insert(node, "its session ended".to_owned())),
            Err(_) => drop(forecast.silent.insert(node, format!("no answer within {} s", PREVIEW.as_secs()))),
        }
    }
    forecast.ended = ended;
    let Foreseen { ref no_evidence, ref unlearned, .. } = foreseen;
    forecast.no_evidence = no_evidence.iter().cloned().collect();
    forecast.unlearned.extend(unlearned.iter().cloned());
    forecast.denied = view::foreseen_edges(foreseen);
    Ok(Some(forecast))
}
