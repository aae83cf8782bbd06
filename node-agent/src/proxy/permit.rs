//! What may be asked of the engine. Pure: a request's head in, the target to ask for out, written anew.

use hyper::header::{CONNECTION, CONTENT_LENGTH, EXPECT, HeaderMap, TRANSFER_ENCODING, UPGRADE};
use hyper::{Method, Uri};

/// Why a request goes no further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Reading is all there is.
    #[error("only GET passes, not {0}")]
    Method(String),
    /// An absolute or authority form, a scheme, a host.
    #[error("only a plain path may be asked for")]
    Form,
    /// A path that is not on the list, as it was written.
    #[error("{0} may not be asked for")]
    Path(String),
    /// A query that the path doesn't have, has twice, or that is not text as URLs write it.
    #[error("query \"{0}\" is not allowed here")]
    Query(String),
    /// A header that would change what the connection carries.
    #[error("header {0} is not allowed")]
    Header(&'static str),
    /// A request that brings something along.
    #[error("a request may have no body")]
    Body,
}

/// Longest path and longest value of a query. The longest we send is a list of ids: 64 of them at 68 bytes.
const LONGEST: usize = 16 * 1024;
/// Longest name or id of a container or network; the engine's own ids have 64 digits.
const LONGEST_NAME: usize = 255;

/// Decides about a request by its head; gives back the path and query to ask the engine for.
///
/// # Errors
/// The first [`Refusal`] that is found.
pub fn permit(method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<String, Refusal> {
    if method != Method::GET {
        return Err(Refusal::Method(method.to_string()));
    }
    if uri.scheme().is_some() || uri.authority().is_some() {
        return Err(Refusal::Form);
    }
    for (name, text) in [(&UPGRADE, "Upgrade"), (&EXPECT, "Expect")] {
        if headers.contains_key(name) {
            return Err(Refusal::Header(text));
        }
    }
    let plain = |value: &hyper::header::HeaderValue| {
        value.to_str().is_ok_and(|value| value.eq_ignore_ascii_case("keep-alive") || value.eq_ignore_ascii_case("close"))
    };
    if !headers.get_all(CONNECTION).iter().all(plain) {
        return Err(Refusal::Header("Connection"));
    }
    if headers.contains_key(TRANSFER_ENCODING) || headers.get_all(CONTENT_LENGTH).iter().any(|length| length != "0") {
        return Err(Refusal::Body);
    }
    let path = uri.path();
    let keys = keys(path).ok_or_else(|| Refusal::Path(path.chars().take(200).collect()))?;
    match uri.query() {
        None => Ok(path.to_owned()),
        Some(query) => {
            check_query(query, keys)?;
            Ok(format!("{path}?{query}"))
        }
    }
}

/// The queries that a path may have; `None`: the path is not on the list.
fn keys(path: &str) -> Option<&'static [&'static str]> {
    // No percent sign, so nothing is hidden behind one; no empty or dotted segment, so nothing moves.
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'/' | b'_' | b'.' | b'-');
    if path.len() > LONGEST || !path.bytes().all(plain) {
        return None;
    }
    let mut segments: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
    if segments.first().is_some_and(|first| is_version(first)) {
        segments.remove(0);
    }
    match segments.as_slice() {
        ["_ping" | "version" | "info"] => Some(&[]),
        ["events"] => Some(&["since", "until", "filters"]),
        ["networks"] => Some(&["filters"]),
        ["networks", name] if is_name(name) => Some(&["verbose", "scope"]),
        ["containers", "json"] => Some(&["all", "limit", "size", "filters"]),
        ["containers", name, "json"] if is_name(name) => Some(&["size"]),
        _ => None,
    }
}

/// `v1.41`.
fn is_version(segment: &str) -> bool {
    let number = |text: &str| (1..=3).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    segment.strip_prefix('v').and_then(|rest| rest.split_once('.')).is_some_and(|(major, minor)| number(major) && number(minor))
}

/// A name or id as the engine allows it: [a-zA-Z0-9][a-zA-Z0-9_.-]*.
fn is_name(segment: &str) -> bool {
    segment.len() <= LONGEST_NAME && segment.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
}

fn check_query(query: &str, keys: &[&str]) -> Result<(), Refusal> {
    let mut seen = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let refused = || Refusal::Query(pair.chars().take(80).collect());
        let (key, value) = pair.split_once('=').ok_or_else(refused)?;
        // Asking for sizes makes the engine walk every container's files.
        let cheap = key != "size" || matches!(value, "false" | "0");
        if !keys.contains(&key) || seen.contains(&key) || !cheap || !is_query_text(value) {
            return Err(refused());
        }
        seen.push(key);
    }
    Ok(())
}

/// Unreserved characters and percent sequences (RFC 3986, 2.1 and 2.3), and what form encoding leaves as it is.
fn is_query_text(value: &str) -> bool {
    let mut rest = value.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = match (first, after) {
            (b'%', [high, low, after @ ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => after,
            (b, after) if b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~' | b'+' | b'*' | b':' | b',') => after,
            (_, _) => return false,
        };
    }
    value.len() <= LONGEST
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "1333ec63c5c18ae9ffaab1510b9567c3af012f56d01ff56c860e8fde7a287fed";

    fn asked(method: &str, target: &str, headers: &[(&'static str, &str)]) -> Result<String, Refusal> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, value.parse().unwrap());
        }
        let uri: Uri = target.parse().map_err(|_| Refusal::Form)?;
        permit(&method.parse().unwrap(), &uri, &map)
    }

    #[test]
    fn what_the_inventory_asks_for_passes_unchanged() {
        let filters = "filters=%7B%22type%22%3A%5B%22container%22%2C%22network%22%5D%7D";
        for target in [
            "/_ping".to_owned(),
            "/version".to_owned(),
            "/v1.41/info".to_owned(),
            format!("/v1.52/events?since=1795231897.000000001&{filters}"),
            "/v1.41/networks".to_owned(),
            format!("/v1.41/networks/{ID}"),
            "/networks/shop_default?verbose=false".to_owned(),
            format!("/v1.41/containers/json?all=true&size=false&{filters}"),
            format!("/v1.41/containers/{ID}/json"),
        ] {
            assert_eq!(asked("GET", &target, &[("host", "localhost"), ("content-length", "0")]), Ok(target.clone()), "{target}");
        }
    }

    #[test]
    fn every_other_method_is_refused() {
        for method in ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get", "BREW"] {
            assert_eq!(asked(method, "/version", &[]), Err(Refusal::Method(method.to_owned())));
        }
    }

    #[test]
    fn every_other_path_is_refused() {
        for path in [
            "/",
            "//version",
            "/version/",
            "/v1.41",
            "/v1.41/v1.41/version",
            "/v1/version",
            "/v1.4141/version",
            "/images/json",
            "/containers/create",
            "/containers/x/archive",
            "/containers/x/logs",
            "/containers/x/attach/ws",
            "/containers/x/top",
            "/containers/x/export",
            "/containers//json",
            "/containers/../json",
            "/containers/.hidden/json",
            "/containers/x/../../images/json",
            "/containers/x%2f..%2fy/json",
            "/containers/%78/json",
            "/networks/x/connect",
            "/networks/..",
            "/v1.41/../exec/x/json",
            "/exec/x/json",
            "/secrets",
            "/plugins",
            "/session",
            "/grpc",
            "/containers/json/",
            "/Version",
            "/version;x",
            "/containers/x/json%00",
        ] {
            assert_eq!(asked("GET", path, &[]), Err(Refusal::Path(path.to_owned())), "{path}");
        }
    }

    #[test]
    fn a_target_that_is_more_than_a_path_is_refused() {
        for target in ["http://engine/version", "https://x/containers/json", "engine:80", "*"] {
            assert!(asked("GET", target, &[]).is_err(), "{target}");
        }
    }

    #[test]
    fn queries_that_the_path_does_not_have_are_refused() {
        for query in [
            "/version?x=1",
            "/events?stream=1",
            "/containers/json?all=true&all=false",
            "/containers/json?size=true",
            "/containers/x/json?size=1",
            "/containers/json?all",
            "/containers/json?filters=%7",
            "/containers/json?filters=%zz",
            "/containers/json?filters={}",
            "/containers/json?a%6cl=1",
            "/networks/x?verbose=a=b",
            "/events?since=1#x?y=1",
        ] {
            let found = asked("GET", query, &[]);
            assert!(matches!(found, Err(Refusal::Query(_))) || query.contains('#'), "{query}: {found:?}");
        }
    }

    #[test]
    fn headers_that_change_the_connection_are_refused() {
        assert_eq!(asked("GET", "/version", &[("upgrade", "tcp")]), Err(Refusal::Header("Upgrade")));
        assert_eq!(asked("GET", "/version", &[("connection", "Upgrade")]), Err(Refusal::Header("Connection")));
        assert_eq!(
            asked("GET", "/version", &[("connection", "keep-alive"), ("connection", "upgrade")]),
            Err(Refusal::Header("Connection"))
        );
        assert_eq!(asked("GET", "/version", &[("expect", "100-continue")]), Err(Refusal::Header("Expect")));
        assert_eq!(asked("GET", "/version", &[("connection", "close")]), Ok("/version".to_owned()));
    }

    #[test]
    fn a_request_that_brings_a_body_is_refused() {
        assert_eq!(asked("GET", "/version", &[("content-length", "5")]), Err(Refusal::Body));
        assert_eq!(asked("GET", "/version", &[("content-length", "0"), ("content-length", "7")]), Err(Refusal::Body));
        assert_eq!(asked("GET", "/version", &[("transfer-encoding", "chunked")]), Err(Refusal::Body));
    }
}
