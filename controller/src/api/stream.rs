//! Flows as JSON lines: those that are kept, then (if asked) those that come.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures::stream::{self, StreamExt};
use tokio::sync::broadcast::error::RecvError;

use super::Served;
use super::ask::FlowFilter;
use super::routes::{Problem, Query};
use super::view::FlowLine;
use crate::hub::view;

/// JSON lines (jsonlines.org).
const JSON_LINES: &str = "application/jsonl";

fn line(line: &FlowLine) -> Result<Bytes, Infallible> {
    // A flow is words and numbers: it is always JSON. If it were not, a blank line says less and breaks nothing.
    let mut text = serde_json::to_vec(line).unwrap_or_default();
    text.push(b'\n');
    Ok(Bytes::from(text))
}

pub(super) async fn flows(State(served): State<Served>, Query(filter): Query<FlowFilter>) -> Result<Response, Problem> {
    // Subscribed before the kept ones are read, so that none falls between; by their numbers what both have is told once.
    let live = served.hub.follow();
    let wanted = filter.clone();
    let (kept, told) = served.hub.read(move |state| view::flows(state, &wanted)).await??;
    let old = stream::iter(kept.into_iter().map(|view| line(&FlowLine::Flow(Box::new(view)))));
    let body = if filter.follow {
        let stop = served.stop.clone();
        let new = stream::unfold((live, stop, filter), move |(mut live, mut stop, filter)| async move {
            loop {
                let next = tokio::select! {
                    next = live.recv() => next,
                    _ = stop.wait_for(|stop| *stop) => return None,
                };
                let text = match next {
                    Ok(kept) if kept.number <= told || !view::flow_fits(&filter, &kept.view) => continue,
                    Ok(kept) => line(&FlowLine::Flow(Box::new(kept.view.clone()))),
                    Err(RecvError::Lagged(lost)) => line(&FlowLine::Lost { lost }),
                    Err(RecvError::Closed) => return None,
                };
                return Some((text, (live, stop, filter)));
            }
        });
        Body::from_stream(old.chain(new))
    } else {
        Body::from_stream(old)
    };
    Ok(([(CONTENT_TYPE, JSON_LINES)], body).into_response())
}
