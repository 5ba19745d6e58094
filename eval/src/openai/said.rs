//! What a server says went wrong: read before anything else in an answer, whatever its status.

use serde_json::Value;

/// Ways to end an answer that mean it was never finished, in the `finish_reason` of servers and routers.
const FAILED: [&str; 6] = ["error", "abort", "aborted", "cancelled", "canceled", "failed"];
/// Keys of what is asked for; an object with one of them is no error by its `message` or `detail` alone.
const ANSWERS: [&str; 3] = ["choices", "data", "models"];

/// A server's account of a failure.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    /// In its words, with its code where that is a word.
    pub message: String,
    /// The HTTP status that it names in its text, which need not be the answer's.
    pub code: Option<u16>,
    /// Its type and code, in lower case.
    pub kind: String,
    /// The field of the request that it blames.
    pub field: Option<String>,
}

impl Said {
    /// Of the body of a refusal, JSON or not.
    pub fn refusal(body: &[u8]) -> Self {
        match serde_json::from_slice::<Value>(body) {
            Ok(value) => Self::of(&value),
            Err(_) => Self { message: plain(&String::from_utf8_lossy(body)), ..Self::default() },
        }
    }

    /// Inside of an answer with a status of success; `None` where there is no failure.
    pub fn within(answer: &Value) -> Option<Self> {
        if answer.get("error").is_some_and(is_something) || answer.get("errors").is_some_and(is_something) {
            return Some(Self::of(answer));
        }
        if answer.get("object").and_then(Value::as_str) == Some("error") {
            return Some(Self::of(answer));
        }
        let is_answer = ANSWERS.iter().any(|key| answer.get(key).is_some());
        if !is_answer && ["detail", "message", "msg"].iter().any(|key| answer.get(key).is_some_and(is_something)) {
            return Some(Self::of(answer));
        }
        answer.get("choices").and_then(Value::as_array).into_iter().flatten().find_map(|choice| {
            let nested = choice.get("error").filter(|e| is_something(e));
            let reason = choice.get("finish_reason").and_then(Value::as_str).filter(|r| FAILED.contains(r));
            match (nested, reason) {
                (Some(_), _) => Some(Self::of(choice)),
                (None, Some(reason)) => Some(Self {
                    message: format!("it ended the answer with finish_reason `{reason}`"),
                    ..Self::default()
                }),
                (None, None) => None,
            }
        })
    }

    /// What the servers' dialects call their message: `error.message` (OpenAI, vLLM, llama.cpp), `error` (Ollama, TGI),
    /// `detail` (FastAPI), `errors[0].message` (Cloudflare), `message` (Azure).
    fn of(value: &Value) -> Self {
        let first = |v: &Value| v.as_array().and_then(|a| a.first()).cloned();
        let error = ["error", "errors"].iter().find_map(|key| value.get(key).filter(|e| is_something(e)));
        let error = error.map_or_else(|| value.clone(), |e| first(e).unwrap_or_else(|| e.clone()));
        let text =
            ["message", "detail", "msg", "error"].iter().find_map(|key| error.get(key).filter(|v| is_something(v)));
        let mut message = words(text.unwrap_or(&error));
        let text_of = |key: &str| error.get(key).and_then(Value::as_str);
        if let Some(code) = text_of("code").filter(|c| c.parse::<f64>().is_err()) {
            message = format!("{message} ({code})");
        }
        let number = |key: &str| match error.get(key).or_else(|| value.get(key))? {
            Value::Number(n) => n.as_u64(),
            Value::String(s) => s.trim().parse().ok(),
            _ => None,
        };
        let codes = ["code", "status", "statusCode", "status_code"];
        let code = codes.iter().filter_map(|key| number(key)).find(|n| (400..600).contains(n));
        let kind = ["type", "code", "status"].iter().filter_map(|key| text_of(key)).collect::<Vec<_>>().join(" ");
        Self {
            message,
            code: code.and_then(|n| n.try_into().ok()),
            kind: kind.to_lowercase(),
            field: text_of("param").map(str::to_owned),
        }
    }

    /// The status that a failure inside of an answer of success stands for: what it names, or what its type means.
    /// A failure that says neither may pass, as a gateway's.
    pub fn status(&self) -> u16 {
        let is = |parts: &[&str]| parts.iter().any(|p| self.kind.contains(p));
        match self.code {
            Some(code) => code,
            None if is(&["rate_limit", "ratelimit", "too_many", "overloaded"]) => 429,
            None if is(&["context_length", "invalid_request", "badrequest", "bad_request", "unsupported"]) => 400,
            None if is(&["authentication", "invalid_api_key", "permission"]) => 401,
            None if is(&["not_found", "notfound"]) => 404,
            None => 502,
        }
    }

    /// Whether it is about the length of a prompt: only where the status can mean that, and no word is of a load that
    /// passes. Wordings of OpenAI and llama-cpp-python ("maximum context length"), vLLM ("maximum model length"), SGLang
    /// ("context length"), llama.cpp ("context size"), TGI ("`inputs` must have less than").
    pub fn is_too_long(&self, status: u16) -> bool {
        const WORDS: [&str; 6] = [
            "context length",
            "context_length",
            "context size",
            "context window",
            "maximum model length",
            "`inputs` must have less than",
        ];
        const PASSES: [&str; 8] =
            ["rate limit", "per min", "per day", "per second", "quota", "overload", "try again", "is loading"];
        let message = format!("{} {}", self.message, self.kind).to_lowercase();
        matches!(status, 400 | 413 | 422)
            && WORDS.iter().any(|w| message.contains(w))
            && !PASSES.iter().any(|w| message.contains(w))
    }

    /// Whether it refuses the field `name` as such, or the value that it was given: not merely how large that is.
    pub fn refuses(&self, name: &str) -> bool {
        const WORDS: [&str; 19] = [
            "unsupported",
            "not support",
            "n't support",
            "unrecognized",
            "unrecognised",
            "unknown",
            "unexpected",
            "not permitted",
            "not allowed",
            "not accepted",
            "extra inputs",
            "extra_forbidden",
            "deprecated",
            "no longer",
            "instead",
            "only the default",
            "strictly positive",
            "greater than 0",
            "additional propert",
        ];
        let message = format!("{} {}", self.message, self.kind).to_lowercase();
        let named = self.field.as_deref() == Some(name) || self.names(name);
        named && WORDS.iter().any(|w| message.contains(w))
    }

    /// Whether `name` stands in it as a word of its own: not in `echo-7b`, nor in `max_tokens_to_sample`.
    pub fn names(&self, name: &str) -> bool {
        let joins = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
        self.message.match_indices(name).any(|(at, _)| {
            let (before, after) = (&self.message[..at], &self.message[at + name.len()..]);
            !before.chars().next_back().is_some_and(joins) && !after.chars().next().is_some_and(joins)
        })
    }
}

/// Whether a field says anything: `"error": null`, `false`, `""`, `{}` and `[]` are no errors.
fn is_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    }
}

/// The text of a message. FastAPI's list of mistakes without the request's own fields, which it repeats in `input`.
fn words(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(words).collect::<Vec<_>>().join("; "),
        Value::Object(fields) => match fields.get("msg").or_else(|| fields.get("message")).and_then(Value::as_str) {
            Some(text) => {
                let place = fields.get("loc").and_then(Value::as_array).into_iter().flatten();
                let place: Vec<_> = place.map(|p| p.as_str().map_or_else(|| p.to_string(), str::to_owned)).collect();
                if place.is_empty() { text.to_owned() } else { format!("{}: {text}", place.join(".")) }
            }
            None => value.to_string(),
        },
        other => other.to_string(),
    }
}

/// A page's or text's words on one line: of HTML its title, or else what is between the tags.
fn plain(text: &str) -> String {
    let text = text.trim();
    if !text.starts_with('<') {
        return text.to_owned();
    }
    let lower = text.to_ascii_lowercase();
    let title = lower.find("<title>").and_then(|start| {
        let from = start + "<title>".len();
        Some(&text[from..from + lower[from..].find("</title>")?])
    });
    if let Some(title) = title.filter(|t| !t.trim().is_empty()) {
        return title.trim().to_owned();
    }
    let mut inside = false;
    let kept = text.chars().map(|c| match c {
        '<' => {
            inside = true;
            ' '
        }
        '>' => {
            inside = false;
            ' '
        }
        _ if inside => ' ',
        c => c,
    });
    let kept: String = kept.collect();
    kept.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn message(value: &Value) -> String {
        Said::refusal(value.to_string().as_bytes()).message
    }

    #[test]
    fn every_dialects_message_is_found() {
        for (value, expected) in [
            (json!({"error": {"message": "no", "code": "bad_thing", "type": "x"}}), "no (bad_thing)"),
            (json!({"error": {"message": "no", "code": 400}}), "no"),
            (json!({"error": "no"}), "no"),
            (json!({"detail": "no"}), "no"),
            (json!({"object": "error", "message": "no", "code": 50001}), "no"),
            (json!({"statusCode": 429, "message": "no"}), "no"),
            (json!({"success": false, "errors": [{"code": 7009, "message": "no"}]}), "no"),
            (json!({"error": {"error": {"message": "no"}}}), "no"),
            (
                json!({"detail": [{"type": "missing", "loc": ["body", "messages"], "msg": "Field required",
                    "input": {"echo": true}}]}),
                "body.messages: Field required",
            ),
        ] {
            assert_eq!(message(&value), expected, "{value}");
        }
        assert_eq!(Said::refusal(b"<html><body>A timeout  occurred</body></html>").message, "A timeout occurred");
        assert_eq!(Said::refusal(b"<html><title>524: timed out</title><p>x").message, "524: timed out");
        assert_eq!(Said::refusal(b" busy\n").message, "busy");
    }

    #[test]
    fn failures_inside_of_answers_are_found_and_have_a_status() {
        let choice = |c: Value| json!({"choices": [c], "error": null});
        for (value, status) in [
            (choice(json!({"text": "", "error": {"code": 502, "message": "Upstream"}})), 502),
            (choice(json!({"text": "", "error": {"code": "429", "message": "slow"}})), 429),
            (choice(json!({"text": "half", "finish_reason": "error"})), 502),
            (choice(json!({"text": "half", "finish_reason": "abort"})), 502),
            (json!({"object": "error", "message": "overloaded", "code": 50001}), 502),
            (json!({"detail": "loading"}), 502),
            (json!({"message": "slow", "statusCode": 429}), 429),
            (json!({"error": {"message": "m", "type": "invalid_request_error"}, "choices": []}), 400),
            (json!({"error": {"message": "m", "type": "overloaded_error"}}), 429),
            (json!({"errors": ["x"]}), 502),
        ] {
            assert_eq!(Said::within(&value).map(|s| s.status()), Some(status), "{value}");
        }
        for value in [
            choice(json!({"text": "x", "finish_reason": "stop", "error": null})),
            json!({"choices": [{"text": "x", "error": {}}], "error": "", "message": "hello"}),
            json!({"object": "list", "data": [], "error": {}}),
            json!({"data": 1}),
            json!([1]),
        ] {
            assert_eq!(Said::within(&value), None, "{value}");
        }
    }

    #[test]
    fn length_is_recognised_in_every_dialect_and_only_where_the_status_can_mean_it() {
        let said = |message: &str| Said { message: message.into(), ..Said::default() };
        for message in [
            "This model's maximum context length is 2048 tokens, however you requested 3000 tokens",
            "The decoder prompt (length 3000) is longer than the maximum model length of 2048.",
            "The input (3000 tokens) is longer than the model's context length (2048 tokens).",
            "the request exceeds the available context size",
            "Requested tokens (3000) exceed context window of 2048",
            "Input validation error: `inputs` must have less than 1024 tokens. Given: 3000",
        ] {
            for status in [400, 413, 422] {
                assert!(said(message).is_too_long(status), "{message}");
            }
            for status in [401, 404, 408, 429, 500, 502, 503, 529] {
                assert!(!said(message).is_too_long(status), "{message} {status}");
            }
        }
        assert!(!said("Rate limit reached on tokens per min. Shorten the context length or wait").is_too_long(400));
        assert!(!said("Unsupported param: echo").is_too_long(400));
    }

    #[test]
    fn a_field_is_refused_by_name_and_not_by_its_size() {
        let said = |message: &str| Said { message: message.into(), ..Said::default() };
        let newer = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.";
        assert!(said(newer).refuses("max_tokens"));
        assert!(
            said("'temperature' does not support 0 with this model. Only the default (1) value is supported.")
                .refuses("temperature")
        );
        assert!(said("body.stop: Extra inputs are not permitted").refuses("stop"));
        assert!(said("`temperature` must be strictly positive").refuses("temperature"));
        assert!(!said("max_tokens is too large: 32000. This model has at most 4096").refuses("max_tokens"));
        assert!(!said("unknown field `max_tokens_to_sample`").refuses("max_tokens"));
        assert!(!said("model 'echo-7b' is unknown").names("echo"));
        let by_field = Said { message: "Unsupported value".into(), field: Some("stop".into()), ..Said::default() };
        assert!(by_field.refuses("stop") && !by_field.refuses("temperature"));
    }
}
