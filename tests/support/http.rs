//! A server as its clients see it: bytes sent, bytes read; and `recoup serve` for the time of a test.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::command::recoup;

/// What a server answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    /// The data of a stream's events; the last must be `[DONE]`.
    #[track_caller]
    pub fn events(&self) -> Vec<Value> {
        let text = self.text();
        let mut data: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{text}");
        data.iter().map(|d| serde_json::from_str(d).unwrap()).collect()
    }

    /// Status and OpenAI's `param` of an error.
    #[track_caller]
    pub fn error(&self) -> (u16, String) {
        let body = self.json();
        assert!(body["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{body}");
        assert!(body["error"]["type"].is_string(), "{body}");
        (self.status, body["error"]["param"].as_str().unwrap_or_default().to_owned())
    }
}

/// Reads the head of an answer: status and headers.
fn head(reader: &mut impl BufRead) -> std::io::Result<(u16, Vec<(String, String)>)> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
    let status = status.ok_or_else(|| std::io::Error::other(format!("no status line: {line:?}")))?;
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.push((name.to_owned(), value.to_owned()));
    }
    Ok((status, headers))
}

fn read(stream: TcpStream) -> std::io::Result<Answer> {
    let mut reader = BufReader::new(stream);
    let (status, headers) = head(&mut reader)?;
    let mut answer = Answer { status, headers, body: Vec::new() };
    if answer.header("transfer-encoding") == Some("chunked") {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size)?;
            let size = usize::from_str_radix(size.trim(), 16).map_err(std::io::Error::other)?;
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk)?;
            if size == 0 {
                return Ok(answer);
            }
            answer.body.extend_from_slice(&chunk[..size]);
        }
    }
    reader.read_to_end(&mut answer.body)?;
    Ok(answer)
}

/// `recoup serve` on a free port, until dropped.
pub struct Server {
    pub child: Child,
    pub address: String,
    /// What it has said, and goes on saying.
    log: std::sync::Arc<std::sync::Mutex<String>>,
}

impl Server {
    /// Serves with these arguments.
    #[track_caller]
    pub fn start(args: &[&str]) -> Self {
        Self::of(&mut recoup(&[&["serve"], args, &["--port", "0"]].concat()))
    }

    /// Of a command that serves.
    #[track_caller]
    pub fn of(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut reader = BufReader::new(child.stderr.take().unwrap());
        let log = std::sync::Arc::<std::sync::Mutex<String>>::default();
        let mut address = None;
        while address.is_none() {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap() == 0 {
                panic!("the server ended: {:?}\n{}", child.wait(), log.lock().unwrap());
            }
            address = line.split_once("http://").map(|(_, a)| a.split([' ', '\n']).next().unwrap().to_owned());
            log.lock().unwrap().push_str(&line);
        }
        let kept = log.clone();
        std::thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                *kept.lock().unwrap() += &(line + "\n");
            }
        });
        Self { child, address: address.unwrap(), log }
    }

    /// What it has said.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// A connection on which this was sent.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> std::io::Result<TcpStream> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n", self.address);
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("Content-Length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)?;
        Ok(stream)
    }

    #[track_caller]
    pub fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let answer = self.send(method, path, headers, body).and_then(read);
        answer.unwrap_or_else(|e| panic!("{method} {path}: {e}\n{}", self.log()))
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], b"")
    }

    #[track_caller]
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask("POST", path, &[("Content-Type", "application/json")], body.to_string().as_bytes())
    }

    /// What an answer has that must be one.
    #[track_caller]
    pub fn asked(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    }

    /// A connection whose answer has begun: its head was read.
    #[track_caller]
    pub fn begun(&self, path: &str, body: &Value) -> BufReader<TcpStream> {
        let stream = self.send("POST", path, &[], body.to_string().as_bytes()).unwrap();
        let mut reader = BufReader::new(stream);
        assert_eq!(head(&mut reader).unwrap().0, 200);
        reader
    }

    /// The value of a metric.
    #[track_caller]
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line = text.lines().find(|l| l.starts_with(name) && !l.starts_with('#'));
        line.and_then(|l| l.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("no {name} in\n{text}"))
    }

    /// Waits until a metric has a value.
    #[track_caller]
    pub fn until(&self, name: &str, value: f64) {
        let end = Instant::now() + Duration::from_secs(60);
        while self.metric(name) != value {
            assert!(Instant::now() < end, "{name} is {}, not {value}", self.metric(name));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Nothing runs, waits or is held, and it answers as ever.
    #[track_caller]
    pub fn is_well(&self) {
        self.until("vllm:num_requests_running", 0.0);
        self.until("vllm:num_requests_waiting", 0.0);
        self.until("vllm:kv_cache_usage_perc", 0.0);
        assert_eq!(self.get("/health").status, 200);
    }

    #[cfg(unix)]
    pub fn signal(&self, signal: rustix::process::Signal) {
        let id = rustix::process::Pid::from_raw(self.child.id().try_into().unwrap()).unwrap();
        rustix::process::kill_process(id, signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
