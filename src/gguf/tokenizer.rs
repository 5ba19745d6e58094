//! tokenizer.json and tokenizer_config.json from `tokenizer.*` metadata: byte-level BPE and SentencePiece BPE.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value as Json, json};

use super::TokenizerFiles;
use super::error::{GgufError, Result};
use super::header::{Gguf, Value};
use super::pretokenizer::PreTokenizer;
use super::sentencepiece::{self, Piece};

/// Larger vocabularies do not exist.
const MAX_TOKENS: usize = 1 << 24;
/// SentencePiece writes a space as this.
const SPACE_MARK: &str = "\u{2581}";
/// Tokens that end a turn, where the file names none; the names that llama.cpp looks for too.
const END_OF_TURN: [&str; 6] =
    ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|endofturn|>"];

/// `enum llama_token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// `tokenizer.ggml.model`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Model {
    /// "gpt2": byte-level BPE with merges.
    ByteLevel,
    /// "llama": SentencePiece BPE with scores.
    SentencePiece,
}

/// Ids that mean something to generation; each below the number of tokens.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SpecialIds {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub pad: Option<u32>,
    unk: Option<u32>,
    /// End of a turn.
    eot: Option<u32>,
    /// End of a message that a tool call follows (Llama 3.1).
    eom: Option<u32>,
}

impl SpecialIds {
    /// The ids to stop at, without repetition, the end of the text first.
    pub fn stop(&self) -> Vec<u32> {
        let mut ids = Vec::new();
        for id in [self.eos, self.eot, self.eom].into_iter().flatten() {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }
}

/// A checked vocabulary: kinds are as many as tokens, and no text that is used appears twice.
pub(super) struct Tokenizer<'a> {
    pub special: SpecialIds,
    model: Model,
    tokens: &'a [String],
    kinds: Vec<Kind>,
    notes: Vec<String>,
}

impl<'a> Tokenizer<'a> {
    /// Reads the vocabulary and the special ids.
    ///
    /// # Errors
    /// Names the key or the token that is missing or wrong.
    pub fn read(gguf: &'a Gguf) -> Result<Self> {
        let model = match gguf.string("tokenizer.ggml.model")? {
            Some("gpt2") => Model::ByteLevel,
            Some("llama") => Model::SentencePiece,
            Some(found) => {
                return Err(GgufError::Unknown {
                    file: gguf.path.clone(),
                    what: "tokenizer model",
                    found: found.into(),
                    known: "gpt2 (byte-level BPE) and llama (SentencePiece)".into(),
                });
            }
            None => return Err(gguf.key_error("tokenizer.ggml.model", "the kind of tokenizer")),
        };
        let tokens = gguf
            .strings("tokenizer.ggml.tokens")?
            .filter(|tokens| (1..=MAX_TOKENS).contains(&tokens.len()))
            .ok_or_else(|| gguf.key_error("tokenizer.ggml.tokens", format!("1 to {MAX_TOKENS} tokens")))?;
        let mut this = Self { special: SpecialIds::default(), model, tokens, kinds: Vec::new(), notes: Vec::new() };
        this.special = this.special_ids(gguf)?;
        this.kinds = this.kinds(gguf)?;
        this.find_end_of_turn();
        this.refuse_duplicates(gguf)?;
        Ok(this)
    }

    /// Builds both files.
    ///
    /// # Errors
    /// When merges, scores or the pre-tokenizer are missing or contradict the vocabulary.
    pub fn to_files(&self, gguf: &Gguf) -> Result<TokenizerFiles> {
        let mut notes = self.notes.clone();
        let (tokenizer, add_bos, add_eos) = match self.model {
            Model::ByteLevel => self.byte_level(gguf, &mut notes)?,
            Model::SentencePiece => self.sentence_piece(gguf, &mut notes)?,
        };
        let left_out = self.tokens.len() - self.used().count();
        if left_out > 0 {
            notes.push(format!("{left_out} unused tokens (padding of the vocabulary) are left out of tokenizer.json"));
        }
        let config = self.config(gguf, add_bos, add_eos, &mut notes)?;
        Ok(TokenizerFiles { tokenizer, config, notes })
    }

    fn special_ids(&self, gguf: &Gguf) -> Result<SpecialIds> {
        let last = self.tokens.len() as u64 - 1;
        let id = |name: &str| -> Result<Option<u32>> {
            let id = gguf.integer(&format!("tokenizer.ggml.{name}_token_id"), 0..=u32::MAX.into())?;
            match id {
                // "None" is written as all ones by some converters.
                Some(id) if id == u64::from(u32::MAX) => Ok(None),
                Some(id) if id > last => {
                    Err(gguf.key_error(&format!("tokenizer.ggml.{name}_token_id"), format!("an id up to {last}")))
                }
                id => Ok(id.and_then(|id| u32::try_from(id).ok())),
            }
        };
        let mut ids = SpecialIds {
            bos: id("bos")?,
            eos: id("eos")?,
            pad: id("padding")?,
            unk: id("unknown")?,
            eot: id("eot")?,
            eom: id("eom")?,
        };
        if self.model == Model::SentencePiece {
            // SentencePiece's own numbers, which the file may leave out.
            for (id, number, text) in [(&mut ids.unk, 0, "<unk>"), (&mut ids.bos, 1, "<s>"), (&mut ids.eos, 2, "</s>")]
            {
                let there = self.tokens.get(number as usize).is_some_and(|t| t == text);
                *id = id.or(there.then_some(number));
            }
        }
        Ok(ids)
    }

    fn kinds(&self, gguf: &Gguf) -> Result<Vec<Kind>> {
        const KEY: &str = "tokenizer.ggml.token_type";
        let mut kinds = match gguf.metadata.get(KEY) {
            None => {
                // Without types, at least the tokens that generation depends on are special.
                let mut kinds = vec![Kind::Normal; self.tokens.len()];
                let s = self.special;
                for id in [s.bos, s.eos, s.unk, s.pad, s.eot, s.eom].into_iter().flatten() {
                    kinds[id as usize] = Kind::Control;
                }
                kinds
            }
            Some(Value::Integers(types)) if types.len() == self.tokens.len() => {
                let mut kinds = Vec::with_capacity(types.len());
                for (id, number) in types.iter().enumerate() {
                    kinds.push(match number {
                        // 0 is "undefined".
                        0 | 1 => Kind::Normal,
                        2 => Kind::Unknown,
                        3 => Kind::Control,
                        4 => Kind::UserDefined,
                        5 => Kind::Unused,
                        6 => Kind::Byte,
                        _ => return Err(tokenizer_error(gguf, format!("token {id} has unknown type {number}"))),
                    });
                }
                kinds
            }
            Some(_) => return Err(gguf.key_error(KEY, format!("an array of {} integers", self.tokens.len()))),
        };
        for (token, kind) in self.tokens.iter().zip(&mut kinds) {
            // Nothing can be made of an empty text.
            if token.is_empty() {
                *kind = Kind::Unused;
            }
        }
        Ok(kinds)
    }

    fn find_end_of_turn(&mut self) {
        if self.special.eot.is_some() {
            return;
        }
        let found = self.used().find(|(id, text, kind)| {
            *kind == Kind::Control && END_OF_TURN.contains(text) && self.special.eos != Some(*id)
        });
        if let Some((id, text, _)) = found {
            let note = format!("`{text}` ({id}) stops generation too: it ends a turn, though the file does not say so");
            self.special.eot = Some(id);
            self.notes.push(note);
        }
    }

    fn refuse_duplicates(&self, gguf: &Gguf) -> Result<()> {
        let mut seen = HashMap::with_capacity(self.tokens.len());
        for (id, text, _) in self.used() {
            if let Some(first) = seen.insert(text, id) {
                return Err(tokenizer_error(gguf, format!("tokens {first} and {id} are both {text:?}")));
            }
        }
        Ok(())
    }

    /// Id, text and kind of every token that text can contain.
    fn used(&self) -> impl Iterator<Item = (u32, &'a str, Kind)> {
        let tokens = (0..).zip(self.tokens).zip(&self.kinds);
        tokens.filter(|(_, kind)| **kind != Kind::Unused).map(|((id, text), kind)| (id, text.as_str(), *kind))
    }

    fn text(&self, id: Option<u32>) -> Option<&'a str> {
        id.and_then(|id| self.tokens.get(id as usize)).map(String::as_str)
    }

    fn vocabulary(&self) -> Map<String, Json> {
        self.used().map(|(id, text, _)| (text.to_owned(), json!(id))).collect()
    }

    /// Tokens that are found in the text before anything else happens to it.
    fn added_tokens(&self) -> Vec<Json> {
        let added = self.used().filter(|(.., kind)| matches!(kind, Kind::Control | Kind::Unknown | Kind::UserDefined));
        added
            .map(|(id, text, kind)| {
                json!({
                    "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": kind != Kind::UserDefined,
                })
            })
            .collect()
    }

    /// Whether BOS goes before the text and EOS after it; each needs its id.
    fn added_ends(&self, gguf: &Gguf, default_bos: bool) -> Result<(bool, bool)> {
        let add_bos = gguf.boolean("tokenizer.ggml.add_bos_token")?;
        let add_eos = gguf.boolean("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
        if add_bos == Some(true) && self.special.bos.is_none() {
            return Err(gguf.key_error("tokenizer.ggml.bos_token_id", "an id, as add_bos_token is set"));
        }
        if add_eos && self.special.eos.is_none() {
            return Err(gguf.key_error("tokenizer.ggml.eos_token_id", "an id, as add_eos_token is set"));
        }
        Ok((add_bos.unwrap_or(default_bos && self.special.bos.is_some()), add_eos))
    }

    /// The post-processor that adds BOS and EOS, if either is wanted.
    fn template(&self, add_bos: bool, add_eos: bool) -> Option<Json> {
        let bos = self.special.bos.filter(|_| add_bos);
        let eos = self.special.eos.filter(|_| add_eos);
        if bos.is_none() && eos.is_none() {
            return None;
        }
        let token = |id: Option<u32>, type_id: u32| {
            self.text(id).map(|text| json!({"SpecialToken": {"id": text, "type_id": type_id}}))
        };
        let part = |name: &str, type_id: u32| {
            let text = json!({"Sequence": {"id": name, "type_id": type_id}});
            [token(bos, type_id), Some(text), token(eos, type_id)].into_iter().flatten().collect::<Vec<_>>()
        };
        let special: Map<_, _> = [bos, eos]
            .into_iter()
            .filter_map(|id| {
                self.text(id).map(|text| (text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})))
            })
            .collect();
        let pair = [part("A", 0), part("B", 1)].concat();
        Some(json!({
            "type": "TemplateProcessing",
            "single": part("A", 0),
            "pair": pair,
            "special_tokens": special,
        }))
    }

    fn byte_level(&self, gguf: &Gguf, notes: &mut Vec<String>) -> Result<(Json, bool, bool)> {
        const PRE: &str = "tokenizer.ggml.pre";
        let name = gguf.string(PRE)?.ok_or_else(|| {
            gguf.key_error(
                PRE,
                "the pre-tokenizer, without which text is cut in the wrong places; convert the file again",
            )
        })?;
        let pre = PreTokenizer::named(name).ok_or_else(|| GgufError::Unknown {
            file: gguf.path.clone(),
            what: "pre-tokenizer",
            found: name.into(),
            known: PreTokenizer::known(),
        })?;
        if name == "default" {
            notes.push("the pre-tokenizer is `default`: the converter did not recognise this model's own".into());
        }
        let merges = self.merges(gguf)?;
        let texts: HashSet<&str> = self.used().map(|(_, text, _)| text).collect();
        let missing = byte_symbols().filter(|symbol| !texts.contains(symbol.encode_utf8(&mut [0; 4]) as &str)).count();
        if missing > 0 {
            notes.push(format!(
                "{missing} bytes that text can hold are not in the vocabulary and are lost when it is encoded"
            ));
        }
        let (add_bos, add_eos) = self.added_ends(gguf, pre.add_bos)?;
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true});
        let post = match self.template(add_bos, add_eos) {
            None => bytes,
            Some(template) => json!({"type": "Sequence", "processors": [bytes, template]}),
        };
        let tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": pre.normalizer(),
            "pre_tokenizer": pre.to_json(),
            "post_processor": post,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": false, "byte_fallback": false, "ignore_merges": pre.ignore_merges,
                "vocab": self.vocabulary(), "merges": merges,
            },
        });
        Ok((tokenizer, add_bos, add_eos))
    }

    /// The merges of a byte-level model, each checked to join two tokens to a third.
    fn merges(&self, gguf: &Gguf) -> Result<Vec<Json>> {
        const KEY: &str = "tokenizer.ggml.merges";
        let texts = gguf.strings(KEY)?.ok_or_else(|| gguf.key_error(KEY, "the merges of a byte-level tokenizer"))?;
        let known: HashMap<&str, u32> = self.used().map(|(id, text, _)| (text, id)).collect();
        let mut merges = Vec::with_capacity(texts.len());
        let mut joined = String::new();
        for (rank, text) in texts.iter().enumerate() {
            let wrong = |detail: String| tokenizer_error(gguf, format!("merge {rank}, {text:?}: {detail}"));
            // A symbol is at least one byte long, even if it should be a space.
            let at = text.bytes().skip(1).position(|b| b == b' ').map(|at| at + 1);
            let (left, right) = at
                .and_then(|at| Some((text.get(..at)?, text.get(at + 1..)?)))
                .ok_or_else(|| wrong("expected two tokens with a space between".into()))?;
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            if let Some(missing) = [left, right, &joined].into_iter().find(|part| !known.contains_key(part)) {
                return Err(wrong(format!("{missing:?} is not in the vocabulary")));
            }
            merges.push(json!([left, right]));
        }
        Ok(merges)
    }

    fn sentence_piece(&self, gguf: &Gguf, notes: &mut Vec<String>) -> Result<(Json, bool, bool)> {
        const KEY: &str = "tokenizer.ggml.scores";
        let scores = match gguf.metadata.get(KEY) {
            Some(Value::Floats(scores)) if scores.len() == self.tokens.len() => scores,
            _ => return Err(gguf.key_error(KEY, format!("an array of {} floats", self.tokens.len()))),
        };
        if let Some(id) = scores.iter().position(|s| s.is_nan()) {
            return Err(tokenizer_error(gguf, format!("token {id} has no number for a score")));
        }
        let pieces: Vec<_> = self
            .used()
            .filter(|(.., kind)| *kind == Kind::Normal)
            .filter_map(|(id, text, _)| scores.get(id as usize).map(|&score| Piece { text, score, id }))
            .collect();
        let merges = sentencepiece::merges(&pieces).map_err(|detail| tokenizer_error(gguf, detail))?;
        let texts: HashSet<&str> = self.used().map(|(_, text, _)| text).collect();
        let missing =
            (0..=255u8).filter(|b| is_utf8_byte(*b) && !texts.contains(format!("<0x{b:02X}>").as_str())).count();
        if missing > 0 {
            notes.push(format!(
                "{missing} bytes that text can hold are not in the vocabulary and become the unknown token"
            ));
        }
        let (add_bos, add_eos) = self.added_ends(gguf, true)?;
        let prefix = gguf.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);

        // As in Llama 2's tokenizer.json.
        let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE_MARK}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null,
            "post_processor": self.template(add_bos, add_eos),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": self.text(self.special.unk),
                "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": self.vocabulary(), "merges": merges,
            },
        });
        Ok((tokenizer, add_bos, add_eos))
    }

    fn config(&self, gguf: &Gguf, add_bos: bool, add_eos: bool, notes: &mut Vec<String>) -> Result<Json> {
        let mut config = Map::new();
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        let s = self.special;
        for (key, id) in [("bos_token", s.bos), ("eos_token", s.eos), ("pad_token", s.pad), ("unk_token", s.unk)] {
            if let Some(text) = self.text(id) {
                config.insert(key.into(), json!(text));
            }
        }
        config.insert("add_bos_token".into(), json!(add_bos));
        config.insert("add_eos_token".into(), json!(add_eos));
        if let Some(architecture) = gguf.string("general.architecture")?
            && let Some(context) = gguf.integer(&format!("{architecture}.context_length"), 1..=1 << 32)?
        {
            config.insert("model_max_length".into(), json!(context));
        }
        match gguf.string("tokenizer.chat_template")? {
            Some(template) => drop(config.insert("chat_template".into(), json!(template))),
            None => notes.push("the file has no chat template; this may be a base model".into()),
        }
        let named: Vec<_> =
            gguf.metadata.keys().filter_map(|key| key.strip_prefix("tokenizer.chat_template.")).collect();
        if !named.is_empty() {
            notes.push(format!("further chat templates are left out: {}", named.join(", ")));
        }
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        Ok(Json::Object(config))
    }
}

fn tokenizer_error(gguf: &Gguf, detail: String) -> GgufError {
    GgufError::Tokenizer { file: gguf.path.clone(), detail }
}

/// The characters that stand for the bytes of UTF-8 text: GPT-2 keeps printable Latin-1 and numbers the others on from
/// U+0100 (`bytes_to_unicode`).
fn byte_symbols() -> impl Iterator<Item = char> {
    let mut others = '\u{100}'..;
    let symbols = (0..=255u8).filter_map(move |byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae.. => Some((byte, char::from(byte))),
        _ => others.next().map(|symbol| (byte, symbol)),
    });
    symbols.filter(|(byte, _)| is_utf8_byte(*byte)).map(|(_, symbol)| symbol)
}

/// Some bytes occur in no text: they would begin overlong forms or code points above U+10FFFF (RFC 3629).
fn is_utf8_byte(byte: u8) -> bool {
    !matches!(byte, 0xc0 | 0xc1 | 0xf5..)
}
