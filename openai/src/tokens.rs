//! What a server says of given tokens, one by one, and what tokens it makes of texts and chats: for who wants to know
//! whether it computes what it should. Unlike scores of tasks, nothing is refused here for being wrong.

use std::sync::atomic::Ordering;

use recoup_ground::model::Message;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::error::{Asked, Error, Fault};
use super::{CHAT_COMPLETIONS, COMPLETIONS, OpenAi, object};

/// SGLang's and llama.cpp's own endpoints.
const GENERATE: &str = "/generate";
const COMPLETION: &str = "/completion";

/// How a server can be asked for log-probabilities, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// vLLM's `prompt_logprobs`.
    PromptLogprobs,
    /// OpenAI's `echo` with `logprobs`.
    Echo,
    /// SGLang's own /generate.
    Generate,
    /// llama.cpp's own /completion: tokens that the server generates, no others.
    Completion,
    /// `logprobs`: tokens that the server generates, no others.
    Logprobs,
}

impl Way {
    /// All, in the order in which they are tried.
    pub const ALL: [Self; 5] = [Self::PromptLogprobs, Self::Echo, Self::Generate, Self::Completion, Self::Logprobs];

    /// Whether it gives log-probabilities of tokens that the server is given.
    #[must_use]
    pub fn is_of_prompts(self) -> bool {
        matches!(self, Self::PromptLogprobs | Self::Echo | Self::Generate)
    }

    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PromptLogprobs => "prompt_logprobs of /v1/completions",
            Self::Echo => "echo and logprobs of /v1/completions",
            Self::Generate => "/generate with return_logprob",
            Self::Completion => "/completion with n_probs (generated tokens only)",
            Self::Logprobs => "logprobs of /v1/completions (generated tokens only)",
        }
    }
}

/// What a server is given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Given<'a> {
    Ids(&'a [u32]),
    Text(&'a str),
}

impl Given<'_> {
    fn json(self) -> Value {
        match self {
            Self::Ids(ids) => json!(ids),
            Self::Text(text) => json!(text),
        }
    }
}

/// A token as a server names it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Name {
    pub id: Option<u32>,
    pub text: Option<String>,
}

/// What a server says of one token where it stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Place {
    pub token: Name,
    pub logprob: Option<f64>,
    /// The most probable tokens there, as many as it gives, in no particular order; the token itself may be among them.
    pub top: Vec<(Name, f64)>,
}

/// An answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    /// The prompt's tokens as far as the server lists them.
    pub prompt: Vec<Place>,
    pub generated: Vec<Place>,
    /// How many tokens the server counts in the prompt, and which.
    pub prompt_tokens: Option<usize>,
    pub prompt_ids: Option<Vec<u32>>,
}

/// What a server makes of a chat, as far as it says so.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChatTold {
    pub ids: Option<Vec<u32>>,
    pub text: Option<String>,
    pub count: Option<usize>,
}

impl OpenAi {
    /// Asks for log-probabilities of `given`, where the `way` has those, and of `generate` (at least 1) tokens after it,
    /// chosen greedily; with the `top` most probable ones of each place.
    ///
    /// # Errors
    /// When the server refuses, or its answer does not have them.
    pub fn tell(&self, way: Way, given: Given<'_>, top: usize, generate: usize) -> Result<Told, Error> {
        let url = || match way {
            Way::PromptLogprobs | Way::Echo | Way::Logprobs => self.http.shown(COMPLETIONS),
            Way::Generate => self.http.shown_root(GENERATE),
            Way::Completion => self.http.shown_root(COMPLETION),
        };
        self.tell_inner(way, given, top, generate).map_err(|fault| self.token_error(url(), fault))
    }

    fn token_error(&self, url: String, fault: Fault) -> Error {
        Error { asked: Asked::Tokens, url, via: self.http.via(), fault }
    }

    fn tell_inner(&self, way: Way, given: Given<'_>, top: usize, generate: usize) -> Result<Told, Fault> {
        let open = |more: Value| {
            let mut body = object(json!({"prompt": given.json(), "max_tokens": generate, "temperature": 0}));
            body.extend(object(more));
            body
        };
        match way {
            Way::PromptLogprobs => {
                let body = open(json!({"logprobs": top, "prompt_logprobs": top}));
                let value = self.post_with(COMPLETIONS, body, &["return_token_ids", "return_tokens_as_token_ids"])?;
                prompt_logprobs(&value, given)
            }
            Way::Echo => {
                let body = open(json!({"logprobs": top, "echo": true}));
                echoed(&self.post_with(COMPLETIONS, body, &["return_tokens_as_token_ids"])?, given)
            }
            Way::Logprobs => {
                let body = open(json!({"logprobs": top}));
                let value = self.post_with(COMPLETIONS, body, &["return_tokens_as_token_ids"])?;
                let generated = match places(&value["choices"][0]["logprobs"]) {
                    Err(_) if value["choices"][0]["text"] == "" => Vec::new(),
                    places => places?,
                };
                Ok(Told { generated, ..counted(&value) })
            }
            Way::Generate => {
                let field = if matches!(given, Given::Ids(_)) { "input_ids" } else { "text" };
                let body = json!({field: given.json(), "return_logprob": true, "logprob_start_len": 0,
                    "top_logprobs_num": top, "sampling_params": {"max_new_tokens": generate, "temperature": 0}});
                sglang(&self.http.call_root(GENERATE, Some(&body))?)
            }
            Way::Completion => {
                let body = json!({"prompt": given.json(), "n_predict": generate, "n_probs": top, "temperature": 0,
                    "cache_prompt": false, "return_tokens": true});
                let value = self.http.call_root(COMPLETION, Some(&body))?;
                let none = Vec::new();
                // An answer that ends at once lists nothing.
                let listed = value["completion_probabilities"].as_array().or((value["content"] == "").then_some(&none));
                let listed = listed.ok_or_else(|| Fault::NoPromptLogProbs {
                    found: "there is no list `completion_probabilities`".into(),
                })?;
                let prompt_tokens = value["tokens_evaluated"].as_u64().map(|n| n as usize);
                let listed = listed.iter().map(described).collect();
                let generated = match ids(&value["tokens"]) {
                    Some(ids) => spread(ids, listed),
                    None => listed,
                };
                Ok(Told { generated, prompt_tokens, ..Told::default() })
            }
        }
    }

    /// Posts a body with fields that only some servers know, and without them where the server refuses them.
    fn post_with(&self, path: &str, body: Map<String, Value>, optional: &[&str]) -> Result<Value, Fault> {
        if !self.plain.load(Ordering::Relaxed) {
            let mut more = body.clone();
            more.extend(optional.iter().map(|name| ((*name).to_owned(), json!(true))));
            match self.post(path, more) {
                Ok((value, _)) => return Ok(value),
                Err(Fault::Refused { status: 400 | 422, said, .. }) if optional.iter().any(|o| said.names(o)) => {}
                Err(fault) => return Err(fault),
            }
        }
        let answered = self.post(path, body)?.0;
        self.plain.store(true, Ordering::Relaxed);
        Ok(answered)
    }

    /// The tokens that the server makes of a prompt's text, where it says so.
    #[must_use]
    pub fn tokens_of(&self, text: &str) -> Option<Vec<u32>> {
        let of_vllm = json!({"model": self.model, "prompt": text, "add_special_tokens": true});
        let of_llama_cpp = json!({"content": text, "add_special": true});
        let of_tensorrt = json!({"prompt": text});
        let ways = [("/tokenize", of_vllm), ("/tokenize", of_llama_cpp), ("/_internal/tokenize", of_tensorrt)];
        ways.into_iter().find_map(|(path, body)| self.tokens_at(path, &body))
    }

    fn tokens_at(&self, path: &str, body: &Value) -> Option<Vec<u32>> {
        let answer = self.http.call_root(path, Some(body)).ok()?;
        ids(&answer["tokens"]).filter(|ids| !ids.is_empty())
    }

    /// What the server makes of a chat up to where the assistant begins, with these `arguments` of its template.
    ///
    /// # Errors
    /// When it does not answer chats.
    pub fn chat_told(&self, messages: &[Message], arguments: &Map<String, Value>) -> Result<ChatTold, Error> {
        let with = |mut body: Map<String, Value>| {
            if !arguments.is_empty() {
                body.insert("chat_template_kwargs".into(), json!(arguments));
            }
            body
        };
        let body = with(object(json!({"messages": messages, "max_tokens": 1, "temperature": 0})));
        let value = self.post_with(CHAT_COMPLETIONS, body, &["return_token_ids"]);
        let value = value.map_err(|fault| self.token_error(self.http.shown(CHAT_COMPLETIONS), fault))?;
        let Told { prompt_tokens: count, prompt_ids, .. } = counted(&value);
        let tokenize = json!({"model": self.model, "messages": messages, "add_generation_prompt": true});
        let ids = prompt_ids
            .or_else(|| self.tokens_at("/tokenize", &Value::Object(with(object(tokenize)))))
            // A server that reads `messages` as something else says something else of their number too.
            .filter(|ids| count.is_none_or(|count| count == ids.len()));
        let text = match ids {
            Some(_) => None,
            None => {
                let body = Value::Object(with(object(json!({"messages": messages}))));
                let answer = self.http.call_root("/apply-template", Some(&body)).ok();
                answer.and_then(|a| a["prompt"].as_str().map(str::to_owned))
            }
        };
        Ok(ChatTold { ids, text, count })
    }
}

fn ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect()
}

/// What the answer says of the prompt as a whole.
fn counted(value: &Value) -> Told {
    let prompt_tokens = value["usage"]["prompt_tokens"].as_u64().map(|n| n as usize);
    let choice = &value["choices"][0];
    let prompt_ids = ids(&choice["prompt_token_ids"]).or_else(|| ids(&value["prompt_token_ids"]));
    Told { prompt_tokens, prompt_ids, ..Told::default() }
}

/// A token by its text, or by what vLLM calls it under `return_tokens_as_token_ids`.
fn named(text: &str) -> Name {
    match text.strip_prefix("token_id:").and_then(|id| id.parse().ok()) {
        Some(id) => Name { id: Some(id), text: None },
        None => Name { id: None, text: Some(text.to_owned()) },
    }
}

/// An object of the chat API's form: `{"id": 1, "token": "a", "logprob": -1.0, "top_logprobs": […]}`; the id is llama.cpp's.
fn described(value: &Value) -> Place {
    let name = |value: &Value| {
        let name = value["token"].as_str().map(named).unwrap_or_default();
        let id = value["id"].as_u64().and_then(|id| u32::try_from(id).ok());
        Name { id: id.or(name.id), text: name.text }
    };
    let top = value["top_logprobs"].as_array();
    let top = top.into_iter().flatten().filter_map(|t| Some((name(t), t["logprob"].as_f64()?))).collect();
    Place { token: name(value), logprob: value["logprob"].as_f64(), top }
}

/// Places for all tokens where only some are listed: llama.cpp leaves those out that end within a character.
fn spread(ids: Vec<u32>, listed: Vec<Place>) -> Vec<Place> {
    let mut listed = listed.into_iter().peekable();
    ids.into_iter()
        .map(|id| {
            let here = listed.next_if(|place| place.token.id == Some(id));
            here.unwrap_or_else(|| Place { token: Name { id: Some(id), text: None }, ..Place::default() })
        })
        .collect()
}

/// Places of either form of `logprobs`.
fn places(logprobs: &Value) -> Result<Vec<Place>, Fault> {
    if let Some(content) = logprobs["content"].as_array() {
        return Ok(content.iter().map(described).collect());
    }
    let missing = |found: &str| Fault::NoPromptLogProbs { found: found.into() };
    let tokens = logprobs["tokens"].as_array().ok_or_else(|| missing("`logprobs` is not there"))?;
    let scores = logprobs["token_logprobs"].as_array().filter(|s| s.len() == tokens.len());
    let scores = scores.ok_or_else(|| missing("`token_logprobs` is not as long as `tokens`"))?;
    let all = tokens.iter().zip(scores).enumerate();
    Ok(all
        .map(|(i, (token, score))| Place {
            token: token.as_str().map(named).unwrap_or_default(),
            logprob: score.as_f64(),
            top: by_name(&logprobs["top_logprobs"][i], |key| Some(named(key)), Value::as_f64),
        })
        .collect())
}

/// Candidates out of an object whose keys name tokens.
fn by_name(
    value: &Value,
    name: impl Fn(&str) -> Option<Name>,
    score: impl Fn(&Value) -> Option<f64>,
) -> Vec<(Name, f64)> {
    value.as_object().into_iter().flatten().filter_map(|(key, value)| Some((name(key)?, score(value)?))).collect()
}

fn prompt_logprobs(value: &Value, given: Given<'_>) -> Result<Told, Fault> {
    let choice = &value["choices"][0];
    // Of chats it stands beside the choices.
    let listed = choice["prompt_logprobs"].as_array().or_else(|| value["prompt_logprobs"].as_array());
    let listed = listed.filter(|l| l.iter().any(Value::is_object));
    let listed = listed.ok_or_else(|| Fault::NoPromptLogProbs { found: "there is no `prompt_logprobs`".into() })?;
    let told = counted(value);
    let known = match (given, &told.prompt_ids) {
        (_, Some(ids)) => Some(&ids[..]),
        (Given::Ids(ids), None) => Some(ids),
        (Given::Text(_), None) => None,
    };
    // From the end, whatever the server put before the prompt.
    let before = listed.len() as isize - known.map_or(0, <[u32]>::len) as isize;
    let prompt = listed.iter().enumerate().map(|(i, place)| {
        let id_of = |key: &str| key.parse::<u32>().ok();
        // Where no other field names the token: it comes first.
        let id = match known {
            Some(known) => usize::try_from(i as isize - before).ok().and_then(|i| known.get(i).copied()),
            None => place.as_object().and_then(|o| o.keys().next()).and_then(|key| id_of(key)),
        };
        let own = id.map_or(&Value::Null, |id| &place[id.to_string()]);
        Place {
            token: Name { id, text: own["decoded_token"].as_str().map(str::to_owned) },
            logprob: own["logprob"].as_f64(),
            top: by_name(place, |k| Some(Name { id: Some(id_of(k)?), text: None }), |v| v["logprob"].as_f64()),
        }
    });
    let prompt = prompt.collect();
    let generated = places(&choice["logprobs"]).unwrap_or_default();
    Ok(Told { prompt, generated, ..told })
}

fn echoed(value: &Value, given: Given<'_>) -> Result<Told, Fault> {
    let choice = &value["choices"][0];
    let mut prompt = places(&choice["logprobs"])?;
    let told = counted(value);
    let count = value["usage"]["completion_tokens"].as_u64().map_or(1, |n| n as usize);
    let generated = prompt.split_off(prompt.len().saturating_sub(count));
    let text = choice["text"].as_str().unwrap_or_default();
    if prompt.iter().all(|p| p.logprob.is_none()) {
        let found = format!("{} of the prompt's tokens have one", prompt.len());
        return Err(Fault::NoPromptLogProbs { found });
    }
    match given {
        Given::Text(given) if !text.starts_with(given) => {
            Err(Fault::NoEcho { found: format!("its text is `{}`", recoup_ground::shorten::shorten(text, 60)) })
        }
        _ => Ok(Told { prompt, generated, ..told }),
    }
}

fn sglang(value: &Value) -> Result<Told, Fault> {
    let meta = &value["meta_info"];
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let name = |entry: &Value| Name { id: id(&entry[1]), text: entry[2].as_str().map(str::to_owned) };
    let side = |scores: &str, top: &str| -> Option<Vec<Place>> {
        let scores = meta[scores].as_array()?.iter().enumerate();
        Some(
            scores
                .map(|(i, entry)| {
                    let top = meta[top][i].as_array().into_iter().flatten();
                    let top = top.filter_map(|t| Some((name(t), t[0].as_f64()?))).collect();
                    Place { token: name(entry), logprob: entry[0].as_f64(), top }
                })
                .collect(),
        )
    };
    let prompt = side("input_token_logprobs", "input_top_logprobs").filter(|p| p.iter().any(|p| p.logprob.is_some()));
    let prompt = prompt.ok_or_else(|| Fault::NoPromptLogProbs { found: "no `input_token_logprobs`".into() })?;
    let generated = side("output_token_logprobs", "output_top_logprobs").unwrap_or_default();
    let prompt_tokens = meta["prompt_tokens"].as_u64().map(|n| n as usize);
    Ok(Told { prompt, generated, prompt_tokens, prompt_ids: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(id: u32) -> Name {
        Name { id: Some(id), text: None }
    }

    #[test]
    fn prompt_logprobs_name_tokens_by_their_ids_from_the_end_of_the_prompt() {
        let entry = |logprob: f64| json!({"logprob": logprob, "rank": 1, "decoded_token": "x"});
        let listed = json!([null, {"7": entry(-0.5), "9": entry(-2.0)}, {"8": entry(-1.0)}]);
        let value = json!({"choices": [{"text": "", "prompt_logprobs": listed}], "usage": {"prompt_tokens": 3}});
        let told = prompt_logprobs(&value, Given::Ids(&[1, 9, 8])).unwrap();
        assert_eq!(told.prompt.iter().map(|p| p.logprob).collect::<Vec<_>>(), [None, Some(-2.0), Some(-1.0)]);
        assert_eq!(told.prompt[1].top, [(id(7), -0.5), (id(9), -2.0)]);
        // A token more than was sent, in front.
        let told = prompt_logprobs(&value, Given::Ids(&[9, 8])).unwrap();
        assert_eq!(told.prompt.iter().map(|p| p.token.id).collect::<Vec<_>>(), [None, Some(9), Some(8)]);
        assert_eq!(told.prompt[2].logprob, Some(-1.0));
        // Of a text whose ids nobody says: what comes first.
        let told = prompt_logprobs(&value, Given::Text("abc")).unwrap();
        assert_eq!(told.prompt[1].token.id, Some(7));
        for none in [json!({"choices": [{}]}), json!({"choices": [{"prompt_logprobs": [null]}]})] {
            assert!(matches!(prompt_logprobs(&none, Given::Ids(&[1])), Err(Fault::NoPromptLogProbs { .. })));
        }
    }

    #[test]
    fn an_echo_is_cut_where_the_answer_begins_and_one_of_the_answer_alone_is_none() {
        let value = |tokens: Value, scores: Value, text: &str| {
            json!({"choices": [{"text": text, "logprobs": {"tokens": tokens, "token_logprobs": scores,
                "top_logprobs": [null, {"token_id:4": -0.1}, {"token_id:4": -0.2}]}}], "usage": {"completion_tokens": 1}})
        };
        let whole = value(json!(["token_id:3", " b", "!"]), json!([null, -1.5, -0.2]), "a b!");
        let told = echoed(&whole, Given::Text("a b")).unwrap();
        assert_eq!((told.prompt.len(), told.generated.len()), (2, 1));
        assert_eq!((told.prompt[0].token.id, told.prompt[1].logprob), (Some(3), Some(-1.5)));
        assert_eq!(told.prompt[1].top, [(id(4), -0.1)]);
        assert!(matches!(echoed(&whole, Given::Text("other")), Err(Fault::NoEcho { .. })));
        let only = value(json!(["!"]), json!([-0.2]), "a b!");
        assert!(matches!(echoed(&only, Given::Ids(&[1, 2])), Err(Fault::NoPromptLogProbs { .. })));
    }

    #[test]
    fn sglangs_triples_and_llama_cpps_objects_are_read() {
        let value = json!({"text": "x", "meta_info": {"prompt_tokens": 2,
            "input_token_logprobs": [[null, 5, null], [-1.0, 6, " b"]],
            "input_top_logprobs": [null, [[-0.5, 7, null], [-1.0, 6, null]]],
            "output_token_logprobs": [[-0.1, 8, null]], "output_top_logprobs": [[[-0.1, 8, null]]]}});
        let told = sglang(&value).unwrap();
        assert_eq!(told.prompt[1].token, Name { id: Some(6), text: Some(" b".into()) });
        assert_eq!((told.prompt[1].logprob, told.prompt[1].top.len(), told.generated.len()), (Some(-1.0), 2, 1));
        let object = json!({"id": 3, "token": " a", "logprob": -0.2, "top_logprobs": [{"id": 4, "token": "b", "logprob": -2.0}]});
        let place = described(&object);
        let parts = spread(vec![1, 3, 2], vec![place.clone()]);
        assert_eq!(parts.iter().map(|p| p.logprob).collect::<Vec<_>>(), [None, Some(-0.2), None]);
        assert_eq!(parts[2].token.id, Some(2));
        assert_eq!((place.token.id, place.top[0].0.id, place.top[0].1), (Some(3), Some(4), -2.0));
    }
}
