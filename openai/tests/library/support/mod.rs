//! An OpenAI-compatible server in this process: a bigram model over a few words and all bytes, and every way to misbehave.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::{Map, Value, json};

/// What the server sends back.
pub enum Reply {
    Json(u16, Value),
    /// Status, further header lines, body.
    Raw(u16, &'static str, String),
    /// A body shorter than its announced length.
    Truncated,
    /// The connection ends without an answer.
    Hangup,
    /// No answer as long as the client waits.
    Silence,
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub authorization: Option<String>,
    pub proxy_authorization: Option<String>,
    pub body: Value,
}

/// A server that answers each request by a function of it and of its number, counted from 0.
pub struct Server {
    pub url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    pub fn start(reply: impl Fn(usize, &Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (reply, record) = (Arc::new(reply), seen.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (reply, record) = (reply.clone(), record.clone());
                std::thread::spawn(move || serve(&stream, &*reply, &record));
            }
        });
        Self { url, seen }
    }

    /// A well-behaved server of the bigram model, with these quirks.
    pub fn bigram(quirks: Quirks) -> Self {
        Self::start(move |_, request| bigram(request, &quirks))
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

fn serve(stream: &TcpStream, reply: &dyn Fn(usize, &Seen) -> Reply, record: &Mutex<Vec<Seen>>) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let Some(path) = line.split(' ').nth(1).map(str::to_owned) else { return };
    let (mut length, mut authorization, mut proxy_authorization) = (0, None, None);
    loop {
        line.clear();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        match name.to_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap(),
            "authorization" => authorization = Some(value.to_owned()),
            "proxy-authorization" => proxy_authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let request =
        Seen { path, authorization, proxy_authorization, body: serde_json::from_slice(&body).unwrap_or_default() };
    let number = {
        let mut record = record.lock().unwrap();
        record.push(request.clone());
        record.len() - 1
    };
    let send = |status: u16, headers: &str, announced: usize, body: &str| {
        let mut stream = stream;
        // The client may have gone.
        let _ = write!(
            stream,
            "HTTP/1.1 {status} X\r\nconnection: close\r\n{headers}content-length: {announced}\r\n\r\n{body}"
        );
    };
    match reply(number, &request) {
        Reply::Json(status, value) => {
            let text = value.to_string();
            send(status, "content-type: application/json\r\n", text.len(), &text);
        }
        Reply::Raw(status, headers, text) => send(status, headers, text.len(), &text),
        Reply::Truncated => send(200, "", 1000, "{\"choices\": ["),
        Reply::Hangup => {}
        // Until the client closes the connection.
        Reply::Silence => drop(reader.read(&mut [0])),
    }
}

/// Deviations of the bigram server that real servers show.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quirks {
    pub echo: Echo,
    /// A BOS token before every prompt, listed with an empty text.
    pub bos: bool,
    /// As `bos`, but not listed.
    pub hidden_bos: bool,
    pub no_usage: bool,
    /// What a byte that is no character by itself prints as.
    pub broken: &'static str,
    /// Tokens of prompt and answer together.
    pub context: Option<usize>,
    /// A field that is refused.
    pub refuses: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Echo {
    #[default]
    Full,
    /// As the chat API's objects.
    Objects,
    /// Neither text nor log-probabilities of the prompt.
    Ignored,
    /// Text, but log-probabilities of the generated token only.
    TextOnly,
    /// Log-probabilities of the prompt are null.
    Nulls,
    /// Each token's log-probability is taken from the logits after it.
    Shifted,
    NoTop,
}

const WORDS: [&str; 8] = [" the", " cat", " sat", " on", " mat", "The", " fox", " dog"];
const BOS: usize = 256 + WORDS.len();
const VOCAB: usize = BOS + 1;

fn text(token: usize) -> Vec<u8> {
    match token {
        0..256 => vec![token as u8],
        BOS => Vec::new(),
        word => WORDS[word - 256].as_bytes().to_vec(),
    }
}

/// Longest word first, else a byte.
pub fn tokenize(text: &str) -> Vec<usize> {
    let (mut rest, mut tokens) = (text.as_bytes(), Vec::new());
    while let Some(byte) = rest.first() {
        let word = WORDS.iter().position(|w| rest.starts_with(w.as_bytes()));
        tokens.push(word.map_or(usize::from(*byte), |w| 256 + w));
        rest = &rest[word.map_or(1, |w| WORDS[w].len())..];
    }
    tokens
}

/// Log-probabilities of every token after `previous`.
fn after(previous: usize) -> Vec<f64> {
    // BOS, and bytes that could break a character, are never likely.
    let logit = |next: usize| match next {
        128..256 | BOS => -20.0,
        _ => ((previous * 31 + next * 17) * 2_654_435_761 % 1009) as f64 / 100.0,
    };
    let normalizer = (0..VOCAB).map(|n| logit(n).exp()).sum::<f64>().ln();
    (0..VOCAB).map(|n| logit(n) - normalizer).collect()
}

fn best(logprobs: &[f64]) -> usize {
    (0..VOCAB).fold(0, |best, n| if logprobs[n] > logprobs[best] { n } else { best })
}

/// What the client should find: log-likelihood of `tokens[from..]`, and whether it is greedy.
pub fn expected(tokens: &[usize], from: usize) -> (f64, bool) {
    (from..tokens.len()).fold((0.0, true), |(sum, greedy), i| {
        let logprobs = after(tokens[i - 1]);
        (sum + logprobs[tokens[i]], greedy && logprobs[tokens[i]] >= logprobs[best(&logprobs)])
    })
}

/// The most probable continuation.
pub fn greedy(prompt: &str, tokens: usize) -> String {
    let mut all = tokenize(prompt);
    let start = all.len();
    for _ in 0..tokens {
        all.push(best(&after(*all.last().unwrap())));
    }
    String::from_utf8(all[start..].iter().flat_map(|t| text(*t)).collect()).unwrap()
}

pub fn bigram(request: &Seen, quirks: &Quirks) -> Reply {
    let body = &request.body;
    let refuse = |message: String| Reply::Json(400, json!({"error": {"message": message, "type": "invalid"}}));
    match request.path.as_str() {
        "/v1/models" => return Reply::Json(200, json!({"data": [{"id": "bigram"}]})),
        "/v1/completions" => {}
        path => return Reply::Json(404, json!({"detail": format!("no {path}")})),
    }
    if let Some(field) = quirks.refuses.filter(|f| body.get(f).is_some()) {
        return refuse(format!("Unrecognized request argument supplied: {field}"));
    }
    let prompt = body["prompt"].as_str().unwrap();
    let limit = body["max_tokens"].as_u64().unwrap() as usize;
    let mut tokens = tokenize(prompt);
    if quirks.bos || quirks.hidden_bos {
        tokens.insert(0, BOS);
    }
    let prompt_tokens = tokens.len();
    if quirks.context.is_some_and(|most| prompt_tokens + limit > most) {
        return refuse(format!("maximum context length is {} tokens", quirks.context.unwrap()));
    }
    for _ in 0..limit {
        tokens.push(best(&after(*tokens.last().unwrap())));
    }
    let echo = body["echo"] == json!(true) && quirks.echo != Echo::Ignored;
    let generated: Vec<u8> = tokens[prompt_tokens..].iter().flat_map(|t| text(*t)).collect();
    let generated = String::from_utf8(generated).unwrap();
    let first = match (echo, quirks.echo) {
        (true, Echo::TextOnly) | (false, _) => prompt_tokens,
        _ => usize::from(quirks.hidden_bos),
    };
    let listed: Vec<_> = (first..tokens.len())
        .map(|i| {
            let name = |t| String::from_utf8(text(t)).unwrap_or_else(|_| quirks.broken.to_owned());
            let shift = usize::from(echo && quirks.echo == Echo::Shifted);
            let scores = (i + shift).checked_sub(1).map(|previous| after(tokens[previous]));
            let hidden = echo && quirks.echo == Echo::Nulls && i < prompt_tokens;
            let logprob = scores.as_ref().filter(|_| !hidden).map(|s| s[tokens[i]]);
            let top = scores.filter(|_| !hidden).map(|s| (name(best(&s)), s[best(&s)]));
            (name(tokens[i]), logprob, top)
        })
        .collect();
    let logprobs = if quirks.echo == Echo::Objects {
        let object = |(token, logprob, top): &(String, Option<f64>, Option<(String, f64)>)| {
            let top: Vec<_> = top.iter().map(|(t, l)| json!({"token": t, "logprob": l})).collect();
            json!({"token": token, "logprob": logprob, "top_logprobs": top})
        };
        json!({"content": listed.iter().map(object).collect::<Vec<_>>()})
    } else {
        let top = |t: &Option<(String, f64)>| t.as_ref().map(|(t, l)| Map::from_iter([(t.clone(), json!(l))]));
        json!({
            "tokens": listed.iter().map(|l| &l.0).collect::<Vec<_>>(),
            "token_logprobs": listed.iter().map(|l| l.1).collect::<Vec<_>>(),
            "top_logprobs": if quirks.echo == Echo::NoTop { json!(null) } else { listed.iter().map(|l| top(&l.2)).collect() },
            "text_offset": vec![-1; listed.len()],
        })
    };
    let text = if echo { format!("{prompt}{generated}") } else { generated };
    let mut answer = json!({"choices": [{"index": 0, "text": text, "finish_reason": "length",
        "logprobs": if body.get("logprobs").is_some() { logprobs } else { json!(null) }}]});
    if !quirks.no_usage {
        answer["usage"] = json!({"prompt_tokens": prompt_tokens, "completion_tokens": limit});
    }
    Reply::Json(200, answer)
}
