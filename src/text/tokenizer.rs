//! Text to token ids and back, by the model's own `tokenizer.json`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use recoup_ground::foreign::foreign;
use recoup_ground::records::without_mark;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer,
};

use super::classes::{Class, Rebuilt, class_of, is_byte_level};
use super::clean_up::clean_up;
use super::rebuild::{finish, fix_mistral_regex, rebuild};
use super::settings::{Flags, read_json_object};
use super::special_tokens::{Configured, EXTRA, Token};
use super::token_bytes::{Around, around};
use super::{SpecialTokens, StreamDecoder, TextError};

/// A tokenizer with its named special tokens. A clone is cheap and shares everything.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
    /// Special tokens that are decoded like others.
    shown: Arc<HashSet<u32>>,
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
    cleans_up: bool,
    /// The text at which CodeLlama's class of transformers rearranges a prompt.
    fill: Option<String>,
    /// What stands around a token whose text is asked for.
    around: OnceLock<Option<Around>>,
    notes: Vec<String>,
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
    /// Loads `tokenizer.json` of a model's folder, and the files beside it that name tokens, flags and the class
    /// (`tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`, `config.json`) if they are there: text and
    /// ids are those of transformers 5 (5.24 is followed), which takes some files as they stand and builds others anew by
    /// the class; what is not followed is among the [`notes`](Self::notes).
    ///
    /// Truncation and padding that `tokenizer.json` may ask for are switched off: they belong to training, and would
    /// silently cut or fill prompts here.
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
        // Of text: that is compiled in the library, `from_bytes` would be compiled here.
        let read = std::str::from_utf8(without_mark(&bytes)).map_err(Into::into).and_then(str::parse);
        let mut hf: tokenizers::Tokenizer = read.map_err(|error: tokenizers::Error| TextError::Invalid {
            path: path.clone(),
            detail: foreign(&bytes).map_or_else(
                || format!("not a tokenizer that Recoup can load ({error}); copy the file again from its source"),
                |what| format!("not a tokenizer: it is {what}"),
            ),
        })?;
        let padding = hf.get_padding().map(|padding| padding.pad_token.clone());
        hf.with_padding(None);
        hf.with_truncation(None)
            .map_err(|error| TextError::Invalid { path: path.clone(), detail: error.to_string() })?;

        let mut notes = Vec::new();
        let mut configured = Configured::from_folder(folder)?;
        let config_path = folder.join("tokenizer_config.json");
        let config = read_json_object(&config_path)?.unwrap_or_default();
        let model_path = folder.join("config.json");
        let model = read_json_object(&model_path)?;
        let flags = Flags { config: &config, path: &config_path };
        let class = class_of(&flags, (&model_path, model.as_ref()), || is_byte_level(&bytes), &mut notes)?;
        let rebuilt = match &class {
            Class::Rebuilt(class) => {
                let added = || added_tokens(&bytes, &path);
                rebuild(*class, &hf, &flags, &mut configured, added, &mut notes)?.map(|hf| (*class, hf))
            }
            Class::File => None,
            Class::Other(name) => {
                notes.push(format!(
                    "transformers 5 loads this tokenizer as {name}, which does not take tokenizer.json as it stands; Recoup \
                     does, so that texts may become other tokens. Set `tokenizer_class` in {} to PreTrainedTokenizerFast for \
                     both to do the same",
                    config_path.display()
                ));
                None
            }
        };
        let no_pad = matches!(rebuilt, Some((Rebuilt::Gpt2 | Rebuilt::CodeGen, _)));
        if let Some(pad) = padding.filter(|_| !no_pad) {
            configured.set_defaults(&[("pad_token", &pad)]);
        }
        let class = rebuilt.as_ref().map(|(class, _)| *class);
        if let Some((_, rebuilt)) = rebuilt {
            hf = rebuilt;
        }
        add_tokens(&mut hf, &configured, class, &path, &mut notes)?;
        fix_mistral_regex(&mut hf, &flags, model.as_ref(), &mut notes)?;
        if let Some(class) = class {
            finish(class, &mut hf, &configured)
                .map_err(|detail| TextError::Invalid { path: config_path.clone(), detail })?;
        }
        let fill = configured.content("fill_token").filter(|_| class == Some(Rebuilt::CodeLlama)).map(str::to_owned);
        let special_tokens = configured.names();
        let id_of = |name: &str| special_tokens.get(name).and_then(|token| hf.token_to_id(token));
        let (bos_id, eos_id) = (id_of("bos_token"), id_of("eos_token"));
        let cleans_up = apply_switches(&mut hf, &flags, class, [bos_id, eos_id], &mut notes)?;
        // As the decoder asks, by the token's text: one that was special once stays so when another file says it is none,
        // and one that the normalizer changes is none.
        let is_special = |id: &u32| hf.id_to_token(*id).is_some_and(|t| hf.get_added_vocabulary().is_special_token(&t));
        let special_ids = hf.get_added_tokens_decoder().into_keys().filter(is_special).collect();
        let vocab_size = hf.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let decoding = hf.get_decoder().map_or(Decoding::Strings, decoding_of);
        Ok(Tokenizer {
            inner: Arc::new(Inner {
                hf,
                path,
                special_tokens,
                bos_id,
                eos_id,
                special_ids,
                vocab_size,
                decoding,
                cleans_up,
                fill,
                around: OnceLock::new(),
                notes,
            }),
            shown: Arc::default(),
        })
    }

    /// The same tokenizer, by which those of `tokens` that are special ones are part of a text all the same.
    #[must_use]
    pub fn showing<S: AsRef<str>>(&self, tokens: &[S]) -> Tokenizer {
        let ids = tokens.iter().filter_map(|token| self.token_to_id(token.as_ref()));
        let shown = self.shown.iter().copied().chain(ids.filter(|id| self.inner.special_ids.contains(id))).collect();
        Tokenizer { inner: Arc::clone(&self.inner), shown: Arc::new(shown) }
    }

    /// The token ids of `text`. Special tokens written out in the text (`<|im_end|>`) become their ids.
    ///
    /// `add_special_tokens` adds what the tokenizer puts around plain text (for many models a leading bos, by
    /// `tokenizer.json`'s post-processor). Pass `false` for text that a chat template wrote:
    /// the template has already written them, and a second bos costs accuracy.
    ///
    /// # Errors
    /// When the tokenizer cannot represent the text (a vocabulary without an unknown token), or the text is one that
    /// CodeLlama's class would rearrange.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        if let Some(fill) = self.inner.fill.as_ref().filter(|fill| text.contains(fill.as_str())) {
            return Err(TextError::Encode {
                path: self.inner.path.clone(),
                detail: format!(
                    "CodeLlamaTokenizer of transformers puts a text with `{fill}` in it into another order, which is not done \
                     here; write the tokens `▁<PRE>`, `▁<SUF>` and `▁<MID>` themselves"
                ),
            });
        }
        let encoding = self.guarded(|| self.inner.hf.encode_fast(text, add_special_tokens))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// What `encode` gives. Oniguruma's binding panics where an expression tries too many ways to match (`(a+)+$` on a long
    /// row of a's), which is an error like others.
    fn guarded<T>(&self, encode: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, TextError> {
        let failed = |detail: String| TextError::Encode { path: self.inner.path.clone(), detail };
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(encode)) {
            Ok(encoded) => encoded.map_err(|error| failed(error.to_string())),
            Err(panic) => {
                let said = panic.downcast_ref::<String>().map(String::as_str);
                let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
                Err(failed(format!("an expression of the tokenizer cannot be matched on this text ({said})")))
            }
        }
    }

    /// The token ids of `text` without added special tokens, and the byte of `text` at which each begins.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_with_starts(&self, text: &str) -> Result<(Vec<u32>, Vec<usize>), TextError> {
        let encoding = self.guarded(|| self.inner.hf.encode(text, false))?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().iter().map(|o| o.0).collect()))
    }

    /// The text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary give nothing (models pad
    /// their vocabulary, so an untrained one may emit them).
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        let text = self.decode_as_is(ids, skip_special)?;
        Ok(if self.cleans_up() { clean_up(&text) } else { text })
    }

    /// The text of `ids` before spaces are cleaned up.
    pub(super) fn decode_as_is(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        // Some decoders of tokenizers 0.23 panic on an empty list.
        let has_text = |&id: &u32| !(skip_special && self.is_special(id)) && self.id_to_token(id).is_some();
        if !ids.iter().any(has_text) {
            return Ok(String::new());
        }
        let failed =
            |error: tokenizers::Error| TextError::Decode { path: self.inner.path.clone(), detail: error.to_string() };
        if skip_special && !self.shown.is_empty() {
            let kept: Vec<u32> = ids.iter().copied().filter(|id| !self.is_special(*id)).collect();
            return self.inner.hf.decode(&kept, false).map_err(failed);
        }
        self.inner.hf.decode(ids, skip_special).map_err(failed)
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
        self.inner.special_ids.contains(&id) && !self.shown.contains(&id)
    }

    /// Whether this id is a special token, shown or not.
    pub(super) fn is_special_by_file(&self, id: u32) -> bool {
        self.inner.special_ids.contains(&id)
    }

    /// Whether this id was added to the vocabulary: no text is made of several tokens where it is one.
    pub(super) fn is_added(&self, id: u32) -> bool {
        self.inner.hf.get_added_vocabulary().simple_id_to_token(id).is_some()
    }

    /// An error about what the vocabulary cannot be used for.
    pub(super) fn unfit(&self, detail: &str) -> TextError {
        let detail = format!("its vocabulary cannot be held to grammars: {detail}");
        TextError::Invalid { path: self.inner.path.clone(), detail }
    }

    /// A token to put around another, to see what the decoder makes of that.
    pub(super) fn around(&self) -> Option<&Around> {
        self.inner.around.get_or_init(|| around(self)).as_ref()
    }

    /// What a person should know about these files: settings that are not applied, tokens that are new to the model.
    pub fn notes(&self) -> &[String] {
        &self.inner.notes
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

    /// Whether `clean_up_tokenization_spaces` counts: not for BPE, unless a second switch says so.
    pub(super) fn cleans_up(&self) -> bool {
        self.inner.cleans_up
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

/// Adds the tokens that the configuration lists or names and `tokenizer.json` lacks or flags otherwise, in transformers'
/// order, on which the ids of new ones depend.
/// Source: transformers 5.24, tokenization_utils_tokenizers.py, `TokenizersBackend.__init__`.
fn add_tokens(
    hf: &mut tokenizers::Tokenizer,
    configured: &Configured,
    class: Option<Rebuilt>,
    path: &Path,
    notes: &mut Vec<String>,
) -> Result<(), TextError> {
    let (listed_in, key) = &configured.listed_in;
    let invalid = |detail: String| TextError::Invalid { path: listed_in.clone(), detail };
    let known = hf.get_added_tokens_decoder();
    let is_name = |token: &Token| configured.named.iter().any(|(_, named)| named.content == token.content);
    let mut tokens: Vec<Token> = Vec::new();
    for (id, token) in &configured.listed {
        match known.get(id) {
            Some(known) if known.content != token.content => {
                return Err(invalid(format!(
                    "`{key}` calls id {id} `{}`, but tokenizer.json calls it `{}`; the two files are not of the same \
                     model, or one was edited without the other",
                    token.content, known.content
                )));
            }
            // Older files list ids only: tokenizer.json has the flags.
            Some(_) if *key == "added_tokens.json" => {}
            _ if known.values().any(|known| *known == token.added()) => {}
            _ => tokens.push(token.clone()),
        }
    }
    let is_listed: HashSet<String> = tokens.iter().map(|token| token.content.clone()).collect();
    let nameless = configured.extra.iter().map(|token| (EXTRA, token));
    for (name, token) in configured.named.iter().map(|(name, token)| (name.as_str(), token)).chain(nameless) {
        let is_known = is_listed.contains(&token.content) || known.values().any(|known| known.content == token.content);
        // A second one with other flags is added as well: its flags count.
        if is_known || token.content.is_empty() || tokens.contains(token) {
            continue;
        }
        let is_new = !tokens.iter().any(|other| other.content == token.content);
        if is_new && hf.token_to_id(&token.content).is_none() {
            notes.push(format!(
                "`{name}` is `{}`, which is not in the vocabulary of {}: it is added with a new id, which the model \
                 has not learned",
                token.content,
                path.display()
            ));
        }
        tokens.push(token.clone());
    }
    for token in &mut tokens {
        token.special |= is_name(token);
    }
    hf.add_tokens(tokens.iter().map(Token::added))
        .map_err(|error| invalid(format!("cannot add tokens of the configuration: {error}")))?;
    for (id, token) in &configured.listed {
        let got = hf.token_to_id(&token.content);
        if got == Some(*id) {
            continue;
        }
        if let (Some(class), Some(got)) = (class, got) {
            notes.push(format!(
                "`{}` has the id {id} in `{key}` or tokenizer.json, but {got} as {} of transformers 5 numbers tokens, which is \
                 followed",
                token.content,
                class.name()
            ));
        } else {
            return Err(invalid(format!(
                "`{key}` gives `{}` the id {id}, but with this tokenizer.json it would be {}; the two files are not of \
                 the same model",
                token.content,
                got.map_or("none".to_owned(), |id| id.to_string())
            )));
        }
    }
    Ok(())
}

/// The added tokens of a `tokenizer.json` with their ids.
fn added_tokens(tokenizer_json: &[u8], path: &Path) -> Result<Vec<(u32, AddedToken)>, TextError> {
    #[derive(serde::Deserialize)]
    struct Added {
        id: u32,
        #[serde(flatten)]
        token: AddedToken,
    }
    #[derive(serde::Deserialize)]
    struct File {
        #[serde(default)]
        added_tokens: Vec<Added>,
    }
    let file: File = serde_json::from_slice(without_mark(tokenizer_json))
        .map_err(|error| TextError::Invalid { path: path.to_owned(), detail: format!("`added_tokens`: {error}") })?;
    Ok(file.added_tokens.into_iter().map(|added| (added.id, added.token)).collect())
}

/// Applies the switches of `tokenizer_config.json` as transformers 5 does beside a `tokenizer.json`: some change nothing
/// there, and are named where they say otherwise than the tokenizer does. Returns whether decoded text is cleaned up.
/// Source: transformers 5.24, `_from_pretrained` (takes `add_bos_token` and `add_eos_token` out), `TokenizersBackend`.
fn apply_switches(
    hf: &mut tokenizers::Tokenizer,
    flags: &Flags<'_>,
    class: Option<Rebuilt>,
    [bos_id, eos_id]: [Option<u32>; 2],
    notes: &mut Vec<String>,
) -> Result<bool, TextError> {
    let path = flags.path;
    let added = hf.encode_fast("", true).map(|e| e.get_ids().to_vec()).unwrap_or_default();
    for (key, id) in [("add_bos_token", bos_id), ("add_eos_token", eos_id)] {
        let does =
            id.is_some_and(
                |id| if key == "add_bos_token" { added.first() == Some(&id) } else { added.last() == Some(&id) },
            );
        // The same token at both ends cannot be told apart without text.
        let one_for_both = added.len() < 2 && bos_id == eos_id && !added.is_empty();
        if let Some(says) = flags.switch(key)?.filter(|says| *says != does && !one_for_both) {
            let who = class.map_or("tokenizer.json's post-processor", Rebuilt::name);
            notes.push(format!(
                "{}: `{key}` is {says}, but {who} {} that token, which counts, as in transformers 5",
                path.display(),
                if does { "adds" } else { "does not add" }
            ));
        }
    }
    if class.is_none()
        && let Some(says) = flags.switch("add_prefix_space")?
        && let Some(does) = adds_prefix_space(hf)
        && says != does
    {
        notes.push(format!(
            "{}: `add_prefix_space` is {says}, but tokenizer.json {} a space at the start of a text, which counts, as in \
             transformers 5",
            path.display(),
            if does { "adds" } else { "does not add" }
        ));
    }
    if flags.switch("split_special_tokens")? == Some(true) {
        hf.set_encode_special_tokens(true);
    }
    let for_bpe = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output";
    let cleans_bpe = flags.switch(for_bpe)? == Some(true);
    let bpe = matches!(hf.get_model(), tokenizers::ModelWrapper::BPE(_));
    Ok(flags.switch("clean_up_tokenization_spaces")? == Some(true) && (cleans_bpe || !bpe))
}

/// Whether a text gets a space before its first character; `None` where the tokenizer does not show spaces.
fn adds_prefix_space(hf: &tokenizers::Tokenizer) -> Option<bool> {
    let mut text = NormalizedString::from("a");
    if let Some(normalizer) = hf.get_normalizer() {
        normalizer.normalize(&mut text).ok()?;
    }
    let mut text = PreTokenizedString::from(text);
    if let Some(pre_tokenizer) = hf.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut text).ok()?;
    }
    let splits = text.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
    let first = splits.first()?.0;
    first.ends_with(['a', 'A']).then(|| first.starts_with(['▁', 'Ġ', ' ']))
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
