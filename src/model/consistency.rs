//! What the files of a checkpoint say differently from each other without making it unreadable: told by name, with which
//! of them counts. What cannot be settled is an error where it is read.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use serde::Deserialize;
use serde_json::Value;

use super::ModelConfig;
use super::config::Architecture;
use super::rope::Rope;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::error::Result;
use crate::checkpoint::json::{self, Object};

/// Notes on a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    /// What decides what is computed: for everybody who loads the model.
    pub important: Vec<String>,
    /// What differs and changes nothing that is computed here: for who inspects it.
    pub minor: Vec<String>,
}

/// Everything there is to tell of `checkpoint`, whose config.json says `config`.
///
/// # Errors
/// A file that is no JSON, or a key that holds something else than its kind.
pub fn notes(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Notes> {
    let c = &checkpoint.config;
    let mut notes = Notes { important: checkpoint.notes.clone(), minor: Vec::new() };
    // Gemma has a block for each kind of layer, which its reader looks at.
    if config.ropes.len() == 1 {
        notes.important.extend(Rope::read(c, config.max_positions)?.1);
    }
    notes.important.extend(unused_keys(c, config)?);
    notes.important.extend(head(c, config, checkpoint)?);
    notes.important.extend(dtypes(c, config, checkpoint)?);
    notes.important.extend(stored_frequencies(config, checkpoint)?);
    let folder = checkpoint.tensors.folder();
    if folder.join("adapter_config.json").is_file() {
        notes
            .important
            .push(format!("{}: adapter_config.json: an adapter lies here; it is not applied", folder.display()));
    }
    tokens(folder, c, config, &mut notes)?;
    Ok(notes)
}

/// Keys that this architecture does not have in transformers, but whose values would mean something.
fn unused_keys(c: &Object, config: &ModelConfig) -> Result<Vec<String>> {
    use Architecture as A;
    let file = c.file().display();
    let mut notes = Vec::new();
    let mut unused = |key: &str, why: &str| notes.push(format!("{file}: `{key}` is not used: {why}"));
    let architecture = config.architecture;
    if let Some(name) = c.string("model_type")?.filter(|t| !t.is_empty() && A::by_type(t).is_none()) {
        unused("model_type", &format!("{name} is not known here, and `architectures` says {architecture:?}"));
    }
    if architecture == A::Llama && c.get("sliding_window").is_some() {
        unused("sliding_window", "Llama attends to everything");
    }
    let windows: Vec<Option<usize>> = config.attentions().iter().map(|(_, _, a)| a.window).collect();
    // Where not every layer is attention, `layer_types` says more and is read as it is.
    let kinds = if config.plain().is_some() { c.strings("layer_types")? } else { Vec::new() };
    let slides = |i: usize| kinds.get(i).is_some_and(|k| k == "sliding_attention");
    let contradicts = windows.iter().enumerate().any(|(i, w)| slides(i) != w.is_some());
    if !kinds.is_empty() && contradicts {
        unused("layer_types", &format!("all layers of {architecture:?} are alike in transformers"));
    }
    if !kinds.is_empty()
        && let Some(full) = c.integer("max_window_layers", 0..=1 << 20)?
        && windows.iter().any(Option::is_some)
        && windows.iter().enumerate().any(|(i, w)| (i >= full) != w.is_some())
    {
        unused("max_window_layers", "`layer_types` says which layers have a window, and they are others");
    }
    if architecture == A::Qwen2 && !c.bool_or("attention_bias", true)? {
        unused("attention_bias", "Qwen2 has biases on q, k and v always");
    }
    if !matches!(architecture, A::Llama | A::NemotronNas | A::NemotronH) && c.bool_or("mlp_bias", false)? {
        unused("mlp_bias", &format!("{architecture:?} has none in transformers"));
    }
    Ok(notes)
}

/// A tied model with a head of its own.
fn head(c: &Object, config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Option<String>> {
    let own =
        c.bool_or("tie_word_embeddings", false)? && !config.tied_embeddings && checkpoint.has_linear(config.names.head);
    Ok(own.then(|| {
        format!(
            "{}: `tie_word_embeddings` is true, but a quantized `lm_head` is stored beside the embedding; the stored one \
             is used",
            c.file().display()
        )
    }))
}

/// The announced type of unquantized weights against each other and the embedding's.
fn dtypes(c: &Object, config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Vec<String>> {
    let file = c.file().display();
    let bare = |s: &str| s.strip_prefix("torch.").unwrap_or(s).to_owned();
    let (new, old) = (c.string("dtype")?.map(bare), c.string("torch_dtype")?.map(bare));
    let mut notes = Vec::new();
    if let (Some(new), Some(old)) = (&new, &old)
        && new != old
    {
        notes.push(format!("{file}: `dtype` is {new} and `torch_dtype` is {old}; the stored tensors decide"));
    }
    let embedding = checkpoint.tensors.peek(&format!("{}.weight", config.names.embedding));
    let stored = match embedding.map(|t| t.dtype) {
        Some(Dtype::F32) => "float32",
        Some(Dtype::F16) => "float16",
        Some(Dtype::BF16) => "bfloat16",
        _ => return Ok(notes),
    };
    let key = if new.is_some() { "dtype" } else { "torch_dtype" };
    if let Some(said) = new.or(old).filter(|s| s != stored && s != "auto") {
        notes.push(format!(
            "{file}: `{key}` is {said}, but the embedding is stored as {stored}; weights are used as stored, where \
             transformers rounds them to {said}"
        ));
    }
    Ok(notes)
}

/// Rotary frequencies that old files store, against those of the configuration, which count.
fn stored_frequencies(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Option<String>> {
    /// BF16 has 8 bits.
    const TOLERANCE: f32 = 1.0 / 128.0;
    let Some((rope, turned)) = config.ropes.first() else { return Ok(None) };
    let computed = rope.frequencies(*turned);
    for name in checkpoint.tensors.names().filter(|n| n.ends_with("rotary_emb.inv_freq")) {
        let Some(view) = checkpoint.tensors.peek(name).filter(|v| v.is_float()) else { continue };
        let stored = view.floats()?;
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= TOLERANCE * b;
        if stored.len() != computed.len() || !stored.iter().zip(&computed).all(close) {
            return Ok(Some(format!(
                "{}: `{name}` differs from the frequencies that config.json gives; those of config.json are used, as \
                 transformers does",
                view.file.display()
            )));
        }
    }
    Ok(None)
}

/// tokenizer.json, as far as ids go.
#[derive(Deserialize)]
struct TokenizerFile {
    model: TokenizerModel,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct TokenizerModel {
    vocab: Vocabulary,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Vocabulary {
    Ids(BTreeMap<String, u64>),
    /// Unigram: position is id.
    List(Vec<(String, f64)>),
}

#[derive(Deserialize)]
struct AddedToken {
    id: u64,
    content: String,
}

impl TokenizerFile {
    fn ids(&self) -> BTreeMap<&str, u64> {
        let mut ids: BTreeMap<&str, u64> = match &self.model.vocab {
            Vocabulary::Ids(ids) => ids.iter().map(|(t, i)| (t.as_str(), *i)).collect(),
            Vocabulary::List(list) => list.iter().zip(0..).map(|((t, _), i)| (t.as_str(), i)).collect(),
        };
        ids.extend(self.added_tokens.iter().map(|t| (t.content.as_str(), t.id)));
        ids
    }
}

/// Tokenizer, generation_config.json and config.json against each other.
fn tokens(folder: &Path, c: &Object, config: &ModelConfig, notes: &mut Notes) -> Result<()> {
    let read = |name: &str| Some(folder.join(name)).filter(|f| f.is_file()).map(|f| Object::read(&f)).transpose();
    let (generation, settings) = (read("generation_config.json")?, read("tokenizer_config.json")?);
    // A tokenizer that cannot be read is an error for the verbs that need one.
    let tokenizer: Option<TokenizerFile> =
        std::fs::read(folder.join("tokenizer.json")).ok().and_then(|t| serde_json::from_slice(&t).ok());
    let ids = tokenizer.as_ref().map(TokenizerFile::ids).unwrap_or_default();
    let (at, vocab) = (folder.display(), config.vocab as u64);

    if let Some((token, id)) = ids.iter().max_by_key(|(_, id)| **id).filter(|(_, id)| **id >= vocab) {
        let beyond = ids.values().filter(|i| **i >= vocab).count();
        notes.important.push(format!(
            "{at}: the tokenizer has {beyond} tokens that the model has no row for (`vocab_size` is {vocab}), up to {id} \
             ({token:?}); text with one of them is refused"
        ));
    } else if let Some(known) = ids.values().max().map(|m| m + 1).filter(|n| n * 10 < vocab * 9) {
        notes
            .minor
            .push(format!("{at}: the tokenizer knows {known} ids of the {vocab} that the model has (`vocab_size`)"));
    }
    for key in ["bos_token", "eos_token"] {
        let id_key = format!("{key}_id");
        let ours = c.token_ids(&id_key)?;
        let generated = generation.as_ref().map(|g| g.token_ids(&id_key)).transpose()?.unwrap_or_default();
        let named = settings.as_ref().and_then(|s| s.get(key)).and_then(|t| match t {
            Value::String(s) => Some(s.as_str()),
            other => other.get("content").and_then(Value::as_str),
        });
        let named_id = named.and_then(|n| ids.get(n).copied());
        let list = |ids: &[u32]| ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        for id in ours.iter().chain(&generated).filter(|i| u64::from(**i) >= vocab) {
            notes.important.push(format!("{at}: `{id_key}` {id} is outside of the vocabulary of {vocab}"));
        }
        let others = [("generation_config.json", generated.clone())]
            .into_iter()
            .chain(named_id.and_then(|i| u32::try_from(i).ok()).map(|i| ("the tokenizer", vec![i])));
        for (whose, theirs) in others {
            // One list may hold more than the other; with nothing in common they are of different models.
            if !ours.is_empty() && !theirs.is_empty() && !ours.iter().any(|i| theirs.contains(i)) {
                let what =
                    if key == "eos_token" { "each of them ends an answer" } else { "the tokenizer's begins a text" };
                notes.important.push(format!(
                    "{at}: `{id_key}` is {} in config.json and {} for {whose}; {what}",
                    list(&ours),
                    list(&theirs)
                ));
            }
        }
    }
    let longest = settings.as_ref().and_then(|s| s.get("model_max_length")).and_then(json::whole);
    let positions = config.max_positions as u64;
    // Without a limit of its own a tokenizer has 10^30.
    if let Some(longest) = longest.filter(|&l| l != positions && l < 1 << 40) {
        notes.minor.push(format!(
            "{at}: `model_max_length` of the tokenizer is {longest}, `max_position_embeddings` of the model {positions}; the \
             model's counts"
        ));
    }
    Ok(())
}
