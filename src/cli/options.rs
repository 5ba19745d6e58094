//! Options that several verbs share: where the model is and what runs it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::OnceLock;

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use recoup_ground::http::address::{Address, is_address, mask};
use serde_json::{Map, Value, json};

use super::device::{AnyBackend, DeviceChoice, Own, Runs as _};
use super::machine::cpu_name;
use super::parallel;
use super::room::{self, Memory};
use crate::backend::cpu::{CpuBackend, isa::Isa};
use crate::backend::{Either, NUMERICS_VERSION};
use crate::checkpoint::dialect::Dialect;
use crate::checkpoint::hub::{Hub, Id};
use crate::checkpoint::json::Object;
use crate::checkpoint::{self, Checkpoint};
use crate::formats::kv::KvFormat;
use crate::model::memory::Needs;
use crate::model::{Decoder, ModelConfig, consistency};
use crate::quantize::random_model::RandomModel;
use crate::quantize::{Amount, CalibrationText, Recipe};
use crate::text::{ChatTemplate, ModelText, TextError, Tokenizer};

/// One of `values`, by its name.
pub(super) fn named<T: Clone + Send + Sync + 'static>(
    values: Vec<(&'static str, T)>,
) -> impl TypedValueParser<Value = T> {
    let names: Vec<&str> = values.iter().map(|v| v.0).collect();
    // The parser before lets through what is there only.
    PossibleValuesParser::new(names).try_map(move |given| {
        values.iter().find(|(name, _)| *name == given).map(|(_, value)| value.clone()).ok_or("no such value")
    })
}

/// A dialect that can be written; `plain` names none of them, where that is an answer.
pub(super) fn dialect(plain: Option<&'static str>) -> impl TypedValueParser<Value = Dialect> {
    let written = Dialect::written().map(|d| (d.name(), d));
    named(plain.map(|name| (name, Dialect::Plain)).into_iter().chain(written).collect())
}

/// How the KV cache can be stored without scales.
pub(super) const KV_FORMATS: [(&str, KvFormat); 2] = [("f32", KvFormat::F32), ("bf16", KvFormat::Bf16)];

/// What records of a run call it.
pub(super) fn kv_name(format: KvFormat) -> String {
    format!("{format:?}").to_lowercase()
}

/// What runs the model.
#[derive(Args, Clone, Debug)]
pub(super) struct EngineOptions {
    /// Threads; 0 is one per core
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Instruction set: scalar, avx2, avxvnni, avx512 or neon [default: the fastest this CPU has]. All give the same bits
    #[arg(long)]
    pub isa: Option<String>,
    /// Storage of the KV cache where the checkpoint has no FP8 scales of its own
    #[arg(long, value_parser = named(KV_FORMATS.to_vec()), default_value = "f32")]
    pub kv_cache_dtype: KvFormat,
    /// GiB of a mixture's experts that stay in memory on the CPU, of each model; the others are read from its files when they are
    /// used, with the same results [default: all, or what finds room]
    #[arg(long, value_name = "GIB", value_parser = gibibytes)]
    pub expert_memory: Option<f64>,
    /// What runs the model: auto (a GPU if there is one that can, else the CPU), cpu, cuda or cuda:N. NVIDIA from compute
    /// capability 8.0 on, driver 580 or newer
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// Ranks that share every layer, its rows, heads and experts: GPUs from --device on, or the processes that mpirun began. The same
    /// bits as of one
    #[arg(long, value_name = "N", default_value = "1", value_parser = at_least_one::<usize>)]
    pub tensor_parallel_size: usize,
    /// Stages that the layers are spread over, each as many ranks as share a layer
    #[arg(long, value_name = "N", default_value = "1", value_parser = at_least_one::<usize>)]
    pub pipeline_parallel_size: usize,
    #[arg(skip)]
    settled: Settled,
}

/// The backend of these options, made once.
#[derive(Clone, Default)]
struct Settled(OnceLock<AnyBackend>);

impl std::fmt::Debug for Settled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.get().is_some() { "settled" } else { "open" })
    }
}

impl EngineOptions {
    /// What runs a model.
    pub(super) fn backend(&self) -> Result<AnyBackend> {
        self.backend_for(0)
    }

    /// What runs models whose weights have `bytes` bytes in files; decided by the first call, for all that follow.
    pub(super) fn backend_for(&self, bytes: u64) -> Result<AnyBackend> {
        if let Some(settled) = self.settled.0.get() {
            return Ok(settled.clone());
        }
        let backend = match parallel::several(self)? {
            Some(several) => several,
            None => AnyBackend::alone(self.own(self.device, threads(self.threads), bytes)?),
        };
        Ok(self.settled.0.get_or_init(|| backend).clone())
    }

    /// A device of this process.
    pub(super) fn own(&self, device: DeviceChoice, threads: usize, bytes: u64) -> Result<Own> {
        let cpu = self.cpu(threads)?;
        let gpu = device.gpu(&cpu, bytes, &mut |note| super::say!("note: {note}"))?;
        Ok(match gpu {
            Some(gpu) => {
                if self.isa.is_some() {
                    super::say!("note: --isa is of the CPU; {} computes", gpu.device().name);
                }
                Either::B(gpu)
            }
            None => Either::A(cpu),
        })
    }

    fn cpu(&self, threads: usize) -> Result<CpuBackend> {
        let isa = match &self.isa {
            None => Isa::detect(),
            Some(name) => Isa::by_name(name).with_context(|| {
                let names: Vec<String> = Isa::available().iter().map(Isa::to_string).collect();
                format!("--isa {name}: this CPU has {}", names.join(", "))
            })?,
        };
        Ok(CpuBackend::new(isa, threads)?)
    }

    /// What of these options decides what a model computes, for keys under which results are kept: not threads nor
    /// instruction set, which change no bit.
    pub(super) fn computation(&self, checkpoint: &Checkpoint) -> Result<Value> {
        let kv = kv_name(self.kv_cache_dtype);
        Ok(match self.backend_for(checkpoint.tensors.file_bytes())?.own() {
            Either::A(_) => json!({"device": "cpu", "numerics": NUMERICS_VERSION, "kv_cache_dtype": kv}),
            // Sums have another order than the CPU's, and tensor cores of another kind round them otherwise.
            Either::B(gpu) => {
                json!({"device": format!("cuda {}", gpu.device().architecture()), "numerics": NUMERICS_VERSION,
                "kernels": gpu.kernels(), "kv_cache_dtype": kv})
            }
        })
    }

    /// The machine, for reports: system, CPU, threads and instruction set, or GPU and driver.
    pub(super) fn machine(&self) -> Result<String> {
        let system = format!("{} {}", std::env::consts::OS, std::env::consts::ARCH);
        let backend = self.backend()?;
        let own = match backend.own() {
            Either::A(cpu) => format!("{system}, {}, {} threads, {}", cpu_name(), cpu.threads(), cpu.isa()),
            Either::B(gpu) => format!("{system}, {}, {}", cpu_name(), gpu.device()),
        };
        Ok(match backend.size() {
            (1, 1) => own,
            (tensor, pipeline) => format!("{own}; {tensor} x {pipeline} ranks"),
        })
    }

    /// What of this machine and these options decides how fast a model is.
    pub(super) fn speed_key(&self) -> Result<Value> {
        let backend = self.backend()?;
        let mut key = match backend.own() {
            Either::A(cpu) => json!({"cpu": cpu_name(), "threads": cpu.threads(), "isa": cpu.isa().to_string()}),
            Either::B(gpu) => {
                json!({"cpu": cpu_name(), "gpu": gpu.device().to_string(), "kernels": gpu.kernels()})
            }
        };
        if backend.size() != (1, 1) {
            key["parallel"] = json!(backend.size());
        }
        if let Some(gib) = self.expert_memory {
            key["expert_memory"] = gib.into();
        }
        key["recoup_version"] = env!("CARGO_PKG_VERSION").into();
        Ok(key)
    }

    fn with_room(&self, cpu: CpuBackend, checkpoint: &Checkpoint, tokens: usize) -> Result<CpuBackend> {
        let config = ModelConfig::read(&checkpoint.config)?.untied_where_stored(checkpoint)?;
        let needs = Needs::of(checkpoint, &config, self.kv_cache_dtype);
        let asked = self.expert_memory.map(|gib| (gib * f64::from(1 << 30)) as u64);
        let folder = checkpoint.tensors.folder().display();
        let memory = Memory::here().without(cpu.open_expert_bytes());
        let plan = room::plan(&needs, (tokens, 1), asked, memory).map_err(|e| anyhow!("{folder}: {e}"))?;
        if let Some(note) = plan.note {
            super::say!("note: {folder}: {note}");
        }
        Ok(match plan.experts {
            Some(bytes) => cpu.with_expert_memory(usize::try_from(bytes).unwrap_or(usize::MAX)),
            None => cpu,
        })
    }

    /// Loads the model of `checkpoint` onto packed kernels.
    pub(super) fn load(&self, checkpoint: &Checkpoint) -> Result<Decoder<AnyBackend>> {
        self.load_for(checkpoint, 0)
    }

    /// The same for a context of `tokens`. What finds no room in memory is told, or refused, before anything is loaded.
    pub(super) fn load_for(&self, checkpoint: &Checkpoint, tokens: usize) -> Result<Decoder<AnyBackend>> {
        let backend = self.backend_for(checkpoint.tensors.file_bytes())?;
        let backend = match (backend.size(), backend.own()) {
            ((1, 1), Either::A(cpu)) => AnyBackend::alone(Either::A(self.with_room(cpu, checkpoint, tokens)?)),
            ((1, 1), _) => backend,
            _ => parallel::for_model(backend, checkpoint, (tokens, self.kv_cache_dtype))?,
        };
        let bar = super::progress(0, "loading");
        let model = Decoder::load_with_progress(backend, checkpoint, &mut |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        });
        bar.finish();
        Ok(model?)
    }
}

/// A number of GiB, which may be broken.
fn gibibytes(text: &str) -> Result<f64, String> {
    let fits = |gib: &f64| gib.is_finite() && *gib > 0.0;
    text.parse().ok().filter(fits).ok_or_else(|| "expected a number of GiB above 0, such as 4 or 0.5".to_owned())
}

/// A model of random weights in place of a checkpoint.
#[derive(clap::Args)]
#[group(id = "shape")]
pub(super) struct ShapeOptions {
    /// Random weights of a known shape, such as llama-3.1-8b or qwen3-30b-a3b (an unknown name lists all), or of that which a
    /// config.json says
    #[arg(long, value_name = "SHAPE|FILE", conflicts_with = "model")]
    model_shape: Option<String>,
    /// With --model-shape: what the weights are quantized to, a recipe as in `recoup quantize` [default: BF16]
    #[arg(long, value_name = "RECIPE")]
    recipe: Option<PathBuf>,
}

impl ShapeOptions {
    /// The model that is asked for, as `dialect` has it.
    pub(super) fn model(&self, dialect: Dialect) -> Result<Option<RandomModel>> {
        let Some(shape) = &self.model_shape else {
            if self.recipe.is_some() {
                bail!("--recipe is for --model-shape; `recoup quantize` applies a recipe to a model");
            }
            return Ok(None);
        };
        let recipe = self.recipe.as_ref().map(Recipe::find).transpose()?;
        let path = Path::new(shape);
        if path.extension().is_some_and(|e| e == "json") {
            let json = Object::read(path)?.value().clone();
            return Ok(Some(RandomModel::of_config(path, json, recipe.as_ref(), dialect)?));
        }
        Ok(Some(RandomModel::new(shape, recipe.as_ref(), dialect)?))
    }

    /// The shape's name.
    pub(super) fn name(&self) -> &str {
        self.model_shape.as_deref().unwrap_or_default()
    }

    /// What its weights are quantized to.
    #[cfg(feature = "parallel")]
    pub(super) fn recipe_name(&self) -> Option<String> {
        self.recipe.as_ref().map(|r| r.display().to_string())
    }

    /// Whether weights are quantized.
    pub(super) fn quantized(&self) -> bool {
        self.recipe.is_some()
    }
}

/// What the chat template is given beside the conversation.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct TemplateOptions {
    /// Arguments of the chat template as a JSON object: '{"enable_thinking": false}'
    #[arg(long, value_name = "JSON", value_parser = json_object)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

impl TemplateOptions {
    /// The arguments; none where the option is not given.
    pub(super) fn arguments(&self) -> Map<String, Value> {
        self.chat_template_kwargs.clone().unwrap_or_default()
    }
}

/// A model's chat template with arguments; names those that it does not know.
pub(super) fn with_arguments(
    template: Option<ChatTemplate>,
    arguments: Map<String, Value>,
    folder: &Path,
) -> Result<Option<ChatTemplate>> {
    if arguments.is_empty() {
        return Ok(template);
    }
    let Some(template) = template else {
        bail!("--chat-template-kwargs: {} has no chat template", folder.display());
    };
    let template = template.with_arguments(arguments)?;
    let unknown = template.unknown_arguments();
    if !unknown.is_empty() {
        super::say!("warning: the chat template of {} does not know {}", folder.display(), unknown.join(", "));
    }
    Ok(Some(template))
}

/// A number of things of which there has to be one.
pub(super) fn at_least_one<T: FromStr + PartialOrd + From<u8>>(text: &str) -> Result<T, String> {
    text.parse().ok().filter(|n| *n >= T::from(1)).ok_or_else(|| "expected a whole number from 1 on".to_owned())
}

/// A JSON object on the command line.
fn json_object(text: &str) -> Result<Map<String, Value>, String> {
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err("expected a JSON object, such as {\"enable_thinking\": false}".into()),
        Err(e) => Err(format!("no JSON: {e}")),
    }
}

/// Opens a checkpoint whose model is to be computed, and says what its files contradict each other in.
pub(super) fn open_model(folder: &Path) -> Result<Checkpoint> {
    Ok(open_noted(folder)?.0)
}

/// The same, with what was said, for reports.
pub(super) fn open_noted(folder: &Path) -> Result<(Checkpoint, Vec<String>)> {
    let checkpoint = Checkpoint::open(folder)?;
    let config = ModelConfig::read(&checkpoint.config)?.untied_where_stored(&checkpoint)?;
    let notes = consistency::notes(&checkpoint, &config)?.important;
    super::say_notes(&notes);
    Ok((checkpoint, notes))
}

/// The text side of the model of `folder` that data is read with; says what of its files is not applied as it stands there.
pub(super) fn text_to_read(folder: &Path, config: &Object, template: Option<&TemplateOptions>) -> Result<ModelText> {
    let text = ModelText::to_read(folder, config)?;
    super::say_notes(text.tokenizer().notes());
    let arguments = template.map(TemplateOptions::arguments).unwrap_or_default();
    text.map_template(|template| with_arguments(template, arguments, folder))
}

/// What the model of `checkpoint` is calibrated on: of `source`, or of the built-in text.
pub(super) fn calibration_text(
    source: Option<&Path>,
    amount: Amount,
    checkpoint: &Checkpoint,
    template: Option<&TemplateOptions>,
) -> Result<CalibrationText> {
    if amount.samples == 0 || amount.length == 0 {
        bail!("--samples and --length must be at least 1");
    }
    let positions = ModelConfig::read(&checkpoint.config)?.max_positions;
    let text = || {
        text_to_read(checkpoint.tensors.folder(), &checkpoint.config, template).context(
            "calibration on text needs the model's tokenizer; give token ids with --calibration FILE.json instead",
        )
    };
    CalibrationText::read(source, amount, positions, text, &mut |note| super::say!("{note}"))
}

/// What is not applied as a model's tokenizer files have it; nothing where there is no tokenizer.
pub(super) fn text_notes(folder: &Path) -> Result<Vec<String>, TextError> {
    if !folder.join("tokenizer.json").exists() {
        return Ok(Vec::new());
    }
    Ok(Tokenizer::from_folder(folder)?.notes().to_vec())
}

/// The identity of a checkpoint's files; large ones take a while the first time.
pub(super) fn identity(checkpoint: &Checkpoint) -> Result<Value> {
    let bar = super::progress(0, "hashing");
    let found = checkpoint::identity::identity(&checkpoint.tensors, &mut |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    });
    bar.finish();
    Ok(found?)
}

/// How many threads compute where `asked` were wanted (0: one per core). More than there are cores would only wait for
/// each other, and the result does not depend on them. What is not the decoder's work runs on as many.
pub(super) fn threads(asked: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let from_environment = || std::env::var("RAYON_NUM_THREADS").ok().and_then(|v| v.parse().ok());
    let wanted = if asked > 0 { Some(asked) } else { from_environment().filter(|n| *n > 0) };
    let threads = wanted.unwrap_or(cores).min(cores);
    // Made once; a second verb of the same process (demo) finds it there.
    let first = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().is_ok();
    if let Some(wanted) = wanted.filter(|w| first && *w > cores) {
        super::say!("note: {threads} threads instead of {wanted}: this process may use no more cores");
    }
    threads
}

/// The folder that MODEL names: a folder, or a hub id (`org/name`, `org/name@revision`) downloaded into the Hugging Face
/// cache.
pub(super) fn model_folder(model: impl AsRef<OsStr>) -> Result<PathBuf> {
    let model = model.as_ref();
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.into());
    }
    let Some(model) = model.to_str() else { bail!("{}: no such folder", path.display()) };
    if is_address(model) {
        bail!("{}: the address of a server; only `recoup eval` and `recoup verify` ask servers", mask(model));
    }
    let looks_like_id = model.split('@').next().is_some_and(|name| name.split('/').count() == 2)
        && !model.starts_with(['.', '/', '~'])
        && !model.ends_with('/');
    if !looks_like_id {
        bail!("{model}: no such folder");
    }
    let id = Id::parse(model).with_context(|| format!("{model}: no such folder"))?;
    let bar = super::progress(0, format!("{model}: bytes"));
    let hub = Hub::from_env(|name| std::env::var(name).ok())?;
    let found = hub.folder(
        &id,
        &mut |done, all| {
            bar.set_length(all);
            bar.set_position(done);
        },
        &mut |note| super::say!("{note}"),
    );
    bar.finish();
    found.with_context(|| format!("{model}: no such folder, and the hub did not give it"))
}

/// The address up to its /v1, which may be left out where there is no path.
pub(super) fn server_address(url: &str) -> Result<String> {
    let parsed = Address::parse(url)?;
    Ok(if parsed.path().is_empty() && !url.contains(['?', '#']) {
        format!("{}/v1", url.trim_end_matches('/'))
    } else {
        url.to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_a_path_is_of_the_api_and_one_with_a_path_is_left_alone() {
        for (url, expected) in [
            ("http://h:1", "http://h:1/v1"),
            ("http://h:1/", "http://h:1/v1"),
            ("https://h/v1", "https://h/v1"),
            ("http://h/proxy/v1", "http://h/proxy/v1"),
        ] {
            assert_eq!(server_address(url).unwrap(), expected);
        }
        assert!(server_address("ftp://h").is_err());
    }
}
