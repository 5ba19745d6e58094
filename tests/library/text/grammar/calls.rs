//! Calls of tools: what is drawn is read as calls of the tools, with arguments by their schemas.

use recoup::text::grammar::{Calls, Grammar};
use recoup::text::reply::{self, Reasoning, Reply, ReplyFormat, Splitter};
use serde_json::{Value, json};

use super::json_schema::wrong;
use super::{BOOKS, Held, PIECES, with_tokens};
use crate::support::random::Random;

/// Marks of the formats that are tokens of some models, special ones and others.
const SPECIAL: [&str; 14] = [
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
];
const ADDED: [&str; 4] = ["<tool_call>", "</tool_call>", "<think>", "</think>"];

const FAMILIES: [&str; 8] =
    ["hermes", "qwen3_coder", "nemotron_json", "llama3_json", "mistral", "deepseek_v31", "qwen3_xml", "openai_gptoss"];

fn format(family: &str) -> ReplyFormat {
    let calls = reply::Calls::named(family);
    ReplyFormat { reasoning: calls.is_none().then(|| Reasoning::named(family).unwrap()), calls }
}

/// Where a prompt ends.
fn prompt(family: &str) -> &'static str {
    if family == "openai_gptoss" { "<|start|>assistant" } else { "" }
}

fn tool(name: &str, parameters: Value) -> Value {
    json!({"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}})
}

/// Tools as people write them, and as pydantic does.
fn tools() -> Vec<Value> {
    vec![
        tool(
            "get_weather",
            json!({"type": "object", "properties": {
            "city": {"type": "string", "description": "d"},
            "unit": {"type": "string", "enum": ["celsius", "fahren\"heit"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14}},
            "required": ["city"], "additionalProperties": false}),
        ),
        tool("now", json!({"type": "object", "properties": {}})),
        tool("no-parameters", Value::Null),
        tool(
            "book.table",
            json!({"type": "object", "$defs": {"When": {"type": "object", "properties": {
            "hour": {"type": "integer"}}, "required": ["hour"], "additionalProperties": false}},
            "properties": {
                "when": {"$ref": "#/$defs/When"},
                "exact": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                "note": {"anyOf": [{"type": "string", "enum": ["a", "b c"]}, {"type": "null"}]},
                "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{1,2}$"},
                "short": {"type": "string", "maxLength": 4},
                "none": {"type": ["string", "null"], "enum": [null]},
                "any": {"description": "d"},
                "list": {"type": "array", "items": {"type": "number"}, "maxItems": 2}},
            "required": ["when", "code", "list"], "additionalProperties": false}),
        ),
    ]
}

fn calls(family: &str, tools: Vec<Value>, only: Option<&str>, parallel: bool) -> Grammar {
    Grammar::Calls(Calls { format: format(family), tools, only: only.map(str::to_owned), parallel })
}

/// What the splitter makes of an answer, and the calls that it gave while the answer came.
fn read(family: &str, tools: &[Value], answer: &str, piece: usize) -> (Reply, usize) {
    let mut splitter = Splitter::new(format(family), prompt(family), tools);
    let mut streamed = Vec::new();
    let chars: Vec<char> = answer.chars().collect();
    for piece in chars.chunks(piece) {
        splitter.push(&piece.iter().collect::<String>());
        streamed.extend(splitter.take_calls());
    }
    let (_, reply) = splitter.finish();
    let streamed: Vec<_> = streamed.into_iter().map(|call| call.expect("a call that can be read")).collect();
    assert_eq!(streamed, reply.calls[..streamed.len()], "{answer}");
    (reply, streamed.len())
}

/// Draws answers, and judges the calls in them; how many ended, and how many had several calls.
fn judge(
    held: &Held,
    family: &str,
    only: Option<&str>,
    parallel: bool,
    rounds: usize,
    random: &mut Random,
) -> (usize, usize) {
    let tools = tools();
    let grammar = calls(family, tools.clone(), only, parallel);
    let (mut ended, mut several) = (0, 0);
    for _ in 0..rounds {
        let Some(answer) = held.walk(held.constraint(&grammar).unwrap(), random) else { continue };
        // A number that no f64 is; grammars know of no such limit.
        if super::overflows(&answer) {
            continue;
        }
        ended += 1;
        let (reply, _) = read(family, &tools, &answer, 1 + random.below(9));
        assert!(reply.malformed.is_empty() && !reply.calls.is_empty(), "{family}: {answer:?} gave {reply:?}");
        assert!(reply.answer.is_empty(), "{family}: {answer:?} gave {:?}", reply.answer);
        assert!(parallel || reply.calls.len() == 1, "{family}: {answer:?}");
        several += usize::from(reply.calls.len() > 1);
        for call in &reply.calls {
            let tool = tools.iter().find(|tool| tool["function"]["name"] == call.name);
            let tool = tool.unwrap_or_else(|| panic!("{family}: {answer:?} calls {}", call.name));
            assert!(only.is_none_or(|only| only == call.name), "{family}: {answer:?}");
            let any = json!({"type": "object"});
            let parameters = Some(&tool["function"]["parameters"]).filter(|p| !p.is_null()).unwrap_or(&any);
            assert_eq!(wrong(parameters, parameters, &call.arguments), None, "{family}: {answer:?}");
        }
    }
    (ended, several)
}

#[test]
fn what_is_drawn_is_read_as_calls_of_the_tools() {
    let tokens = Held::new(with_tokens(&SPECIAL, &ADDED), &["<|im_end|>", "<|call|>"]);
    let mut random = Random(6);
    for family in FAMILIES {
        let (mut ended, mut several) = (0, 0);
        // Where marks are text, where they are tokens, and where there are byte tokens besides.
        for held in [&*BOOKS, &tokens, &*PIECES] {
            // A mark that is text is no token that harmony can do without.
            for (only, parallel) in [(None, true), (None, false), (Some("book.table"), true)] {
                let found = judge(held, family, only, parallel, 12, &mut random);
                ended += found.0;
                several += found.1;
            }
        }
        assert!(ended >= 20, "{family}: only {ended} of 108 answers ended");
        assert_eq!(several > 0, family != "openai_gptoss", "{family}: {several} of {ended} answers had several calls");
    }
}

/// As the families' chat templates write calls.
#[test]
fn calls_as_templates_write_them_are_accepted() {
    let tokens = Held::new(with_tokens(&SPECIAL, &ADDED), &["<|im_end|>", "<|call|>"]);
    let arguments = "{\"city\": \"Rome\", \"days\": 3}";
    for (held, family, written) in [
        (&*BOOKS, "hermes", format!("<tool_call>\n{{\"name\": \"get_weather\", \"arguments\": {arguments}}}\n</tool_call>")),
        (&tokens, "hermes", format!("\n\n<tool_call>\n{{\"name\": \"get_weather\", \"arguments\": {arguments}}}\n</tool_call>\n<tool_call>\n{{\"name\": \"now\", \"arguments\": {{}}}}\n</tool_call>")),
        (&tokens, "qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>".into()),
        (&*BOOKS, "qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\n<b>two\n\nlines</b>\n\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>".into()),
        (&*BOOKS, "nemotron_json", format!("<TOOLCALL>[{{\"name\": \"get_weather\", \"arguments\": {arguments}}}, {{\"name\": \"now\", \"arguments\": {{}}}}]</TOOLCALL>")),
        (&*BOOKS, "llama3_json", format!("{{\"name\": \"get_weather\", \"parameters\": {arguments}}}; {{\"name\": \"now\", \"parameters\": {{}}}}")),
        (&tokens, "llama3_json", format!("<|python_tag|>{{\"name\": \"get_weather\", \"parameters\": {arguments}}}")),
        (&*BOOKS, "mistral", format!("[TOOL_CALLS][{{\"name\": \"get_weather\", \"arguments\": {arguments}}}]")),
        (&tokens, "mistral", format!("[TOOL_CALLS]get_weather[ARGS]{arguments}[TOOL_CALLS]now[ARGS]{{}}")),
        (&tokens, "deepseek_v31", format!("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>")),
        (&tokens, "openai_gptoss", format!("<|channel|>analysis<|message|>Let me <b>see</b>.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{arguments}")),
        (&tokens, "openai_gptoss", format!("<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{arguments}")),
    ] {
        assert!(held.accepts(&calls(family, tools(), None, true), &written), "{family}: {written}");
        let (reply, _) = read(family, &tools(), &written, 3);
        assert_eq!(reply.calls[0].arguments["city"], if written.contains("two\n") { "<b>two\n\nlines</b>\n" } else { "Rome" }, "{written}");
        for wrong in [written.replace("get_weather", "get_whether"), written.replace("3", "15"), written.replace("city", "town")] {
            assert!(wrong == written || !held.accepts(&calls(family, tools(), None, true), &wrong), "{family}: {wrong}");
        }
        assert!(!held.accepts(&calls(family, tools(), Some("now"), true), &written), "{family}: another is to be called");
    }
}

#[test]
fn a_call_is_given_out_as_soon_as_it_ends() {
    let two = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>\n<tool_call>\nnonsense\n</tool_call>";
    let mut splitter = Splitter::new(format("hermes"), "", &tools());
    let mut given = Vec::new();
    for (at, c) in two.char_indices() {
        splitter.push(&c.to_string());
        given.extend(splitter.take_calls().into_iter().map(|call| (at, call)));
    }
    let ends: Vec<usize> = two.match_indices("</tool_call>").map(|(at, end)| at + end.len() - 1).collect();
    assert_eq!(given.iter().map(|(at, _)| *at).collect::<Vec<_>>(), ends);
    assert_eq!(given[0].1.as_ref().unwrap().name, "now");
    assert!(given[1].1.as_ref().unwrap_err().text.contains("nonsense"));
    assert!(splitter.take_calls().is_empty());
    let (_, reply) = splitter.finish();
    assert_eq!((reply.calls.len(), reply.malformed.len()), (1, 1));
    // The end of the reply ends the last of Mistral's.
    let (reply, streamed) = read("mistral", &tools(), "[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}", 1);
    assert_eq!((reply.calls.len(), streamed), (2, 1));
}

#[test]
fn what_cannot_be_called_is_refused_by_name() {
    let now = || vec![tool("now", json!({}))];
    assert!(BOOKS.error(&calls("hermes", vec![], None, true)).contains("there is no tool"));
    assert!(BOOKS.error(&calls("hermes", now(), Some("then"), true)).contains("no tool `then`"));
    let unknown = Calls { format: ReplyFormat::default(), tools: now(), only: None, parallel: true };
    assert!(BOOKS.error(&Grammar::Calls(unknown)).contains("--tool-call-parser"));
    let not = json!({"type": "object", "properties": {"a": {"not": {}}}});
    let error = BOOKS.error(&calls("hermes", vec![tool("now", json!({})), tool("f", not.clone())], None, true));
    assert_eq!(
        error,
        "tool `f`: JSON schema, at `#/properties/a/not`: `not` cannot be enforced; leave it out, and check the answer for it"
    );
    // What is not called may say what it wants.
    assert!(
        BOOKS.constraint(&calls("hermes", vec![tool("now", json!({})), tool("f", not)], Some("now"), true)).is_ok()
    );
    for (parameters, why) in [
        (json!({"type": "object", "anyOf": [{"required": ["a"]}]}), "`anyOf`"),
        (json!({"properties": {"a>": {}}}), "name of a tag"),
        (json!({"properties": {"a": {"enum": ["x</parameter>"]}}}), "a tag in it"),
        (json!({"properties": {"a": {"type": "string", "pattern": "^a|b$"}}}), "parentheses"),
    ] {
        let error = BOOKS.error(&calls("qwen3_coder", vec![tool("f", parameters.clone())], None, true));
        assert!(error.contains(why), "{parameters}: {error}");
    }
}
