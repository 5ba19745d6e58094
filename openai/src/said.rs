//! What a server says went wrong: read before anything else in an answer, whatever its status.

use std::fmt;

use recoup_ground::shorten::shorten;
use serde_json::Value;

/// Ways to end an answer that mean it was never finished, in the `finish_reason` of servers and routers.
const FAILED: [&str; 6] = ["error", "abort", "aborted", "cancelled", "canceled", "failed"];
/// Keys of what is asked for; an object with one of them is no error by its `message` or `detail` alone.
const ANSWERS: [&str; 3] = ["choices", "data", "models"];

/// Characters of a server's message that go into an error.
pub(super) const LONGEST_MESSAGE: usize = 400;

/// A server's account of a failure. Shown, only its beginning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// In its words, with its code where that is a word.
    pub(super) message: String,
    /// The HTTP status that it names in its text, which need not be the answer's.
    code: Option<u16>,
    /// Its type and code, in lower case.
    kind: String,
    /// The field of the request that it blames.
    field: Option<String>,
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shorten(self.message.trim(), LONGEST_MESSAGE))
    }
}

impl Said {
    /// These words alone.
    pub(super) fn words(message: impl Into<String>) -> Self {
        Self { message: message.into(), ..Self::default() }
    }

    /// Of the body of a refusal, JSON or not.
    pub(super) fn refusal(body: &[u8]) -> Self {
        match serde_json::from_slice(body) {
            Ok(value) => Self::of(&value),
            Err(_) => Self::words(plain(&String::from_utf8_lossy(body))),
        }
    }

    /// Inside of an answer with a status of success; `None` where there is no failure.
    pub(super) fn within(answer: &Value) -> Option<Self> {
        let has = |keys: &[&str]| first(answer, keys).is_some();
        let is_answer = ANSWERS.iter().any(|key| answer.get(key).is_some());
        if has(&["error", "errors"]) || answer["object"] == "error" || !is_answer && has(&["detail", "message", "msg"])
        {
            return Some(Self::of(answer));
        }
        answer["choices"].as_array()?.iter().find_map(|choice| {
            if first(choice, &["error"]).is_some() {
                return Some(Self::of(choice));
            }
            let reason = choice["finish_reason"].as_str().filter(|r| FAILED.contains(r))?;
            Some(Self::words(format!("it ended the answer with finish_reason `{reason}`")))
        })
    }

    /// What the servers' dialects call their message: `error.message` (OpenAI, vLLM, llama.cpp), `error` (Ollama, TGI),
    /// `detail` (FastAPI), `errors[0].message` (Cloudflare), `message` (Azure).
    fn of(value: &Value) -> Self {
        let error = first(value, &["error", "errors"]).unwrap_or(value);
        let error = error.get(0).unwrap_or(error);
        let mut message = words(first(error, &["message", "detail", "msg", "error"]).unwrap_or(error));
        if let Some(code) = error["code"].as_str().filter(|c| c.parse::<f64>().is_err()) {
            message = format!("{message} ({code})");
        }
        let code = ["code", "status", "statusCode", "status_code"].iter().find_map(|key| {
            let number = error.get(key).or_else(|| value.get(key))?;
            let number = number.as_str().map_or_else(|| number.as_u64(), |text| text.trim().parse().ok());
            number.and_then(|n| u16::try_from(n).ok()).filter(|n| (400..600).contains(n))
        });
        let kind: Vec<_> = ["type", "code", "status"].iter().filter_map(|key| error[*key].as_str()).collect();
        let field = error["param"].as_str().map(str::to_owned);
        Self { message, code, kind: kind.join(" ").to_lowercase(), field }
    }

    /// The status that a failure inside of an answer of success stands for: what it names, or what its type means.
    /// A failure that says neither may pass, as a gateway's.
    pub(super) fn status(&self) -> u16 {
        const KINDS: [(u16, &[&str]); 4] = [
            (429, &["rate_limit", "ratelimit", "too_many", "overloaded"]),
            (400, &["context_length", "invalid_request", "badrequest", "bad_request", "unsupported"]),
            (401, &["authentication", "invalid_api_key", "permission"]),
            (404, &["not_found", "notfound"]),
        ];
        let of_kind = KINDS.iter().find(|(_, parts)| parts.iter().any(|p| self.kind.contains(p)));
        self.code.or(of_kind.map(|(status, _)| *status)).unwrap_or(502)
    }

    /// Whether it is about the length of a prompt: only where the status can mean that, and no word is of a load that
    /// passes. Wordings of OpenAI and llama-cpp-python ("maximum context length"), vLLM ("maximum model length"), SGLang
    /// ("context length"), llama.cpp ("context size"), TGI ("`inputs` must have less than").
    pub(super) fn is_too_long(&self, status: u16) -> bool {
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
        matches!(status, 400 | 413 | 422) && self.has_one_of(&WORDS) && !self.has_one_of(&PASSES)
    }

    /// Whether it refuses the field `name` as such, or the value that it was given: not merely how large that is.
    pub(super) fn refuses(&self, name: &str) -> bool {
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
        (self.field.as_deref() == Some(name) || self.names(name)) && self.has_one_of(&WORDS)
    }

    fn has_one_of(&self, words: &[&str]) -> bool {
        let said = format!("{} {}", self.message, self.kind).to_lowercase();
        words.iter().any(|w| said.contains(w))
    }

    /// Whether `name` stands in it as a word of its own: not in `echo-7b`, nor in `max_tokens_to_sample`.
    pub(super) fn names(&self, name: &str) -> bool {
        let joins = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
        self.message
            .match_indices(name)
            .any(|(at, _)| !self.message[..at].ends_with(joins) && !self.message[at + name.len()..].starts_with(joins))
    }
}

/// The first of these fields that says anything: `"error": null`, `false`, `""`, `{}` and `[]` are no errors.
fn first<'a>(value: &'a Value, keys: &[&str]) -> Option<&'a Value> {
    keys.iter().filter_map(|key| value.get(key)).find(|field| match field {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    })
}

/// The text of a message. FastAPI's list of mistakes without the request's own fields, which it repeats in `input`.
fn words(value: &Value) -> String {
    if let Value::Array(items) = value {
        return items.iter().map(words).collect::<Vec<_>>().join("; ");
    }
    let Some(text) = value.as_str().or(value["msg"].as_str()).or(value["message"].as_str()) else {
        return value.to_string();
    };
    let place = value["loc"].as_array().map(|parts| parts.iter().map(words).collect::<Vec<_>>().join("."));
    place.filter(|p| !p.is_empty()).map_or_else(|| text.to_owned(), |place| format!("{place}: {text}"))
}

/// A page's or text's words on one line: of HTML its title, or else what is between the tags.
fn plain(text: &str) -> String {
    let text = text.trim();
    if !text.starts_with('<') {
        return text.to_owned();
    }
    let lower = text.to_ascii_lowercase();
    let title = lower.find("<title>").map(|at| at + "<title>".len());
    let title = title.and_then(|from| Some(text[from..from + lower[from..].find("</title>")?].trim()));
    if let Some(title) = title.filter(|t| !t.is_empty()) {
        return title.to_owned();
    }
    let between = text.split('<').filter_map(|part| part.split_once('>'));
    between.flat_map(|(_, words)| words.split_whitespace()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_dialects_message_is_found() {
        for (body, expected) in [
            (r#"{"error": {"message": "no", "code": "bad_thing", "type": "x"}}"#, "no (bad_thing)"),
            (r#"{"error": {"message": "no", "code": 400}}"#, "no"),
            (r#"{"error": "no"}"#, "no"),
            (r#"{"detail": "no"}"#, "no"),
            (r#"{"object": "error", "message": "no", "code": 50001}"#, "no"),
            (r#"{"statusCode": 429, "message": "no"}"#, "no"),
            (r#"{"success": false, "errors": [{"code": 7009, "message": "no"}]}"#, "no"),
            (r#"{"error": {"error": {"message": "no"}}}"#, "no"),
            (
                r#"{"detail": [{"loc": ["body", "messages", 0], "msg": "Field required", "input": {"echo": true}}]}"#,
                "body.messages.0: Field required",
            ),
            ("<html><body>A timeout  occurred</body></html>", "A timeout occurred"),
            ("<html><title>524: timed out</title><p>x", "524: timed out"),
            (" busy\n", "busy"),
        ] {
            assert_eq!(Said::refusal(body.as_bytes()).message, expected, "{body}");
        }
    }

    #[test]
    fn failures_inside_of_answers_are_found_and_have_a_status() {
        let choice = |c: Value| json!({"choices": [c], "error": null});
        for (value, status) in [
            (choice(json!({"text": "", "error": {"code": 502, "message": "Upstream"}})), Some(502)),
            (choice(json!({"text": "", "error": {"code": "429", "message": "slow"}})), Some(429)),
            (choice(json!({"text": "half", "finish_reason": "error"})), Some(502)),
            (choice(json!({"text": "half", "finish_reason": "abort"})), Some(502)),
            (json!({"object": "error", "message": "overloaded", "code": 50001}), Some(502)),
            (json!({"detail": "loading"}), Some(502)),
            (json!({"message": "slow", "statusCode": 429}), Some(429)),
            (json!({"error": {"message": "m", "type": "invalid_request_error"}, "choices": []}), Some(400)),
            (json!({"error": {"message": "m", "type": "overloaded_error"}}), Some(429)),
            (json!({"errors": ["x"]}), Some(502)),
            (choice(json!({"text": "x", "finish_reason": "stop", "error": null})), None),
            (json!({"choices": [{"text": "x", "error": {}}], "error": "", "message": "hello"}), None),
            (json!({"object": "list", "data": [], "error": {}}), None),
            (json!({"data": 1}), None),
            (json!([1]), None),
        ] {
            assert_eq!(Said::within(&value).map(|s| s.status()), status, "{value}");
        }
    }

    #[test]
    fn length_is_recognised_in_every_dialect_and_only_where_the_status_can_mean_it() {
        for message in [
            "This model's maximum context length is 2048 tokens, however you requested 3000 tokens",
            "The decoder prompt (length 3000) is longer than the maximum model length of 2048.",
            "The input (3000 tokens) is longer than the model's context length (2048 tokens).",
            "the request exceeds the available context size",
            "Requested tokens (3000) exceed context window of 2048",
            "Input validation error: `inputs` must have less than 1024 tokens. Given: 3000",
        ] {
            let too_long = |status: &u16| Said::words(message).is_too_long(*status);
            assert!([400, 413, 422].iter().all(too_long), "{message}");
            assert!(![401, 404, 408, 429, 500, 502, 503, 529].iter().any(too_long), "{message}");
        }
        for message in ["Rate limit on tokens per min. Shorten the context length or wait", "Unsupported param: echo"] {
            assert!(!Said::words(message).is_too_long(400), "{message}");
        }
    }

    #[test]
    fn a_field_is_refused_by_name_and_not_by_its_size() {
        for (message, field, refused) in [
            (
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'x' instead.",
                "max_tokens",
                true,
            ),
            ("'temperature' does not support 0. Only the default (1) value is supported.", "temperature", true),
            ("body.stop: Extra inputs are not permitted", "stop", true),
            ("`temperature` must be strictly positive", "temperature", true),
            ("max_tokens is too large: 32000. This model has at most 4096", "max_tokens", false),
            ("unknown field `max_tokens_to_sample`", "max_tokens", false),
        ] {
            assert_eq!(Said::words(message).refuses(field), refused, "{message}");
        }
        assert!(!Said::words("model 'echo-7b' is unknown").names("echo"));
        let by_field = Said { field: Some("stop".into()), ..Said::words("Unsupported value") };
        assert!(by_field.refuses("stop") && !by_field.refuses("temperature"));
    }
}
