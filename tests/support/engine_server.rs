//! An engine behind HTTP that computes with this library, answers as one of several engines does, and has the faults that it
//! is told to have.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use recoup::backend::cpu::CpuBackend;
use recoup::checkpoint::resolve::LinearRole;
use recoup::checkpoint::{Checkpoint, CheckpointError};
use recoup::engine::{Engine, Limits, Request, answer, logits};
use recoup::formats::kv::KvFormat;
use recoup::formats::linear::{ActivationFormat, LinearTensors, OutputScale};
use recoup::logits::SamplingParams;
use recoup::model::config::MixerConfig;
use recoup::model::{Decoder, ModelConfig, Source};
use recoup::text::{ChatTemplate, ModelText, SpecialTokens};
use serde_json::{Map, Value, json};

use super::fixtures::cpu;

/// Whose answers it gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// vLLM: `prompt_logprobs`, tokens by their ids, /tokenize.
    Vllm,
    /// llama-cpp-python: `echo` of texts; token ids are refused and tokens are named by their texts.
    Echo,
    /// SGLang's /generate alone.
    Sglang,
    /// llama.cpp: generated tokens only.
    LlamaCpp,
    /// Text, and nothing else.
    Mute,
}

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    None,
    /// A module's scale is this many times what it should be.
    Scale(&'static str, f32),
    /// Gate and up of a layer, or of all, are taken for each other.
    GateUp(Option<usize>),
    /// Keys and values in FP8 under scales of 1.
    UnitCache,
    FloatInputs,
    NoWindow,
    /// Texts do not get the token that begins them.
    NoBeginning,
    /// Chats are written otherwise.
    Template,
    /// Log-probabilities after a temperature.
    Temperature(f32),
    /// Log-probabilities of the logits after the token.
    Late,
    /// A penalty on tokens that stood there, when it generates.
    Penalty,
    /// Tokens that it generates are computed with a scale that is wrong; prompts are not.
    Decoding(&'static str, f32),
}

/// A checkpoint as a faulty engine reads it.
struct Planted<'c>(&'c Checkpoint, Fault);

impl Source for Planted<'_> {
    fn place(&self) -> PathBuf {
        Source::place(self.0)
    }

    fn config(&self) -> Result<ModelConfig, CheckpointError> {
        let mut config = Source::config(self.0)?;
        for step in config.layers.iter_mut().flat_map(|l| &mut l.steps) {
            if let (MixerConfig::Attention(attention), Fault::NoWindow) = (&mut step.mixer, self.1) {
                attention.window = None;
            }
        }
        Ok(config)
    }

    fn linear(&self, name: &str, role: LinearRole) -> Result<LinearTensors<'_>, CheckpointError> {
        let is_swapped = match self.1 {
            Fault::GateUp(None) => true,
            Fault::GateUp(Some(layer)) => name.contains(&format!(".{layer}.mlp")),
            _ => false,
        };
        let read = match is_swapped {
            true if name.ends_with("gate_proj") => name.replace("gate_proj", "up_proj"),
            true => name.replace("up_proj", "gate_proj"),
            false => name.to_owned(),
        };
        let mut linear = self.0.linear(&read, role)?;
        linear.name = name.to_owned();
        match self.1 {
            Fault::Scale(module, factor) | Fault::Decoding(module, factor) if module == name => {
                let OutputScale::Tensor(scale) = linear.output_scale else { panic!("{name} has no scale of its own") };
                linear.output_scale = OutputScale::Tensor(scale * factor);
            }
            Fault::FloatInputs => linear.activation = ActivationFormat::Float,
            _ => {}
        }
        Ok(linear)
    }

    fn vector(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        Source::vector(self.0, name, shape)
    }

    fn kv(&self, module: &str) -> Result<Option<KvFormat>, CheckpointError> {
        match self.1 {
            Fault::UnitCache => Ok(Some(KvFormat::Fp8 { k_scale: 1.0, v_scale: 1.0 })),
            _ => Source::kv(self.0, module),
        }
    }

    fn finish(&self) -> Result<(), CheckpointError> {
        Ok(())
    }
}

/// The model at work.
struct Served {
    model: Decoder<CpuBackend>,
    /// What computes tokens that are generated.
    decoding: Option<Decoder<CpuBackend>>,
    text: ModelText,
    protocol: Protocol,
    fault: Fault,
}

/// Log-probabilities of one place: of the token there, and of the most probable ones.
struct Scored {
    token: u32,
    own: Option<f64>,
    top: Vec<(u32, f64)>,
}

/// Serves the model in `folder` until the process ends; the server's address.
pub fn start(folder: &Path, protocol: Protocol, fault: Fault) -> String {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let planted = if matches!(fault, Fault::Decoding(..)) { Fault::None } else { fault };
    let load = |fault| Decoder::load(cpu(1), &Planted(&checkpoint, fault)).unwrap();
    let decoding = matches!(fault, Fault::Decoding(..)).then(|| load(fault));
    let text = ModelText::to_read(folder, &checkpoint.config).unwrap();
    let served = Served { model: load(planted), decoding, text, protocol, fault };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || listener.incoming().flatten().for_each(|stream| serve(&served, &stream)));
    url
}

fn serve(served: &Served, mut stream: &TcpStream) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let path = line.split(' ').nth(1).unwrap().to_owned();
    let mut length = 0;
    loop {
        line.clear();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let (status, answer) = served.answer(&path, &serde_json::from_slice(&body).unwrap_or_default());
    let text = answer.to_string();
    // The client may have gone.
    let _ = write!(
        stream,
        "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{text}",
        text.len()
    );
}

fn refuse(message: &str) -> (u16, Value) {
    (400, json!({"error": {"message": message, "type": "invalid_request_error"}}))
}

impl Served {
    fn answer(&self, path: &str, body: &Value) -> (u16, Value) {
        match (path, self.protocol) {
            ("/v1/models", _) => (200, json!({"data": [{"id": "planted"}]})),
            ("/v1/completions", Protocol::Sglang) => refuse("logprobs are of /generate"),
            ("/v1/completions", protocol) => self.completions(body, protocol),
            ("/generate", Protocol::Sglang) => self.sglang(body),
            ("/completion", Protocol::LlamaCpp) => self.llama_cpp(body),
            ("/tokenize", Protocol::Vllm) => {
                let ids = match body["messages"].as_array() {
                    Some(messages) => self.chat(messages),
                    None => self.ids(&body["prompt"]),
                };
                (200, json!({"tokens": ids, "count": ids.len()}))
            }
            ("/v1/chat/completions", _) => {
                let ids = self.chat(body["messages"].as_array().unwrap());
                let message = json!({"role": "assistant", "content": "x"});
                (
                    200,
                    json!({"choices": [{"message": message}], "usage": {"prompt_tokens": ids.len(), "completion_tokens": 1}}),
                )
            }
            (path, _) => (404, json!({"detail": format!("no {path}")})),
        }
    }

    fn ids(&self, prompt: &Value) -> Vec<u32> {
        match prompt {
            Value::String(text) => self.text.tokenizer().encode(text, self.fault != Fault::NoBeginning).unwrap(),
            ids => serde_json::from_value(ids.clone()).unwrap(),
        }
    }

    fn chat(&self, messages: &[Value]) -> Vec<u32> {
        if self.fault != Fault::Template {
            return self.text.prompt(messages, None).unwrap().map(|p| p.1).unwrap_or_default();
        }
        let source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]";
        let other = ChatTemplate::from_source("other", source.into(), SpecialTokens::default()).unwrap();
        let input = recoup::text::ChatInput { messages, add_generation_prompt: true, ..Default::default() };
        self.text.tokenizer().encode(&other.render(&input).unwrap(), false).unwrap()
    }

    /// Log-probabilities of the prompt's tokens, and of `generate` tokens after it.
    fn scored(&self, prompt: &[u32], generate: usize, top: usize) -> (Vec<Scored>, Vec<Scored>) {
        let decoding = self.decoding.as_ref().unwrap_or(&self.model);
        let mut engine = Engine::new(decoding, Limits::new(prompt.len() + generate, 1), KvFormat::F32).unwrap();
        let penalty = if self.fault == Fault::Penalty { 1.5 } else { 1.0 };
        let sampling = SamplingParams { temperature: 0.0, repetition_penalty: penalty, ..SamplingParams::default() };
        let request = Request { prompt: prompt.to_vec(), max_tokens: generate, sampling, ..Request::default() };
        let answered = answer(&mut engine, self.text.tokenizer(), request, &mut |_| ControlFlow::Continue(())).unwrap();
        let all: Vec<u32> = prompt.iter().copied().chain(answered.tokens.iter().map(|t| t.token)).collect();
        let rows =
            |model: &Decoder<CpuBackend>| logits(model, std::slice::from_ref(&all), KvFormat::F32, &mut || {}).unwrap();
        let (of_prompt, of_answer) = (rows(&self.model), self.decoding.as_ref().map(rows));
        let vocab = self.model.config.vocab;
        let place = |i: usize| {
            let rows = if i < prompt.len() { &of_prompt } else { of_answer.as_ref().unwrap_or(&of_prompt) };
            let row = if self.fault == Fault::Late { i } else { i.wrapping_sub(1) };
            let logprobs = rows.chunks_exact(vocab).nth(row).map(|row| self.logprobs(row));
            let Some(logprobs) = logprobs else { return Scored { token: all[i], own: None, top: Vec::new() } };
            let mut order: Vec<u32> = (0..vocab as u32).collect();
            order.sort_by(|a, b| logprobs[*b as usize].total_cmp(&logprobs[*a as usize]));
            let top = order[..top].iter().map(|id| (*id, logprobs[*id as usize])).collect();
            Scored { token: all[i], own: (i > 0).then(|| logprobs[all[i] as usize]), top }
        };
        let mut places: Vec<Scored> = (0..all.len()).map(place).collect();
        let generated = places.split_off(prompt.len());
        (places, generated)
    }

    fn logprobs(&self, row: &[f32]) -> Vec<f64> {
        let temperature = if let Fault::Temperature(t) = self.fault { f64::from(t) } else { 1.0 };
        let scaled: Vec<f64> = row.iter().map(|v| f64::from(*v) / temperature).collect();
        let max = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total = scaled.iter().map(|v| (v - max).exp()).sum::<f64>().ln();
        scaled.iter().map(|v| v - max - total).collect()
    }

    fn name(&self, id: u32) -> String {
        self.text.tokenizer().decode(&[id], false).unwrap()
    }

    fn completions(&self, body: &Value, protocol: Protocol) -> (u16, Value) {
        if protocol == Protocol::Echo && body["prompt"].is_array() {
            return (422, json!({"detail": [{"loc": ["body", "prompt"], "msg": "Input should be a valid string"}]}));
        }
        if protocol == Protocol::LlamaCpp && body["echo"] == true {
            return refuse("Only no echo is supported");
        }
        let ids = self.ids(&body["prompt"]);
        let count = body["max_tokens"].as_u64().unwrap() as usize;
        let top = body["logprobs"].as_u64().unwrap_or(0) as usize;
        let (prompt, generated) = self.scored(&ids, count, top);
        let tokens: Vec<u32> = generated.iter().map(|s| s.token).collect();
        let answered = self.text.tokenizer().decode(&tokens, true).unwrap();
        let by_id = protocol == Protocol::Vllm && body["return_tokens_as_token_ids"] == true;
        let name = |id: u32| if by_id { format!("token_id:{id}") } else { self.name(id) };
        let echo = protocol == Protocol::Echo && body["echo"] == true;
        let listed: Vec<&Scored> = prompt.iter().filter(|_| echo).chain(&generated).collect();
        let logprobs = json!({
            "tokens": listed.iter().map(|s| name(s.token)).collect::<Vec<_>>(),
            "token_logprobs": listed.iter().map(|s| s.own).collect::<Vec<_>>(),
            "top_logprobs": listed.iter().map(|s| {
                s.own.map(|_| s.top.iter().map(|(id, l)| (name(*id), json!(l))).collect::<Map<_, _>>())
            }).collect::<Vec<_>>(),
        });
        let text = if echo { body["prompt"].as_str().unwrap().to_owned() + &answered } else { answered };
        let mut choice = json!({"index": 0, "text": text, "finish_reason": "length"});
        if protocol != Protocol::Mute && protocol != Protocol::LlamaCpp {
            choice["logprobs"] = logprobs;
        }
        if protocol == Protocol::Vllm && !body["prompt_logprobs"].is_null() {
            let entry = |(id, logprob): (u32, f64)| {
                (id.to_string(), json!({"logprob": logprob, "decoded_token": self.name(id)}))
            };
            let place = |s: &Scored| match s.own {
                None => Value::Null,
                Some(own) => {
                    Value::Object([(s.token, own)].into_iter().chain(s.top.iter().copied()).map(entry).collect())
                }
            };
            choice["prompt_logprobs"] = prompt.iter().map(place).collect();
        }
        (200, json!({"choices": [choice], "usage": {"prompt_tokens": ids.len(), "completion_tokens": generated.len()}}))
    }

    fn sglang(&self, body: &Value) -> (u16, Value) {
        let prompt = if body["input_ids"].is_array() { &body["input_ids"] } else { &body["text"] };
        let ids = self.ids(prompt);
        let count = body["sampling_params"]["max_new_tokens"].as_u64().unwrap() as usize;
        let (prompt, generated) = self.scored(&ids, count, body["top_logprobs_num"].as_u64().unwrap() as usize);
        let own = |side: &[Scored]| side.iter().map(|s| json!([s.own, s.token, null])).collect::<Value>();
        let top = |side: &[Scored]| {
            let places = side
                .iter()
                .map(|s| s.own.map(|_| s.top.iter().map(|(id, l)| json!([l, id, null])).collect::<Vec<_>>()));
            json!(places.collect::<Vec<_>>())
        };
        let meta = json!({"prompt_tokens": ids.len(), "completion_tokens": generated.len(),
            "input_token_logprobs": own(&prompt), "input_top_logprobs": top(&prompt),
            "output_token_logprobs": own(&generated), "output_top_logprobs": top(&generated)});
        (200, json!({"text": "x", "meta_info": meta}))
    }

    fn llama_cpp(&self, body: &Value) -> (u16, Value) {
        let ids = self.ids(&body["prompt"]);
        let count = body["n_predict"].as_u64().unwrap() as usize;
        let (_, generated) = self.scored(&ids, count, body["n_probs"].as_u64().unwrap() as usize);
        let entry = |id: u32, logprob: f64| json!({"id": id, "token": self.name(id), "bytes": [], "logprob": logprob});
        let listed = generated.iter().map(|s| {
            let mut place = entry(s.token, s.own.unwrap());
            place["top_logprobs"] = s.top.iter().map(|(id, l)| entry(*id, *l)).collect();
            place
        });
        let listed: Vec<Value> = listed.collect();
        (200, json!({"content": "x", "tokens_evaluated": ids.len(), "completion_probabilities": listed}))
    }
}
