//! The engine's API by hand, a request a connection: fifty clients of the engine at once would take the machine that is measured.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// An engine's socket.
#[derive(Clone, Debug)]
pub(crate) struct Api(PathBuf);

impl Api {
    pub(crate) fn at(socket: &Path) -> Self {
        Self(socket.to_owned())
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Result<(u16, String), String> {
        let told = |what: &str, e: std::io::Error| format!("{method} {path}: {what}: {e}");
        let mut stream = UnixStream::connect(&self.0).map_err(|e| told("connect", e))?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: engine\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).map_err(|e| told("write", e))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map_err(|e| told("read", e))?;
        let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(|| format!("{method} {path}: {answer:?}"))?;
        Ok((status, answer))
    }

    /// # Errors
    /// What the engine said, where it was not what was wanted.
    pub(crate) fn call(&self, method: &str, path: &str, body: &str) -> Result<Value, String> {
        let (status, answer) = self.ask(method, path, body)?;
        if status >= 400 {
            return Err(format!("{method} {path}: {status}: {}", answer.lines().last().unwrap_or_default()));
        }
        // Chunked or not, the object is what is between the first and the last brace.
        let text = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let object = text.find('{').zip(text.rfind('}')).and_then(|(from, to)| text.get(from..=to));
        Ok(object.and_then(|object| serde_json::from_str(object).ok()).unwrap_or(Value::Null))
    }

    /// A container that runs a script of busybox as the workload of this name, on one network, and connects from these ports. Its id.
    ///
    /// # Errors
    /// As [`Api::call`].
    pub(crate) fn create(&self, name: &str, workload: &str, on: (&str, &str), ports: (u16, u16), script: &str) -> Result<String, String> {
        let (network, image) = on;
        let body = serde_json::json!({
            "Image": image,
            "Cmd": ["sh", "-c", script],
            "Labels": { "bulkhead.dev/workload": workload },
            "HostConfig": {
                "NetworkMode": network,
                "Sysctls": { "net.ipv4.ip_local_port_range": format!("{} {}", ports.0, ports.1) },
            },
        });
        let made = self.call("POST", &format!("/containers/create?name={name}"), &body.to_string())?;
        made["Id"].as_str().map(str::to_owned).ok_or_else(|| format!("create {name}: {made}"))
    }

    /// # Errors
    /// As [`Api::call`].
    pub(crate) fn start(&self, name: &str) -> Result<(), String> {
        self.call("POST", &format!("/containers/{name}/start"), "").map(drop)
    }

    /// # Errors
    /// As [`Api::call`].
    pub(crate) fn restart(&self, name: &str) -> Result<(), String> {
        self.call("POST", &format!("/containers/{name}/restart?t=0"), "").map(drop)
    }

    /// Waits for its end; its exit code.
    ///
    /// # Errors
    /// As [`Api::call`].
    pub(crate) fn wait(&self, name: &str) -> Result<i64, String> {
        let ended = self.call("POST", &format!("/containers/{name}/wait"), "")?;
        ended["StatusCode"].as_i64().ok_or_else(|| format!("wait {name}: {ended}"))
    }

    /// # Errors
    /// As [`Api::call`].
    pub(crate) fn remove(&self, name: &str) -> Result<(), String> {
        self.call("DELETE", &format!("/containers/{name}?force=1"), "").map(drop)
    }
}
