//! Any OpenAI-compatible server as a model: scoring through `/v1/completions` with `echo`, generation through it or through
//! `/v1/chat/completions`.
//!
//! # Scoring
//! A prompt (context and continuation as one text, so the server tokenizes them together) is sent with `echo`, `logprobs: 1`
//! and `max_tokens: 1`; the generated token is dropped. Not 0: vLLM long refused it, and llama-cpp-python takes 0 for "until
//! the context is full". As in lm-evaluation-harness, white space at the context's end belongs to the continuation. A token
//! that holds the boundary counts to the continuation. Tokens are found by their texts, from the prompt's end; where texts
//! do not show them (characters split over tokens) by counting, with one more request for the context alone.
//!
//! A continuation without anything before it has no log-probability for its first token, unless the server adds a BOS token
//! itself: such a request is refused and asks for [`Options::prefix`].
//!
//! A rolling log-likelihood is that of the whole text in one request. Where the server finds it too long, it is cut in half
//! before white space, again and again, and every later piece is read after the last word of the one before. An engine in
//! the process cuts by tokens into full windows, which gives later tokens more context: texts beyond the server's context
//! score lower here, the more so the more they repeat themselves; compare only with runs on servers of the same context.
//! Without a prefix or a BOS token of the server's own, the text's first token is not scored and not counted in `tokens`.
//!
//! # What is refused instead of scored
//! Before the first score, the server generates a few tokens and is then asked for the same tokens as a prompt: the
//! log-probabilities must be the same. That finds servers that ignore `echo`, that echo text without log-probabilities, and
//! that attach them to the wrong tokens. Every answer must start with the prompt and have a log-probability for every token
//! that counts.
//!
//! # Servers
//! | server | echo with log-probabilities | differs in |
//! |---|---|---|
//! | vLLM | yes, `max_tokens` ≥ 1 ([#9336](https://github.com/vllm-project/vllm/issues/9336)) | first token null; a split character's tokens print as U+FFFD, so offsets drift; sampling defaults come from the model's `generation_config.json` |
//! | SGLang | yes ([#1998](https://github.com/sgl-project/sglang/pull/1998)) | `text_offset` is always -1 |
//! | llama-cpp-python | with `--logits_all true`; wrong by one token for models without BOS (measured with 0.3.36, found by the check) | special and split tokens have empty text; BOS not listed; `repeat_penalty` is 1.1 unless sent |
//! | llama.cpp | no: refuses `echo`, or ignores it ([#27174](https://github.com/ggml-org/llama.cpp/issues/27174)) | log-probabilities as `{"content": […]}` |
//! | mistral.rs | 0.7 gave `logprobs: null` ([#1876](https://github.com/EricLBuehler/mistral.rs/issues/1876)) | |
//! | TGI | no; prompts' log-probabilities only in its own API and off by default since 3.0 ([#3070](https://github.com/huggingface/text-generation-inference/issues/3070)) | |
//! | LM Studio | no log-probabilities at all ([#60](https://github.com/lmstudio-ai/lms/issues/60)) | |
//! | Ollama | no; generated tokens' only ([#16117](https://github.com/ollama/ollama/issues/16117)) | |
//! | OpenAI | not `echo` together with `logprobs` | |

mod chat;
mod error;
mod fields;
mod http;
mod protocol;
mod said;
mod scoring;
mod tally;
mod timed;
mod tokens;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use serde_json::{Map, Value, json};

pub use error::{Asked, Error, Fault};
pub use fields::Fields;
pub use http::ApiKey;
pub use tally::Tally;
pub use timed::Timed;
pub use tokens::{ChatTold, Given, Name, Place, Told, Way};

use chat::Chat;
use fields::Learned;
use http::Http;
use protocol::{Answer, Token};
use recoup_ground::http::address::mask;
use recoup_ground::http::retry;
use recoup_ground::model::{GenerationOptions, LanguageModel, Message, Prompts, Request, Response};
use scoring::Scored;

const COMPLETIONS: &str = "/completions";
const CHAT_COMPLETIONS: &str = "/chat/completions";
/// Stop strings that the API permits (<https://platform.openai.com/docs/api-reference/completions/create>); the rest is cut
/// here.
const MOST_STOPS: usize = 4;
/// What the check of `echo` generates from: mid-sentence, so that no model ends here.
const PROBES: [&str; 2] =
    ["The quick brown fox jumps over the lazy dog. The quick brown fox", "1 2 3 4 5 6 7 8 9 10 11 12"];
/// Tokens that the check compares at most.
const PROBE_TOKENS: usize = 8;

/// How to talk to a server.
#[derive(Clone, Debug)]
pub struct Options {
    /// The model's name there; `None`: the only one it has.
    pub model: Option<String>,
    pub api_key: Option<ApiKey>,
    /// Requests under way at once.
    pub concurrency: usize,
    /// For one try of one request, answer included.
    pub timeout: Duration,
    /// Tries after the first, of requests that failed for a reason that may pass; waits of 0.5 s, 1 s, 2 s, … 60 s between
    /// them, or what the server's `Retry-After` says, up to ten minutes.
    pub retries: usize,
    /// Text put before everything that is scored: the model's BOS token, for servers that do not add it themselves.
    pub prefix: String,
    /// Generate through the chat API, with the server's template. No scoring then.
    pub chat: bool,
    /// What is added to requests, renamed in them and left out.
    pub fields: Fields,
    /// Certificates in PEM form to be trusted instead of the public authorities'.
    pub ca_file: Option<PathBuf>,
    /// Told of long waits, for who watches.
    pub notice: Option<fn(&str)>,
}

impl Default for Options {
    /// No key, 4 requests at once, 5 minutes each, 8 further tries (two minutes of waiting), completions.
    fn default() -> Self {
        Self {
            model: None,
            api_key: None,
            concurrency: 4,
            timeout: Duration::from_secs(300),
            retries: retry::RETRIES,
            prefix: String::new(),
            chat: false,
            fields: Fields::default(),
            ca_file: None,
            notice: None,
        }
    }
}

/// A model behind an OpenAI-compatible server.
pub struct OpenAi {
    http: Http,
    model: String,
    options: Options,
    echo_checked: bool,
    /// Tokens of contexts that had to be counted.
    lengths: Mutex<BTreeMap<String, usize>>,
    /// What the server turned out to refuse.
    learned: Mutex<Learned>,
    /// Whether it refuses fields that only some servers know.
    plain: AtomicBool,
}

impl OpenAi {
    /// The server at `base_url` (`http://host:port/v1`). Asks it for its models if the options name none.
    ///
    /// # Errors
    /// When the address or key cannot be one, or the model is not clear.
    pub fn new(base_url: &str, options: Options) -> Result<Self, Error> {
        let failed = |asked, url: String, via| move |fault| Error { asked, url, via, fault };
        let http = options.fields.check().and_then(|()| Http::new(base_url, &options));
        let http = http.map_err(failed(Asked::Settings, mask(base_url), None))?;
        let model = match &options.model {
            Some(model) => model.clone(),
            None => only_model(&http).map_err(failed(Asked::Models, http.shown("/models"), http.via()))?,
        };
        let (lengths, learned, plain) = Default::default();
        Ok(Self { http, model, options, echo_checked: false, lengths, learned, plain })
    }

    /// The server's address without what is secret in it.
    #[must_use]
    pub fn address(&self) -> String {
        self.http.shown("")
    }

    /// What happened so far that a reader of the scores has to know.
    #[must_use]
    pub fn tally(&self) -> Tally {
        let mut tally = locked(&self.http.tally).clone();
        locked(&self.learned).describe(&mut tally);
        tally
    }

    /// The model's name on the server.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    fn error(&self, asked: Asked, fault: Fault) -> Error {
        let path = if self.options.chat { CHAT_COMPLETIONS } else { COMPLETIONS };
        Error { asked, url: self.http.shown(path), via: self.http.via(), fault }
    }

    fn one(&self, request: &Request) -> Result<Response, Fault> {
        match request {
            Request::Generate { context, options } => self.generate(context, options),
            _ if self.options.chat => Err(Fault::ChatScoring),
            Request::LogLikelihood { context, continuation } => {
                let Scored { log_likelihood, is_greedy, .. } = self.score(context, continuation, false)?;
                Ok(Response::LogLikelihood { log_likelihood, is_greedy })
            }
            Request::Rolling { text } => {
                let mut cut = false;
                let Scored { log_likelihood, tokens, .. } = self.rolling("", text, &mut cut)?;
                locked(&self.http.tally).cut_texts += u64::from(cut);
                Ok(Response::Rolling { log_likelihood, tokens: Some(tokens) })
            }
        }
    }

    /// Scores `continuation` after `context`. With `skip_first` the very first token of a prompt may go without a score.
    fn score(&self, context: &str, continuation: &str, skip_first: bool) -> Result<Scored, Fault> {
        let context = format!("{}{context}", self.options.prefix);
        let boundary = scoring::boundary(&context);
        let prompt = context + continuation;
        if boundary == prompt.len() {
            return Ok(Scored::NOTHING);
        }
        let answer = self.echo(&prompt)?;
        let tokens = self.scored_tokens(&answer, &prompt, boundary)?;
        match tokens {
            // Only the prompt's first token has nothing before it; a null anywhere else is a fault of the server's.
            [first, rest @ ..] if first.logprob.is_none() && std::ptr::eq(first, &raw const answer.tokens[0]) => {
                if skip_first {
                    Scored::of(rest)
                } else {
                    Err(Fault::NothingBefore { token: first.text.clone() })
                }
            }
            _ => Scored::of(tokens),
        }
    }

    fn scored_tokens<'a>(&self, answer: &'a Answer, prompt: &str, boundary: usize) -> Result<&'a [Token], Fault> {
        match scoring::by_text(answer, prompt, boundary)? {
            Some(tokens) => Ok(tokens),
            None if boundary == 0 => scoring::by_count(answer, 0),
            None => scoring::by_count(answer, self.prompt_tokens(&prompt[..boundary])?),
        }
    }

    /// `cut`: set where the text was scored in pieces.
    fn rolling(&self, context: &str, text: &str, cut: &mut bool) -> Result<Scored, Fault> {
        let too_long = match self.score(context, text, true) {
            Err(fault @ Fault::TooLong { .. }) => fault,
            scored => return scored,
        };
        let Some((first, second)) = scoring::cut(text).map(|at| text.split_at(at)) else { return Err(too_long) };
        *cut = true;
        let scored = self.rolling(context, first, cut)?;
        Ok(scored.and(self.rolling(scoring::last_word(first), second, cut)?))
    }

    fn generate(&self, context: &str, options: &GenerationOptions) -> Result<Response, Fault> {
        let (path, mut body) = if self.options.chat {
            let chat = Chat::from_prompt(context).ok_or(Fault::NotChat)?;
            let mut body = json!({"messages": chat.messages});
            if chat.continue_last {
                // As vLLM and SGLang call it; llama.cpp continues an assistant's turn unasked.
                body["continue_final_message"] = json!(true);
                body["add_generation_prompt"] = json!(false);
            }
            (CHAT_COMPLETIONS, object(body))
        } else {
            (COMPLETIONS, object(json!({"prompt": context})))
        };
        body.extend(sampling(options));
        if options.think_end.is_some() {
            // The server would look for them in the thinking too.
            body.remove("stop");
        }
        let (value, sent) = self.post(path, body)?;
        let answer = Answer::read(&value)?;
        {
            let mut tally = locked(&self.http.tally);
            tally.filtered += u64::from(answer.filtered);
            tally.declined += u64::from(answer.declined);
            tally.only_reasoning += u64::from(answer.reasoning && answer.text.trim().is_empty());
            tally.temperature_not_sent += u64::from(options.temperature == 0.0 && !sent.contains_key("temperature"));
        }
        let tokens = answer.generated_tokens;
        if options.think_end.is_some() {
            return Ok(Response::Generated { text: options.answer(answer.text), tokens, capped: answer.capped });
        }
        let until = options.until.iter().filter(|s| !s.is_empty());
        let end = until.filter_map(|s| answer.text.find(s.as_str())).min();
        let text = answer.text[..end.unwrap_or(answer.text.len())].to_owned();
        Ok(Response::Generated { text, tokens, capped: answer.capped && end.is_none() })
    }

    /// The prompt and one more token, scored.
    fn echo(&self, prompt: &str) -> Result<Answer, Fault> {
        let body = json!({"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": true});
        Answer::scored(&self.post(COMPLETIONS, object(body))?.0)
    }

    /// How many tokens the server makes of `text`, BOS included.
    fn prompt_tokens(&self, text: &str) -> Result<usize, Fault> {
        if let Some(known) = locked(&self.lengths).get(text) {
            return Ok(*known);
        }
        let body = json!({"prompt": text, "max_tokens": 1, "temperature": 0});
        let tokens = Answer::read(&self.post(COMPLETIONS, object(body))?.0)?.prompt_tokens;
        let tokens = tokens.ok_or_else(|| Fault::Misaligned("`usage.prompt_tokens` is absent".into()))?;
        locked(&self.lengths).insert(text.to_owned(), tokens);
        Ok(tokens)
    }

    /// Refuses a server whose log-probabilities of a prompt are not those of the same tokens when it generates them.
    fn check_echo(&self) -> Result<(), Fault> {
        for probe in PROBES {
            let prompt = format!("{}{probe}", self.options.prefix);
            let mut body = object(json!({"prompt": prompt, "logprobs": 1}));
            body.extend(sampling(&GenerationOptions { max_tokens: PROBE_TOKENS, ..Default::default() }));
            let generated = Answer::scored(&self.post(COMPLETIONS, body)?.0)?;
            if generated.text.is_empty() || generated.tokens.is_empty() {
                continue;
            }
            let whole = prompt.clone() + &generated.text;
            let echoed = self.echo(&whole)?;
            return scoring::agree(&generated.tokens, self.scored_tokens(&echoed, &whole, prompt.len())?);
        }
        Err(Fault::EchoUnchecked)
    }

    /// Posts `body` to the model with the options' changes and as the server turned out to want it; the answer and what was
    /// sent last.
    fn post(&self, path: &str, mut body: Map<String, Value>) -> Result<(Value, Map<String, Value>), Fault> {
        body.insert("model".to_owned(), json!(self.model));
        let body = self.options.fields.apply(body);
        loop {
            let sent = locked(&self.learned).apply(body.clone());
            let fault = match self.http.call(path, Some(&Value::Object(sent.clone()))) {
                Ok(value) => return Ok((value, sent)),
                Err(fault) => fault,
            };
            match &fault {
                Fault::Refused { status: 400 | 422, said, .. } if locked(&self.learned).learn(&sent, said) => {}
                _ => return Err(fault),
            }
        }
    }
}

impl LanguageModel for OpenAi {
    /// Asks `concurrency` requests at once. After a failure the requests under way are finished and passed to `done`; the
    /// error is that of the first failed request in the order of `requests`.
    fn answer(
        &mut self,
        requests: &[Request],
        done: &mut dyn FnMut(usize, Response) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        self.http.stop.store(false, Ordering::Relaxed);
        let scores = requests.iter().any(|r| !matches!(r, Request::Generate { .. }));
        if scores && !self.options.chat && !self.echo_checked {
            self.check_echo().map_err(|fault| self.error(Asked::EchoCheck, fault))?;
            self.echo_checked = true;
        }
        let (model, next, stop) = (&*self, AtomicUsize::new(0), &self.http.stop);
        let (sender, answers) = mpsc::channel();
        let mut failed: Option<(usize, Fault)> = None;
        let mut broken = false;
        std::thread::scope(|scope| {
            for _ in 0..model.options.concurrency.clamp(1, requests.len().max(1)) {
                let (sender, next) = (sender.clone(), &next);
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(request) = requests.get(index) else { break };
                        let answer = model.one(request);
                        stop.fetch_or(answer.is_err(), Ordering::Relaxed);
                        if sender.send((index, answer)).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            for (index, answer) in answers {
                match answer {
                    _ if broken => {}
                    Ok(response) => {
                        broken = done(index, response).is_break();
                        stop.fetch_or(broken, Ordering::Relaxed);
                    }
                    Err(fault) if failed.as_ref().is_none_or(|(first, _)| index < *first) => {
                        failed = Some((index, fault))
                    }
                    Err(_) => {}
                }
            }
        });
        match failed {
            Some((index, fault)) if !broken => Err(self.error(Asked::Request(index), fault)),
            _ => Ok(()),
        }
    }
}

impl Prompts for OpenAi {
    type Error = Error;

    /// In chat mode the messages themselves, written so that `answer` reads them back and sends them to the chat API, where
    /// the server's template is applied. Text appended to that prompt starts the assistant's turn.
    ///
    /// `continue_last` is asked of the server as vLLM and SGLang know it; one that knows no such thing opens a new turn.
    fn chat_prompt(&self, messages: &[Message], continue_last: bool) -> Result<String, Error> {
        if !self.options.chat {
            return Err(self.error(Asked::ChatPrompt, Fault::NoTemplate));
        }
        let chat = Chat { messages: messages.to_vec(), continue_last };
        chat.to_prompt().map_err(|e| self.error(Asked::ChatPrompt, Fault::Unexpected(e.to_string())))
    }
}

fn only_model(http: &Http) -> Result<String, Fault> {
    let mut ids = protocol::models(&http.call("/models", None)?)?;
    match ids.pop() {
        None => Err(Fault::NoModel),
        Some(id) if ids.is_empty() => Ok(id),
        Some(id) => Err(Fault::SeveralModels(ids.into_iter().chain([id]).collect())),
    }
}

/// The fields of a generation request that say how to generate. Fields that OpenAI does not know are sent where they ask for
/// something, so that a server that cannot do it refuses.
fn sampling(options: &GenerationOptions) -> Map<String, Value> {
    let stops: Vec<_> = options.until.iter().filter(|s| !s.is_empty()).take(MOST_STOPS).collect();
    let penalty = |penalty: f64| Some(json!(penalty)).filter(|_| penalty != 0.0);
    let sampled = |value: Value| Some(value).filter(|_| options.temperature > 0.0);
    // Off by name: -1 is off for llama.cpp, SGLang and every vLLM; not all of them take 0.
    let truncation = |name: &str, asked: bool, value: Value, off: Value| match options.off.iter().any(|o| o == name) {
        true => sampled(off),
        false => sampled(value).filter(|_| asked),
    };
    let all = [
        ("max_tokens", Some(json!(options.max_tokens))),
        ("temperature", Some(json!(options.temperature))),
        (fields::NEUTRAL[0], Some(json!(options.repetition_penalty))),
        (fields::NEUTRAL[1], Some(json!(options.repetition_penalty))),
        ("presence_penalty", penalty(options.presence_penalty)),
        ("frequency_penalty", penalty(options.frequency_penalty)),
        ("stop", Some(json!(stops)).filter(|_| !stops.is_empty())),
        ("top_p", sampled(json!(options.top_p))),
        ("seed", sampled(json!(options.seed))),
        ("top_k", truncation("top_k", options.top_k > 0, json!(options.top_k), json!(-1))),
        ("min_p", truncation("min_p", options.min_p > 0.0, json!(options.min_p), json!(0.0))),
    ];
    all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing can panic while holding it; and what it holds is only ever added to.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
