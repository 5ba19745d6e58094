//! `recoup serve` as its clients see it: what it answers, what it refuses, and that nobody's request harms another's.

use std::io::Read as _;
use std::io::Write as _;
use std::net::TcpStream;
use std::time::Duration;

use serde_json::{Value, json};

use recoup::formats::kv::KvFormat;
use recoup::model::Decoder;

use crate::support::command::{BF16, Folder, NVFP4, recoup, succeed};
use crate::support::fixtures::cpu;
use crate::support::http::Server;
use crate::support::project;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// A chat template as Qwen's are, without its words.
const TEMPLATE: &str = "\
{%- if tools %}Tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}, by <tool_call>{}</tool_call>\n{% endif %}\
{%- for m in messages %}{{ m.role }}: {{ m.content }}\n\
{%- if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endif %}\
{% endfor %}{% if add_generation_prompt %}assistant:{% if style %} {{ style }}{% endif %}{% endif %}";

fn prompt(text: &str, max_tokens: usize) -> Value {
    json!({"prompt": text, "max_tokens": max_tokens, "temperature": 0, "logprobs": 3})
}

/// What of an answer must repeat: all but its name and time.
fn choices(body: &Value) -> Value {
    body["choices"].clone()
}

/// Serves the shipped model, which has no template, with one.
fn chat_server(folder: &Folder, more: &[&str]) -> Server {
    let template = folder.write("template.jinja", TEMPLATE);
    let args = [&[NVFP4, "--chat-template", &template][..], more].concat();
    Server::start(&args)
}

#[test]
fn an_answer_is_the_same_whatever_else_is_asked() {
    let server = Server::start(&[NVFP4, "--max-num-seqs", "8", "--max-num-batched-tokens", "64"]);
    let asked: Vec<Value> = (0..6)
        .map(|i| {
            let mut body = prompt(&"The king said to his son, who was young. ".repeat(i + 1)[5 * i..], 12 + i);
            if i % 2 == 1 {
                (body["temperature"], body["seed"]) = (json!(0.9), json!(i));
            }
            if i == 3 {
                (body["echo"], body["prompt_logprobs"], body["n"]) = (json!(true), json!(2), json!(2));
            }
            body
        })
        .collect();
    let alone: Vec<Value> = asked.iter().map(|body| choices(&server.asked(COMPLETIONS, body))).collect();
    std::thread::scope(|scope| {
        let (server, asked, alone) = (&server, &asked, &alone);
        for thread in 0..6 {
            scope.spawn(move || {
                for i in 0..8 {
                    let at = (thread * 5 + i) % asked.len();
                    assert_eq!(choices(&server.asked(COMPLETIONS, &asked[at])), alone[at], "request {at}");
                }
            });
        }
    });
    server.is_well();
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let folder = Folder::new();
    let server = chat_server(&folder, &[]);
    let mut body = prompt("It was a dark night, and", 20);
    (body["n"], body["seed"], body["temperature"]) = (json!(2), json!(5), json!(0.8));
    let whole = server.asked(COMPLETIONS, &body);
    (body["stream"], body["stream_options"]) = (json!(true), json!({"include_usage": true}));
    let events = server.post(COMPLETIONS, &body).events();
    for choice in whole["choices"].as_array().unwrap() {
        let own: Vec<&Value> = events
            .iter()
            .flat_map(|e| e["choices"].as_array().unwrap())
            .filter(|c| c["index"] == choice["index"])
            .collect();
        let text: String = own.iter().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(text, choice["text"].as_str().unwrap());
        let logprobs: Vec<&Value> =
            own.iter().filter_map(|c| c["logprobs"]["token_logprobs"].as_array()).flatten().collect();
        assert_eq!(json!(logprobs), choice["logprobs"]["token_logprobs"]);
        let offsets: Vec<&Value> =
            own.iter().filter_map(|c| c["logprobs"]["text_offset"].as_array()).flatten().collect();
        assert_eq!(json!(offsets), choice["logprobs"]["text_offset"]);
        assert_eq!(own.last().unwrap()["finish_reason"], choice["finish_reason"]);
    }
    let tokens = |usage: &Value| {
        [&usage["prompt_tokens"], &usage["completion_tokens"], &usage["total_tokens"]].map(Value::clone)
    };
    assert_eq!(tokens(&events.last().unwrap()["usage"]), tokens(&whole["usage"]));
    assert_eq!(events.last().unwrap()["choices"], json!([]));

    let mut chat = json!({"messages": [{"role": "user", "content": "Tell of a ship."}], "max_completion_tokens": 16,
        "temperature": 0, "logprobs": true, "top_logprobs": 2});
    let whole = server.asked(CHAT, &chat);
    chat["stream"] = json!(true);
    let events = server.post(CHAT, &chat).events();
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let deltas: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(deltas, whole["choices"][0]["message"]["content"].as_str().unwrap());
    let told: Vec<&Value> =
        events.iter().filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array()).flatten().collect();
    assert_eq!(json!(told), whole["choices"][0]["logprobs"]["content"]);
    assert!(events.iter().all(|e| e.get("usage").is_none()));
    server.is_well();
}

#[test]
fn token_ids_and_echo_score_what_they_are_given() {
    let server = Server::start(&[NVFP4]);
    let text = "The old man went to the sea.";
    let ids = server.asked("/tokenize", &json!({"prompt": text}))["tokens"].clone();
    assert_eq!(server.asked("/detokenize", &json!({"tokens": ids}))["prompt"], text);
    let by_text = server.asked(COMPLETIONS, &json!({"prompt": text, "max_tokens": 0, "echo": true, "logprobs": 1}));
    let logprobs = &by_text["choices"][0]["logprobs"];
    assert_eq!(by_text["choices"][0]["text"], text);
    assert_eq!(logprobs["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect::<String>(), text);
    assert_eq!(logprobs["token_logprobs"][0], Value::Null);
    let asked =
        json!({"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 2, "return_token_ids": true});
    let by_ids = server.asked(COMPLETIONS, &asked);
    let choice = &by_ids["choices"][0];
    assert_eq!(choice["prompt_token_ids"], ids);
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), 1);
    for (at, id) in ids.as_array().unwrap().iter().enumerate().skip(1) {
        let entry = &choice["prompt_logprobs"][at][id.to_string()];
        assert_eq!(entry["logprob"], logprobs["token_logprobs"][at]);
        let top = choice["prompt_logprobs"][at].as_object().unwrap();
        assert!(top.values().any(|t| t["rank"] == 1), "{top:?}");
        let more_probable = top.values().filter(|t| t["logprob"].as_f64() > entry["logprob"].as_f64()).count();
        assert!(entry["rank"].as_u64().unwrap() as usize > more_probable);
    }
    // What the model computes by itself, as `recoup logits` has it: the same log-probability to the last digit that f32 has.
    let folder = Folder::new();
    let input = folder.write("tokens.json", json!([ids]).to_string());
    let out = folder.name("logits.safetensors");
    succeed(&["logits", NVFP4, "--input-ids", &input, "-o", &out]);
    let file = std::fs::read(&out).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let logits: Vec<f32> = tensors
        .tensor("logits")
        .unwrap()
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let vocab = logits.len() / ids.as_array().unwrap().len();
    for (at, id) in ids.as_array().unwrap().iter().enumerate().skip(1) {
        let row = &logits[(at - 1) * vocab..at * vocab];
        let total: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
        let expected = f64::from(row[id.as_u64().unwrap() as usize]) - total.ln();
        let told = logprobs["token_logprobs"][at].as_f64().unwrap();
        assert!((told - expected).abs() < 1e-5, "token {at}: {told}, {expected}");
    }
}

#[test]
fn calls_of_tools_and_schemas_are_followed() {
    let folder = Folder::new();
    let server = chat_server(&folder, &[]);
    let tool = |name: &str, parameter: &str| {
        json!({"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object",
            "properties": {parameter: {"type": "string", "maxLength": 8}}, "required": [parameter], "additionalProperties": false}}})
    };
    let mut body = json!({"messages": [{"role": "user", "content": "Weather in Rome?"}], "max_tokens": 120, "seed": 1,
        "temperature": 0.5, "tools": [tool("weather", "city"), tool("clock", "zone")], "tool_choice": "required",
        "parallel_tool_calls": false});
    let called = server.asked(CHAT, &body);
    let choice = &called["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{called}");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(choice["message"]["tool_calls"].as_array().unwrap().len(), 1);
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    let parameter = if call["function"]["name"] == "weather" { "city" } else { "zone" };
    assert!(arguments[parameter].is_string() && arguments.as_object().unwrap().len() == 1, "{call}");
    body["tool_choice"] = json!({"type": "function", "function": {"name": "clock"}});
    body["stream"] = json!(true);
    let events = server.post(CHAT, &body).events();
    let streamed: Vec<&Value> =
        events.iter().filter_map(|e| e["choices"][0]["delta"]["tool_calls"].as_array()).flatten().collect();
    assert_eq!(streamed[0]["function"]["name"], "clock");
    assert_eq!(streamed[0]["index"], 0);
    assert!(events.iter().any(|e| e["choices"][0]["finish_reason"] == "tool_calls"));

    let schema = json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer",
        "minimum": 0, "maximum": 120}}, "required": ["name", "age"], "additionalProperties": false});
    for more in [
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "strict": true, "schema": schema}}}),
        json!({"structured_outputs": {"json": schema}}),
    ] {
        let mut body = json!({"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 100, "seed": 3});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = server.asked(CHAT, &body);
        let made: Value = serde_json::from_str(answer["choices"][0]["message"]["content"].as_str().unwrap()).unwrap();
        assert!(made["name"].is_string() && made["age"].as_u64().is_some_and(|a| a <= 120), "{made}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
    for (more, right) in [
        (json!({"structured_outputs": {"choice": ["yes", "no"]}}), ["yes", "no"]),
        (json!({"guided_regex": "(ab|cd)"}), ["ab", "cd"]),
        (json!({"structured_outputs": {"grammar": "start: \"x\" | \"y\""}}), ["x", "y"]),
    ] {
        let mut body = json!({"prompt": "Answer:", "max_tokens": 20, "seed": 4});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let text = server.asked(COMPLETIONS, &body)["choices"][0]["text"].as_str().unwrap().to_owned();
        assert!(right.contains(&text.as_str()), "{text}");
    }
    server.is_well();
}

#[test]
fn the_responses_api_tells_a_text_at_once_and_as_it_comes() {
    let folder = Folder::new();
    let server = chat_server(&folder, &[]);
    let mut body =
        json!({"input": "Tell of a ship.", "instructions": "Be brief.", "max_output_tokens": 12, "temperature": 0});
    let whole = server.asked("/v1/responses", &body);
    assert_eq!(whole["object"], "response");
    let text = whole["output"][0]["content"][0]["text"].as_str().unwrap();
    assert!(!text.is_empty());
    assert_eq!(whole["status"], "incomplete");
    assert_eq!(whole["usage"]["output_tokens"], 12);
    body["stream"] = json!(true);
    let answer = server.post("/v1/responses", &body);
    let told = answer.text();
    let events: Vec<Value> =
        told.lines().filter_map(|l| serde_json::from_str(l.strip_prefix("data: ")?).ok()).collect();
    let deltas: String = events
        .iter()
        .filter(|e| e["type"] == "response.output_text.delta")
        .filter_map(|e| e["delta"].as_str())
        .collect();
    assert_eq!(deltas, text);
    assert_eq!(events[0]["type"], "response.created");
    assert_eq!(events.last().unwrap()["type"], "response.incomplete");
    assert_eq!(events.last().unwrap()["response"]["output"][0]["content"][0]["text"], text);
    assert!(events.iter().enumerate().all(|(i, e)| e["sequence_number"] == i));
    let chat = server.asked(
        CHAT,
        &json!({"messages": [{"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tell of a ship."}], "max_tokens": 12, "temperature": 0}),
    );
    assert_eq!(chat["choices"][0]["message"]["content"], text);
    let refused = server.post("/v1/responses", &json!({"input": "x", "previous_response_id": "resp_1"}));
    assert_eq!(refused.error(), (400, "previous_response_id".into()));
}

#[test]
fn what_cannot_be_done_is_refused_by_name_and_others_are_served() {
    let folder = Folder::new();
    let server = chat_server(&folder, &["--max-body-mib", "1"]);
    let with = |more: Value| {
        let mut body = prompt("The", 2);
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let many: Vec<String> = (0..10_000).map(|i| format!("s{i}")).collect();
    let mut deep = json!(1);
    for _ in 0..100 {
        deep = json!({"type": "object", "properties": {"a": deep}});
    }
    let cases = [
        (with(json!({"model": "gpt-9"})), 404, "model"),
        (with(json!({"temperature": -0.5})), 400, "temperature"),
        (with(json!({"max_tokens": -1})), 400, "max_tokens"),
        (with(json!({"max_tokens": 1.5})), 400, "max_tokens"),
        (with(json!({"stop": many})), 400, "stop"),
        (with(json!({"logprobs": -2})), 400, "logprobs"),
        (with(json!({"prompt": []})), 400, "prompt"),
        (with(json!({"prompt": [99_999_999]})), 400, "prompt"),
        (with(json!({"prompt": [[1, "x"]]})), 400, "prompt"),
        (with(json!({"prompt": "word ".repeat(2000)})), 400, ""),
        (with(json!({"prompt": "word ".repeat(200_000)})), 400, ""),
        (with(json!({"temprature": 1})), 400, "temprature"),
        (with(json!({"suffix": "x"})), 400, "suffix"),
        (with(json!({"n": 129})), 400, "n"),
        (with(json!({"guided_regex": "("})), 400, ""),
        (with(json!({"guided_json": {"$ref": "http://127.0.0.1:1/x.json"}})), 400, ""),
        (with(json!({"guided_json": {"$ref": "file:///etc/passwd"}})), 400, ""),
    ];
    for (body, status, param) in cases {
        let answer = server.post(COMPLETIONS, &body);
        assert_eq!(answer.error(), (status, param.to_owned()), "{body:.300}: {}", answer.text());
    }
    let messages = json!([{"role": "user", "content": "x"}]);
    let chats = [
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "user"}]}), "messages"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}),
            "messages",
        ),
        (json!({"messages": messages, "chat_template": "{{ 1 }}"}), "chat_template"),
        (json!({"messages": messages, "chat_template_kwargs": {"enable_thinking": true}}), "chat_template_kwargs"),
        (json!({"messages": messages, "top_logprobs": 3}), "top_logprobs"),
        (json!({"messages": messages, "tool_choice": "required"}), "tool_choice"),
        (json!({"messages": messages, "reasoning_effort": "high"}), "reasoning_effort"),
    ];
    for (body, param) in chats {
        assert_eq!(server.post(CHAT, &body).error(), (400, param.to_owned()), "{body}");
    }
    // Arguments that the template reads reach it as data.
    let hostile =
        json!({"messages": messages, "max_tokens": 1, "chat_template_kwargs": {"style": "{{ 7 * 7 }}".repeat(100)}});
    assert!(server.post(CHAT, &hostile).status < 500);
    // Bodies that are none.
    for body in [&b""[..], b"{", b"[1]", b"\xff\xfe\x00", b"{\"prompt\": NaN}", b"{\"prompt\": \"\\ud800\"}"] {
        assert_eq!(server.ask("POST", COMPLETIONS, &[], body).error().0, 400, "{body:?}");
    }
    let nested = format!("{{\"prompt\": {}{}}}", "[".repeat(200_000), "]".repeat(200_000));
    assert_eq!(server.ask("POST", COMPLETIONS, &[], nested.as_bytes()).error().0, 400);
    let large = vec![b' '; 8 << 20];
    assert_eq!(server.ask("POST", COMPLETIONS, &[], &large).error().0, 413);
    assert!(server.post(COMPLETIONS, &with(json!({"guided_json": deep}))).status < 500);
    // Addresses and methods that are none.
    for path in ["/v1/files", "/v1/../etc/passwd", "/reports", "/reports/x.html", "/etc/passwd", "//"] {
        assert_eq!(server.get(path).error().0, 404, "{path}");
    }
    assert_eq!(server.get(COMPLETIONS).error().0, 405);
    for path in ["/v1/models/%ff", "/reports/%ff", "/v1/models/a%80/b"] {
        assert_eq!(server.get(path).error().0, 400, "{path}");
    }
    // Nothing is lost on those whose request is right, if at the edge.
    let huge = server.asked(COMPLETIONS, &with(json!({"max_tokens": 4_000_000_000u64, "ignore_eos": true})));
    assert_eq!(huge["choices"][0]["finish_reason"], "length");
    let none = server.asked(COMPLETIONS, &with(json!({"max_tokens": 0})));
    assert_eq!((&none["choices"][0]["text"], &none["usage"]["completion_tokens"]), (&json!(""), &json!(0)));
    server.is_well();
}

#[test]
fn guessing_ahead_changes_no_answer() {
    let plain = Server::start(&[NVFP4]);
    let body = |i: usize| {
        let mut body = prompt(&"the cat sat on the mat and the cat sat on the hat; ".repeat(1 + i % 3), 60);
        (body["temperature"], body["seed"], body["ignore_eos"]) = (json!([0.0, 0.8][i % 2]), json!(i), json!(true));
        body
    };
    let expected: Vec<Value> = (0..8).map(|i| choices(&plain.asked(COMPLETIONS, &body(i)))).collect();
    let draft = format!("{{\"model\": \"{BF16}\", \"num_speculative_tokens\": 3}}");
    for config in ["{\"method\": \"ngram\", \"num_speculative_tokens\": 4, \"prompt_lookup_min\": 2}", &draft] {
        let server = Server::start(&[NVFP4, "--speculative-config", config]);
        std::thread::scope(|scope| {
            let (server, expected) = (&server, &expected);
            for (i, expected) in expected.iter().enumerate() {
                scope.spawn(move || assert_eq!(choices(&server.asked(COMPLETIONS, &body(i))), *expected, "{i}"));
            }
        });
        let [guessed, right] =
            ["draft", "accepted"].map(|what| server.metric(&format!("vllm:spec_decode_num_{what}_tokens_total")));
        assert!(right > 0.0 && right <= guessed, "{right} of {guessed}");
        server.is_well();
    }
}

/// What a forced answer becomes: (content, calls, reason), whole and in a stream, which are the same.
fn forced(server: &Server, text: &str, more: Value) -> (String, usize, Value) {
    let tool =
        json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}});
    let mut body = json!({"messages": [{"role": "user", "content": "x"}], "tools": [tool], "temperature": 0,
        "structured_outputs": {"choice": [text]}});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let whole = server.asked(CHAT, &body);
    let choice = &whole["choices"][0];
    let calls = |v: &Value| v.as_array().map_or(0, Vec::len);
    let content = choice["message"]["content"].as_str().unwrap_or_default().to_owned();
    body["stream"] = json!(true);
    let events = server.post(CHAT, &body).events();
    let deltas = || events.iter().map(|e| &e["choices"][0]["delta"]);
    assert_eq!(deltas().filter_map(|d| d["content"].as_str()).collect::<String>(), content, "{text}");
    assert_eq!(
        deltas().map(|d| calls(&d["tool_calls"])).sum::<usize>(),
        calls(&choice["message"]["tool_calls"]),
        "{text}"
    );
    (content, calls(&choice["message"]["tool_calls"]), choice["finish_reason"].clone())
}

#[test]
fn calls_are_told_where_they_stand_and_one_where_one_is_wanted() {
    let folder = Folder::new();
    let server = chat_server(&folder, &[]);
    let call = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    let torn = "<tool_call>{\"name\": \"f\", \"arg</tool_call>";
    let nothing = json!({});
    assert_eq!(forced(&server, &format!("a{torn}tail"), nothing.clone()), (format!("a{torn}tail"), 0, json!("stop")));
    assert_eq!(forced(&server, &format!("a{call}"), nothing.clone()), ("a".into(), 1, json!("tool_calls")));
    assert_eq!(forced(&server, &format!("{call}\n{call}"), nothing), (String::new(), 2, json!("tool_calls")));
    let one = json!({"parallel_tool_calls": false});
    assert_eq!(forced(&server, &format!("{call}\n{call}"), one), (String::new(), 1, json!("tool_calls")));
}

#[test]
fn a_call_that_is_cut_off_is_a_call_as_far_as_it_goes() {
    let folder = Folder::new();
    let server = chat_server(&folder, &[]);
    let tool = |name: &str| {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties":
            {"city": {"type": "string", "minLength": 300}}, "required": ["city"], "additionalProperties": false}}})
    };
    let mut body = json!({"messages": [{"role": "user", "content": "Weather in Rome?"}], "seed": 1, "temperature": 0.5,
        "tools": [tool("weather"), tool("clock")], "parallel_tool_calls": false});
    let mut longest = 0;
    for (choice, known) in
        [(json!("required"), false), (json!({"type": "function", "function": {"name": "clock"}}), true)]
    {
        for length in [1, 4, 12, 24, 120] {
            (body["tool_choice"], body["max_tokens"], body["stream"]) = (choice.clone(), json!(length), json!(false));
            let answer = server.asked(CHAT, &body);
            let told = &answer["choices"][0];
            assert_eq!(told["finish_reason"], "length", "{answer}");
            assert_eq!(told["message"]["content"].as_str().unwrap_or_default(), "", "{answer}");
            let calls = told["message"]["tool_calls"].as_array().cloned().unwrap_or_default();
            assert!(
                calls.len() <= 1 && (!known || calls.len() == 1 && calls[0]["function"]["name"] == "clock"),
                "{answer}"
            );
            let arguments =
                |calls: &[Value]| calls.first().map(|c| c["function"]["arguments"].as_str().unwrap().to_owned());
            if let Some(arguments) = arguments(&calls).filter(|a| !a.is_empty()) {
                assert!(arguments.starts_with('{'), "{arguments}");
                assert!(serde_json::from_str::<Value>(&arguments).is_err(), "{arguments}");
                longest = longest.max(arguments.len());
            }
            body["stream"] = json!(true);
            let events = server.post(CHAT, &body).events();
            let deltas = || events.iter().map(|e| &e["choices"][0]["delta"]);
            let streamed: Vec<Value> = deltas().filter_map(|d| d["tool_calls"].as_array()).flatten().cloned().collect();
            assert_eq!(arguments(&streamed), arguments(&calls));
            assert!(deltas().all(|d| d["content"].as_str().unwrap_or_default().is_empty()), "{events:?}");
            assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
        }
    }
    assert!(longest > 20, "{longest}");
    // The other API has an item that is not complete.
    let flat =
        |name: &str| json!({"type": "function", "name": name, "parameters": tool(name)["function"]["parameters"]});
    let body = json!({"input": "Weather in Rome?", "seed": 1, "temperature": 0.5, "tools": [flat("clock")],
        "tool_choice": {"type": "function", "name": "clock"}, "max_output_tokens": 24});
    let response = server.asked("/v1/responses", &body);
    assert_eq!((&response["status"], &response["output"][0]["status"]), (&json!("incomplete"), &json!("incomplete")));
    assert_eq!(response["output"][0]["name"], "clock", "{response}");
}

#[test]
fn thinking_that_the_model_opens_is_beside_the_grammar() {
    let folder = Folder::new();
    let template = folder.write("thinking.jinja", format!("{{# <think> </think> #}}{TEMPLATE}"));
    let model = folder.model("m", NVFP4);
    // The token that fills up is the one that opens thinking.
    let mut tokenizer = folder.json("m/tokenizer.json");
    let added = tokenizer["added_tokens"].as_array_mut().unwrap().iter_mut().find(|t| t["id"] == 3).unwrap();
    let before = std::mem::replace(&mut added["content"], json!("<think>"));
    let text = tokenizer.to_string().replace(&format!("{before}:"), "\"<think>\":");
    folder.write("m/tokenizer.json", text);
    let server = Server::start(&[&model, "--chat-template", &template]);
    assert_eq!(server.asked("/tokenize", &json!({"prompt": "<think>"}))["tokens"], json!([3]));
    let ask = |bias: i32| {
        let body = json!({"messages": [{"role": "user", "content": "Is it?"}], "max_tokens": 24, "seed": 1, "stop": ["y"],
            "logit_bias": {"3": bias}, "structured_outputs": {"choice": ["yes", "no"]}});
        server.asked(CHAT, &body)["choices"][0].clone()
    };
    let thinks = ask(100);
    assert!(thinks["message"]["reasoning_content"].as_str().is_some_and(|t| !t.is_empty()), "{thinks}");
    assert_eq!((&thinks["message"]["content"], &thinks["finish_reason"]), (&json!(""), &json!("length")));
    let answers = ask(-100);
    let content = answers["message"]["content"].as_str().unwrap();
    assert!(["", "no"].contains(&content) && answers["finish_reason"] == "stop", "{answers}");
    assert_eq!(answers["message"]["reasoning_content"], Value::Null);
}

#[test]
fn usage_tells_what_of_the_prompt_was_kept() {
    let folder = Folder::new();
    let server = chat_server(&folder, &[]);
    let cached = |usage: &Value| usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let mut body = prompt(&"The king said to his son. ".repeat(6), 3);
    let first = server.asked(COMPLETIONS, &body)["usage"].clone();
    let length = first["prompt_tokens"].as_u64().unwrap();
    assert_eq!(cached(&first), 0);
    assert_eq!(cached(&server.asked(COMPLETIONS, &body)["usage"]), length - 1);
    // A prompt counts once, however many answers it has.
    (body["n"], body["stream"], body["stream_options"]) = (json!(3), json!(true), json!({"include_usage": true}));
    let events = server.post(COMPLETIONS, &body).events();
    assert_eq!(cached(&events.last().unwrap()["usage"]), length - 1);
    let chat = json!({"messages": [{"role": "user", "content": "Tell of a ship that went to sea."}], "max_tokens": 2});
    let told: Vec<u64> = (0..2).map(|_| cached(&server.asked(CHAT, &chat)["usage"])).collect();
    assert!(told[0] < 4 && told[1] > 4, "{told:?}");
    let body = json!({"input": "Tell of a ship that went to sea.", "max_output_tokens": 2});
    let usage = server.asked("/v1/responses", &body)["usage"].clone();
    assert_eq!(usage["input_tokens_details"]["cached_tokens"], told[1]);
}

#[test]
fn a_stop_token_stays_in_the_text_where_it_is_asked_for() {
    let server = Server::start(&[NVFP4]);
    let mut body =
        json!({"prompt": "It was a dark night", "max_tokens": 12, "temperature": 0, "return_token_ids": true});
    let plain = server.asked(COMPLETIONS, &body)["choices"][0].clone();
    let token = plain["token_ids"][6].clone();
    let at = plain["token_ids"].as_array().unwrap().iter().position(|id| *id == token).unwrap();
    let text = |count: usize| {
        let ids = &plain["token_ids"].as_array().unwrap()[..count];
        server.asked("/detokenize", &json!({"tokens": ids}))["prompt"].clone()
    };
    body["stop_token_ids"] = json!([token]);
    for (keeps, count) in [(false, at), (true, at + 1)] {
        body["include_stop_str_in_output"] = json!(keeps);
        let choice = server.asked(COMPLETIONS, &body)["choices"][0].clone();
        assert_eq!((&choice["text"], &choice["stop_reason"]), (&text(count), &token), "{choice}");
    }
}

#[test]
fn the_context_is_for_prompt_and_answer() {
    let server = Server::start(&[NVFP4, "--max-model-len", "32"]);
    let ids = |count: usize| json!((0..count).map(|i| 300 + i).collect::<Vec<_>>());
    let ask = |count: usize, max_tokens: usize, more: Value| {
        let mut body = json!({"prompt": ids(count), "max_tokens": max_tokens, "ignore_eos": true, "temperature": 0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post(COMPLETIONS, &body)
    };
    for (count, length) in [(20, 10), (30, 2), (31, 1)] {
        let answer = ask(count, 10, json!({})).json();
        assert_eq!(answer["usage"]["completion_tokens"], length, "{answer}");
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
    }
    for full in [32, 33] {
        let refused = ask(full, 1, json!({}));
        assert_eq!((refused.error().0, &refused.json()["error"]["code"]), (400, &json!("context_length_exceeded")));
    }
    // A prompt that is only scored may fill it.
    for more in [json!({"echo": true, "logprobs": 0}), json!({"prompt_logprobs": 0})] {
        assert_eq!(ask(32, 0, more.clone()).json()["usage"]["completion_tokens"], 0);
        assert_eq!(ask(32, 1, more).error().0, 400);
    }
}

#[test]
fn one_client_cannot_take_all_connections() {
    let server = Server::start(&[NVFP4, "--max-connections-per-client", "3"]);
    let mut idle: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(&server.address).unwrap()).collect();
    let refused = server.get("/v1/models");
    assert_eq!((refused.error().0, &refused.json()["error"]["code"]), (429, &json!("too_many_connections")));
    assert!(refused.header("retry-after").is_some());
    idle.pop();
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while server.get("/v1/models").status != 200 {
        assert!(std::time::Instant::now() < end, "the place was not given back");
    }
}

#[test]
fn offsets_point_to_where_tokens_stand_in_the_text() {
    let server = Server::start(&[NVFP4]);
    let text = "<|im_start|>user\nHi – é<|im_end|>\nso";
    for show in [true, false] {
        let body = json!({"prompt": text, "echo": true, "logprobs": 0, "max_tokens": 3, "skip_special_tokens": show});
        let choice = server.asked(COMPLETIONS, &body)["choices"][0].clone();
        let told: Vec<char> = choice["text"].as_str().unwrap().chars().collect();
        let lists = ["tokens", "text_offset"].map(|l| choice["logprobs"][l].as_array().unwrap().clone());
        for (token, offset) in lists[0].iter().zip(&lists[1]) {
            let token = token.as_str().unwrap();
            if token.is_ascii() {
                let offset = offset.as_u64().unwrap() as usize;
                let there: String = told[offset..].iter().take(token.len()).collect();
                assert!(there == token || token.starts_with("<|") && offset >= text.chars().count(), "{token} {there}");
            }
        }
    }
}

#[test]
fn a_grammar_is_compiled_once_for_all_answers_of_a_request() {
    let server = Server::start(&[NVFP4]);
    let choices: Vec<String> = (0..20_000).map(|i| format!("choice {i}")).collect();
    let body = |n: usize| json!({"prompt": "x", "max_tokens": 1, "n": n, "structured_outputs": {"choice": choices}});
    let took = |n: usize| {
        let began = std::time::Instant::now();
        server.asked(COMPLETIONS, &body(n));
        began.elapsed()
    };
    let (one, many) = (took(1), took(64));
    assert!(many < 16 * one + Duration::from_secs(5), "64 answers took {many:?}, one {one:?}");
}

#[test]
fn pages_of_others_may_not_ask() {
    let server = Server::start(&[NVFP4, "--allowed-origins", "https://mine.example", "--allowed-hosts", "box.lan"]);
    let body = prompt("The", 1).to_string();
    let with = |headers: &[(&str, &str)]| server.ask("POST", COMPLETIONS, headers, body.as_bytes());
    let own = format!("http://{}", server.address);
    assert_eq!(with(&[("Origin", &own)]).status, 200);
    let mine = with(&[("Origin", "https://mine.example")]);
    assert_eq!((mine.status, mine.header("access-control-allow-origin")), (200, Some("https://mine.example")));
    assert_eq!(with(&[("Origin", "https://evil.example"), ("Content-Type", "text/plain")]).error().0, 403);
    assert_eq!(with(&[("Origin", "null")]).error().0, 403);
    assert_eq!(with(&[("Content-Encoding", "gzip")]).error().0, 415);
    let named = |host: &str| {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        write!(stream, "GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split(' ').nth(1).unwrap().to_owned()
    };
    assert_eq!(
        ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "box.lan:8000"].map(named),
        ["200"; 6]
    );
    assert_eq!(["evil.example", "evil.example:8000", "localhost.evil.example"].map(named), ["403"; 3]);
}

#[test]
fn keys_are_asked_for() {
    let server = Server::of(&mut {
        let mut command = recoup(&["serve", NVFP4, "--port", "0", "--api-key", "one", "--api-key", "two"]);
        command.env("RECOUP_API_KEY", "three");
        command
    });
    let body = prompt("The", 1).to_string();
    let with = |value: &str| server.ask("POST", COMPLETIONS, &[("Authorization", value)], body.as_bytes()).status;
    assert_eq!([with("Bearer one"), with("bearer two"), with("Bearer three")], [200, 200, 401]);
    assert_eq!([with("Bearer"), with("Bearer onee"), with("Basic one"), with("")], [401; 4]);
    for path in ["/v1/models", "/reports", "/v1/models/x"] {
        let answer = server.get(path);
        assert_eq!(answer.error().0, 401);
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
    }
    for path in ["/", "/health", "/metrics", "/version"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    assert!(!server.log().contains("Bearer one"));
}

#[test]
fn two_models_answer_by_their_names() {
    let server = Server::start(&[BF16, NVFP4, "--served-model-name", "original", "quantized"]);
    let listed = server.get("/v1/models").json();
    let names: Vec<&str> = listed["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["original", "quantized"]);
    let ask = |model: Value| {
        let mut body = prompt("Once upon a time", 8);
        body["model"] = model;
        server.asked(COMPLETIONS, &body)
    };
    let [first, original, quantized] = [Value::Null, json!("original"), json!("quantized")].map(ask);
    assert_eq!(choices(&first), choices(&original));
    assert_ne!(original["choices"][0]["logprobs"], quantized["choices"][0]["logprobs"]);
    assert_eq!(quantized["model"], "quantized");
    assert_eq!(server.get("/v1/models/quantized").json()["id"], "quantized");
    assert_eq!(server.get("/v1/models/none").error(), (404, "model".into()));
}

#[test]
fn who_has_gone_is_not_answered_and_who_reads_slowly_holds_nobody_up() {
    let server = Server::start(&[NVFP4, "--max-num-seqs", "4"]);
    let long = json!({"prompt": "The king", "max_tokens": 200, "ignore_eos": true, "stream": true, "seed": 1});
    // Gone in the middle of a stream, before its beginning, and while the whole answer is computed.
    for _ in 0..6 {
        let mut reader = server.begun(COMPLETIONS, &long);
        let mut some = [0; 400];
        reader.read_exact(&mut some).unwrap();
        drop(reader);
        drop(server.send("POST", COMPLETIONS, &[], long.to_string().as_bytes()).unwrap());
        let mut whole = long.clone();
        (whole["stream"], whole["n"]) = (json!(false), json!(3));
        drop(server.send("POST", COMPLETIONS, &[], whole.to_string().as_bytes()).unwrap());
    }
    server.is_well();
    assert!(server.metric("vllm:request_success_total{finished_reason=\"abort\"") > 0.0);
    // Who does not read, and who sends half of what was announced.
    let slow: Vec<_> = (0..3).map(|_| server.begun(COMPLETIONS, &long)).collect();
    let mut half = TcpStream::connect(&server.address).unwrap();
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{\"prompt\"")
        .unwrap();
    let mut torn = TcpStream::connect(&server.address).unwrap();
    torn.write_all(b"GET /v1/mod").unwrap();
    for _ in 0..4 {
        server.asked(COMPLETIONS, &prompt("And then", 5));
    }
    server.is_well();
    for mut reader in slow {
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("[DONE]"));
    }
}

#[test]
fn a_full_queue_sends_away_and_a_small_cache_serves_all() {
    let server = Server::start(&[NVFP4, "--max-num-seqs", "2", "--max-queue", "2", "--max-num-batched-tokens", "16"]);
    let long = json!({"prompt": "The king", "max_tokens": 220, "ignore_eos": true, "seed": 1});
    let waiting: Vec<TcpStream> =
        (0..4).map(|_| server.send("POST", COMPLETIONS, &[], long.to_string().as_bytes()).unwrap()).collect();
    server.until("vllm:num_requests_waiting", 2.0);
    let full = server.post(COMPLETIONS, &prompt("x", 1));
    assert_eq!(full.error().0, 503);
    assert!(full.header("retry-after").is_some_and(|s| s.parse::<u32>().is_ok()));
    assert!(server.metric("vllm:requests_refused_total") >= 1.0);
    drop(waiting);
    // More answers at once than there ever are places for: told so, and not to come again.
    let mut many = prompt("x", 1);
    many["n"] = json!(5);
    assert_eq!(server.post(COMPLETIONS, &many).error().0, 400);
    server.is_well();
    drop(server);

    let of_model = recoup::checkpoint::Checkpoint::open(std::path::Path::new(&project().join(NVFP4))).unwrap();
    let page = Decoder::load(cpu(1), &of_model).unwrap().page_bytes(KvFormat::F32);
    let room = (40 * page) as f64 / f64::from(1 << 30);
    let room = room.to_string();
    // Room for two whole sequences, sixteen at a time: some give way, all end as they end alone.
    let server = Server::start(&[NVFP4, "--max-num-seqs", "16", "--kv-cache-memory", &room, "--max-model-len", "200"]);
    let body = |i: usize| json!({"prompt": format!("Story number {i}: there was a"), "max_tokens": 120, "ignore_eos": true, "seed": i, "logprobs": 0});
    let alone: Vec<Value> = (0..16).map(|i| choices(&server.asked(COMPLETIONS, &body(i)))).collect();
    std::thread::scope(|scope| {
        let (server, alone) = (&server, &alone);
        for (i, alone) in alone.iter().enumerate() {
            scope.spawn(move || assert_eq!(choices(&server.asked(COMPLETIONS, &body(i))), *alone));
        }
    });
    assert!(server.metric("vllm:num_preemptions_total") > 0.0, "the cache was never too small");
    server.is_well();
}

#[cfg(unix)]
#[test]
fn at_sigterm_what_has_begun_is_finished_and_nothing_new_is_taken() {
    let mut server = Server::start(&[NVFP4, "--max-num-seqs", "4"]);
    let long = json!({"prompt": "The king", "max_tokens": 200, "ignore_eos": true, "seed": 1});
    let whole = choices(&server.asked(COMPLETIONS, &long));
    std::thread::scope(|scope| {
        let server = &server;
        let under_way: Vec<_> = (0..4).map(|_| scope.spawn(|| choices(&server.asked(COMPLETIONS, &long)))).collect();
        while server.metric("vllm:num_requests_running") < 4.0 {
            std::thread::sleep(Duration::from_millis(2));
        }
        server.signal(rustix::process::Signal::TERM);
        while server.get("/health").status == 200 {
            std::thread::sleep(Duration::from_millis(2));
        }
        let refused = server.post(COMPLETIONS, &prompt("x", 1));
        assert_eq!(refused.error().0, 503);
        assert!(refused.header("retry-after").is_some());
        for answer in under_way {
            assert_eq!(answer.join().unwrap(), whole);
        }
    });
    assert!(server.child.wait().unwrap().success(), "{}", server.log());
    // With more to do than it may take, it says so.
    let folder = Folder::new();
    let mut server = chat_server(&folder, &["--shutdown-timeout", "0", "--max-num-batched-tokens", "1"]);
    let mut many = long.clone();
    (many["n"], many["stream"]) = (json!(64), json!(true));
    let mut reader = server.begun(COMPLETIONS, &many);
    let mut response = server.begun("/v1/responses", &json!({"input": "x", "stream": true}));
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| server.post(COMPLETIONS, &long));
        std::thread::sleep(Duration::from_millis(500));
        server.signal(rustix::process::Signal::TERM);
        // Whoever waits is told, in a stream as well.
        let answer = waits.join().unwrap();
        assert_eq!((answer.error().0, &answer.json()["error"]["code"]), (503, &json!("shutting_down")));
    });
    let [stream, events] = [&mut reader, &mut response].map(|reader| {
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        rest
    });
    assert!(stream.contains("\"shutting_down\"") && stream.contains("data: [DONE]"), "{stream}");
    assert!(events.contains("event: response.failed"), "{events}");
    assert_eq!(server.child.wait().unwrap().code(), Some(1), "{}", server.log());
    assert!(server.log().contains("not finished"), "{}", server.log());
}

#[test]
fn what_is_wrong_with_the_options_is_said_before_anything_is_loaded() {
    let refused = |args: &[&str], part: &str| {
        let out = recoup(&[&["serve"], args].concat()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(part), "{args:?}: {said}");
    };
    refused(&["no-such-folder", "--port", "0"], "no such folder");
    refused(&[NVFP4, "--port", "0", "--max-model-len", "100000"], "positions");
    refused(&[NVFP4, NVFP4, "--port", "0"], "would be called");
    refused(&[NVFP4, BF16, "--port", "0", "--served-model-name", "a", "b", "c"], "3 names for 2 models");
    refused(&[NVFP4, "--port", "0", "--reports", "no-such-folder"], "--reports");
    refused(&[NVFP4, "--port", "0", "--api-key", ""], "--api-key");
    refused(&[NVFP4, "--port", "0", "--gpu-memory-utilization", "7"], "from 0 to 1");
    refused(&[NVFP4, "--port", "0", "--chat-template", "no-such-file"], "--chat-template");
    let taken = Server::start(&[NVFP4]);
    refused(&[NVFP4, "--port", taken.address.rsplit(':').next().unwrap()], "cannot be listened on");
}
