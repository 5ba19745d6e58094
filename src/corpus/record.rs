//! What a record means: a text, token ids, or a conversation for the chat template; and which of its
//! fields were not used.

use serde_json::{Map, Value, json};

use super::{CorpusError, Document, Result};
use crate::text::{ChatInput, ChatTemplate, Tokenizer};

/// Roles that chat templates know. One writes nothing at all for a role that it does not know, so that what is said in
/// another must be found in what it wrote.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// ShareGPT's names for roles, as LLaMA-Factory and Axolotl read them.
const SHAREGPT: [(&str, &str); 12] = [
    ("system", "system"),
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("assistant", "assistant"),
    ("model", "assistant"),
    ("bot", "assistant"),
    ("tool", "tool"),
    ("observation", "tool"),
    ("function_response", "tool"),
    ("developer", "developer"),
];

/// What one record is.
#[derive(Clone, Debug, PartialEq)]
pub enum Meaning {
    /// A document, which goes on in the next row where one is full.
    Text(String),
    /// A text of which what comes after the prompt is the answer.
    Completion {
        prompt: String,
        completion: String,
    },
    Conversation(Conversation),
    /// Token ids as they are, one or several sequences.
    Tokens(Vec<Vec<u32>>),
}

/// Turns, and what the template is told beside them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    pub messages: Vec<Value>,
    pub tools: Option<Vec<Value>>,
    pub documents: Option<Vec<Value>>,
    /// Further arguments of the template (`chat_template_kwargs`, as TRL calls the column).
    pub extra: Map<String, Value>,
}

/// A record's meaning, and its fields that have no part in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Meant {
    pub meaning: Meaning,
    pub unused: Vec<String>,
}

/// What a record means.
///
/// # Errors
/// A record of no known kind, by the names of its fields; turns, tools or ids that are none.
pub fn meaning(record: &Value) -> Result<Meant, String> {
    let all_used = |meaning| Ok(Meant { meaning, unused: Vec::new() });
    let map = match record {
        Value::String(text) => return all_used(Meaning::Text(text.clone())),
        Value::Array(items) if items.iter().all(Value::is_number) => return all_used(Meaning::Tokens(ids(record)?)),
        Value::Array(items) if is_turns(items) => {
            let conversation = Conversation { messages: turns(items)?, ..Conversation::default() };
            return all_used(Meaning::Conversation(conversation));
        }
        Value::Object(map) => map,
        other => return Err(format!("expected an object, found {}", recoup_ground::records::kind(other))),
    };
    let has = |key: &str| map.get(key).is_some_and(|v| !v.is_null());
    let mut used = Vec::new();
    let mut take = |key: &'static str| {
        used.push(key);
        map.get(key).filter(|v| !v.is_null())
    };
    let meaning = if let Some(key) = ["messages", "conversations", "conversation"].into_iter().find(|k| has(k)) {
        let list = list(key, take(key).unwrap_or(&Value::Null))?;
        let mut messages = turns(&list).map_err(|e| format!("`{key}`: {e}"))?;
        conversation(&mut take, &mut messages)?
    } else if let (true, Some(text)) = (has("text"), map.get("text")) {
        take("text");
        Meaning::Text(text.as_str().ok_or_else(|| wrong_kind("text", "a text", text))?.to_owned())
    } else if has("prompt") && has("completion") {
        match (take("prompt"), take("completion")) {
            (Some(Value::String(prompt)), Some(Value::String(completion))) => {
                Meaning::Completion { prompt: prompt.clone(), completion: completion.clone() }
            }
            (Some(prompt), Some(completion)) => {
                let both = [list("prompt", prompt)?, list("completion", completion)?].concat();
                let mut messages = turns(&both).map_err(|e| format!("`prompt` and `completion`: {e}"))?;
                conversation(&mut take, &mut messages)?
            }
            _ => return Err("`prompt` and `completion` must both be there".into()),
        }
    } else if has("input_ids") {
        Meaning::Tokens(ids(take("input_ids").unwrap_or(&Value::Null))?)
    } else {
        let found: Vec<String> = map.keys().map(|k| format!("`{k}`")).collect();
        return Err(format!(
            "expected `messages` (a list of turns), `conversations` (ShareGPT's), `prompt` and `completion`, `text` (a \
             string) or `input_ids`; found {}",
            if found.is_empty() { "nothing".into() } else { found.join(", ") }
        ));
    };
    let mut unused: Vec<String> =
        map.iter().filter(|(k, v)| !used.contains(&k.as_str()) && says_something(v)).map(|(k, _)| k.clone()).collect();
    // Templates know nothing of it: OpenAI's fine-tuning leaves such turns out of the loss.
    let turns = match &meaning {
        Meaning::Conversation(c) => &c.messages[..],
        _ => &[],
    };
    if turns.iter().any(|t| t.get("weight").is_some_and(|w| !w.is_null())) {
        unused.push("weight of turns".into());
    }
    Ok(Meant { meaning, unused })
}

/// A field that is there in every row of a table says nothing where it is empty.
fn says_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    }
}

fn wrong_kind(key: &str, expected: &str, found: &Value) -> String {
    format!("`{key}`: expected {expected}, found {}", recoup_ground::records::kind(found))
}

fn is_turns(items: &[Value]) -> bool {
    !items.is_empty() && items.iter().all(|i| i.get("role").or(i.get("from")).is_some())
}

/// Turns with the other fields of a record that the template is given.
fn conversation<'a>(
    take: &mut impl FnMut(&'static str) -> Option<&'a Value>,
    messages: &mut Vec<Value>,
) -> Result<Meaning, String> {
    if let Some(system) = take("system") {
        let system = system.as_str().ok_or_else(|| wrong_kind("system", "a text", system))?;
        if messages.first().is_some_and(|m| m["role"] == "system") {
            return Err("`system` beside a first turn of the role `system`: two system messages".into());
        }
        if !system.is_empty() {
            messages.insert(0, json!({"role": "system", "content": system}));
        }
    }
    let mut listed = |key| take(key).map(|value| list(key, value)).transpose();
    let (tools, documents) = (listed("tools")?, listed("documents")?);
    let extra = match take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(map)) => map.clone(),
        Some(other) => return Err(wrong_kind("chat_template_kwargs", "an object", other)),
    };
    // As OpenAI's API writes an empty list.
    let tools = tools.filter(|t| !t.is_empty());
    if let Some(bad) = tools.iter().flatten().find(|t| !t.is_object()) {
        return Err(wrong_kind("tools", "a list of objects", bad));
    }
    Ok(Meaning::Conversation(Conversation { messages: std::mem::take(messages), tools, documents, extra }))
}

/// A list, also where it is written as JSON in a string, as tables hold it.
fn list(key: &str, value: &Value) -> Result<Vec<Value>, String> {
    match value {
        Value::Array(items) => Ok(items.clone()),
        Value::String(text) if text.is_empty() => Ok(Vec::new()),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(Value::Array(items)) => Ok(items),
            Ok(other) => Err(wrong_kind(key, "a list (as JSON in a text)", &other)),
            Err(e) => Err(format!("`{key}`: expected a list, or one as JSON in a text ({e})")),
        },
        other => Err(wrong_kind(key, "a list", other)),
    }
}

/// Turns as templates expect them: ShareGPT's names changed, arguments of tool calls as objects, a content of one text part
/// as that text.
fn turns(items: &[Value]) -> Result<Vec<Value>, String> {
    if items.is_empty() {
        return Err("a conversation without turns".into());
    }
    items.iter().enumerate().map(|(i, turn)| one_turn(turn).map_err(|e| format!("turn {}: {e}", i + 1))).collect()
}

fn one_turn(turn: &Value) -> Result<Value, String> {
    let Value::Object(turn) = turn else { return Err(wrong_kind("turn", "an object", turn)) };
    let mut turn = turn.clone();
    // What a table gives every row, and templates would take for said.
    turn.retain(|key, value| !value.is_null() || key == "content");
    if turn.contains_key("from") && !turn.contains_key("role") {
        let from = turn.remove("from").unwrap_or_default();
        let role = SHAREGPT.iter().find(|(name, _)| from == *name);
        let Some((_, role)) = role else {
            let known: Vec<&str> = SHAREGPT.iter().map(|(name, _)| *name).collect();
            return Err(format!("`from` is {from}, expected one of {}", known.join(", ")));
        };
        let Some(value) = turn.remove("value") else { return Err("`from` without `value`".into()) };
        let mut first = Map::from_iter([("role".to_owned(), json!(role)), ("content".to_owned(), value)]);
        first.append(&mut turn);
        turn = first;
    }
    let role = match turn.get("role") {
        Some(Value::String(role)) => role.clone(),
        Some(other) => return Err(wrong_kind("role", "a text", other)),
        None => {
            let keys: Vec<&str> = turn.keys().map(String::as_str).collect();
            return Err(format!("no `role` (nor ShareGPT's `from`); it has {}", keys.join(", ")));
        }
    };
    let calls = turn.get("tool_calls").is_some_and(says_something);
    match turn.get("content") {
        Some(Value::String(_)) => {}
        None | Some(Value::Null) if calls || turn.keys().any(|k| k.starts_with("reasoning") || k == "thinking") => {}
        None | Some(Value::Null) => return Err(format!("the {role} says nothing: no `content` and no `tool_calls`")),
        Some(Value::Array(parts)) => {
            let text = parts_text(parts)?;
            turn.insert("content".into(), text.into());
        }
        // What a tool gives may be JSON.
        Some(Value::Object(_)) if role == "tool" => {}
        Some(other) => return Err(wrong_kind("content", "a text", other)),
    }
    if let Some(Value::Array(calls)) = turn.get_mut("tool_calls") {
        calls.iter_mut().for_each(open_arguments);
    }
    Ok(Value::Object(turn))
}

/// The text of a content in parts, of which there must be one.
fn parts_text(parts: &[Value]) -> Result<String, String> {
    match parts {
        [Value::Object(part)] if part.get("type").is_none_or(|t| t == "text") => {
            let text = part.get("text").and_then(Value::as_str);
            Ok(text.ok_or("a part of `content` without `text`")?.to_owned())
        }
        _ => {
            let kinds: Vec<String> =
                parts.iter().map(|p| p["type"].as_str().unwrap_or("without a type").to_owned()).collect();
            Err(format!(
                "`content` in {} parts ({}); only text is read, in one part or as a string",
                parts.len(),
                kinds.join(", ")
            ))
        }
    }
}

/// Arguments of a tool call as an object, where they are one as JSON in a text: OpenAI's API writes them so, and templates
/// would quote them a second time.
fn open_arguments(call: &mut Value) {
    let call = if call.get("function").is_some() { &mut call["function"] } else { call };
    let Some(Value::String(text)) = call.get("arguments") else { return };
    if let Ok(Value::Object(map)) = serde_json::from_str(text) {
        call["arguments"] = Value::Object(map);
    }
}

/// Token ids: a list of them, or a list of such lists.
fn ids(value: &Value) -> Result<Vec<Vec<u32>>, String> {
    let nested = value.get(0).is_some_and(Value::is_array);
    let rows = if nested {
        serde_json::from_value(value.clone())
    } else {
        serde_json::from_value(value.clone()).map(|row| vec![row])
    };
    rows.map_err(|e| format!("expected token ids, a list of numbers from 0 or a list of such lists ({e})"))
}

impl Conversation {
    /// The conversation as the template writes it, and of which bytes the assistant said them, where that is asked for:
    /// what a turn of its adds to the opening of it.
    ///
    /// # Errors
    /// When the template refuses or leaves a turn out; when it writes earlier turns differently later on.
    pub fn render(
        &self,
        template: &ChatTemplate,
        assistant_only: bool,
    ) -> Result<(String, Vec<std::ops::Range<usize>>)> {
        let render = |messages, add_generation_prompt| template.render(&self.input(messages, add_generation_prompt));
        let text = render(&self.messages, false)?;
        for turn in &self.messages {
            let (role, content) =
                (turn["role"].as_str().unwrap_or_default(), turn["content"].as_str().unwrap_or_default());
            if !ROLES.contains(&role) && !text.contains(content.trim()) {
                let known = ROLES.join(", ");
                return Err(CorpusError::Data(format!(
                    "the chat template writes nothing of what the role `{role}` says; roles that templates know: {known}"
                )));
            }
        }
        let mut said = Vec::new();
        let assistant = |m: &Value| m["role"] == "assistant";
        for (i, _) in self.messages.iter().enumerate().filter(|(_, m)| assistant_only && assistant(m)) {
            let (opening, whole) = (render(&self.messages[..i], true)?, render(&self.messages[..=i], false)?);
            if !text.starts_with(&whole) || !whole.starts_with(&opening) {
                let detail = "the chat template writes earlier turns differently later on, so what the assistant said cannot \
                              be told apart; leave --assistant-only out";
                return Err(CorpusError::Data(detail.into()));
            }
            said.push(opening.len()..whole.len());
        }
        Ok((text, said))
    }

    /// Whether the template writes anything of the tools.
    ///
    /// # Errors
    /// When it refuses the conversation without them.
    pub fn tools_are_written(&self, template: &ChatTemplate, text: &str) -> Result<bool> {
        let without = Self { tools: None, ..self.clone() };
        Ok(template.render(&without.input(&self.messages, false))? != text)
    }

    fn input<'a>(&'a self, messages: &'a [Value], add_generation_prompt: bool) -> ChatInput<'a> {
        let (tools, documents) = (self.tools.as_deref(), self.documents.as_deref());
        let extra = (!self.extra.is_empty()).then_some(&self.extra);
        ChatInput { messages, tools, documents, add_generation_prompt, extra }
    }
}

/// A text of which the bytes in `learned` are to be learned, as tokens.
///
/// # Errors
/// When the tokenizer cannot represent the text.
pub fn document(tokenizer: &Tokenizer, text: &str, learned: &[std::ops::Range<usize>]) -> Result<Document> {
    let (tokens, starts) = tokenizer.encode_with_starts(text)?;
    let learned = starts.iter().map(|s| learned.iter().any(|r| r.contains(s))).collect();
    Ok(Document { tokens, learned })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::SpecialTokens;

    fn turns_of(record: Value) -> Value {
        match meaning(&record).unwrap().meaning {
            Meaning::Conversation(c) => c.messages.into(),
            other => panic!("{other:?}"),
        }
    }

    fn refused(record: Value) -> String {
        meaning(&record).unwrap_err()
    }

    #[test]
    fn every_shape_of_a_conversation_is_the_same_conversation() {
        let turns = json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ]);
        let said = json!([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]);
        for record in [
            json!({"messages": turns}),
            json!({"messages": turns.to_string()}),
            turns.clone(),
            json!({"conversations": [{"from": "system", "value": "Be brief."}, said[0], said[1]]}),
            json!({"conversations": said, "system": "Be brief."}),
            json!({"conversations": turns}),
            json!({"prompt": turns.as_array().unwrap()[..2], "completion": turns.as_array().unwrap()[2..]}),
            json!({"messages": [turns[0], turns[1], {"role": "assistant", "name": null, "tool_calls": null,
                "content": [{"type": "text", "text": "Hello"}]}]}),
        ] {
            assert_eq!(turns_of(record.clone()), turns, "{record}");
        }
    }

    #[test]
    fn what_is_not_used_is_named_and_what_is_empty_is_not() {
        let record = json!({"messages": [{"role": "user", "content": "a", "weight": 0}], "text": "b", "images": ["x"],
            "source": "web", "id": 7, "category": null, "notes": "", "tools": []});
        let meant = meaning(&record).unwrap();
        assert_eq!(meant.unused, ["text", "images", "source", "id", "weight of turns"]);
        let meant = meaning(&json!({"text": "a", "tools": [{"name": "f"}], "meta": {"url": "u"}})).unwrap();
        assert_eq!((meant.meaning, meant.unused), (Meaning::Text("a".into()), vec!["tools".into(), "meta".into()]));
    }

    #[test]
    fn a_record_of_no_known_kind_is_refused_by_the_names_of_its_fields() {
        for (record, expected) in [
            (json!({"instruction": "a", "output": "b"}), "found `instruction`, `output`"),
            (json!({"prompt": "a", "chosen": "b", "rejected": "c"}), "found `prompt`, `chosen`, `rejected`"),
            (json!({}), "found nothing"),
            (json!(true), "found true or false"),
            (json!({"text": 3}), "`text`: expected a text, found a number"),
            (json!({"messages": []}), "`messages`: a conversation without turns"),
            (json!({"messages": "no list"}), "`messages`: expected a list"),
            (json!({"messages": [{"role": "user"}]}), "turn 1: the user says nothing"),
            (json!({"messages": [{"role": "user", "content": "a"}, {"text": "b"}]}), "turn 2: no `role`"),
            (json!({"conversations": [{"from": "narrator", "value": "a"}]}), "`from` is \"narrator\""),
            (json!({"conversations": [{"from": "human"}]}), "`from` without `value`"),
            (json!({"prompt": "a", "completion": [{"role": "user", "content": "b"}]}), "`prompt`: expected a list"),
            (json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), "in 1 parts (image)"),
            (json!({"messages": [{"role": "user", "content": "a"}], "tools": "{}"}), "`tools`: expected a list"),
            (
                json!({"conversations": [{"from": "system", "value": "a"}], "system": "b"}),
                "`system` beside a first turn of the role `system`",
            ),
            (json!([1, -2]), "token ids"),
            (json!({"input_ids": ["a"]}), "token ids"),
        ] {
            let said = refused(record.clone());
            assert!(said.contains(expected), "{record}: {said}");
        }
    }

    #[test]
    fn arguments_of_tool_calls_are_objects_however_they_are_written() {
        let call = |arguments: Value| json!({"type": "function", "function": {"name": "f", "arguments": arguments}});
        let turn = |arguments| json!([{"role": "assistant", "content": null, "tool_calls": [call(arguments)]}]);
        assert_eq!(turns_of(json!({"messages": turn(json!("{\"x\": 1}"))})), turn(json!({"x": 1})));
        assert_eq!(turns_of(json!({"messages": turn(json!("no JSON"))})), turn(json!("no JSON")));
    }

    /// What transformers 5.24 gives for the same: apply_chat_template(messages, tools=tools, tokenize=False).
    #[test]
    fn tools_and_arguments_of_the_template_reach_it() {
        let source = "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools>{% endif %}\
                      {% for m in messages %}{{ m.role }}: {{ m.content }}{{ '!' if loud }}\n{% endfor %}";
        let template = ChatTemplate::from_source("t", source.into(), SpecialTokens::default()).unwrap();
        let tool = json!({"type": "function", "function": {"name": "get", "parameters": {}}});
        let messages = json!([{"role": "user", "content": "Hi"}]);
        let rendered = |record: Value| match meaning(&record).unwrap().meaning {
            Meaning::Conversation(c) => {
                let (text, _) = c.render(&template, false).unwrap();
                (c.tools_are_written(&template, &text).unwrap(), text)
            }
            other => panic!("{other:?}"),
        };
        let with = "<tools>{\"type\": \"function\", \"function\": {\"name\": \"get\", \"parameters\": {}}}\n</tools>user: Hi\n";
        for tools in [json!([tool]), json!(json!([tool]).to_string())] {
            assert_eq!(rendered(json!({"messages": messages, "tools": tools})), (true, with.into()));
        }
        assert_eq!(rendered(json!({"messages": messages, "tools": null})), (false, "user: Hi\n".into()));
        let loud = json!({"messages": messages, "chat_template_kwargs": {"loud": true}});
        assert_eq!(rendered(loud).1, "user: Hi!\n");
    }

    #[test]
    fn a_role_that_the_template_drops_is_refused_and_one_that_it_writes_is_not() {
        let knows = |roles: &str| {
            let source = format!(
                "{{% for m in messages if m.role in [{roles}] %}}{{{{ m.role }}}}: {{{{ m.content }}}}{{% endfor %}}"
            );
            ChatTemplate::from_source("t", source, SpecialTokens::default()).unwrap()
        };
        let narrated = Conversation {
            messages: vec![json!({"role": "user", "content": "a"}), json!({"role": "narrator", "content": "Night."})],
            ..Conversation::default()
        };
        let error = narrated.render(&knows("'user'"), false).unwrap_err().to_string();
        assert!(error.contains("role `narrator`"), "{error}");
        narrated.render(&knows("'user', 'narrator'"), false).unwrap();
    }
}
