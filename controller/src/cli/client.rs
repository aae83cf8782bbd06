//! Speaks to the controller over its Unix socket. One connection a question.

use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use super::{Failed, exit};
use crate::api::ask::LARGEST_REQUEST;
use crate::api::view::Failure;

/// Header in which the command line passes SUDO_USER on. The controller notes it as a claim.
pub const CLAIM: &str = "x-bulkhead-claims";

/// A client of the API.
pub struct Client {
    socket: PathBuf,
    runtime: Runtime,
}

/// Text that may stand in a path: everything else is percent-encoded (RFC 3986, 2.1). `/` stays, workloads have one.
pub(super) fn path(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

impl Client {
    /// A client of the socket; connects with each question.
    ///
    /// # Errors
    /// Without threads or timers in this process.
    pub fn new(socket: PathBuf) -> Result<Self, Failed> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Failed::new(exit::FAILED, format!("cannot start: {e}"), ""))?;
        Ok(Self { socket, runtime })
    }

    /// Where it connects.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    async fn send(&self, method: Method, uri: &str, body: Option<Vec<u8>>) -> Result<Response<Incoming>, Failed> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| self.unreachable(&e))?;
        let broken =
            |e: hyper::Error| Failed::new(exit::UNREACHABLE, format!("the controller ended the conversation: {e}"), "Its log tells why.");
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(uri).header("host", "bulkhead");
        if let Some(user) = std::env::var("SUDO_USER").ok().filter(|user| !user.is_empty() && user.bytes().all(|b| b.is_ascii_graphic())) {
            request = request.header(CLAIM, user);
        }
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let request = request
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|e| Failed::new(exit::FAILED, format!("cannot ask for {uri}: {e}"), ""))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = response.into_body().collect().await.map_err(broken)?.to_bytes();
        match serde_json::from_slice::<Failure>(&body) {
            Ok(failure) => Err(failure.into()),
            Err(_) => Err(Failed::new(
                exit::FAILED,
                format!("the controller answered {status}: {}", String::from_utf8_lossy(&body)),
                "Is it of another version? `bulkhead version` shows both.",
            )),
        }
    }

    fn unreachable(&self, error: &std::io::Error) -> Failed {
        let socket = self.socket.display();
        match error.kind() {
            std::io::ErrorKind::PermissionDenied => Failed::new(
                exit::FAILED,
                format!("no permission to speak to the controller at {socket}"),
                "Use sudo, or become a member of the group bulkhead (and log in again).",
            ),
            _ => Failed::new(
                exit::UNREACHABLE,
                format!("cannot reach the controller at {socket}: {error}"),
                "Is it running? `sudo bulkhead up` starts it; --run-dir or BULKHEAD_RUN_DIR names another place.",
            ),
        }
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, uri: &str, body: Option<Vec<u8>>) -> Result<T, Failed> {
        let response = self.send(method, uri, body).await?;
        let body = response
            .into_body()
            .collect()
            .await
            .map_err(|e| Failed::new(exit::UNREACHABLE, format!("the answer broke off: {e}"), ""))?
            .to_bytes();
        serde_json::from_slice(&body).map_err(|e| {
            Failed::new(
                exit::FAILED,
                format!("cannot read the controller's answer: {e}"),
                "Is it of another version? `bulkhead version` shows both.",
            )
        })
    }

    /// Asks and reads.
    pub(super) fn get<T: DeserializeOwned>(&self, uri: &str) -> Result<T, Failed> {
        self.runtime.block_on(self.ask(Method::GET, uri, None))
    }

    /// Asks with a query made of the fields of a value.
    pub(super) fn query<T: DeserializeOwned>(&self, uri: &str, query: &impl Serialize) -> Result<T, Failed> {
        self.get(&with_query(uri, query)?)
    }

    /// Sends a request and reads what became of it.
    pub(super) fn post<T: DeserializeOwned>(&self, uri: &str, body: &impl Serialize) -> Result<T, Failed> {
        let body = serde_json::to_vec(body).map_err(|e| Failed::new(exit::FAILED, format!("cannot write the request: {e}"), ""))?;
        if body.len() > LARGEST_REQUEST {
            let what = format!("that is {} MB, and the controller takes {} MB at once", body.len() >> 20, LARGEST_REQUEST >> 20);
            return Err(Failed::new(exit::USAGE, what, "Apply it in parts: each document changes what it names and nothing else."));
        }
        self.runtime.block_on(self.ask(Method::POST, uri, Some(body)))
    }

    /// Reads an answer of JSON lines as it comes, until it ends or `each` fails.
    pub(super) fn lines<T: DeserializeOwned>(
        &self,
        uri: &str,
        query: &impl Serialize,
        mut each: impl FnMut(T) -> Result<(), Failed>,
    ) -> Result<(), Failed> {
        let uri = with_query(uri, query)?;
        self.runtime.block_on(async {
            let mut body = self.send(Method::GET, &uri, None).await?.into_body();
            let mut rest: Vec<u8> = Vec::new();
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|e| Failed::new(exit::UNREACHABLE, format!("the controller went away: {e}"), ""))?;
                let Ok(data) = frame.into_data() else { continue };
                rest.extend_from_slice(&data);
                let Some(end) = rest.iter().rposition(|&byte| byte == b'\n') else { continue };
                let tail = rest.split_off(end + 1);
                for line in rest.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
                    let value = serde_json::from_slice(line)
                        .map_err(|e| Failed::new(exit::FAILED, format!("cannot read the controller's answer: {e}"), ""))?;
                    each(value)?;
                }
                rest = tail;
            }
            Ok(())
        })
    }
}

/// The fields of a flat value as a query; what is not set is left out.
fn with_query(uri: &str, query: &impl Serialize) -> Result<String, Failed> {
    let value = serde_json::to_value(query).map_err(|e| Failed::new(exit::FAILED, format!("cannot write the request: {e}"), ""))?;
    let mut uri = uri.to_owned();
    let mut mark = '?';
    for (name, value) in value.as_object().into_iter().flatten() {
        let text = match value {
            serde_json::Value::Null => continue,
            serde_json::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        uri.push(mark);
        uri.push_str(&format!("{name}={}", path(&text)));
        mark = '&';
    }
    Ok(uri)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_cannot_leave_its_place_in_the_path() {
        assert_eq!(path("shop/db"), "shop/db");
        assert_eq!(path("a b?c#d%e\r\n"), "a%20b%3Fc%23d%25e%0D%0A");
    }

    #[test]
    fn what_is_not_set_is_not_asked() {
        let filter = crate::api::ask::FlowFilter { port: Some(53), from: Some("outside:192.0.2.1".into()), ..Default::default() };
        assert_eq!(with_query("/x", &filter).unwrap(), "/x?follow=false&from=outside%3A192.0.2.1&port=53");
    }
}
