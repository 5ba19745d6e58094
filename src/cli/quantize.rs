//! `recoup quantize`: post-training quantization of a BF16 checkpoint.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use recoup_ground::digest::sha256;
use recoup_ground::kept::kept;
use recoup_ground::records;
use recoup_ground::shares::{self, Shard};
use serde_json::{Value, json};

use super::machine::peak_memory;
use super::options::{
    EngineOptions, TemplateOptions, calibration_text, identity, model_folder, open_model, text_notes,
};
use super::shards::Shares;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::Dialect;
use crate::output;
use crate::quantize::auto::Table;
use crate::quantize::{self, Amount, CalibrationText, Found, Recipe, Scheme};

#[derive(clap::Args, Clone)]
pub(super) struct Args {
    /// BF16 checkpoint folder or hub id
    #[arg(required_unless_present = "list_recipes")]
    model: Option<PathBuf>,
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "FOLDER", required_unless_present = "list_recipes")]
    output: Option<PathBuf>,
    /// What the blocks' linears become: a shipped recipe (--list-recipes) or a JSON file
    #[arg(long, value_name = "NAME|FILE", required_unless_present = "list_recipes")]
    recipe: Option<OsString>,
    /// Print the shipped recipes
    #[arg(long)]
    list_recipes: bool,
    /// Whose conventions the output follows
    #[arg(long, value_parser = super::options::dialect(None), default_value = "modelopt")]
    dialect: Dialect,
    /// What to calibrate on: text, or records (JSON lines or lists, CSV, TSV, Parquet; compressed by gzip or Zstandard)
    /// with `messages`, `conversations`, `prompt` and `completion`, `text` or `input_ids`; a file, a folder, a pattern, or -
    /// for standard input [default: a short built-in text]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Average bits per weight of the blocks' linears, for recipes that choose formats themselves
    #[arg(long, value_name = "BITS")]
    bits: Option<f64>,
    /// Choose by the recoup_sensitivity.json of an earlier run instead of measuring again
    #[arg(long, conflicts_with = "merge", value_name = "FILE")]
    sensitivity: Option<PathBuf>,
    /// Also keep the plain model that the weights were rounded from, after smoothing or rotation: what `recoup recover`
    /// starts from
    #[arg(long, value_name = "FOLDER")]
    keep_unrounded: Option<PathBuf>,
    /// Windows of the text, or conversations, to run [default: 8, and 16 where the recipe rounds weights by them]
    #[arg(long)]
    samples: Option<usize>,
    /// Tokens in a window
    #[arg(long, default_value_t = 512)]
    length: usize,
    #[command(flatten)]
    shares: Shares,
    #[command(flatten)]
    template: TemplateOptions,
    #[command(flatten)]
    pub(super) options: EngineOptions,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    if args.list_recipes {
        for recipe in Recipe::shipped()? {
            super::outln!("{:<34} {}", recipe.name, recipe.description);
        }
        return super::done();
    }
    args.shares
        .of_this_process(args.output.as_deref(), |shares, output| run_here(&Args { shares, output, ..args.clone() }))
}

/// The part of this process.
fn run_here(args: &Args) -> Result<ExitCode> {
    let (Some(model), Some(out), Some(recipe)) = (&args.model, &args.output, &args.recipe) else {
        bail!("MODEL, --output and --recipe are needed");
    };
    let shard = args.shares.part();
    if shard != Shard::ALL {
        return find_share(args, (model, out), recipe, shard);
    }
    let start = Instant::now();
    let claim = output::folder(out)?;
    let kept = args.keep_unrounded.as_deref().map(output::folder).transpose()?;
    if kept.is_some_and(|kept| kept.target() == claim.target()) {
        bail!("--output and --keep-unrounded name the same folder");
    }
    if claim.cleared() {
        super::say!("note: what a run for the same output had left when it was killed was removed");
    }
    let mut recipe = Recipe::find(recipe)?;
    let measured = choose_bits(args, &mut recipe)?;
    let folder = model_folder(model)?;
    let checkpoint = open_model(&folder)?;
    let text = if recipe.needs_text() {
        args.text(&recipe, &checkpoint)?
    } else {
        if args.calibration.is_some() || args.samples.is_some() {
            super::say!(
                "note: recipe {} looks at no text; --calibration and --samples are without effect",
                recipe.name
            );
        }
        // The copy has the same tokenizer; one that cannot be read is no reason not to quantize.
        super::say_notes(&text_notes(&folder).unwrap_or_else(|e| vec![e.to_string()]));
        CalibrationText::none()
    };
    let bar = super::progress(0, "");
    let backend = args.options.backend_for(checkpoint.tensors.file_bytes())?;
    let found = match args.shares.merge.as_slice() {
        [] => None,
        folders => Some(args.of_shares(folders, &checkpoint, &recipe, &text)?),
    };
    let unrounded = args.keep_unrounded.as_deref();
    let places = quantize::Places { out, unrounded, measured: measured.as_ref(), found: found.as_ref() };
    let report =
        quantize::apply(&checkpoint, &backend, &text, &recipe, args.dialect, places, &mut |what, done, all| {
            bar.at(what, done, all);
        })?;
    bar.finish();
    if let Some(table) = &report.table {
        print_table(table)?;
    }
    let tokens = text.sequences.iter().map(Vec::len).sum::<usize>();
    super::say!(
        "{} linears by {} ({} dialect), {}: {} to {} in {:.1} s{}",
        report.modules,
        recipe.name,
        args.dialect,
        if tokens > 0 { format!("calibrated on {tokens} tokens") } else { "without calibration".into() },
        super::human_bytes(report.bytes_before),
        super::human_bytes(report.bytes_after),
        start.elapsed().as_secs_f64(),
        peak_memory().map_or_else(String::new, |bytes| format!(", peak memory {}", super::human_bytes(bytes)))
    );
    for module in &report.unreached {
        super::say!("note: no calibration token reached {module}; it shares the scale of its neighbours");
    }
    super::name_left_out(&folder);
    for note in &report.notes {
        super::say!("note: {note}");
    }
    super::say!("wrote {}", out.display());
    super::done()
}

/// What can be found wrong with the arguments before anything takes time.
pub(super) fn check(args: &Args) -> Result<()> {
    let (Some(model), Some(recipe)) = (&args.model, &args.recipe) else { return Ok(()) };
    let mut recipe = Recipe::find(recipe)?;
    choose_bits(args, &mut recipe)?;
    let checkpoint = open_model(&model_folder(model)?)?;
    if recipe.needs_text() {
        args.text(&recipe, &checkpoint)?;
    }
    Ok(())
}

/// What a share found, in its folder.
const FOUND: &str = "found.json";

impl Args {
    fn text(&self, recipe: &Recipe, checkpoint: &Checkpoint) -> Result<CalibrationText> {
        let amount = Amount { samples: self.samples.unwrap_or(recipe.samples()), length: self.length };
        calibration_text(self.calibration.as_deref(), amount, checkpoint, Some(&self.template))
    }

    /// All that what shares find depends on: not the budget of bits, by which formats are chosen afterwards.
    fn key(&self, checkpoint: &Checkpoint, recipe: &Recipe, text: &CalibrationText) -> Result<Value> {
        let mut recipe = json!(recipe);
        if let Some(auto) = recipe.get_mut("auto").and_then(Value::as_object_mut) {
            auto.shift_remove("bits");
        }
        Ok(json!({"model": identity(checkpoint)?, "recipe": recipe, "text": sha256(json!(text.sequences).to_string()),
            "dialect": self.dialect.name(), "version": env!("CARGO_PKG_VERSION"),
            "computation": self.options.computation(checkpoint)?}))
    }

    /// What all shares found.
    fn of_shares(
        &self,
        folders: &[PathBuf],
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        text: &CalibrationText,
    ) -> Result<Found> {
        let shares = shares::all(folders, Path::new(FOUND), &self.key(checkpoint, recipe, text)?)?;
        Found::joined(shares).with_context(|| format!("--merge: {FOUND} of the shards are not of one kind"))
    }
}

/// Finds a share of what the recipe measures, and keeps it in the folder `out`.
fn find_share(args: &Args, (model, out): (&Path, &Path), recipe: &OsStr, shard: Shard) -> Result<ExitCode> {
    for (name, given) in [
        ("--keep-unrounded", args.keep_unrounded.is_some()),
        ("--sensitivity", args.sensitivity.is_some()),
        ("--bits", args.bits.is_some()),
    ] {
        if given {
            bail!("{name} is for the model that all shards are for: give it with --merge");
        }
    }
    let start = Instant::now();
    let recipe = Recipe::find(recipe)?;
    recipe.check_measures()?;
    let checkpoint = open_model(&model_folder(model)?)?;
    let text = args.text(&recipe, &checkpoint)?;
    let backend = args.options.backend_for(checkpoint.tensors.file_bytes())?;
    let claim = output::growing(out)?;
    let bar = super::progress(0, "");
    let key = shares::of_share(&args.key(&checkpoint, &recipe, &text)?, shard);
    let with = (&recipe, args.dialect);
    kept(&out.join(FOUND), &key, || {
        let shown = &mut |what, done, all| bar.at(what, done, all);
        anyhow::Ok(quantize::find_share(&checkpoint, &backend, &text, with, &claim, shard, shown)?)
    })?;
    bar.finish();
    let seconds = start.elapsed().as_secs_f64();
    super::say!("shard {shard} is complete after {seconds:.1} s; when all are: recoup quantize … --merge DIRS -o OUT");
    super::done()
}

/// Takes --bits into the recipe; the table that --sensitivity names.
fn choose_bits(args: &Args, recipe: &mut Recipe) -> Result<Option<Table>> {
    let Some(auto) = &mut recipe.auto else {
        if args.bits.is_some() || args.sensitivity.is_some() {
            bail!(
                "--bits and --sensitivity are for recipes that choose formats themselves, such as nvfp4_fp8_auto; {} does \
                 not",
                recipe.name
            );
        }
        return Ok(None);
    };
    let mut measured = None;
    if let Some(bits) = args.bits {
        auto.bits = bits;
    }
    if let Some(file) = &args.sensitivity {
        measured = Some(records::read_json(file).context("--sensitivity: no table of sensitivities")?);
    }
    recipe.check()?;
    Ok(measured)
}

/// What was measured of each group, and what it became.
fn print_table(table: &Table) -> Result<()> {
    let mut shown = comfy_table::Table::new();
    shown.load_style(comfy_table::presets::NOTHING);
    let schemes: Vec<_> = table.groups.first().map_or_else(Vec::new, |g| g.options.clone());
    let header = ["group".to_owned(), "weights".to_owned()].into_iter();
    let columns = schemes.iter().filter(|o| o.scheme != Scheme::None).map(|o| format!("KL as {}", o.scheme));
    shown.set_header(header.chain(columns).chain(["becomes".to_owned()]));
    for group in &table.groups {
        let figures = group.options.iter().filter(|o| o.scheme != Scheme::None).map(|o| format!("{:.6}", o.kl));
        let row = [group.name.clone(), group.weights.to_string()].into_iter();
        shown.add_row(row.chain(figures).chain([group.scheme.to_string()]));
    }
    super::outln!("{shown}");
    super::outln!(
        "{:.3} of {} bits per weight; the parts' KL sums to {:.5} nats (measured on {} tokens)",
        table.bits,
        table.budget_bits,
        table.kl_sum,
        table.tokens
    );
    Ok(())
}
