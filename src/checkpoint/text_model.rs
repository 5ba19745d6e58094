//! Where the text model stands in a checkpoint: its configuration inside of a wrapper's, the prefix of its tensors, and
//! what lies beside it and is knowingly not used.

use serde_json::Value;

use super::error::Result;
use super::json::{self, Object};
use super::tensors::TensorStore;

/// Where the configuration of a text model stands in that of a model that sees or hears as well.
const CONFIGS: [&str; 2] = ["text_config", "llm_config"];
/// What the text model's configuration may leave to the wrapper's.
const INHERITED: [&str; 6] =
    ["tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype"];

/// What the names of a text model's tensors begin with; the first but for Nemotron-H.
pub(super) const ROOTS: [&str; 2] = ["model.", "backbone."];
/// Where the text model stands inside of a wrapper: transformers' module names of today, and those before 4.52, which
/// files keep; the last is the head's there, and the others as ModelOpt may shorten them.
pub(super) const WRAPPERS: [&str; 4] =
    ["model.language_model.", "language_model.model.", "language_model.backbone.", "language_model."];

/// What the decoder consists of, by either root's names.
const PARTS: [&str; 6] = ["layers.", "embed_tokens.", "norm.", "rotary_emb.", "embeddings.", "norm_f."];
const HEAD: &str = "lm_head.";

/// Beginnings of the names of tensors that no text model has: towers of vision, projectors, heads that predict several
/// tokens.
const UNUSED: [&str; 10] = [
    "model.visual.",
    "visual.",
    "vision_model.",
    "vision_tower.",
    "model.vision_tower.",
    "mlp1.",
    "multi_modal_projector.",
    "model.multi_modal_projector.",
    "mtp.",
    "model.mtp.",
];

/// How the files spell the names of a text model, where not as a plain one's: the one place that knows both.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Spelling {
    /// What the decoder's names begin with here, and in the files.
    decoder: Option<(&'static str, &'static str)>,
    /// What stands before the head's.
    head: &'static str,
}

impl Spelling {
    /// The name in the files of tensor or module `name`.
    pub(super) fn stored(&self, name: &str) -> String {
        let is = |name: &str, part: &str| name.strip_prefix(part.trim_end_matches('.')).is_some_and(starts_anew);
        if is(name, HEAD) {
            return format!("{}{name}", self.head);
        }
        let in_decoder = |(root, prefix): (&str, &str)| {
            let rest = name.strip_prefix(root).filter(|rest| PARTS.iter().any(|p| is(rest, p)))?;
            Some(format!("{prefix}{rest}"))
        };
        self.decoder.and_then(in_decoder).unwrap_or_else(|| name.to_owned())
    }
}

/// Whether `rest` is what can stand behind the name of a module.
fn starts_anew(rest: &str) -> bool {
    rest.is_empty() || rest.starts_with('.')
}

/// The text model's configuration: `config` itself, or what a wrapper has of it.
///
/// # Errors
/// When there are two.
pub fn config(config: Object) -> Result<Object> {
    let (text, llm) = (config.object(CONFIGS[0])?, config.object(CONFIGS[1])?);
    if text.is_some() && llm.is_some() {
        return Err(config.error(CONFIGS[1], "nothing beside `text_config`: keep the one that is meant"));
    }
    Ok(match text.or(llm) {
        Some(inner) => inner.inheriting(&config, &INHERITED),
        None => config,
    })
}

/// Says in a config.json, and in what it has of a text model, that the head is a tensor of its own.
pub fn untie(config: &mut Value) {
    const KEY: &str = "tie_word_embeddings";
    let Some(outer) = config.as_object_mut() else { return };
    outer.insert(KEY.into(), false.into());
    for key in CONFIGS {
        if let Some(text) = outer.get_mut(key).and_then(Value::as_object_mut) {
            text.insert(KEY.into(), false.into());
        }
    }
}

/// What the names of the text model's tensors begin with.
fn root(config: &Object) -> Result<&'static str> {
    let nemotron_h = config.string("model_type")? == Some("nemotron_h")
        || config.strings("architectures")?.iter().any(|a| a == "NemotronHForCausalLM");
    Ok(if nemotron_h { ROOTS[1] } else { ROOTS[0] })
}

/// Gives the text model's tensors the names that a plain one's have, and sets those aside that are of other parts; each
/// with a note. Whether they stood under another name, so that patterns may as well.
///
/// # Errors
/// When `config`, the text model's, has keys of the wrong type.
pub(super) fn canonical_names(tensors: &mut TensorStore, config: &Object) -> Result<bool> {
    let root = root(config)?;
    set_aside(tensors, &|name| UNUSED.iter().copied().find(|p| name.starts_with(p)).map(str::to_owned));
    let wrapped = rename(tensors, root);
    let layers = config.get("num_hidden_layers").and_then(json::whole);
    let more = config.get("num_nextn_predict_layers").and_then(json::whole).unwrap_or(0);
    if let Some(layers) = layers {
        let stem = format!("{root}layers.");
        set_aside(tensors, &|name| {
            let layer: u64 = name.strip_prefix(&stem)?.split('.').next()?.parse().ok()?;
            (layers..layers.saturating_add(more)).contains(&layer).then(|| format!("{stem}{layer}."))
        });
    }
    Ok(wrapped)
}

/// Removes the tensors for which `of` names the part that they are of.
fn set_aside(tensors: &mut TensorStore, of: &dyn Fn(&str) -> Option<String>) {
    for (part, count, bytes) in tensors.set_aside(of) {
        let note = format!(
            "{}: {count} tensor(s) of `{part}` ({bytes} bytes) are not used: the text model computes without them",
            tensors.folder().display()
        );
        tensors.note(note);
    }
}

fn rename(tensors: &mut TensorStore, root: &'static str) -> bool {
    let part = |name: &str, prefix: &str| {
        name.strip_prefix(prefix).filter(|rest| PARTS.iter().any(|p| rest.starts_with(p))).map(|r| format!("{root}{r}"))
    };
    if tensors.names().any(|n| part(n, root).is_some()) {
        return false;
    }
    // Saved without its head, by the other root, or out of a wrapper.
    let prefixes = std::iter::once("").chain(ROOTS.into_iter().filter(|r| *r != root)).chain(WRAPPERS);
    for prefix in prefixes {
        let mut renames: Vec<(String, String)> =
            tensors.names().filter_map(|n| Some((n.to_owned(), part(n, prefix)?))).collect();
        let Some((first, to)) = renames.first().cloned() else { continue };
        tensors.note(format!(
            "{}: the decoder's tensors are not under `{root}`: `{first}` is read as `{to}`, and so on",
            tensors.folder().display()
        ));
        let head = |n: &str| {
            let wrapper = WRAPPERS.into_iter().find(|w| n.strip_prefix(w).is_some_and(|r| r.starts_with(HEAD)))?;
            Some((n.to_owned(), wrapper))
        };
        let heads: Vec<(String, &str)> = tensors.names().filter_map(head).collect();
        let plain = tensors.names().any(|n| n.starts_with(HEAD));
        let wrapper = match heads.first() {
            Some((_, wrapper)) => wrapper,
            // Tied: where the class of such a wrapper has it.
            None if !plain && prefix != WRAPPERS[3] && prefix.starts_with(WRAPPERS[3]) => WRAPPERS[3],
            None => "",
        };
        renames.extend(heads.iter().map(|(from, wrapper)| (from.clone(), from[wrapper.len()..].to_owned())));
        renames.iter().for_each(|(from, to)| tensors.rename(from, to));
        tensors.spell(Spelling { decoder: Some((root, prefix)), head: if plain { "" } else { wrapper } });
        return !prefix.is_empty();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_spelled_as_the_files_have_them() {
        let wrapped = Spelling { decoder: Some(("backbone.", "language_model.backbone.")), head: "language_model." };
        let other_root = Spelling { decoder: Some(("backbone.", "model.")), head: "" };
        for (name, in_wrapper, by_other_root) in [
            (
                "backbone.layers.3.mixer.in_proj",
                "language_model.backbone.layers.3.mixer.in_proj",
                "model.layers.3.mixer.in_proj",
            ),
            ("backbone.embeddings.weight", "language_model.backbone.embeddings.weight", "model.embeddings.weight"),
            ("backbone.norm_f", "language_model.backbone.norm_f", "model.norm_f"),
            ("lm_head", "language_model.lm_head", "lm_head"),
            ("lm_head.weight_scale", "language_model.lm_head.weight_scale", "lm_head.weight_scale"),
            ("mtp.layers.0.norm.weight", "mtp.layers.0.norm.weight", "mtp.layers.0.norm.weight"),
        ] {
            assert_eq!(wrapped.stored(name), in_wrapper);
            assert_eq!(other_root.stored(name), by_other_root);
            assert_eq!(Spelling::default().stored(name), name);
        }
    }
}
