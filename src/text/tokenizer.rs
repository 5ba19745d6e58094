//! Text to token ids and back, by the model's own `tokenizer.json`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use recoup_eval::foreign::foreign;
use recoup_eval::records::without_mark;
use serde_json::{Map, Value};
use tokenizers::{AddedToken, DecoderWrapper};

use super::special_tokens::read_json_object;
use super::{SpecialTokens, StreamDecoder, TextError};

/// A tokenizer with its named special tokens. A clone is cheap and shares everything.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    hf: tokenizers::Tokenizer,
    path: PathBuf,
    special_tokens: SpecialTokens,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    special_ids: HashSet<u32>,
    vocab_size: usize,
    decoding: Decoding,
}

/// How the strings of tokens become text: decides what a streaming decoder may already give out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decoding {
    /// Each token is a run of bytes, and text is all bytes read as UTF-8 (GPT-2, Llama 3, Qwen).
    Bytes,
    /// A run of tokens `<0xAB>` is text together or not at all (sentencepiece with byte fallback: Llama 2, Gemma).
    ByteRuns,
    /// Anything else.
    Strings,
}

impl Tokenizer {
    /// Loads `tokenizer.json` of a model's folder, and `tokenizer_config.json` and `special_tokens_map.json` if they
    /// are there.
    ///
    /// Truncation and padding that `tokenizer.json` may ask for are switched off: they belong to training, and would
    /// silently cut or fill prompts here. `clean_up_tokenization_spaces` is not applied: it is lossy ("a ." becomes
    /// "a."), and vLLM leaves it out of streamed text as well.
    ///
    /// # Errors
    /// A file that is missing (`tokenizer.json` only), cannot be read or is not what its name says.
    pub fn from_folder(folder: &Path) -> Result<Tokenizer, TextError> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| TextError::Read {
            path: path.clone(),
            source,
            hint: "; Recoup needs the model's tokenizer.json (a sentencepiece tokenizer.model alone is not enough: \
                   convert it with transformers' AutoTokenizer(...).save_pretrained)",
        })?;
        let mut hf = tokenizers::Tokenizer::from_bytes(without_mark(&bytes)).map_err(|error| TextError::Invalid {
            path: path.clone(),
            detail: foreign(&bytes).map_or_else(
                || format!("not a tokenizer that Recoup can load ({error}); copy the file again from its source"),
                |what| format!("not a tokenizer: it is {what}"),
            ),
        })?;
        hf.with_padding(None);
        hf.with_truncation(None)
            .map_err(|error| TextError::Invalid { path: path.clone(), detail: error.to_string() })?;

        let config_path = folder.join("tokenizer_config.json");
        if let Some(config) = read_json_object(&config_path)? {
            add_missing_tokens(&mut hf, &config, &config_path)?;
        }
        let special_tokens = SpecialTokens::from_folder(folder)?;
        let id_of = |name: &str| special_tokens.get(name).and_then(|token| hf.token_to_id(token));
        let (bos_id, eos_id) = (id_of("bos_token"), id_of("eos_token"));
        if special_tokens.add_bos_token() == Some(true) && bos_id.is_none() {
            return Err(TextError::Invalid {
                path: config_path,
                detail: match special_tokens.get("bos_token") {
                    Some(token) => format!(
                        "`add_bos_token` is true, but bos_token `{token}` is not in the vocabulary of {}",
                        path.display()
                    ),
                    None => "`add_bos_token` is true, but no `bos_token` is given".to_owned(),
                },
            });
        }
        let special_ids =
            hf.get_added_tokens_decoder().iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let vocab_size = hf.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let decoding = hf.get_decoder().map_or(Decoding::Strings, decoding_of);
        Ok(Tokenizer {
            inner: Arc::new(Inner { hf, path, special_tokens, bos_id, eos_id, special_ids, vocab_size, decoding }),
        })
    }

    /// The token ids of `text`. Special tokens written out in the text (`<|im_end|>`) become their ids.
    ///
    /// `add_special_tokens` adds what the tokenizer puts around plain text (for many models a leading bos; the
    /// configuration's `add_bos_token` overrules `tokenizer.json`). Pass `false` for text that a chat template wrote:
    /// the template has already written them, and a second bos costs accuracy.
    ///
    /// # Errors
    /// When the tokenizer cannot represent the text (a vocabulary without an unknown token).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let inner = &*self.inner;
        let encoding = inner
            .hf
            .encode_fast(text, add_special_tokens)
            .map_err(|error| TextError::Encode { path: inner.path.clone(), detail: error.to_string() })?;
        let ids = encoding.get_ids();
        let (Some(bos), true) = (inner.bos_id, add_special_tokens) else {
            return Ok(ids.to_vec());
        };
        // The mask is 1 on tokens that the post-processor added, 0 on tokens that came from the text.
        let bos_was_added = ids.first() == Some(&bos) && encoding.get_special_tokens_mask().first() == Some(&1);
        Ok(match (inner.special_tokens.add_bos_token(), bos_was_added) {
            (Some(true), false) => std::iter::once(bos).chain(ids.iter().copied()).collect(),
            (Some(false), true) => ids[1..].to_vec(),
            _ => ids.to_vec(),
        })
    }

    /// The token ids of `text` without added special tokens, and the byte of `text` at which each begins.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_with_starts(&self, text: &str) -> Result<(Vec<u32>, Vec<usize>), TextError> {
        let inner = &*self.inner;
        let encoding = inner
            .hf
            .encode(text, false)
            .map_err(|error| TextError::Encode { path: inner.path.clone(), detail: error.to_string() })?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().iter().map(|o| o.0).collect()))
    }

    /// The text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary give nothing (models pad
    /// their vocabulary, so an untrained one may emit them).
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        // Some decoders of tokenizers 0.23 panic on an empty list.
        let has_text = |&id: &u32| !(skip_special && self.is_special(id)) && self.id_to_token(id).is_some();
        if !ids.iter().any(has_text) {
            return Ok(String::new());
        }
        self.inner
            .hf
            .decode(ids, skip_special)
            .map_err(|error| TextError::Decode { path: self.inner.path.clone(), detail: error.to_string() })
    }

    /// A decoder that gives out text while ids arrive; all its text together is what [`decode`](Self::decode) gives.
    pub fn stream_decoder(&self, skip_special: bool) -> StreamDecoder {
        StreamDecoder::new(self.clone(), skip_special)
    }

    /// One more than the highest id: every id of [`encode`](Self::encode) is below it. The model's own vocabulary may
    /// be larger, never smaller.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab_size
    }

    /// The id of a token given by its vocabulary string.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.hf.token_to_id(token)
    }

    /// The vocabulary string of an id (in the tokenizer's own alphabet: a space may be written `Ġ` or `▁`).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.hf.id_to_token(id)
    }

    /// Whether `skip_special` leaves this id out.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.special_ids.contains(&id)
    }

    /// The named special tokens.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.inner.special_tokens
    }

    /// The string of the token that begins a text, if the model has one.
    pub fn bos_token(&self) -> Option<&str> {
        self.inner.special_tokens.get("bos_token")
    }

    /// The string of the token that ends a text, if the configuration names one.
    pub fn eos_token(&self) -> Option<&str> {
        self.inner.special_tokens.get("eos_token")
    }

    /// The id of [`bos_token`](Self::bos_token), if it is in the vocabulary.
    pub fn bos_id(&self) -> Option<u32> {
        self.inner.bos_id
    }

    /// The id of [`eos_token`](Self::eos_token), if it is in the vocabulary. A model may end on others as well:
    /// `generation_config.json` lists them.
    pub fn eos_id(&self) -> Option<u32> {
        self.inner.eos_id
    }

    pub(super) fn decoding(&self) -> Decoding {
        self.inner.decoding
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.inner.path)
            .field("vocab_size", &self.inner.vocab_size)
            .finish_non_exhaustive()
    }
}

/// Adds the tokens that `tokenizer_config.json` lists in `added_tokens_decoder` and `tokenizer.json` lacks, as
/// transformers does on loading.
fn add_missing_tokens(
    hf: &mut tokenizers::Tokenizer,
    config: &Map<String, Value>,
    path: &Path,
) -> Result<(), TextError> {
    let invalid = |detail: String| TextError::Invalid { path: path.to_owned(), detail };
    let Some(Value::Object(listed)) = config.get("added_tokens_decoder") else {
        return Ok(());
    };
    let mut entries = Vec::with_capacity(listed.len());
    for (id, entry) in listed {
        let number: u32 = id
            .parse()
            .map_err(|_| invalid(format!("`added_tokens_decoder` has the key `{id}`, expected a token id")))?;
        let token: AddedToken = serde_json::from_value(entry.clone())
            .map_err(|error| invalid(format!("`added_tokens_decoder`, entry {id} is not an added token: {error}")))?;
        entries.push((number, token));
    }
    // A new token gets the next free id, so they must come in the order of their ids.
    entries.sort_by_key(|(id, _)| *id);
    let known = hf.get_added_tokens_decoder();
    for (id, token) in entries {
        let content = token.content.clone();
        if let Some(known) = known.get(&id) {
            if known.content == content {
                continue;
            }
            return Err(invalid(format!(
                "`added_tokens_decoder` calls id {id} `{content}`, but tokenizer.json calls it `{}`; the two files \
                 are not of the same model, or one was edited without the other",
                known.content
            )));
        }
        let added = if token.special { hf.add_special_tokens([token]) } else { hf.add_tokens([token]) };
        added.map_err(|error| invalid(format!("cannot add `{content}` of `added_tokens_decoder`: {error}")))?;
        let got = hf.token_to_id(&content);
        if got != Some(id) {
            return Err(invalid(format!(
                "`added_tokens_decoder` gives `{content}` the id {id}, but with this tokenizer.json it would be {}; \
                 the two files are not of the same model",
                got.map_or("none".to_owned(), |id| id.to_string())
            )));
        }
    }
    Ok(())
}

fn decoding_of(decoder: &DecoderWrapper) -> Decoding {
    match decoder {
        DecoderWrapper::ByteLevel(_) => Decoding::Bytes,
        DecoderWrapper::ByteFallback(_) => Decoding::ByteRuns,
        DecoderWrapper::Sequence(sequence) => match sequence.get_decoders() {
            [only] => decoding_of(only),
            // `Fuse` joins strings and changes no text.
            [DecoderWrapper::ByteLevel(_), DecoderWrapper::Fuse(_)] => Decoding::Bytes,
            many if many.iter().any(|d| decoding_of(d) == Decoding::ByteRuns) => Decoding::ByteRuns,
            _ => Decoding::Strings,
        },
        _ => Decoding::Strings,
    }
}
