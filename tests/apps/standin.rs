//! A stand-in for the services of sample stacks: it makes the same calls, on the same ports, with payload both ways, and is
//! one small program instead of five images from a registry. Standard library only, so that it needs nothing but libc.
//!
//! It stops where the application's meaning starts: votes are counted in memory and lost with the container.
//!
//! Called by the last part of its own name or by its first word: `standin redis`, or a link named `redis`.

use std::collections::{BTreeMap, VecDeque};
use std::env;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// A healthy neighbour answers in milliseconds; a dropped SYN is repeated after one second.
const PATIENCE: Duration = Duration::from_secs(3);

const USAGE: &str = "standin queue|db [PORT]
       standin vote QUEUE [PORT]        a web page that puts votes on the queue
       standin result DB [PORT]         a web page that shows the counts, and looks every second
       standin worker QUEUE DB [URL]    from the queue to the database, after asking the URL, if one is given
       standin service PORT [HOST:PORT]...   a web page that asks each of these twice a second
       standin get URL                  the answer of a web page
       standin post URL BODY
       standin dial HOST:PORT           open, refused, silent or unreachable
       standin scan HOST FIRST LAST     dials every port and hangs up
       standin say udp HOST:PORT TEXT   one datagram, no answer wanted
       standin listen PORT              echoes on TCP and UDP
       standin hold HOST:PORT SECONDS   one connection that says something every 200 ms";

fn main() -> ExitCode {
    let mut words: Vec<String> = env::args().collect();
    let called = words.remove(0).rsplit('/').next().unwrap_or_default().to_owned();
    if called != "standin" {
        words.insert(0, called);
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("standin {}: {e}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> io::Result<()> {
    match words {
        ["queue"] => queue(6379),
        ["queue", at] => queue(port(at)?),
        ["db"] => database(5432),
        ["db", at] => database(port(at)?),
        ["vote", queue] => vote(queue, 80),
        ["vote", queue, at] => vote(queue, port(at)?),
        ["result", db] => result(db, 80),
        ["result", db, at] => result(db, port(at)?),
        ["worker", queue, db] => worker(queue, db, None),
        ["worker", queue, db, url] => worker(queue, db, Some(url)),
        ["service", at, calls @ ..] => service(port(at)?, calls),
        // Health checks of Compose files give curl flags and headers, which change nothing here.
        ["get" | "curl", .., url] => http("GET", url, "").map(|body| print!("{body}")),
        ["post", url, body] => http("POST", url, body).map(|body| print!("{body}")),
        ["dial", to] => dial(to),
        ["scan", host, first, last] => scan(host, port(first)?, port(last)?),
        ["say", "udp", to, text] => say(to, text),
        ["listen", at] => listen(port(at)?),
        ["hold", to, seconds] => hold(to, seconds.parse().map_err(io::Error::other)?),
        ["ask", to, line] => connect(to).and_then(|mut s| ask(&mut s, line)).map(|answer| println!("{answer}")),
        _ => Err(io::Error::new(ErrorKind::InvalidInput, format!("not understood\nusage: {USAGE}"))),
    }
}

fn port(text: &str) -> io::Result<u16> {
    text.parse().map_err(|_| io::Error::new(ErrorKind::InvalidInput, format!("{text} is not a port")))
}

/// Accepts for ever, each connection on a thread of its own.
fn serve(port: u16, conversation: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static) -> io::Result<()> {
    let conversation = Arc::new(conversation);
    // Both families by one socket; where IPv6 is switched off, IPv4 alone.
    let listener = TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))?;
    for stream in listener.incoming().flatten() {
        let conversation = Arc::clone(&conversation);
        thread::spawn(move || conversation(stream));
    }
    Ok(())
}

/// Answers line by line.
fn serve_lines(port: u16, answer: impl Fn(&str) -> String + Send + Sync + 'static) -> io::Result<()> {
    serve(port, move |stream| {
        let mut writer = stream.try_clone()?;
        for line in BufReader::new(stream).lines() {
            writer.write_all(format!("{}\n", answer(line?.trim())).as_bytes())?;
        }
        Ok(())
    })
}

/// `PUSH x`, `POP`, `PING`, a line each.
fn queue(port: u16) -> io::Result<()> {
    let waiting: Mutex<VecDeque<String>> = Mutex::default();
    serve_lines(port, move |line| {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        match line.split_once(' ') {
            Some(("PUSH", what)) => {
                waiting.push_back(what.to_owned());
                waiting.len().to_string()
            }
            None if line == "POP" => waiting.pop_front().unwrap_or_else(|| "(nil)".to_owned()),
            None if line == "PING" => "PONG".to_owned(),
            Some(_) | None => "ERR".to_owned(),
        }
    })
}

/// `INSERT x`, `COUNT`, `PING`, a line each.
fn database(port: u16) -> io::Result<()> {
    let counts: Mutex<BTreeMap<String, u64>> = Mutex::default();
    serve_lines(port, move |line| {
        let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
        match line.split_once(' ') {
            Some(("INSERT", what)) => {
                *counts.entry(what.to_owned()).or_default() += 1;
                "OK".to_owned()
            }
            None if line == "COUNT" => counts.iter().map(|(what, n)| format!("{what}={n}")).collect::<Vec<_>>().join(" "),
            None if line == "PING" => "PONG".to_owned(),
            Some(_) | None => "ERR".to_owned(),
        }
    })
}

fn connect(to: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, format!("{to}: no address"));
    for address in to.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// One line there, one line back.
fn ask(stream: &mut TcpStream, line: &str) -> io::Result<String> {
    stream.write_all(format!("{line}\n").as_bytes())?;
    let mut answer = String::new();
    let mut byte = [0];
    loop {
        match stream.read(&mut byte)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            _ if byte[0] == b'\n' => return Ok(answer),
            _ => answer.push(char::from(byte[0])),
        }
    }
}

/// A connection that is kept, as real clients of queues and databases do, and made again when it broke.
struct Kept {
    to: String,
    stream: Option<TcpStream>,
}

impl Kept {
    fn new(to: &str, default_port: u16) -> Self {
        let to = if to.contains(':') { to.to_owned() } else { format!("{to}:{default_port}") };
        Self { to, stream: None }
    }

    fn ask(&mut self, line: &str) -> io::Result<String> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => connect(&self.to)?,
        };
        let answer = ask(&mut stream, line)?;
        self.stream = Some(stream);
        Ok(answer)
    }
}

/// Answers web requests: the method, the body, and what to say (`Err`: 502).
fn serve_http(port: u16, page: impl Fn(&str, &str) -> io::Result<String> + Send + Sync + 'static) -> io::Result<()> {
    serve(port, move |stream| {
        let mut writer = stream.try_clone()?;
        let mut reader = BufReader::new(stream);
        let mut first = String::new();
        reader.read_line(&mut first)?;
        let mut length = 0;
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = header.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse::<usize>().unwrap_or(0).min(65_536);
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let method = first.split(' ').next().unwrap_or_default();
        let (status, text) = match page(method, &String::from_utf8_lossy(&body)) {
            Ok(text) => ("200 OK", text),
            Err(e) => ("502 Bad Gateway", format!("{e}\n")),
        };
        let length = text.len();
        writer.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}").as_bytes())
    })
}

fn vote(queue: &str, port: u16) -> io::Result<()> {
    let queue = Mutex::new(Kept::new(queue, 6379));
    serve_http(port, move |method, body| match method {
        "POST" => {
            let depth = queue.lock().unwrap_or_else(PoisonError::into_inner).ask(&format!("PUSH {}", body.trim()))?;
            Ok(format!("voted {}, {depth} waiting\n", body.trim()))
        }
        _ => Ok("vote: cats or dogs?\n".to_owned()),
    })
}

fn result(db: &str, port: u16) -> io::Result<()> {
    let counts = Arc::new(Mutex::new(String::new()));
    let (seen, mut db) = (Arc::clone(&counts), Kept::new(db, 5432));
    thread::spawn(move || {
        loop {
            match db.ask("COUNT") {
                Ok(text) => *seen.lock().unwrap_or_else(PoisonError::into_inner) = text,
                Err(e) => eprintln!("result: {}: {e}", db.to),
            }
            thread::sleep(Duration::from_secs(1));
        }
    });
    serve_http(port, move |_, _| Ok(format!("result: {}\n", counts.lock().unwrap_or_else(PoisonError::into_inner))))
}

fn worker(queue: &str, db: &str, url: Option<&str>) -> io::Result<()> {
    let (mut queue, mut db) = (Kept::new(queue, 6379), Kept::new(db, 5432));
    loop {
        match queue.ask("POP") {
            Ok(none) if none == "(nil)" => {
                // The real worker keeps its database connection alive while there is nothing to do.
                if let Err(e) = db.ask("PING") {
                    eprintln!("worker: {}: {e}", db.to);
                }
                thread::sleep(Duration::from_millis(200));
            }
            Ok(vote) => {
                if let Some(url) = url
                    && let Err(e) = http("GET", url, "")
                {
                    eprintln!("worker: {url}: {e}");
                }
                while let Err(e) = db.ask(&format!("INSERT {vote}")) {
                    eprintln!("worker: {}: {e}", db.to);
                    thread::sleep(Duration::from_millis(200));
                }
            }
            Err(e) => {
                eprintln!("worker: {}: {e}", queue.to);
                thread::sleep(Duration::from_millis(200));
            }
        }
    }
}

/// Answers requests, and asks its own servers twice a second.
fn service(port: u16, calls: &[&str]) -> io::Result<()> {
    for call in calls {
        let url = format!("http://{call}/");
        thread::spawn(move || {
            loop {
                if let Err(e) = http("GET", &url, "") {
                    eprintln!("service: {url}: {e}");
                }
                thread::sleep(Duration::from_millis(500));
            }
        });
    }
    serve_http(port, |_, _| Ok("ok\n".to_owned()))
}

/// A request; the body of the answer, or an error for anything but a 2xx.
fn http(method: &str, url: &str, body: &str) -> io::Result<String> {
    let rest = url.strip_prefix("http://").ok_or_else(|| io::Error::other("only http:// URLs"))?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let to = if has_port { host.to_owned() } else { format!("{host}:80") };
    let mut stream = connect(&to)?;
    let length = body.len();
    stream.write_all(
        format!("{method} /{path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}").as_bytes(),
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(ErrorKind::InvalidData)?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status.starts_with('2') { Ok(body.to_owned()) } else { Err(io::Error::other(format!("{status}: {}", body.trim()))) }
}

/// Prints what became of one connection; only `open` is success.
fn dial(to: &str) -> io::Result<()> {
    let address = first_address(to)?;
    match TcpStream::connect_timeout(&address, PATIENCE) {
        Ok(_) => {
            println!("open");
            Ok(())
        }
        Err(e) => {
            println!(
                "{}",
                match e.kind() {
                    ErrorKind::ConnectionRefused => "refused",
                    ErrorKind::TimedOut => "silent",
                    _ => "unreachable",
                }
            );
            Err(e)
        }
    }
}

fn first_address(to: &str) -> io::Result<SocketAddr> {
    to.to_socket_addrs()?.next().ok_or_else(|| io::Error::new(ErrorKind::NotFound, format!("{to}: no address")))
}

fn scan(host: &str, first: u16, last: u16) -> io::Result<()> {
    let address = first_address(&format!("{host}:{first}"))?.ip();
    let open: Vec<String> = (first..=last)
        .filter(|port| TcpStream::connect_timeout(&SocketAddr::new(address, *port), Duration::from_millis(300)).is_ok())
        .map(|port| port.to_string())
        .collect();
    println!("{host}: open: {}", open.join(" "));
    Ok(())
}

fn say(to: &str, text: &str) -> io::Result<()> {
    let address = first_address(to)?;
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    UdpSocket::bind(any)?.send_to(text.as_bytes(), address).map(|_| ())
}

fn listen(port: u16) -> io::Result<()> {
    let socket = UdpSocket::bind(("::", port)).or_else(|_| UdpSocket::bind(("0.0.0.0", port)))?;
    thread::spawn(move || {
        let mut datagram = [0; 2048];
        loop {
            if let Ok((n, from)) = socket.recv_from(&mut datagram) {
                let _ = socket.send_to(&datagram[..n], from);
            }
        }
    });
    serve_lines(port, str::to_owned)
}

fn hold(to: &str, seconds: u64) -> io::Result<()> {
    let mut stream = connect(to)?;
    for _ in 0..seconds * 5 {
        ask(&mut stream, "PING")?;
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}
