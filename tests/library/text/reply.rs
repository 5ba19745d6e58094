//! Replies taken apart: by what chat templates write of them, by the formats' own examples, and in any pieces.

use proptest::prelude::*;
use recoup::text::reply::{Calls, Kind, Piece, Reasoning, Reply, ReplyFormat, Splitter, ToolCall};
use recoup::text::{ChatInput, ChatTemplate, ThinkingSwitch};
use serde_json::{Map, Value, json};

use super::{data, template_of, tokens_of, unsaved};

fn golden(name: &str) -> ChatTemplate {
    let cases = crate::support::json(&data().join("python_cases.json"));
    template_of(&data().join("chat_templates").join(name), tokens_of(&cases["tokens"]))
}

/// Pieces with neighbours of one kind joined, and the reply; the text comes in parts of `sizes` characters, in turn.
fn split(format: ReplyFormat, prompt: &str, tools: &[Value], text: &str, sizes: &[usize]) -> (Vec<Piece>, Reply) {
    let mut splitter = Splitter::new(format, prompt, tools);
    let mut pieces: Vec<Piece> = Vec::new();
    let mut join = |more: Vec<Piece>| {
        for piece in more {
            assert!(!piece.text.is_empty());
            match pieces.last_mut().filter(|last| last.kind == piece.kind) {
                Some(last) => last.text += &piece.text,
                None => pieces.push(piece),
            }
        }
    };
    let mut chars = text.chars().peekable();
    let mut sizes = sizes.iter().cycle();
    while chars.peek().is_some() {
        let part: String = chars.by_ref().take(*sizes.next().unwrap()).collect();
        join(splitter.push(&part));
    }
    let (rest, reply) = splitter.finish();
    join(rest);
    (pieces, reply)
}

fn reply(format: ReplyFormat, prompt: &str, tools: &[Value], text: &str) -> Reply {
    split(format, prompt, tools, text, &[usize::MAX]).1
}

fn called(name: &str, arguments: Value) -> ToolCall {
    ToolCall { name: name.into(), arguments }
}

fn tools() -> Vec<Value> {
    let parameters = json!({"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": ["boolean", "null"]},
        "where": {"type": "object"}}});
    vec![json!({"type": "function", "function": {"name": "weather", "description": "d", "parameters": parameters}})]
}

const TEMPLATES: [(&str, Option<&str>, Option<&str>); 16] = [
    ("HuggingFaceTB-SmolLM3-3B.jinja", Some("qwen3"), None),
    ("Mistral-Small-3.2-24B-Instruct-2506.jinja", None, Some("mistral")),
    ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.jinja", Some("qwen3"), Some("qwen3_coder")),
    ("NVIDIA-Nemotron-Nano-v2.jinja", Some("qwen3"), Some("nemotron_json")),
    ("Qwen-Qwen2.5-7B-Instruct.jinja", None, Some("hermes")),
    ("Qwen-Qwen3-0.6B.jinja", Some("qwen3"), Some("hermes")),
    ("Qwen3.5-4B.jinja", Some("qwen3"), Some("qwen3_coder")),
    ("deepseek-ai-DeepSeek-V3.1.jinja", Some("deepseek_v3"), Some("deepseek_v31")),
    ("google-gemma-2-2b-it.jinja", None, None),
    ("llama3_1.tokenizer_config.json", None, None),
    ("meta-llama-Llama-3.1-8B-Instruct.jinja", None, Some("llama3_json")),
    ("meta-llama-Llama-3.2-3B-Instruct.jinja", None, Some("llama3_json")),
    ("microsoft-Phi-3.5-mini-instruct.jinja", None, None),
    ("mistralai-Mistral-Nemo-Instruct-2407.jinja", None, Some("mistral")),
    ("openai-gpt-oss-120b.jinja", Some("openai_gptoss"), None),
    ("smollm2.tokenizer_config.json", None, None),
];

#[test]
fn the_format_of_a_reply_is_seen_in_the_chat_template() {
    for (name, reasoning, calls) in TEMPLATES {
        let format = golden(name).reply_format();
        assert_eq!(format.reasoning, reasoning.map(|name| Reasoning::named(name).unwrap()), "{name}");
        assert_eq!(format.calls, calls.map(|name| Calls::named(name).unwrap()), "{name}");
    }
}

#[test]
fn how_thinking_is_switched_is_seen_by_what_the_template_writes() {
    use ThinkingSwitch::{Argument, Message};
    for (name, switch) in [
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.jinja", Some(Argument("enable_thinking"))),
        // It has a variable `enable_thinking` and no such argument.
        ("NVIDIA-Nemotron-Nano-v2.jinja", Some(Message)),
        ("Qwen3.5-4B.jinja", Some(Argument("enable_thinking"))),
        ("deepseek-ai-DeepSeek-V3.1.jinja", Some(Argument("enable_thinking"))),
        ("openai-gpt-oss-120b.jinja", None),
        ("Qwen-Qwen2.5-7B-Instruct.jinja", None),
    ] {
        assert_eq!(golden(name).thinking_switch(), switch, "{name}");
    }
}

/// What a template writes of an assistant's turn is taken apart into what it was given.
#[test]
fn calls_and_thinking_come_back_as_the_template_wrote_them() {
    let arguments = json!({"city": "A \"quoted\"\nplace <b>", "days": 3, "exact": true, "where": {"n": [1, 2.5]}});
    let arguments_of = |name: &str| match name {
        // Its template writes what its parameters say, without their types.
        name if name.starts_with("meta") => json!({"city": "Rome", "days": "3"}),
        _ => arguments.clone(),
    };
    for (name, reasoning, calls) in TEMPLATES {
        let template = golden(name);
        let (format, tools) = (template.reply_format(), tools());
        let user = json!({"role": "user", "content": "What?"});
        let render = |messages: &[Value], add_generation_prompt: bool, with_tools: bool| {
            let tools = with_tools.then_some(&tools[..]);
            let extra = Map::from_iter([("thinking".to_owned(), json!(true))]);
            let input =
                ChatInput { messages, tools, add_generation_prompt, extra: Some(&extra), ..ChatInput::default() };
            template.render(&input).unwrap()
        };
        let check = |message: Value, wanted: Reply| {
            let with_tools = calls.is_some() || name.starts_with("openai");
            let prompt = render(std::slice::from_ref(&user), true, with_tools);
            let whole = render(&[user.clone(), message], false, with_tools);
            let common: usize =
                prompt.chars().zip(whole.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
            // The beginning of two tags is none.
            let common = prompt[..common].strip_suffix('<').map_or(common, str::len);
            let written = whole[common..].trim_end();
            let ends = [
                "<|im_end|>",
                "<EOS>",
                "<|eot_id|>",
                "<SPECIAL_12>",
                "<｜end▁of▁sentence｜>",
                "<|call|>",
                "<|return|>",
            ];
            let written = ends.iter().find_map(|end| written.strip_suffix(end)).unwrap_or(written);
            let tools = if with_tools { &tools[..] } else { &[] };
            for sizes in [&[usize::MAX][..], &[1], &[3, 1, 7]] {
                let (pieces, mut got) = split(format, &prompt[..common], tools, written, sizes);
                assert_eq!(pieces.iter().map(|p| p.text.as_str()).collect::<String>(), written, "{name}");
                got.answer = got.answer.trim().to_owned();
                assert_eq!(got, wanted, "{name}: after {:?} {written:?}", &prompt[common.saturating_sub(60)..common]);
            }
        };
        if calls.is_some() || name.starts_with("openai") {
            let arguments = arguments_of(name);
            let function = json!({"name": "weather", "arguments": arguments});
            let call = json!({"id": "abcdefghi", "type": "function", "function": function});
            let message = json!({"role": "assistant", "content": "", "tool_calls": [call]});
            check(message, Reply { calls: vec![called("weather", arguments)], ..Reply::default() });
        }
        // Those whose template writes the thinking of the last turn.
        if matches!(name, n if n.starts_with("Qwen3") || n.starts_with("Qwen-Qwen3") || n.contains("Nemotron-3") || n.starts_with("openai"))
        {
            assert!(reasoning.is_some());
            let message = json!({"role": "assistant", "content": "It is.", "reasoning_content": "Hm.\n\nYes?"});
            check(message, Reply { thinking: "Hm.\n\nYes?".into(), answer: "It is.".into(), ..Reply::default() });
        }
    }
}

fn harmony() -> ReplyFormat {
    ReplyFormat { reasoning: Reasoning::named("openai_gptoss"), calls: None }
}

/// The prompt's end.
const HARMONY: &str = "<|start|>user<|message|>q<|end|><|start|>assistant";

/// Texts of OpenAI's description of the format, cookbook.openai.com/articles/openai-harmony.
#[test]
fn harmonys_channels_are_thinking_answer_and_calls() {
    let text = "<|channel|>analysis<|message|>User asks: \"What is 2 + 2?\" Simple arithmetic.<|end|>\
                <|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|return|>";
    let (pieces, got) = split(harmony(), HARMONY, &[], text, &[2]);
    assert_eq!(got.thinking, "User asks: \"What is 2 + 2?\" Simple arithmetic.");
    assert_eq!((got.answer.as_str(), got.unfinished), ("2 + 2 = 4.", false));
    let kinds: Vec<Kind> = pieces.iter().map(|p| p.kind).collect();
    assert_eq!(kinds, [Kind::Markup, Kind::Thinking, Kind::Markup, Kind::Answer, Kind::Markup]);

    let call = "<|channel|>analysis<|message|>Need to use function get_current_weather.<|end|><|start|>assistant\
                <|channel|>commentary to=functions.get_current_weather <|constrain|>json<|message|>\
                {\"location\":\"San Francisco\"}<|call|>";
    let wanted = [called("get_current_weather", json!({"location": "San Francisco"}))];
    for text in [call, call.strip_suffix("<|call|>").unwrap()] {
        let got = reply(harmony(), HARMONY, &[], text);
        assert_eq!(got.calls, wanted);
        assert_eq!((got.thinking.as_str(), got.answer.as_str()), ("Need to use function get_current_weather.", ""));
    }
    // The recipient among the role's words, as the chat template writes it.
    let role = " to=functions.get_current_weather<|channel|>commentary json<|message|>{\"location\":\"San Francisco\"}";
    assert_eq!(reply(harmony(), HARMONY, &[], role).calls, wanted);

    let preamble = "<|channel|>analysis<|message|>Plan.<|end|><|start|>assistant<|channel|>commentary<|message|>\
                    **Action plan**: 1. Look.<|end|><|start|>assistant<|channel|>commentary to=functions.f \
                    <|constrain|>json<|message|>{}<|call|>";
    let got = reply(harmony(), HARMONY, &[], preamble);
    assert_eq!((got.answer.as_str(), &got.calls[..]), ("**Action plan**: 1. Look.", &[called("f", json!({}))][..]));
    // Built-in tools take code.
    let python = "<|channel|>analysis to=python code<|message|>print(1)<|call|>";
    assert_eq!(reply(harmony(), HARMONY, &[], python).calls, [called("python", json!("print(1)"))]);
}

#[test]
fn harmony_that_is_cut_short_broken_or_opened_by_the_prompt_is_told() {
    let cut = reply(harmony(), HARMONY, &[], "<|channel|>analysis<|message|>Let me");
    assert_eq!((cut.thinking.as_str(), cut.unfinished), ("Let me", true));
    let broken = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": ";
    let got = reply(harmony(), HARMONY, &[], broken);
    assert!(got.calls.is_empty() && got.malformed[0].text == "{\"a\": " && got.malformed[0].why.contains("JSON"));
    let opened = format!("{HARMONY}<|channel|>final<|message|>");
    assert_eq!(reply(harmony(), &opened, &[], "Yes.<|return|>").answer, "Yes.");
    // No end of the message, and two messages on one channel.
    let loose = "<|channel|>final<|message|>a<|start|>assistant<|channel|>final<|message|>b";
    assert_eq!(reply(harmony(), HARMONY, &[], loose).answer, "a\n\nb");
    assert_eq!(reply(harmony(), HARMONY, &[], "plain text").answer, "plain text");
}

fn tags(name: &str, calls: Option<&str>) -> ReplyFormat {
    ReplyFormat { reasoning: Reasoning::named(name), calls: calls.map(|c| Calls::named(c).unwrap()) }
}

#[test]
fn thinking_between_tags_is_told_from_the_answer() {
    let is = |format, prompt: &str, text: &str| {
        let got = reply(format, prompt, &[], text);
        (got.thinking, got.answer, got.unfinished)
    };
    let was = |thinking: &str, answer: &str, unfinished| (thinking.to_owned(), answer.to_owned(), unfinished);
    let (qwen, r1) = (tags("qwen3", None), tags("deepseek_r1", None));
    // Opened by the reply, by the prompt, by neither.
    assert_eq!(is(qwen, "<|im_start|>assistant\n", "<think>\na\n\nb\n</think>\n\nc\n"), was("a\n\nb", "c\n", false));
    assert_eq!(is(qwen, "assistant\n<think>\n", "a</think>c"), was("a", "c", false));
    assert_eq!(is(qwen, "assistant\n", "c <think>d</think>"), was("", "c <think>d</think>", false));
    assert_eq!(is(r1, "assistant\n", "a</think>\nc"), was("a", "c", false));
    assert_eq!(is(r1, "assistant\n", "<think>\na</think>\nc"), was("a", "c", false));
    // Closed by the prompt.
    for prompt in ["<think>\n\n</think>\n\n", "<think></think>"] {
        assert_eq!(is(qwen, prompt, "c"), was("", "c", false));
        assert_eq!(is(r1, prompt, "c"), was("", "c", false));
    }
    assert_eq!(is(qwen, "<think>\n", "a\n</thi"), was("a\n</thi", "", true));
    assert_eq!(is(qwen, "<think>\n", "</think>"), was("", "", false));
    assert_eq!(is(tags("mistral", None), "", "[THINK]a[/THINK]c"), was("a", "c", false));
}

#[test]
fn calls_are_read_in_every_way_models_write_them() {
    let tools = tools();
    let format = |calls| ReplyFormat { reasoning: None, calls: Calls::named(calls) };
    let paris = called("weather", json!({"city": "Paris"}));
    for (calls, text, answer, count) in [
        (
            "hermes",
            "Look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>",
            "Look.",
            1,
        ),
        (
            "hermes",
            "<tool_call>{\"name\": \"weather\", \"arguments\": \"{\\\"city\\\": \\\"Paris\\\"}\"}</tool_call>\n<tool_call>\n{\"name\": \
             \"weather\", \"arguments\": {\"city\": \"Paris\"}}",
            "",
            2,
        ),
        (
            "qwen3_coder",
            "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>\n",
            "",
            1,
        ),
        ("qwen3_coder", "So:\n\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>", "So:", 1),
        (
            "nemotron_json",
            "<TOOLCALL>[{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}]</TOOLCALL>",
            "",
            1,
        ),
        ("llama3_json", "{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}", "", 1),
        (
            "llama3_json",
            "<|python_tag|>{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}; {\"name\": \"weather\", \
             \"parameters\": {\"city\": \"Paris\"}}",
            "",
            2,
        ),
        (
            "mistral",
            "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}, \"id\": \"abcdefghi\"}]",
            "",
            1,
        ),
        (
            "mistral",
            "Well[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{\"city\": \"Paris\"}[TOOL_CALLS]weather[ARGS]{\"city\": \"Paris\"}",
            "Well",
            2,
        ),
        ("mistral", "[TOOL_CALLS]weather{\"city\": \"Paris\"}", "", 1),
        (
            "deepseek_v31",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Paris\"}<｜tool▁call▁end｜>\
             <｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Paris\"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "",
            2,
        ),
    ] {
        for sizes in [&[usize::MAX][..], &[1]] {
            let (pieces, got) = split(format(calls), "", &tools, text, sizes);
            assert_eq!(got.calls, vec![paris.clone(); count], "{calls}: {text}");
            assert_eq!((got.answer.as_str(), &got.malformed[..]), (answer, &[][..]), "{calls}: {text}");
            assert_eq!(pieces.iter().map(|p| p.text.as_str()).collect::<String>(), text);
        }
        // Without tools there are no calls: a text about them is an answer.
        assert_eq!(reply(format(calls), "", &[], text).answer, text);
    }
}

#[test]
fn arguments_have_the_types_that_the_tool_says() {
    let text = "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n3\n</parameter>\n\
                <parameter=exact>\nTrue\n</parameter>\n<parameter=where>\n{\"a\": [1]}\n</parameter>\n<parameter=other>\n7\n\
                </parameter>\n</function>\n</tool_call>";
    let got = reply(tags("qwen3", Some("qwen3_xml")), "", &tools(), text);
    let wanted = json!({"city": "12", "days": 3, "exact": true, "where": {"a": [1]}, "other": "7"});
    assert_eq!(got.calls, [called("weather", wanted)]);
    let wrong = text.replace("\n3\n", "\nthree\n");
    assert_eq!(reply(tags("qwen3", Some("qwen3_xml")), "", &tools(), &wrong).calls[0].arguments["days"], "three");
}

#[test]
fn a_call_that_cannot_be_read_is_told_and_an_answer_in_json_is_an_answer() {
    for (calls, text, why) in [
        ("hermes", "<tool_call>\n{\"name\": \"weather\", \"arg\n</tool_call>", "no JSON"),
        ("hermes", "<tool_call>{\"arguments\": {}}</tool_call>", "`name`"),
        ("hermes", "<tool_call>{\"name\": \"weather\"", "no JSON"),
        ("qwen3_coder", "<tool_call><function=weather>\n<parameter=city>\nPar", "</function> is missing"),
        ("mistral", "[TOOL_CALLS]weather", "NAME[ARGS]"),
        ("llama3_json", "<|python_tag|>brave.call(query=\"a\")", "JSON"),
    ] {
        let format = ReplyFormat { reasoning: None, calls: Calls::named(calls) };
        let got = reply(format, "", &tools(), text);
        assert_eq!((&got.calls[..], got.malformed.len()), (&[][..], 1), "{text}");
        assert!(got.malformed[0].text == text && got.malformed[0].why.contains(why), "{:?}", got.malformed);
    }
    let format = ReplyFormat { reasoning: None, calls: Calls::named("llama3_json") };
    for text in ["{\"city\": \"Paris\"}", "{ no", "{\"name\": \"weather\", \"parameters\": {}} and more"] {
        let got = reply(format, "", &tools(), text);
        assert_eq!((got.answer.as_str(), got.calls.len()), (text, 0));
    }
}

/// A call as a family writes it, and its arguments as they stand there.
const WRITTEN: [(&str, &str, &str); 9] = [
    (
        "hermes",
        "<tool_call>\n{\"name\": \"weather\", \"arguments\": ARGUMENTS}\n</tool_call>",
        r#"{"city": "Rome", "days": 3}"#,
    ),
    (
        "hermes",
        "<tool_call>\n{\"arguments\": ARGUMENTS, \"name\": \"weather\"}\n</tool_call>",
        r#"{"city": "Rome", "days": 3}"#,
    ),
    (
        "nemotron_json",
        "<TOOLCALL>[{\"name\": \"weather\", \"arguments\": ARGUMENTS}]</TOOLCALL>",
        r#"{"where": {"a": [1, "]"]}}"#,
    ),
    ("llama3_json", "{\"name\": \"weather\", \"parameters\": ARGUMENTS}", r#"{"city": "a \"b\" {"}"#),
    ("llama3_json", "<|python_tag|>{\"name\": \"weather\", \"parameters\": ARGUMENTS}", r#"{"city": "é"}"#),
    ("mistral", "[TOOL_CALLS]weather[ARGS]ARGUMENTS", r#"{"city": "Rome"}"#),
    ("mistral", "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": ARGUMENTS}]", r#"{"city": "Rome"}"#),
    (
        "deepseek_v31",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        r#"{"city": "Rome"}"#,
    ),
    (
        "openai_gptoss",
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>ARGUMENTS<|call|>",
        r#"{"city": "Rome"}"#,
    ),
];

/// What of a call's arguments is told: a text, or what it says.
fn told(call: &ToolCall) -> String {
    call.arguments.as_str().map_or_else(|| call.arguments.to_string(), str::to_owned)
}

fn cut(format: ReplyFormat, text: &str) -> (String, Reply) {
    let mut splitter = Splitter::new(format, "", &tools());
    let mut pieces = splitter.push(text);
    let (rest, reply) = splitter.cut();
    pieces.extend(rest);
    (pieces.iter().filter(|p| p.kind == Kind::Answer).map(|p| p.text.as_str()).collect(), reply)
}

#[test]
fn a_call_that_is_cut_off_is_told_as_far_as_it_goes() {
    for (name, text, arguments) in WRITTEN {
        let format = if name == "openai_gptoss" { harmony() } else { tags("qwen3", Some(name)) };
        let whole = text.replace("ARGUMENTS", arguments);
        let (from, expected) = (text.find("ARGUMENTS").unwrap(), serde_json::from_str::<Value>(arguments).unwrap());
        let named = whole.find("\"weather\"").map_or(whole.find("weather").unwrap(), |at| at + 2) + "weather".len();
        let mut lengths = Vec::new();
        for end in (0..=whole.len()).filter(|at| whole.is_char_boundary(*at)) {
            let (answer, reply) = cut(format, &whole[..end]);
            let Some(call) = reply.calls.first() else {
                assert!(end < from.max(named), "{}", &whole[..end]);
                continue;
            };
            assert_eq!(
                (reply.calls.len(), call.name.as_str(), answer.as_str()),
                (1, "weather", ""),
                "{}",
                &whole[..end]
            );
            let there = &whole[from.min(end)..end.min(from + arguments.len())];
            match end >= from + arguments.len() {
                true => assert_eq!(call.arguments, expected, "{}", &whole[..end]),
                false => assert_eq!(told(call), there, "{}", &whole[..end]),
            }
            lengths.push(end);
        }
        assert!(lengths.len() > 3 && lengths.last() == Some(&whole.len()), "{name}: {lengths:?}");
    }
    // Parameters between tags, as the JSON that they are.
    let format = tags("qwen3", Some("qwen3_coder"));
    let whole = "<tool_call>\n<function=weather>\n<parameter=city>\nSan \"F\nR\n</parameter>\n<parameter=days>\n12\n</parameter>\n\
                 </function>\n</tool_call>";
    let json = r#"{"city":"San \"F\nR","days":12}"#;
    let mut before = String::new();
    for end in whole.find("weather>").unwrap() + 8..=whole.len() {
        let (_, reply) = cut(format, &whole[..end]);
        let told = told(&reply.calls[0]);
        assert!(json.starts_with(&told) && told.len() >= before.len(), "{}: {told}", &whole[..end]);
        before = told;
    }
    assert_eq!(before, json);
    // Whole calls before it stay, and what is no call of a tool stays an answer.
    let two = "{\"name\": \"weather\", \"parameters\": {\"days\": 1}}; {\"name\": \"weather\", \"parameters\": {\"da";
    let (_, reply) = cut(tags("qwen3", Some("llama3_json")), two);
    assert_eq!(reply.calls, [called("weather", json!({"days": 1})), called("weather", json!("{\"da"))]);
    for (name, text) in [("llama3_json", "{\"name\": \"Bob\", \"age\": 3"), ("hermes", "a <tool_call>{\"name\": \"we")]
    {
        let (answer, reply) = cut(tags("qwen3", Some(name)), text);
        let malformed: String = reply.malformed.iter().map(|m| m.text.as_str()).collect();
        assert_eq!((reply.calls.len(), answer + &malformed), (0, text.to_owned()));
    }
}

#[test]
fn a_reply_is_a_message_that_its_template_takes_back() {
    let template = golden("openai-gpt-oss-120b.jinja");
    let user = |text: &str| json!({"role": "user", "content": text});
    let text = "<|channel|>analysis<|message|>Secret.<|end|><|start|>assistant<|channel|>final<|message|>Open.";
    let said = reply(template.reply_format(), HARMONY, &[], text).message(&harmony());
    let messages = [user("a"), said, user("b")];
    let input = ChatInput { messages: &messages, add_generation_prompt: true, ..ChatInput::default() };
    let prompt = template.render(&input).unwrap();
    // OpenAI: thinking of earlier turns is dropped once there is a final answer.
    assert!(prompt.contains("<|start|>assistant<|channel|>final<|message|>Open.<|end|>") && !prompt.contains("Secret"));

    // With words to the user before the call, which this template refuses beside thinking.
    let call = "<|channel|>analysis<|message|>Secret.<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>\
                <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"x\": 1}<|call|>";
    let said = reply(template.reply_format(), HARMONY, &[], call).message(&harmony());
    let messages = [user("a"), said, json!({"role": "tool", "content": "7"})];
    let prompt = template.render(&ChatInput { messages: &messages, ..input }).unwrap();
    // While its tools answer, it stays.
    assert!(prompt.contains("<|channel|>analysis<|message|>Secret.<|end|>"), "{prompt}");
    assert!(prompt.contains("to=functions.f<|channel|>commentary json<|message|>{\"x\": 1}<|call|>"), "{prompt}");
}

/// Makers hand over a reply as it was written and have their template find the thinking in it; taken apart it is the same.
#[test]
fn a_reply_taken_apart_makes_the_prompt_that_its_template_makes_of_the_whole_text() {
    let user = |text: &str| json!({"role": "user", "content": text});
    for (name, raw) in [
        ("Qwen-Qwen3-0.6B.jinja", "<think>\nHm.\n\nYes?\n</think>\n\nIt is."),
        ("Qwen3.5-4B.jinja", "<think>\nHm.\n\nYes?\n</think>\n\nIt is."),
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.jinja", "<think>\nHm.\n\nYes?\n</think>\nIt is."),
        ("NVIDIA-Nemotron-Nano-v2.jinja", "<think>\nHm.\n\nYes?\n</think>\n\nIt is."),
        ("deepseek-ai-DeepSeek-V3.1.jinja", "<think>Hm.</think>It is."),
    ] {
        let template = golden(name);
        let apart = reply(template.reply_format(), "", &[], raw);
        assert_eq!((apart.answer.as_str(), apart.thinking.starts_with("Hm.")), ("It is.", true), "{name}");
        let prompt = |said: Value| {
            let messages = [user("a"), said, user("b")];
            template
                .render(&ChatInput { messages: &messages, add_generation_prompt: true, ..ChatInput::default() })
                .unwrap()
        };
        let whole = prompt(json!({"role": "assistant", "content": raw}));
        assert_eq!(prompt(apart.message(&template.reply_format())), whole, "{name}");
        assert!(!whole.contains("Hm."), "{name}");
    }
}

/// Every format there is, with prompts that open thinking or do not.
fn formats() -> impl Strategy<Value = (ReplyFormat, &'static str)> {
    let reasoning: Vec<Option<Reasoning>> =
        std::iter::once(None).chain(Reasoning::names().map(Reasoning::named)).collect();
    let calls: Vec<Option<Calls>> = std::iter::once(None).chain(Calls::names().map(Calls::named)).collect();
    let prompts = prop::sample::select(vec!["", "<think>\n", "<think></think>", HARMONY, "[THINK]"]);
    (prop::sample::select(reasoning), prop::sample::select(calls), prompts)
        .prop_map(|(reasoning, calls, prompt)| (ReplyFormat { reasoning, calls }, prompt))
}

/// Marks of all formats, their beginnings, and what stands between them.
fn texts() -> impl Strategy<Value = String> {
    let call = "{\"name\": \"weather\", \"arguments\": {}}";
    let mut parts =
        vec!["a", " ", "\n", "\n\n", "{", "ü€", "<", "</", "[", "<|", "；", call, "; ", "NAME", ">", "\r\n"];
    parts.extend(["analysis", "final", "commentary to=functions.f <|constrain|>json", "assistant", "weather>"]);
    parts.extend(["<parameter=city>\nx\n</parameter>\n", "</think", "<tool", "<|ch"]);
    for name in Reasoning::names() {
        parts.extend(ReplyFormat { reasoning: Reasoning::named(name), calls: None }.marks());
    }
    for name in Calls::names() {
        parts.extend(ReplyFormat { reasoning: None, calls: Calls::named(name) }.marks());
    }
    prop::collection::vec(prop::sample::select(parts), 0..14).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..unsaved() })]
    #[test]
    fn nothing_is_lost_and_the_cuts_of_a_stream_change_nothing(
        (format, prompt) in formats(),
        text in texts(),
        sizes in prop::collection::vec(1usize..9, 1..6),
        with_tools in any::<bool>(),
    ) {
        let tools = if with_tools { tools() } else { Vec::new() };
        let whole = split(format, prompt, &tools, &text, &[usize::MAX]);
        let all: String = whole.0.iter().map(|p| p.text.as_str()).collect();
        prop_assert_eq!(&all, &text);
        prop_assert_eq!(&split(format, prompt, &tools, &text, &sizes), &whole);
        // What the reply has is what the pieces have.
        let of = |kind| whole.0.iter().filter(|p| p.kind == kind).map(|p| p.text.as_str()).collect::<Vec<_>>().join("\n\n");
        prop_assert_eq!(&whole.1.thinking, &of(Kind::Thinking));
        prop_assert_eq!(&whole.1.answer, &of(Kind::Answer));
    }
}

/// Marks of replies are special tokens in many vocabularies, which no text has otherwise.
#[test]
fn special_tokens_are_shown_where_replies_are_taken_apart_by_them() {
    for (name, tokenizer) in super::small_tokenizers() {
        let of = |text: &str| tokenizer.token_to_id(text);
        let mark = if name == "byte-level" { "<|im_end|>" } else { "</s>" };
        let ids = [of("a"), of(mark), of("b"), of("a")].map(Option::unwrap);
        let shown = tokenizer.showing(&[mark, "no such token"]);
        assert!(tokenizer.is_special(ids[1]) && !shown.is_special(ids[1]), "{name}");
        assert!(!tokenizer.decode(&ids, true).unwrap().contains(mark), "{name}");
        let text = shown.decode(&ids, true).unwrap();
        assert_eq!(text, tokenizer.decode(&ids, false).unwrap(), "{name}");
        assert_eq!(super::streamed(&shown, &ids, true), text, "{name}");
        // Others stay away, also beside it.
        let other = if name == "byte-level" { "<|endoftext|>" } else { "<s>" };
        let Some(other) = of(other).filter(|id| tokenizer.is_special(*id)) else { continue };
        let ids = [ids[0], other, ids[1], ids[2]];
        assert_eq!(super::streamed(&shown, &ids, true), shown.decode(&ids, true).unwrap(), "{name}");
        assert_eq!(
            shown.decode(&ids, true).unwrap(),
            tokenizer.decode(&[ids[0], ids[2], ids[3]], false).unwrap(),
            "{name}"
        );
    }
}
