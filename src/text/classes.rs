//! Which of its tokenizer classes transformers takes for a model's folder: some read `tokenizer.json` as it stands, others
//! only its vocabulary.
//!
//! Source: transformers 5.24 without mistral-common, models/auto/tokenization_auto.py, `AutoTokenizer.from_pretrained` of a
//! local folder without `trust_remote_code`.

use std::path::Path;

use serde_json::{Map, Value};

use super::TextError;
use super::settings::{Flags, kind};

/// What transformers makes of a `tokenizer.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Class {
    /// All that the file says (`TokenizersBackend`, once called `PreTrainedTokenizerFast`).
    File,
    /// The file's vocabulary, merges and post-processor; the rest is the class's own, by `tokenizer_config.json`.
    Rebuilt(Rebuilt),
    /// A class that Recoup does not follow, by its name.
    Other(String),
}

/// The classes that are built anew here as transformers builds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rebuilt {
    Llama,
    CodeLlama,
    Gemma,
    Qwen2,
    Qwen3_5,
    Gpt2,
    CodeGen,
    GptNeoX,
    Cohere,
}

impl Rebuilt {
    const ALL: [Self; 9] = [
        Self::Llama,
        Self::CodeLlama,
        Self::Gemma,
        Self::Qwen2,
        Self::Qwen3_5,
        Self::Gpt2,
        Self::CodeGen,
        Self::GptNeoX,
        Self::Cohere,
    ];

    /// transformers' name of the class.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaTokenizer",
            Self::CodeLlama => "CodeLlamaTokenizer",
            Self::Gemma => "GemmaTokenizer",
            Self::Qwen2 => "Qwen2Tokenizer",
            Self::Qwen3_5 => "Qwen3_5Tokenizer",
            Self::Gpt2 => "GPT2Tokenizer",
            Self::CodeGen => "CodeGenTokenizer",
            Self::GptNeoX => "GPTNeoXTokenizer",
            Self::Cohere => "CohereTokenizer",
        }
    }
}

/// The class of tokenizer that each type of model is registered with; types of which Recoup can run none (encoders, speech)
/// are left out. Source: `TOKENIZER_MAPPING_NAMES`.
const REGISTERED: &[(&str, &str)] = &[
    ("CodeLlamaTokenizer", "code_llama"),
    ("CohereTokenizer", "aya_vision cohere cohere2"),
    (
        "GPT2Tokenizer",
        "blip-2 codegen dbrx emu3 gpt2 gpt_neo gptj hyperclovax_vision_v2 instructblip instructblipvideo jais2 opt \
         phi starcoder2",
    ),
    ("GPTNeoXTokenizer", "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm"),
    (
        "GemmaTokenizer",
        "diffusion_gemma gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma shieldgemma2 t5gemma \
         zaya",
    ),
    ("LlamaTokenizer", "idefics idefics2"),
    (
        "Qwen2Tokenizer",
        "audioflamingo3 colqwen2 cosmos3_omni dots3_note fun_asr_nano hunyuan_vl internvl lighton_ocr \
         moss_transcribe_diarize ovis2 qianfan_ocr qwen2 qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_moe qwen2_vl qwen3 \
         qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe vibevoice",
    ),
    ("Qwen3_5Tokenizer", "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp"),
    (
        "TokenizersBackend",
        "EvollaModel arctic aria beam bigbird_pegasus camembertv2-base canary chatlm cohere_asr ernie4_5 ernie4_5_moe \
         flex_olmo fuyu glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe glm_image glmasr got_ocr2 gpt_bigcode \
         gradium_phonon_tts granite granitemoe granitemoehybrid granitemoeshared h2ovl_chat hyperclovax \
         hyperclovax_vlm internlm2 internlm3 iquestcoder jamba kimi_k25 kimi_linear kosmos-2 llava llava_next \
         mimo_v2_flash minicpm3 minicpm_ocr minicpmv minicpmv4_6 minicpmv4_7 minimax_m2 ministral ministral3 mistral \
         mistral3 mistral_large4 mixtral modernbert modernbert-decoder molmo molmo2 nemo_speechlm nemotron nvfp4 \
         nystromformer olmo2 olmo3 olmo_hybrid omniasr opencua openvla paddleocr_vl pegasus_x persimmon phi3 phi3_v \
         phimoe pix2struct pixtral pocket_tts smolvlm stablelm step3_vl umt5 vipllava voxtral voxtral_realtime \
         xlm-roberta-xl",
    ),
];

/// Types of models whose files name the wrong class, so that the registered one counts.
/// Source: `MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`.
const WRONG_IN_FILES: &str = "arctic camembertv2-base chatlm cohere_asr ernie4_5 ernie4_5_moe fuyu h2ovl_chat hyperclovax \
    hyperclovax_vision_v2 hyperclovax_vlm internlm2 internlm3 iquestcoder jamba llava llava_next minicpm3 minicpmv \
    minimax_m2 modernbert modernbert-decoder molmo molmo2 nemotron nvfp4 opencua openvla paddleocr_vl phi3 phi3_v \
    phimoe qwen2 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen4_exp siglip2 smolvlm step3_vl vipllava";

/// All other classes that transformers has and that do not take `tokenizer.json` as it stands: what is neither here nor in
/// [`Rebuilt`] is `TokenizersBackend`, an unknown class too.
const OTHERS: &str = "AlbertTokenizer BartTokenizer BarthezTokenizer BartphoTokenizer BertGenerationTokenizer BertJapaneseTokenizer \
    BertTokenizer BertTokenizerLegacy BertweetTokenizer BigBirdTokenizer BioGptTokenizer BlenderbotSmallTokenizer \
    BlenderbotTokenizer ByT5Tokenizer CLIPTokenizer CTRLTokenizer CamembertTokenizer CanineTokenizer ClvpTokenizer \
    ConvBertTokenizer CpmAntTokenizer CpmTokenizer DPRContextEncoderTokenizer DPRQuestionEncoderTokenizer \
    DPRReaderTokenizer DebertaTokenizer DebertaV2Tokenizer DiaTokenizer DistilBertTokenizer EsmTokenizer \
    EsmcTokenizer FNetTokenizer FSMTTokenizer FastSpeech2ConformerTokenizer FlaubertTokenizer FunnelTokenizer \
    GPTNeoXJapaneseTokenizer GPTSw3Tokenizer HerbertTokenizer LEDTokenizer LasrTokenizer LayoutLMv2Tokenizer \
    LayoutLMv3Tokenizer LayoutXLMTokenizer LukeTokenizer LxmertTokenizer M2M100Tokenizer MBart50Tokenizer \
    MBartTokenizer MLukeTokenizer MPNetTokenizer MarianTokenizer MarkupLMTokenizer MgpstrTokenizer \
    MobileBertTokenizer MvpTokenizer MyT5Tokenizer NllbTokenizer NougatTokenizer OpenAIGPTTokenizer PLBartTokenizer \
    PegasusTokenizer PerceiverTokenizer PhobertTokenizer ProphetNetTokenizer RagTokenizer ReformerTokenizer \
    RemBertTokenizer RoCBertTokenizer RoFormerTokenizer RobertaTokenizer SeamlessM4TTokenizer Siglip2Tokenizer \
    SiglipTokenizer Speech2TextTokenizer SpeechT5Tokenizer SplinterTokenizer SqueezeBertTokenizer T5Tokenizer \
    TapasTokenizer Tipsv2Tokenizer UdopTokenizer VideoPrismTokenizer VitsTokenizer Wav2Vec2CTCTokenizer \
    Wav2Vec2PhonemeCTCTokenizer WhisperTokenizer XGLMTokenizer XLMRobertaTokenizer XLMTokenizer XLNetTokenizer";

/// Finds the class by `tokenizer_config.json`, `config.json` (`model`, with its path) and whether [`is_byte_level`], and
/// notes what stands in the way of knowing it.
///
/// # Errors
/// A file that names a class or a type of model by something other than a string.
pub(super) fn class_of(
    flags: &Flags<'_>,
    (path, model): (&Path, Option<&Map<String, Value>>),
    is_byte_level: impl FnOnce() -> bool,
    notes: &mut Vec<String>,
) -> Result<Class, TextError> {
    let none = Map::new();
    let model = model.unwrap_or(&none);
    let files = Files {
        class: text(flags.config, "tokenizer_class", flags.path)?,
        model_class: text(model, "tokenizer_class", path)?,
        model_type: text(model, "model_type", path)?,
        model_name: model.get("model_name").and_then(Value::as_str).map(str::to_owned),
        own_code: match flags.config.get("auto_map") {
            Some(Value::Object(map)) => map.get("AutoTokenizer").is_some_and(|code| !code.is_null()),
            Some(Value::Array(_)) => true,
            _ => false,
        },
    };
    let name = files.class_name(is_byte_level);
    let folder = flags.path.parent().unwrap_or(Path::new("."));
    if files.model_type.as_deref().is_some_and(|t| is_in(MISTRALS, t)) && folder.join("tekken.json").exists() {
        notes.push(format!(
            "{}: transformers 5 takes tekken.json for the tokenizer where mistral-common is installed; Recoup takes \
             tokenizer.json, as transformers does without it",
            folder.display()
        ));
    }
    if let Some(Value::Array(others)) = flags.config.get("fast_tokenizer_files")
        && let Some(other) = others.iter().filter_map(Value::as_str).find(|name| *name != "tokenizer.json")
    {
        notes.push(format!(
            "{}: `fast_tokenizer_files` names {other} for some versions of transformers; Recoup takes tokenizer.json",
            flags.path.display()
        ));
    }
    if files.own_code && !files.is_wrong() {
        notes.push(format!(
            "{}: `auto_map` names code of the model's maker for the tokenizer, which is not run; what it does otherwise than \
             transformers' {name} is not known here (transformers runs it with trust_remote_code only)",
            flags.path.display()
        ));
    }
    Ok(match Rebuilt::ALL.into_iter().find(|class| class.name() == name) {
        Some(class) => Class::Rebuilt(class),
        None if is_in(OTHERS, &name) => Class::Other(name),
        None => Class::File,
    })
}

/// A text that may be missing, null or empty.
fn text(of: &Map<String, Value>, key: &str, path: &Path) -> Result<Option<String>, TextError> {
    match of.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
        Some(other) => Err(TextError::Invalid {
            path: path.to_owned(),
            detail: format!("`{key}` must be a string, found {}", kind(other)),
        }),
    }
}

/// What the files say about the class.
struct Files {
    /// `tokenizer_class` of tokenizer_config.json.
    class: Option<String>,
    /// `tokenizer_class` of config.json.
    model_class: Option<String>,
    model_type: Option<String>,
    model_name: Option<String>,
    /// Whether `auto_map` of tokenizer_config.json names code.
    own_code: bool,
}

/// Types of models of which mistral-common has the tokenizers.
const MISTRALS: &str = "ministral ministral3 mistral mistral3 mistral_large4 mixtral pixtral voxtral voxtral_realtime";

/// Whether a `tokenizer.json` has something byte-level, as transformers asks: by a word in the text.
pub(super) fn is_byte_level(tokenizer_json: &[u8]) -> bool {
    const WORD: &[u8] = br#""ByteLevel""#;
    tokenizer_json.windows(WORD.len()).any(|window| window == WORD)
}

/// What takes `tokenizer.json` as it stands.
const BACKEND: &str = "TokenizersBackend";

impl Files {
    /// Whether transformers knows that these files name the wrong class.
    fn is_wrong(&self) -> bool {
        [&self.model_type, &self.model_name].into_iter().flatten().any(|name| is_in(WRONG_IN_FILES, name))
    }

    /// The class by name, without the `Fast` of older versions. The order of the questions is transformers'.
    fn class_name(&self, is_byte_level: impl FnOnce() -> bool) -> String {
        let registered = self.model_type.as_deref().and_then(registered);
        let named = self.class.as_ref().or(self.model_class.as_ref()).map(|name| without_fast(name));
        if let Some(named) = named.filter(|_| !self.own_code) {
            // Llama 3 and others write this class beside byte-level vocabularies, which it is not made for.
            if named == "LlamaTokenizer" && !self.is_wrong() && is_byte_level() {
                return BACKEND.to_owned();
            }
            if let Some(registered) = registered.filter(|registered| *registered != named) {
                return match registered {
                    BACKEND => BACKEND,
                    registered if self.is_wrong() => registered,
                    _ => named,
                }
                .to_owned();
            }
        }
        // Files of a type known to be wrong are not asked for the maker's code, but still for the class. CodeLlama's type is
        // none of a model's, so that nothing but a class leads to it.
        let of_model = registered.filter(|_| self.model_type.as_deref() != Some("code_llama"));
        named.or(of_model).unwrap_or(BACKEND).to_owned()
    }
}

fn registered(model_type: &str) -> Option<&'static str> {
    REGISTERED.iter().find(|(_, types)| is_in(types, model_type)).map(|(class, _)| *class)
}

fn is_in(names: &str, name: &str) -> bool {
    names.split(' ').any(|known| known == name)
}

fn without_fast(name: &str) -> &str {
    name.strip_suffix("Fast").unwrap_or(name)
}
