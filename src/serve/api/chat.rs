//! /v1/chat/completions: conversations, with thinking and calls of tools taken apart.

use std::collections::VecDeque;
use std::sync::Arc;

use axum::response::Response;
use serde_json::{Map, Value, json};

use super::answers::{Answers, Ending, Prompt, Whole};
use super::fields::Fields;
use super::logprobs::Names;
use super::messages::{ToolChoice, messages, tool_choice, tools};
use super::parameters::{self, Parameters};
use super::{Head, events, fresh, total_usage, usage};
use crate::serve::error::ApiError;
use crate::serve::model::{Conversation, ServedModel};
use crate::serve::state::Models;
use crate::serve::worker::Output;
use crate::text::grammar::{Calls, Grammar};
use crate::text::reply::{Kind, Malformed, Piece, Reasoning, ReplyFormat, Splitter, ToolCall};

type Result<T> = std::result::Result<T, ApiError>;

/// A conversation that is to be answered, as both chat endpoints understand it.
pub(super) struct Chat {
    pub model: Arc<ServedModel>,
    pub parameters: Parameters,
    pub prompt: Vec<u32>,
    /// Takes one answer apart.
    splitter: Splitter,
    pub answers: Answers,
    /// Thinking is told.
    reasoning: bool,
    /// One call at most.
    single: bool,
    choice: ToolChoice,
}

/// What is asked of the model beside the conversation.
pub(super) struct Wish {
    pub conversation: Conversation,
    pub choice: ToolChoice,
    /// Several calls at once.
    pub parallel: bool,
    pub max_tokens: Option<usize>,
    pub reasoning: bool,
}

impl Chat {
    /// Writes the prompt and asks for the answers.
    pub(super) fn begin(model: Arc<ServedModel>, mut parameters: Parameters, mut wish: Wish) -> Result<Self> {
        let tools = wish.conversation.tools.take().filter(|t| !t.is_empty() && wish.choice != ToolChoice::None);
        wish.conversation.tools = tools;
        let tools = wish.conversation.tools.as_deref().unwrap_or_default();
        let format = ReplyFormat { calls: model.format.calls.filter(|_| !tools.is_empty()), ..model.format };
        let harmony = format.reasoning == Some(Reasoning::Harmony);
        if !tools.is_empty() && format.calls.is_none() && !harmony {
            let message = "how this model writes calls of tools is not known from its chat template; \
                           `recoup serve --tool-call-parser NAME` says it";
            return Err(ApiError::parameter("tools", message));
        }
        let named = match &wish.choice {
            ToolChoice::Named(name) => Some(Some(name.clone())),
            ToolChoice::Required => Some(None),
            ToolChoice::Auto | ToolChoice::None => None,
        };
        if let Some(name) = named {
            if parameters.grammar.is_some() {
                let message =
                    "`tool_choice` says that a tool is called, `response_format` what is answered instead; one of both";
                return Err(ApiError::parameter("tool_choice", message));
            }
            let calls = Calls { format, tools: tools.to_vec(), only: name, parallel: wish.parallel };
            parameters.grammar = Some(Grammar::Calls(calls));
        }
        let (written, prompt) = model.write(&wish.conversation)?;
        let splitter = Splitter::new(format, &written, tools);
        // A grammar of gpt-oss's calls has its thinking too, which ends in no answer.
        let of_calls = harmony && matches!(parameters.grammar, Some(Grammar::Calls(_)));
        let thinking = splitter.thinking().filter(|_| !of_calls);
        let asked = Prompt { tokens: prompt.clone(), thinking };
        let answers = Answers::ask(&model, &parameters, &[asked], wish.max_tokens)?;
        let Wish { reasoning, choice, parallel, .. } = wish;
        Ok(Self { model, parameters, prompt, splitter, answers, reasoning, single: !parallel, choice })
    }

    /// What takes the first answer apart, and each other.
    pub(super) fn reader(&self) -> Reader {
        Reader {
            splitter: self.splitter.clone(),
            calls: 0,
            malformed: 0,
            section: String::new(),
            single: self.single,
            reasoning: self.reasoning,
            choice: self.choice.clone(),
            thinks: self.splitter.thinking().is_some_and(|thinking| thinking.open.is_none()),
            thought: 0,
        }
    }
}

/// Takes an answer apart while it comes.
pub(super) struct Reader {
    splitter: Splitter,
    calls: usize,
    malformed: usize,
    /// Text of a call that is being written.
    section: String,
    /// Only the first call is told.
    single: bool,
    reasoning: bool,
    choice: ToolChoice,
    /// What came last is thinking, and how many tokens were.
    thinks: bool,
    thought: usize,
}

/// What is new of an answer.
#[derive(Debug, Default)]
pub(super) struct News {
    pub thinking: String,
    pub content: String,
    /// Each with its number among the answer's calls.
    pub calls: Vec<(usize, ToolCall)>,
}

impl News {
    fn extend(&mut self, more: Self) {
        self.thinking += &more.thinking;
        self.content += &more.content;
        self.calls.extend(more.calls);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.thinking.is_empty() && self.content.is_empty() && self.calls.is_empty()
    }
}

impl Reader {
    /// The text that came with one token.
    pub(super) fn push(&mut self, text: &str) -> News {
        let news = self.read(text);
        self.thought += usize::from(self.thinks);
        news
    }

    /// A whole answer; whether it had calls, and how many of its tokens were thinking.
    pub(super) fn whole(mut self, answer: &Whole) -> (News, bool, usize) {
        let mut all = News::default();
        let tokens = answer.tokens.len();
        for text in &answer.texts[..tokens.min(answer.texts.len())] {
            all.extend(self.push(text));
        }
        let thought = self.thought;
        let is_cut = answer.finish.as_ref().is_some_and(Ending::is_cut);
        let (last, called) = self.finish(answer.texts.get(tokens).map_or("", String::as_str), is_cut);
        all.extend(last);
        (all, called, thought)
    }

    /// Tokens that were thinking so far.
    pub(super) fn thought(&self) -> usize {
        self.thought
    }

    fn read(&mut self, text: &str) -> News {
        let pieces = self.splitter.push(text);
        let calls = self.splitter.take_calls();
        self.news(pieces, calls)
    }

    /// The end of the answer, which `is_cut` off there or not; whether it had calls.
    pub(super) fn finish(mut self, rest: &str, is_cut: bool) -> (News, bool) {
        let mut news = self.read(rest);
        let splitter = self.splitter.clone();
        let (pieces, reply) = if is_cut { splitter.cut() } else { splitter.finish() };
        let in_thinking = reply.unfinished;
        // What was given before is not given again.
        let calls = reply.calls.into_iter().skip(self.calls).map(Ok);
        let calls = calls.chain(reply.malformed.into_iter().skip(self.malformed).map(Err)).collect();
        news.extend(self.news(pieces, calls));
        if is_cut && matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_)) {
            // All but calls is what was to become one.
            news.content.clear();
            if let ToolChoice::Named(name) = &self.choice
                && self.calls == 0
                && !in_thinking
            {
                news.calls.push((0, ToolCall { name: name.clone(), arguments: "".into() }));
                self.calls = 1;
            }
        }
        (news, self.calls > 0)
    }

    fn news(&mut self, pieces: Vec<Piece>, calls: Vec<std::result::Result<ToolCall, Malformed>>) -> News {
        let mut news = News::default();
        let mut malformed = VecDeque::new();
        for call in calls {
            match call {
                Ok(call) => {
                    if self.calls == 0 || !self.single {
                        news.calls.push((self.calls, call));
                    }
                    self.calls += 1;
                }
                Err(call) => malformed.push_back(call.text),
            }
        }
        for piece in pieces {
            if piece.kind == Kind::Call {
                self.section += &piece.text;
                self.thinks = false;
                continue;
            }
            self.end_section(&mut malformed, &mut news);
            self.section.clear();
            match piece.kind {
                Kind::Thinking => {
                    self.thinks = true;
                    if self.reasoning {
                        news.thinking += &piece.text;
                    }
                }
                Kind::Answer => {
                    self.thinks = false;
                    news.content += &piece.text;
                }
                Kind::Call | Kind::Markup => {}
            }
        }
        self.end_section(&mut malformed, &mut news);
        for text in malformed {
            self.malformed += 1;
            news.content += &text;
        }
        news
    }

    /// A call that cannot be read is not lost: the client sees what the model wrote, where it stood.
    fn end_section(&mut self, malformed: &mut VecDeque<String>, news: &mut News) {
        if malformed.front().is_some_and(|text| *text == self.section) {
            self.malformed += 1;
            news.content += &malformed.pop_front().unwrap_or_default();
            self.section.clear();
        }
    }
}

/// The arguments of a call as the API has them: JSON in a text.
pub(super) fn arguments(call: &ToolCall) -> String {
    match &call.arguments {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn call(call: &ToolCall) -> Value {
    json!({"id": fresh("call_"), "type": "function", "function": {"name": call.name, "arguments": arguments(call)}})
}

/// A request to /v1/chat/completions that has been understood and asked.
pub struct ChatCompletion {
    chat: Chat,
    logprobs: bool,
    head: Head,
}

impl ChatCompletion {
    /// Understands a body and asks for the answers.
    ///
    /// # Errors
    /// What is wrong with the request; too many wait.
    pub fn begin(models: &Models, body: &[u8]) -> Result<Self> {
        let mut fields = Fields::read(body)?;
        let model = models.named(fields.take::<String>("model")?.as_deref())?;
        let mut parameters = Parameters::take(&mut fields, &model.text.generation().drawn)?;
        let logprobs = fields.switch("logprobs", false)?;
        let top =
            fields.take::<i64>("top_logprobs")?.map(|k| parameters::alternatives("top_logprobs", k)).transpose()?;
        if top.is_some_and(|k| k > 0) && !logprobs {
            return Err(ApiError::parameter("top_logprobs", "`top_logprobs` needs `logprobs: true`"));
        }
        parameters.sampling.logprobs = logprobs.then_some(top.unwrap_or(0));
        let max_tokens: Option<usize> = fields.take("max_completion_tokens")?;
        let max_tokens = max_tokens.or(fields.take("max_tokens")?);
        let (conversation, choice) = conversation(&model, &mut fields)?;
        let parallel = fields.switch("parallel_tool_calls", true)?;
        let reasoning = fields.switch("include_reasoning", true)?;
        fields.refuse("chat_template", &[], "the model's own template is used; it is set by whoever serves")?;
        fields.refuse("functions", &[json!([])], "use `tools`")?;
        fields.refuse("function_call", &[json!("none")], "use `tool_choice`")?;
        fields.refuse("modalities", &[json!(["text"])], "answers are texts")?;
        fields.refuse("audio", &[], "answers are texts")?;
        fields.refuse("web_search_options", &[], "nothing is looked up")?;
        fields.refuse("echo", &[json!(false)], "it is for /v1/completions")?;
        fields.finish()?;
        let wish = Wish { conversation, choice, parallel, max_tokens, reasoning };
        let chat = Chat::begin(model, parameters, wish)?;
        let head = Head::new("chatcmpl-", "chat.completion", &chat.model);
        Ok(Self { chat, logprobs, head })
    }

    /// The response, at once or as it comes.
    ///
    /// # Errors
    /// When an answer cannot be given.
    pub async fn respond(self) -> Result<Response> {
        if self.chat.parameters.stream.is_some() {
            return Ok(self.stream());
        }
        let Self { chat, logprobs, head } = self;
        let readers: Vec<Reader> = (0..chat.answers.count).map(|_| chat.reader()).collect();
        let Chat { model, parameters, prompt, answers, .. } = chat;
        let whole = answers.whole().await?;
        let names = Names { model: &model, by_id: parameters.name_by_id };
        let (mut choices, mut tokens, mut thoughts, mut cached) = (Vec::new(), 0, 0, 0);
        for (index, (answer, reader)) in whole.iter().zip(readers).enumerate() {
            let (news, called, thought) = reader.whole(answer);
            thoughts += thought;
            let ending = answer.finish.as_ref().ok_or_else(ApiError::stopped)?;
            tokens += ending.tokens;
            cached += if index == 0 { ending.cached } else { 0 };
            let mut message = Map::from_iter([("role".to_owned(), json!("assistant"))]);
            let silent = called && news.content.is_empty();
            message.insert("content".into(), if silent { Value::Null } else { news.content.into() });
            message.insert("refusal".into(), Value::Null);
            if !news.thinking.is_empty() {
                message.insert("reasoning_content".into(), news.thinking.into());
            }
            if called {
                message.insert("tool_calls".into(), news.calls.iter().map(|(_, c)| call(c)).collect());
            }
            let mut choice = json!({"index": index, "message": message,
                "logprobs": if logprobs { names.chat(&answer.tokens) } else { Value::Null },
                "finish_reason": reason(ending, called), "stop_reason": ending.stop_reason(&parameters.stop_tokens)});
            if parameters.ids {
                choice["token_ids"] = answer.tokens.iter().map(|t| t.token).collect();
            }
            choices.push(choice);
        }
        let usage = with_thoughts(total_usage(prompt.len(), tokens, cached), thoughts);
        let mut body = json!({"choices": choices, "usage": usage});
        if parameters.prompt_logprobs.is_some() {
            body["prompt_logprobs"] = names.prompt(&whole[0].prompt);
        }
        if parameters.ids {
            body["prompt_token_ids"] = prompt.into();
        }
        Ok(head.whole(body))
    }

    fn stream(self) -> Response {
        let Self { chat, logprobs, mut head } = self;
        head.object = "chat.completion.chunk";
        let mut readers: Vec<Option<Reader>> = (0..chat.answers.count).map(|_| Some(chat.reader())).collect();
        let Chat { model, parameters, prompt, mut answers, .. } = chat;
        events(move |out| async move {
            let stream = parameters.stream.unwrap_or_default();
            let (mut told, mut thoughts, mut cached) = (0, 0, 0);
            let chunk = |choices: Value, told: usize| {
                let mut chunk = json!({ "choices": choices });
                if stream.running_usage {
                    chunk["usage"] = usage(prompt.len(), told);
                }
                head.chunk(chunk)
            };
            for index in 0..readers.len() {
                let delta = json!({"role": "assistant", "content": ""});
                let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
                let mut first = chunk(json!([choice]), 0);
                if parameters.ids && index == 0 {
                    first["prompt_token_ids"] = prompt.clone().into();
                }
                out.send(&first).await?;
            }
            while let Some(output) = answers.next().await {
                let (index, output) = output?;
                let Some(reader) = readers[index].as_mut() else { continue };
                let (news, tokens, ending) = match output {
                    Output::Prompt(scores) => {
                        let names = Names { model: &model, by_id: parameters.name_by_id };
                        let mut with = chunk(json!([]), told);
                        with["prompt_logprobs"] = names.prompt(&scores);
                        out.send(&with).await?;
                        continue;
                    }
                    Output::Token { token, text } => (reader.push(&text), vec![token], None),
                    Output::Done { answer, rest } => {
                        let Some(reader) = readers[index].take() else { continue };
                        thoughts += reader.thought();
                        let ending = Ending::of(&answer);
                        cached += if index == 0 { ending.cached } else { 0 };
                        let (news, called) = reader.finish(&rest, ending.is_cut());
                        (news, Vec::new(), Some((ending, called)))
                    }
                    Output::Failed(error) => return Err(error),
                };
                told += tokens.len();
                let must = (logprobs || parameters.ids) && !tokens.is_empty();
                if !news.is_empty() || must {
                    let names = Names { model: &model, by_id: parameters.name_by_id };
                    for (at, delta) in deltas(news, must).into_iter().enumerate() {
                        let mut choice =
                            json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
                        if must && at == 0 {
                            if logprobs {
                                choice["logprobs"] = names.chat(&tokens);
                            }
                            if parameters.ids {
                                choice["token_ids"] = tokens.iter().map(|t| t.token).collect();
                            }
                        }
                        out.send(&chunk(json!([choice]), told)).await?;
                    }
                }
                if let Some((ending, called)) = ending {
                    let choice = json!({"index": index, "delta": {}, "logprobs": null,
                        "finish_reason": reason(&ending, called),
                        "stop_reason": ending.stop_reason(&parameters.stop_tokens)});
                    out.send(&chunk(json!([choice]), told)).await?;
                }
            }
            if readers.iter().any(Option::is_some) {
                return Err(ApiError::stopped());
            }
            if stream.usage {
                let usage = with_thoughts(total_usage(prompt.len(), told, cached), thoughts);
                out.send(&head.chunk(json!({"choices": [], "usage": usage}))).await?;
            }
            out.done().await
        })
    }
}

/// What was used, of which so many tokens were thinking.
fn with_thoughts(mut usage: Value, thoughts: usize) -> Value {
    usage["completion_tokens_details"] = json!({"reasoning_tokens": thoughts});
    usage
}

/// News as deltas of messages, in the order in which they are read; `must`: one at least.
fn deltas(news: News, must: bool) -> Vec<Value> {
    let mut deltas = Vec::new();
    if !news.thinking.is_empty() {
        deltas.push(json!({"reasoning_content": news.thinking}));
    }
    if !news.content.is_empty() {
        deltas.push(json!({"content": news.content}));
    }
    for (number, made) in &news.calls {
        let mut call = call(made);
        call["index"] = (*number).into();
        deltas.push(json!({"tool_calls": [call]}));
    }
    if deltas.is_empty() && must {
        deltas.push(json!({"content": ""}));
    }
    deltas
}

fn reason(ending: &Ending, called: bool) -> &'static str {
    if called && ending.reason() == "stop" { "tool_calls" } else { ending.reason() }
}

/// The conversation of a request, as /tokenize understands it too.
pub(super) fn conversation(model: &ServedModel, fields: &mut Fields) -> Result<(Conversation, ToolChoice)> {
    let mentions = |name: &str| model.text.template().is_some_and(|template| template.mentions(name));
    let messages = messages(fields.need("messages")?, mentions("developer"))?;
    let tools = tools(fields.take("tools")?)?;
    let choice = tool_choice(fields.take("tool_choice")?, &tools)?;
    let mut arguments: Map<String, Value> = fields.take("chat_template_kwargs")?.unwrap_or_default();
    if let Some(effort) = fields.take::<String>("reasoning_effort")? {
        if !mentions("reasoning_effort") {
            let message = "`reasoning_effort`: this model's chat template knows none";
            return Err(ApiError::parameter("reasoning_effort", message));
        }
        arguments.entry("reasoning_effort").or_insert(effort.into());
    }
    let continue_last = fields.switch("continue_final_message", false)?;
    let open = fields.switch("add_generation_prompt", !continue_last)?;
    if continue_last && open {
        let message = "`continue_final_message` and `add_generation_prompt` exclude each other";
        return Err(ApiError::parameter("continue_final_message", message));
    }
    let documents = fields.take("documents")?;
    let conversation = Conversation {
        messages,
        tools: (!tools.is_empty()).then_some(tools),
        documents,
        arguments,
        open,
        continue_last,
    };
    Ok((conversation, choice))
}
