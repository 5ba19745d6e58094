//! `recoup inspect`: what a checkpoint is, module by module, and everything that is wrong with it at once.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use serde_json::{Value, json};

use super::options::{model_folder, text_notes};
use super::room::{self, Memory};
use crate::checkpoint::Checkpoint;
use crate::formats::kv::KvFormat;
use crate::model::config::{MixerConfig, MixtureConfig, ModelConfig};
use crate::model::inspection::{Inspection, Row};
use crate::model::memory::Needs;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Checkpoint folder or hub id
    model: PathBuf,
    /// Print JSON, every module by itself
    #[arg(long)]
    json: bool,
    /// List every module instead of groups of alike ones
    #[arg(long)]
    modules: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let checkpoint = Checkpoint::open(&model_folder(&args.model)?)?;
    let mut found = Inspection::of(&checkpoint);
    match text_notes(checkpoint.tensors.folder()) {
        Ok(more) => found.notes.extend(more),
        Err(e) => found.problems.push(e.to_string()),
    }
    found.resolve(&checkpoint);
    if args.json {
        print_json(&checkpoint, &found)?;
    } else {
        print_text(&checkpoint, &found, args.modules)?;
    }
    Ok(if found.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print_json(checkpoint: &Checkpoint, found: &Inspection) -> Result<()> {
    let Inspection { config, rows, notes, problems } = found;
    let config = config.as_ref();
    let needs = config.map(|c| Needs::of(checkpoint, c, KvFormat::F32));
    let modules: Vec<Value> = rows
        .iter()
        .map(|r| {
            json!({"module": r.module, "weight": r.weight, "activation": r.activation, "shape": r.shape,
                "bytes": r.bytes, "notes": r.notes})
        })
        .collect();
    let report = json!({
        "path": checkpoint.tensors.folder(),
        "architecture": config.map(|c| format!("{:?}", c.architecture)),
        "dialect": checkpoint.announced.dialect.to_string(),
        "algorithm": checkpoint.announced.algorithm,
        "kv_cache": if checkpoint.announced.fp8_kv_cache { "fp8" } else { "unquantized" },
        "kv_cache_scales": checkpoint.announced.fp8_kv_cache.then_some(if checkpoint.unit_kv_scales { "1.0" } else { "stored" }),
        "layers": config.map(|c| c.layers.len()),
        "hidden_size": config.map(|c| c.hidden),
        "vocab_size": config.map(|c| c.vocab),
        "max_positions": config.map(|c| c.max_positions),
        "tied_embeddings": config.map(|c| c.tied_embeddings),
        "parameters": found.parameters(),
        "cache_values_per_token": config.map(ModelConfig::cache_values),
        "state_bytes_per_sequence": config.map(|c| 4 * c.state_values()),
        "memory": needs.map(|n| json!({"weight_bytes": n.weights, "expert_bytes": n.experts, "bytes_per_expert": n.expert,
            "cache_bytes_per_1000_tokens": 1000 * n.token, "state_bytes_per_sequence": n.sequence})),
        "file_bytes": checkpoint.tensors.file_bytes(),
        "modules": modules,
        "notes": notes,
        "problems": problems,
    });
    super::outln!("{report:#}");
    Ok(())
}

/// What a run needs: the weights, and what is kept of each token and each sequence.
fn memory(needs: &Needs, fp8: bool) -> String {
    let bytes = super::human_bytes;
    let format = if fp8 { "FP8" } else { "f32, half of that with --kv-cache-dtype bf16" };
    let mut out = format!("{} of weights", bytes(needs.weights));
    if needs.experts > 0 {
        let (all, one) = (bytes(needs.experts), bytes(needs.expert));
        out += &format!(", of which {all} are experts of {one} that may stay in the files (--expert-memory)");
    }
    out += &format!("; {} for 1,000 tokens of context ({format})", bytes(1000 * needs.token));
    if needs.sequence > 0 {
        out += &format!("; {} of recurrent state a sequence", bytes(needs.sequence));
    }
    out
}

/// What is to be said where that finds no room here with a thousand tokens.
fn no_room(needs: &Needs) -> Option<String> {
    room::plan(needs, (1000, 1), None, Memory::here()).map_or_else(Some, |plan| plan.note)
}

/// Heads of the attention layers, each kind once.
fn attention(c: &ModelConfig) -> String {
    let mut kinds: Vec<String> = Vec::new();
    for (_, _, a) in c.attentions() {
        let kind = format!(", {} heads ({} KV) of {}", a.heads, a.kv_heads, a.head_dim);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds.concat()
}

/// What the layers are made of, where that is more than attention and a feed-forward.
fn mixers(c: &ModelConfig) -> String {
    let experts = |m: &MixtureConfig| format!("{} experts, {} per token", m.experts, m.rule.top_k);
    let moe = c.mixtures().first().map_or(String::new(), |(_, _, m)| format!(", {}", experts(m)));
    if c.plain().is_some() {
        return moe;
    }
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for step in c.layers.iter().flat_map(|l| &l.steps) {
        let name = match step.mixer {
            MixerConfig::Attention(_) => "attention",
            MixerConfig::Mamba(_) => "Mamba-2",
            MixerConfig::DeltaNet(_) => "gated delta net",
            MixerConfig::Mlp(_) => "feed-forward",
            MixerConfig::Mixture(_) => "mixture",
        };
        match counts.iter_mut().find(|c| c.0 == name) {
            Some(count) => count.1 += 1,
            None => counts.push((name, 1)),
        }
    }
    let counts: Vec<String> = counts.iter().map(|(name, count)| format!("{count} x {name}")).collect();
    format!("{moe}\nmixers    {}", counts.join(", "))
}

fn print_text(checkpoint: &Checkpoint, found: &Inspection, all: bool) -> Result<()> {
    let Inspection { config, rows, notes, problems } = found;
    super::outln!("{}", checkpoint.tensors.folder().display());
    if let Some(c) = config {
        super::outln!(
            "model     {:?}: {} layers, hidden {}{}, vocabulary {}{}",
            c.architecture,
            c.layers.len(),
            c.hidden,
            attention(c),
            c.vocab,
            mixers(c)
        );
        super::outln!(
            "context   {} positions; embeddings {}",
            c.max_positions,
            if c.tied_embeddings { "tied" } else { "not tied" }
        );
    }
    let s = &checkpoint.announced;
    super::outln!("scheme    {} ({}); KV cache {}", s.dialect, s.algorithm, kv_cache(checkpoint));
    let size = super::human_bytes(checkpoint.tensors.file_bytes());
    // Which tensors are linears, a refused configuration does not say; and one that none belongs to has no bits.
    match found.parameters() {
        None => super::outln!("size      {size} on disk"),
        Some(n) => {
            let bits = 8.0 * rows.iter().map(|r| r.bytes).sum::<usize>() as f64 / n as f64;
            super::outln!(
                "size      {size} on disk; {:.1} M parameters in linears, {bits:.2} bits each",
                n as f64 / 1e6
            );
        }
    }
    if let Some(c) = config.as_ref().filter(|_| !rows.is_empty()) {
        let needs = Needs::of(checkpoint, c, KvFormat::F32);
        super::outln!("memory    {}", memory(&needs, checkpoint.announced.fp8_kv_cache));
        if let Some(why) = no_room(&needs) {
            super::outln!("          here: {why}");
        }
    }
    if !rows.is_empty() {
        super::outln!("{}", table(rows, all));
    }
    for n in notes {
        super::outln!("note      {n}");
    }
    if problems.is_empty() {
        super::outln!("no problems: every tensor is accounted for");
    }
    for p in problems {
        super::outln!("problem   {p}");
    }
    Ok(())
}

fn table(rows: &[Row], all: bool) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["module", "count", "weight", "activation", "N x K", "bytes", "notes"]);
    for (key, (count, bytes)) in grouped(rows, all) {
        let [module, weight, activation, shape, notes] = key;
        table.add_row([module, count.to_string(), weight, activation, shape, super::human_bytes(bytes as u64), notes]);
    }
    table
}

fn kv_cache(checkpoint: &Checkpoint) -> &'static str {
    match (checkpoint.announced.fp8_kv_cache, checkpoint.unit_kv_scales) {
        (false, _) => "unquantized",
        (true, false) => "fp8, calibrated",
        (true, true) => "fp8, no scales stored: 1.0",
    }
}

/// Rows with layer and expert numbers starred out, and how many fell together.
fn grouped(rows: &[Row], all: bool) -> Vec<([String; 5], (usize, usize))> {
    let star = |module: &str| {
        let part = |p: &str| if !all && p.parse::<usize>().is_ok() { "*".to_owned() } else { p.to_owned() };
        module.split('.').map(part).collect::<Vec<_>>().join(".")
    };
    let mut order: BTreeMap<[String; 5], usize> = BTreeMap::new();
    let mut groups: Vec<([String; 5], (usize, usize))> = Vec::new();
    for r in rows {
        let shape = format!("{} x {}", r.shape[0], r.shape[1]);
        let key = [star(&r.module), r.weight.clone(), r.activation.clone(), shape, r.notes.join(", ")];
        let at = *order.entry(key.clone()).or_insert_with(|| {
            groups.push((key, (0, 0)));
            groups.len() - 1
        });
        groups[at].1.0 += 1;
        groups[at].1.1 += r.bytes;
    }
    groups
}
