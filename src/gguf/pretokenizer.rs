//! How each value of `tokenizer.ggml.pre` cuts text into words, as Hugging Face's `pre_tokenizer`.
//!
//! GGUF names the rule and leaves its expressions to the program. These are the ones of the tokenizer.json that each
//! name was derived from; llama.cpp rewrites some of them for its own engine. A name that is not here is refused: with
//! the wrong rule a model still talks, only worse.

use serde_json::{Value as Json, json};

/// A pre-tokenizer and what goes with it.
#[derive(Clone, Copy)]
pub(super) struct PreTokenizer {
    names: &'static [&'static str],
    cut: Cut,
    /// Unicode normalization form C comes first.
    nfc: bool,
    /// A word that is a token is that token, whatever the merges say.
    pub ignore_merges: bool,
    /// Whether text begins with the BOS token where `tokenizer.ggml.add_bos_token` does not say.
    pub add_bos: bool,
}

#[derive(Clone, Copy)]
enum Cut {
    /// GPT-2's expression, which `ByteLevel` has built in.
    Gpt2,
    /// Single digits first, then GPT-2's expression.
    DigitsGpt2,
    /// One expression after the other, each cutting what the ones before left whole.
    Expressions(&'static [&'static str]),
}

const PLAIN: PreTokenizer =
    PreTokenizer { names: &[], cut: Cut::Gpt2, nfc: false, ignore_merges: false, add_bos: false };

const KNOWN: [PreTokenizer; 8] = [
    PreTokenizer { names: &["gpt-2", "phi-2"], ..PLAIN },
    PreTokenizer { names: &["smollm", "starcoder", "refact", "codeshell"], cut: Cut::DigitsGpt2, ..PLAIN },
    // tokenizer.json of Qwen2 to Qwen3, and of DeepSeek's distillations into Qwen.
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen"],
        cut: Cut::Expressions(&[concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )]),
        nfc: true,
        ..PLAIN
    },
    // tokenizer.json of Llama 3.
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        cut: Cut::Expressions(&[concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )]),
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    // tokenizer.json of Mistral NeMo.
    PreTokenizer {
        names: &["tekken"],
        cut: Cut::Expressions(&[concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )]),
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    // tokenizer.json of DeepSeek Coder. The third range is what it says: CJK, and everything from U+0800 to U+4E00.
    PreTokenizer {
        names: &["deepseek-coder"],
        cut: Cut::Expressions(&[
            "[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+",
            r"\p{N}",
        ]),
        ..PLAIN
    },
    // tokenizer.json of DeepSeek V3 and R1.
    PreTokenizer {
        names: &["deepseek-v3"],
        cut: Cut::Expressions(&[
            r"\p{N}{1,3}",
            "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
            concat!(
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"##,
                "\r\n",
                r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[",
                "\r\n",
                r"]*|\s*[",
                "\r\n",
                r"]+|\s+(?!\S)|\s+"
            ),
        ]),
        ..PLAIN
    },
    // What llama.cpp does where the converter knew no better.
    PreTokenizer {
        names: &["default"],
        cut: Cut::Expressions(&[
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            "[0-9][0-9][0-9]",
        ]),
        ..PLAIN
    },
];

impl PreTokenizer {
    /// The rule with this name in `tokenizer.ggml.pre`.
    pub fn named(name: &str) -> Option<Self> {
        KNOWN.into_iter().find(|p| p.names.contains(&name))
    }

    /// All names.
    pub fn known() -> String {
        KNOWN.iter().flat_map(|p| p.names).copied().collect::<Vec<_>>().join(", ")
    }

    /// The `normalizer` of tokenizer.json, or null.
    pub fn normalizer(&self) -> Json {
        if self.nfc { json!({"type": "NFC"}) } else { Json::Null }
    }

    /// The `pre_tokenizer` of tokenizer.json.
    pub fn to_json(self) -> Json {
        match self.cut {
            Cut::Gpt2 => byte_level(true),
            Cut::DigitsGpt2 => {
                let digits = json!({"type": "Digits", "individual_digits": true});
                json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]})
            }
            Cut::Expressions(expressions) => {
                let mut steps: Vec<_> = expressions
                    .iter()
                    .map(|e| json!({"type": "Split", "pattern": {"Regex": e}, "behavior": "Isolated", "invert": false}))
                    .collect();
                steps.push(byte_level(false));
                json!({"type": "Sequence", "pretokenizers": steps})
            }
        }
    }
}

/// Bytes become printable characters; with GPT-2's expression before that, or without.
fn byte_level(use_regex: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}
