//! Tokenizers that transformers 5 builds anew: the vocabulary, merges and post-processor of `tokenizer.json`, everything
//! else by the class and its flags in `tokenizer_config.json`.
//!
//! Source: transformers 5.24, models/*/tokenization_*.py and `TokenizersBackend.convert_to_native_format` and `__init__`.

use serde::Serialize;
use serde_json::{Map, Value, json};
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, Model, ModelWrapper};

use super::TextError;
use super::classes::Rebuilt;
use super::settings::Flags;
use super::special_tokens::Configured;

/// What a class puts in the place of the parts of `tokenizer.json`, in that file's own terms.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    unk_token: Option<String>,
    fuse_unk: bool,
    byte_fallback: bool,
}

/// Whether and how a class keeps the post-processor of `tokenizer.json`.
enum PostProcessor {
    File,
    /// No token is added, whatever the file or `add_bos_token` says.
    None,
    /// `bos_token` is added, whatever the file or `add_bos_token` says.
    Bos,
}

impl Rebuilt {
    /// Names of tokens that the class has where no file says otherwise, null included.
    pub fn default_tokens(self) -> &'static [(&'static str, &'static str)] {
        const END: &str = "<|endoftext|>";
        match self {
            Self::Llama => &[("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")],
            Self::CodeLlama => &[
                ("unk_token", "<unk>"),
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("prefix_token", "▁<PRE>"),
                ("middle_token", "▁<MID>"),
                ("suffix_token", "▁<SUF>"),
                ("eot_token", "▁<EOT>"),
                ("fill_token", "<FILL_ME>"),
            ],
            Self::Gemma => &[
                ("unk_token", "<unk>"),
                ("bos_token", "<bos>"),
                ("eos_token", "<eos>"),
                ("pad_token", "<pad>"),
                ("mask_token", "<mask>"),
            ],
            Self::Qwen2 | Self::Qwen3_5 => &[("unk_token", END), ("eos_token", END), ("pad_token", END)],
            Self::Gpt2 | Self::CodeGen => &[("unk_token", END), ("bos_token", END), ("eos_token", END)],
            Self::GptNeoX => {
                &[("unk_token", END), ("bos_token", END), ("eos_token", END), ("pad_token", "<|padding|>")]
            }
            Self::Cohere => &[
                ("unk_token", "<UNK>"),
                ("bos_token", "<BOS_TOKEN>"),
                ("eos_token", "<|END_OF_TURN_TOKEN|>"),
                ("pad_token", "<PAD>"),
                ("cls_token", "<CLS>"),
                ("sep_token", "<SEP>"),
                ("mask_token", "<MASK_TOKEN>"),
            ],
        }
    }

    fn post_processor(self) -> PostProcessor {
        match self {
            Self::GptNeoX => PostProcessor::None,
            Self::CodeLlama => PostProcessor::Bos,
            _ => PostProcessor::File,
        }
    }

    fn parts(self, flags: &Flags<'_>, unk: Option<&str>) -> Result<Parts, TextError> {
        let add_prefix_space = flags.switch("add_prefix_space")?;
        let byte_level = |prefix: bool, use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": use_regex});
        let sequence = |first: Value, second: Value| json!({"type": "Sequence", "pretokenizers": [first, second]});
        let metaspace =
            |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
        let pieces = |strip: bool| {
            let mut decoders = vec![
                json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
                json!({"type": "ByteFallback"}),
                json!({"type": "Fuse"}),
            ];
            decoders.extend(strip.then(|| json!({"type": "Strip", "content": " ", "start": 1, "stop": 0})));
            json!({"type": "Sequence", "decoders": decoders})
        };
        let bytes = |normalizer: Value, pre_tokenizer: Value| Parts {
            normalizer,
            pre_tokenizer,
            decoder: byte_level(true, true),
            unk_token: None,
            fuse_unk: false,
            byte_fallback: false,
        };
        let nfc = json!({"type": "NFC"});
        let qwen = |regex: &str| {
            let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
            bytes(nfc.clone(), sequence(split, byte_level(add_prefix_space.unwrap_or(false), false)))
        };
        Ok(match self {
            Self::Llama => {
                let prefix = add_prefix_space.unwrap_or(true);
                // The class's own default is false, and null is no true.
                let legacy = flags.switch("legacy")?.unwrap_or(false);
                Parts {
                    normalizer: Value::Null,
                    pre_tokenizer: metaspace(match (prefix, legacy) {
                        (false, _) => "never",
                        (true, false) => "first",
                        (true, true) => "always",
                    }),
                    decoder: pieces(prefix),
                    unk_token: None,
                    fuse_unk: true,
                    byte_fallback: true,
                }
            }
            Self::CodeLlama => Parts {
                normalizer: Value::Null,
                pre_tokenizer: metaspace(if add_prefix_space.unwrap_or(true) { "first" } else { "never" }),
                decoder: pieces(true),
                // Python writes None out.
                unk_token: Some(unk.unwrap_or("None").to_owned()),
                fuse_unk: true,
                byte_fallback: true,
            },
            Self::Gemma => Parts {
                normalizer: json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}),
                pre_tokenizer: json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                                      "invert": false}),
                decoder: pieces(false),
                unk_token: Some(unk.unwrap_or("None").to_owned()),
                fuse_unk: true,
                byte_fallback: true,
            },
            Self::Qwen2 => qwen(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            Self::Qwen3_5 => qwen(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            Self::Gpt2 | Self::CodeGen => bytes(Value::Null, byte_level(add_prefix_space.unwrap_or(false), true)),
            Self::GptNeoX => bytes(nfc.clone(), byte_level(add_prefix_space.unwrap_or(false), true)),
            Self::Cohere => {
                let digits = json!({"type": "Digits", "individual_digits": true});
                bytes(nfc.clone(), sequence(digits, byte_level(add_prefix_space.unwrap_or(false), true)))
            }
        })
    }
}

/// Builds the tokenizer of this class from `file`, the tokenizer as its `tokenizer.json` has it; `None` where the class
/// cannot be built from such a file. Adds the class's own names of tokens and the file's added tokens to `configured`; the
/// caller adds the tokens, then calls [`finish`].
///
/// # Errors
/// Flags that are none.
pub(super) fn rebuild(
    class: Rebuilt,
    file: &tokenizers::Tokenizer,
    flags: &Flags<'_>,
    configured: &mut Configured,
    added: impl FnOnce() -> Result<Vec<(u32, AddedToken)>, TextError>,
    notes: &mut Vec<String>,
) -> Result<Option<tokenizers::Tokenizer>, TextError> {
    let name = class.name();
    let not_so = |what: &str| {
        format!(
            "transformers 5 loads this tokenizer as {name}, which makes nothing sensible of {what}; tokenizer.json is taken as \
             it stands. `tokenizer_class` in {} should be PreTrainedTokenizerFast",
            flags.path.display()
        )
    };
    let ModelWrapper::BPE(bpe) = file.get_model() else {
        configured.set_defaults(class.default_tokens());
        notes.push(not_so("a vocabulary that is not BPE"));
        return Ok(None);
    };
    let is_set = |affix: &Option<String>| affix.as_ref().is_some_and(|affix| !affix.is_empty());
    if is_set(&bpe.continuing_subword_prefix) || is_set(&bpe.end_of_word_suffix) {
        configured.set_defaults(class.default_tokens());
        notes.push(not_so("a vocabulary with marked beginnings or ends of words"));
        return Ok(None);
    }
    if !configured.lists_all() {
        configured.list_more(added()?);
    }
    configured.set_defaults(class.default_tokens());
    if matches!(class, Rebuilt::Gpt2 | Rebuilt::CodeGen | Rebuilt::GptNeoX | Rebuilt::Cohere)
        && flags.config.get("add_prefix_space") == Some(&Value::Null)
    {
        notes.push(format!(
            "{}: `add_prefix_space` is null, which {name} of transformers refuses; it is taken for false",
            flags.path.display()
        ));
    }

    let parts = class.parts(flags, configured.content("unk_token"))?;
    let mut changed = Vec::new();
    let mut compare = |key: &'static str, is: Value, was: Value| {
        if essence(key, is) != essence(key, was) {
            changed.push(key);
        }
    };
    compare("normalizer", parts.normalizer.clone(), value_of(file.get_normalizer()));
    compare("pre_tokenizer", parts.pre_tokenizer.clone(), value_of(file.get_pre_tokenizer()));
    compare("decoder", parts.decoder.clone(), value_of(file.get_decoder()));
    let model = with_flags(bpe, &parts);
    compare("model", flags_of(&model), flags_of(bpe));
    let mut hf = tokenizers::Tokenizer::new(model);
    let invalid = |error: tokenizers::Error| TextError::Invalid {
        path: flags.path.to_owned(),
        detail: format!("cannot build {name}: {error}"),
    };
    let Parts { normalizer, pre_tokenizer, decoder, .. } = parts;
    let parts = json!({"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder});
    let parts = read(parts).map_err(invalid)?;
    hf.with_normalizer(parts.get_normalizer().cloned()).map_err(invalid)?;
    hf.with_pre_tokenizer(parts.get_pre_tokenizer().cloned());
    hf.with_decoder(parts.get_decoder().cloned());
    if matches!(class.post_processor(), PostProcessor::File) {
        hf.with_post_processor(file.get_post_processor().cloned());
    }
    if !changed.is_empty() {
        notes.push(format!(
            "transformers 5 loads this tokenizer as {name} and puts the class's own in the place of `{}` of tokenizer.json; so \
             does Recoup. If the model was trained by that file, `tokenizer_class` in {} should be PreTrainedTokenizerFast",
            changed.join("`, `"),
            flags.path.display()
        ));
    }
    Ok(Some(hf))
}

/// What a class does when all tokens are there: flags of some are set anew, and tokens added around a text.
///
/// # Errors
/// When the tokenizers library refuses.
pub(super) fn finish(class: Rebuilt, hf: &mut tokenizers::Tokenizer, configured: &Configured) -> Result<(), String> {
    let again: Vec<AddedToken> = match class {
        Rebuilt::Qwen2 => configured.special().map(|token| AddedToken::from(token.content.clone(), true)).collect(),
        Rebuilt::Cohere => configured.special().map(|token| AddedToken { special: true, ..token.added() }).collect(),
        _ => Vec::new(),
    };
    hf.add_tokens(again).map_err(|error| error.to_string())?;
    let bos = configured.content("bos_token").and_then(|bos| Some((bos, hf.token_to_id(bos)?)));
    if let (PostProcessor::Bos, Some((bos, id))) = (class.post_processor(), bos) {
        let template = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}}});
        let parts = read(json!({"post_processor": template})).map_err(|error| error.to_string())?;
        hf.with_post_processor(parts.get_post_processor().cloned());
    }
    Ok(())
}

/// Replaces the regular expression of an old Mistral vocabulary where `fix_mistral_regex` asks for it, and says where
/// transformers would say that it is wrong.
/// Source: transformers 5.24, `TokenizersBackend._patch_mistral_regex`, for a local folder.
///
/// # Errors
/// A switch that is none.
pub(super) fn fix_mistral_regex(
    hf: &mut tokenizers::Tokenizer,
    flags: &Flags<'_>,
    model: Option<&Map<String, Value>>,
    notes: &mut Vec<String>,
) -> Result<(), TextError> {
    let fix = flags.switch("fix_mistral_regex")?;
    let ignored = |why: &str| {
        format!(
            "{}: `fix_mistral_regex` is true, which has no effect here as in transformers 5: {why}",
            flags.path.display()
        )
    };
    let model_type = model.and_then(|model| model.get("model_type")).and_then(Value::as_str);
    let version = model.and_then(|model| model.get("transformers_version")).and_then(Value::as_str);
    let why_not = if hf.get_vocab_size(true) <= 100_000 || hf.get_pre_tokenizer().is_none() {
        Some("the vocabulary is not one of those concerned")
    } else if model.is_none() {
        Some("there is no config.json beside it")
    } else if version.is_some_and(|version| !is_before_5(version)) {
        Some("`transformers_version` in config.json is 5 or later")
    } else if model_type.is_some_and(|t| !["mistral", "mistral3", "voxtral", "ministral", "pixtral"].contains(&t)) {
        Some("`model_type` in config.json is none of Mistral's")
    } else {
        None
    };
    match (why_not, fix) {
        (Some(why), Some(true)) => notes.push(ignored(why)),
        (None, None) => notes.push(format!(
            "{}: transformers 5 warns that the regular expression of such a Mistral tokenizer may be wrong, and takes it as it \
             stands unless `fix_mistral_regex` is true; so does Recoup",
            flags.path.display()
        )),
        (None, Some(true)) => {
            let was = value_of(hf.get_pre_tokenizer());
            let is = json!({"pre_tokenizer": mistral_pre_tokenizer(was)});
            let is = read(is).map_err(|error| TextError::Invalid {
                path: flags.path.to_owned(),
                detail: format!("`fix_mistral_regex` cannot be applied to this tokenizer.json: {error}"),
            })?;
            hf.with_pre_tokenizer(is.get_pre_tokenizer().cloned());
        }
        _ => {}
    }
    Ok(())
}

/// The expression in the place of the first of a sequence, or before what is there.
fn mistral_pre_tokenizer(mut was: Value) -> Value {
    let split = json!({"type": "Split", "behavior": "Isolated", "invert": false, "pattern": {"Regex":
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"}});
    if let Some(first) = was.get_mut("pretokenizers").and_then(|all| all.get_mut(0)) {
        *first = split;
        return was;
    }
    if was.get("type").is_some_and(|kind| kind == "Metaspace") {
        was = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    }
    json!({"type": "Sequence", "pretokenizers": [split, was]})
}

/// Whether a version is before 5.0.0, its candidates included.
fn is_before_5(version: &str) -> bool {
    let numbers: String = version.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    let mut parts = numbers.trim_end_matches('.').split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let major = parts.next().unwrap_or(0);
    let candidate = ["dev", "rc", "a", "b"].iter().any(|mark| version[numbers.len()..].starts_with(mark));
    major < 5 || (major == 5 && parts.all(|part| part == 0) && candidate)
}

/// A copy of the model with the flags of a class.
fn with_flags(bpe: &BPE, parts: &Parts) -> BPE {
    let mut model = bpe.clone();
    model.dropout = None;
    model.unk_token.clone_from(&parts.unk_token);
    model.continuing_subword_prefix = None;
    model.end_of_word_suffix = None;
    model.fuse_unk = parts.fuse_unk;
    model.byte_fallback = parts.byte_fallback;
    model.ignore_merges = false;
    model
}

/// What of a model's flags can change a token.
fn flags_of(bpe: &BPE) -> Value {
    let has_bytes =
        bpe.byte_fallback && (0..=u8::MAX).all(|byte| bpe.token_to_id(&format!("<0x{byte:02X}>")).is_some());
    let unknown = bpe.unk_token.as_ref().filter(|_| !has_bytes).map(|unk| (unk, bpe.fuse_unk));
    let dropout = bpe.dropout.filter(|dropout| *dropout > 0.0);
    json!([unknown, bpe.byte_fallback, bpe.ignore_merges, dropout])
}

/// A part of a tokenizer as its file has it, without what changes neither tokens nor text.
fn essence(part: &'static str, value: Value) -> Value {
    match value {
        Value::Array(list) => list.into_iter().map(|value| essence(part, value)).collect(),
        Value::Object(mut map) => {
            for list in ["normalizers", "pretokenizers", "decoders"] {
                if map.get(list).and_then(Value::as_array).is_some_and(|list| list.len() == 1) {
                    return essence(part, map[list][0].take());
                }
            }
            map.remove("trim_offsets");
            if part == "decoder" && map.get("type").is_some_and(|kind| kind == "ByteLevel") {
                return json!("ByteLevel");
            }
            map.into_iter().map(|(key, value)| (key, essence(part, value))).collect()
        }
        other => other,
    }
}

fn value_of(part: Option<&impl Serialize>) -> Value {
    part.and_then(|part| serde_json::to_value(part).ok()).unwrap_or_default()
}

/// A tokenizer without words that has these parts of a `tokenizer.json`. Of text: that is compiled in the library, any other
/// way of reading it would be compiled here once more.
fn read(mut parts: Value) -> tokenizers::Result<tokenizers::Tokenizer> {
    parts["model"] = json!({"type": "BPE", "vocab": {}, "merges": []});
    parts.to_string().parse()
}
