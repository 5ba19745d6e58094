//! Does the engine behind a URL compute what a checkpoint says? What it says of given tokens is compared with the same
//! computed here; where they differ by more than noise, computations of likely faults are compared too.

mod agreement;
pub mod altered;
mod ask;
mod checks;
mod facts;
mod report;
mod search;
mod statistics;
mod suspects;
mod texts;

use recoup_openai::{Error, Fault, OpenAi};
use serde::Serialize;
use serde_json::{Map, Value};

pub use self::agreement::{Agreement, Judged, Segment, Tolerance};
use self::agreement::{Place, RULED_OUT, Valid, by_position, growth, phase, places, segments, square};
use self::altered::Possible;
pub use self::ask::NoWay;
use self::ask::{Manner, Names, find, hear};
pub use self::checks::{CheckError, Tokens};
use self::facts::{Fact, Sequence, facts, settled};
use self::report::Finding;
pub use self::report::{Parting, Report, Sampling, Verdict};
use self::statistics::mean;
pub use self::suspects::Suspect;
use self::suspects::Tried;
pub use self::texts::{Chat, Text, Texts};
use super::Watch;
use crate::backend::rounded::Rounding;
use crate::backend::{Backend, BackendError};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::engine::EngineError;
use crate::formats::kv::KvFormat;
use crate::model::{Decoder, LoadError};
use crate::text::{ModelText, TextError};

/// Tokens of the longest text where nobody says otherwise, and the largest sliding window that is gone beyond unasked.
const LONGEST: usize = 640;
const REACHED_WINDOW: usize = 2048;
/// Tokens that explanations are tried on, at most, beyond the worst text's.
const SECOND: usize = 64;
/// Pieces of one text at most.
const PIECES: usize = 8;
/// Valid computations that the server is compared with.
const RUNS: u64 = 3;
/// How much finer than BF16 another one is rounded, in bits: by how much noise shrinks then tells whether it is chaos.
const FINER: u32 = 3;
/// Noise that grows less than with this power of rounding is mostly chaos.
const CHAOS: f64 = 0.5;
/// A token that the server chose although it says another is more probable by this much was not chosen greedily.
const CHOSEN: f64 = 0.05;

/// What a difference comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Texts become other tokens.
    Tokenizer,
    /// The token that begins texts is missing or there twice.
    Bos,
    /// Chats become other prompts.
    Template,
    /// How keys and values are kept.
    KvCache,
    /// How inputs of products are quantized.
    Activations,
    /// A scale of a weight.
    Scale,
    /// Weights in the place of others.
    Weights,
    /// The sliding window.
    Window,
    /// Positions.
    Rope,
    /// Temperature, penalties or truncation where none was asked for.
    Sampling,
    /// Log-probabilities in the wrong places.
    Shift,
    /// One token after the other otherwise than a whole prompt.
    Decoding,
    /// Something that none of the explanations fits.
    Unknown,
}

/// A checkpoint and its model.
pub struct Subject<'m, B: Backend> {
    pub checkpoint: &'m Checkpoint,
    pub model: &'m Decoder<B>,
    pub text: &'m ModelText,
    /// How keys and values are kept where the checkpoint does not say it.
    pub kv: KvFormat,
}

/// How a server is verified.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most probable tokens that are compared at each place.
    pub top: usize,
    /// Tokens of the longest text; `None`: enough to go beyond a small sliding window.
    pub longest: Option<usize>,
    /// Tokens that the server generates after each text.
    pub generate: usize,
    /// Times the noise, and nats beside it, that are allowed.
    pub factor: f64,
    pub floor: f64,
    /// Whether to look for the layer of a fault that nothing else explains.
    pub search: bool,
    /// Arguments of the chat template.
    pub template: Map<String, Value>,
}

impl Default for Options {
    fn default() -> Self {
        Self { top: 20, longest: None, generate: 24, factor: 1.3, floor: 0.005, search: true, template: Map::new() }
    }
}

/// Why a server could not be verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    NoWay(#[from] NoWay),
    #[error(transparent)]
    Check(#[from] CheckError),
    #[error(transparent)]
    Server(#[from] Error),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("no text has two tokens; there is nothing to compare")]
    NoTexts,
}

/// Verifies that `server` computes what the checkpoint of `subject` says, on `texts`.
///
/// # Errors
/// When the server gives no log-probabilities or fails, or the model here does.
pub fn verify<B: Backend + Clone>(
    server: &OpenAi,
    subject: &Subject<'_, B>,
    texts: &Texts,
    options: &Options,
    watch: &mut dyn Watch,
) -> Result<Report, VerifyError> {
    let possible = Possible::of(subject.checkpoint, &subject.model.config)?;
    let mut notes = Vec::new();
    let longest = longest(subject, &possible, options, &mut notes);
    let texts = Texts { texts: pieces(subject.text, &texts.texts, longest)?, chats: texts.chats.clone() };
    let first = texts.texts.first().ok_or(VerifyError::NoTexts)?;
    let probe = subject.text.tokenizer().encode(&first.text, true)?;
    let manner = find(server, &first.text, &probe, options.top)?;
    watch.say(&format!("asking by {}", manner.way.name()));
    let short: Vec<Text> = texts.texts.iter().map(|t| Text { name: t.name.clone(), text: start(&t.text) }).collect();
    let tokens = checks::texts(server, &manner, subject.text, &short)?;
    let chats = checks::chats(server, subject.text, &texts.chats, &options.template, &mut notes)?;
    let mut sequences = heard(server, subject, &manner, &texts.texts, options, &mut notes, watch)?;
    let (valid, growth) = computed(subject, &mut sequences, watch)?;
    let noise = noise(&valid);
    let tolerance = Tolerance { factor: options.factor, floor: options.floor, noise, growth };
    let places = places(&sequences, &valid, &tolerance);
    let agreement = Agreement::of(&sequences, &valid.exact, &places, &tolerance);
    let segments = segments(&sequences, &places, &tolerance);
    let sampling = sampling(&sequences);
    let phases = [false, true].map(|generated| phase(&sequences, &places, generated, &tolerance));
    let within =
        agreement.is_within() && segments.iter().all(|s| s.within) && phases.iter().flatten().all(|p| p.agrees);
    let mut suspects = Vec::new();
    let mut findings: Vec<Finding> = Vec::new();
    let named = tokens.iter().chain(&chats).filter_map(|t| Some((t, t.difference.as_ref()?)));
    for (tokens, (kind, what)) in named {
        if !findings.iter().any(|f| f.kind == *kind) {
            findings.push(Finding { kind: *kind, what: format!("`{}`: {what}", tokens.name), others: Vec::new() });
        }
    }
    findings.extend(sampling.finding());
    let asked = places.iter().map(Vec::len).sum::<usize>();
    if agreement.ruled_out * 100 > asked {
        findings.push(Finding {
            kind: Kind::Sampling,
            what: format!(
                "it rules out {} of {} tokens: its distribution is cut off (top-k, top-p, min-p)",
                agreement.ruled_out, asked
            ),
            others: Vec::new(),
        });
    }
    if agreement.missing * 20 > asked {
        notes.push(format!("the server says nothing of {} of {asked} tokens", agreement.missing));
    }
    // Also where the noise allows it: a fault that fits much better than the checkpoint is one all the same.
    if !sequences.is_empty() && (!within || agreement.all.rms > options.floor) {
        let tried = tried(&sequences, &valid, &places, growth);
        suspects = suspects::try_all(subject, &tried, tolerance, watch)?;
        let explained = suspects.iter().any(|s| s.explains);
        let worst = &tried.sequences[0];
        if !within && !explained && options.search && worst.first <= search::TOKENS {
            let beginning = worst.cut(worst.first + search::TOKENS);
            let known = &tried.exact[0][..beginning.said.len()];
            let distances = search::distances(&beginning, known).into_iter().flatten();
            let is_off = mean(distances).is_some_and(|d| d.sqrt() > tolerance.all(beginning.said.len()));
            // In chaos few places tell nothing, but a server of the same arithmetic can be equalled.
            if is_off || growth < CHAOS {
                suspects.extend(search::search(subject, &beginning, known, &tolerance, watch)?);
            }
        }
        suspects.sort_by(|a, b| a.after.total_cmp(&b.after));
        let explained = report::explanation(&suspects, &segments, &phases, within);
        if explained.as_ref().is_some_and(|f| f.kind == Kind::Shift) {
            // What it holds more probable is of another place.
            findings.retain(|f| f.kind != Kind::Sampling);
        }
        findings.extend(explained);
    }
    let differs = !within || findings.iter().any(|f| suspects.iter().any(|s| s.explains && s.kind == f.kind));
    let verdict = match (sequences.is_empty(), findings.is_empty()) {
        (_, false) => Verdict::Differs,
        (true, true) => Verdict::Unknown,
        (false, true) => Verdict::Same,
    };
    Ok(Report {
        verdict,
        findings,
        url: server.address(),
        model: server.model().to_owned(),
        checkpoint: subject.checkpoint.tensors.folder().display().to_string(),
        manner,
        tolerance,
        agreement,
        within,
        parting: if differs {
            parting(subject, &sequences, &valid.exact, &places, &segments, &tolerance)
        } else {
            None
        },
        by_position: by_position(&sequences, &places),
        segments,
        phases,
        tokens,
        chats,
        sampling,
        suspects,
        notes,
    })
}

/// Tokens of the longest text.
fn longest<B: Backend>(
    subject: &Subject<'_, B>,
    possible: &Possible,
    options: &Options,
    notes: &mut Vec<String>,
) -> usize {
    let room = subject.model.config.max_positions.saturating_sub(options.generate + 1).max(2);
    let window = possible.window.unwrap_or(0);
    let unasked = if window <= REACHED_WINDOW { LONGEST.max(window + SECOND) } else { LONGEST };
    let longest = options.longest.unwrap_or(unasked).min(room);
    if possible.window.is_some() && longest <= window && window < room {
        notes.push(format!(
            "the sliding window of {window} tokens was not reached; --longest {} goes beyond it",
            window + SECOND
        ));
    }
    longest
}

/// Texts in pieces of at most `longest` tokens each.
fn pieces(text: &ModelText, texts: &[Text], longest: usize) -> Result<Vec<Text>, TextError> {
    let mut all = Vec::new();
    for Text { name, text: whole } in texts {
        let mut rest = &whole[..];
        // Of what is built in one piece is enough.
        let most = if name == "long" { 1 } else { PIECES };
        for piece in 0..most {
            if rest.trim().is_empty() {
                break;
            }
            // More than enough characters; all of a long text need not be tokenized.
            let ahead = char_end(rest, 16 * longest);
            let (_, starts) = text.tokenizer().encode_with_starts(&rest[..ahead])?;
            if starts.len() < 2 {
                // Of one token nothing can be said.
                break;
            }
            // One token is left for what the tokenizer puts in front.
            let end = starts.get(longest.saturating_sub(1)).map_or(ahead, |at| char_end(rest, *at));
            let end = if end == 0 { rest.len() } else { end };
            let name = if piece == 0 { name.clone() } else { format!("{name}, piece {}", piece + 1) };
            all.push(Text { name, text: rest[..end].to_owned() });
            rest = &rest[end..];
        }
    }
    Ok(all)
}

/// The last end of a character within the first `bytes` bytes.
fn char_end(text: &str, bytes: usize) -> usize {
    (0..=bytes.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

/// As much of a text as its tokens are compared of.
fn start(text: &str) -> String {
    text[..char_end(text, 2000)].to_owned()
}

/// What the server says of every text.
fn heard<B: Backend>(
    server: &OpenAi,
    subject: &Subject<'_, B>,
    manner: &Manner,
    texts: &[Text],
    options: &Options,
    notes: &mut Vec<String>,
    watch: &mut dyn Watch,
) -> Result<Vec<Sequence>, VerifyError> {
    let tokenizer = subject.text.tokenizer();
    let names = Names::new(tokenizer);
    let beginning = tokenizer.bos_id();
    let mut sequences = Vec::new();
    watch.begin("asking the server", texts.len() as u64, 0);
    for Text { name, text } in texts {
        let ids = tokenizer.encode(text, true)?;
        watch.part();
        if ids.len() < 2 {
            continue;
        }
        let heard = match hear(server, manner, &names, (name, text, &ids), beginning, options.generate) {
            Ok(heard) => heard,
            Err(error) if matches!(error.fault, Fault::TooLong(_)) => {
                notes.push(format!("`{name}` ({} tokens) was not compared: {error}", ids.len()));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        if heard.renamed > 0 {
            notes
                .push(format!("`{name}`: the server lists other tokens than it was given in {} places", heard.renamed));
        }
        match heard.sequence {
            Some(sequence) => sequences.push(sequence),
            None => notes.push(format!(
                "`{name}` was not compared: the server reads it as other tokens, or generated none after it"
            )),
        }
    }
    watch.end();
    Ok(sequences)
}

/// What the checkpoint says of what the server said, in ways that are all valid, and how noise grows with rounding. What is
/// compared is settled by a computation that is none of them: a server of the same arithmetic would equal the exact one.
fn computed<B: Backend>(
    subject: &Subject<'_, B>,
    sequences: &mut [Sequence],
    watch: &mut dyn Watch,
) -> Result<(Valid, f64), VerifyError> {
    watch.begin("computing the same", (RUNS + 2) * sequences.len() as u64, 0);
    let coarse = Rounding::bf16(0);
    let finer = subject.model.rounded(Rounding { bits: coarse.bits + FINER, ..coarse });
    let fine = settled(&finer, KvFormat::Bf16, sequences, &mut || watch.part())?;
    let exact = facts(subject.model, subject.kv, sequences, 1.0, &mut || watch.part())?;
    // Engines on GPUs keep BF16 between their kernels, and keys and values in it too where nothing else is said.
    let run = |seed| -> Result<Vec<Vec<Fact>>, VerifyError> {
        let model = subject.model.rounded(Rounding::bf16(seed));
        Ok(facts(&model, KvFormat::Bf16, sequences, 1.0, &mut || watch.part())?)
    };
    let runs = (0..RUNS).map(run).collect::<Result<Vec<_>, _>>()?;
    watch.end();
    let growth = growth(&exact, &fine, &runs[0], f64::from(1u32 << FINER));
    Ok((Valid { exact, runs }, growth))
}

/// Root mean square of the differences between two valid computations.
fn noise(valid: &Valid) -> f64 {
    let pairs = (0..valid.runs.len()).flat_map(|a| (0..a).map(move |b| (&valid.runs[a], &valid.runs[b])));
    let places = pairs.flat_map(|(a, b)| a.iter().flatten().zip(b.iter().flatten()));
    mean(places.filter_map(|(a, b)| square(&a.values, &b.values))).unwrap_or(0.0).sqrt()
}

/// What explanations are tried on: the worst sequence and the beginning of the next one, or all where noise is chaos and only
/// many places tell.
fn tried(sequences: &[Sequence], valid: &Valid, places: &[Vec<Place>], growth: f64) -> Tried {
    let size = |i: &usize| mean(places[*i].iter().filter_map(|p| p.server)).unwrap_or(0.0);
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by(|a, b| size(b).total_cmp(&size(a)));
    let whole = if growth < CHAOS { order.len() } else { 1 };
    order.truncate(whole.max(2));
    let cut = |(at, i): (usize, &usize)| match at < whole {
        true => sequences[*i].clone(),
        false => sequences[*i].cut(sequences[*i].first + SECOND),
    };
    let tried: Vec<Sequence> = order.iter().enumerate().map(cut).collect();
    let of = |all: &[Vec<Fact>]| order.iter().zip(&tried).map(|(i, s)| all[*i][..s.said.len()].to_vec()).collect();
    let (exact, runs) = (of(&valid.exact), valid.runs.iter().map(|run| of(run)).collect());
    Tried { sequences: tried, exact, runs }
}

/// Whether generated tokens are the most probable ones by the server's own account.
fn sampling(sequences: &[Sequence]) -> Sampling {
    let mut out = Sampling::default();
    for sequence in sequences {
        let generated = sequence.said.iter().zip(&sequence.tokens[sequence.first..]);
        for (said, token) in generated.skip(sequence.generated.saturating_sub(sequence.first)) {
            let best = said.top.iter().map(|t| t.1).fold(f64::NEG_INFINITY, f64::max);
            let (Some(own), true) = (said.logprob, best > RULED_OUT) else { continue };
            out.generated += 1;
            if best > own + CHOSEN {
                out.not_greedy += 1;
                out.repeated += usize::from(sequence.tokens[..sequence.first].contains(token));
            }
        }
    }
    out
}

/// The first place beyond the noise in the text that is farthest from what is computed here; its farthest place where
/// none is beyond.
fn parting<B: Backend>(
    subject: &Subject<'_, B>,
    sequences: &[Sequence],
    exact: &[Vec<Fact>],
    places: &[Vec<Place>],
    segments: &[Segment],
    tolerance: &Tolerance,
) -> Option<Parting> {
    let worst = segments.iter().max_by(|a, b| a.rms.total_cmp(&b.rms))?;
    let at = sequences.iter().position(|s| s.name == worst.text)?;
    let (sequence, facts, places) = (&sequences[at], &exact[at], &places[at]);
    let distance = |i: usize| places[i].server.unwrap_or(0.0);
    let farthest = (0..places.len()).max_by(|a, b| distance(*a).total_cmp(&distance(*b)))?;
    let i = places.iter().position(|p| !p.is_within(tolerance)).unwrap_or(farthest);
    let (said, fact) = (&sequence.said[i], &facts[i]);
    let position = sequence.first + i;
    let show = |ids: &[u32]| subject.text.tokenizer().decode(ids, false).unwrap_or_default();
    Some(Parting {
        text: sequence.name.clone(),
        position,
        generated: position >= sequence.generated,
        before: show(&sequence.tokens[position.saturating_sub(12)..position]),
        token: show(&sequence.tokens[position..=position]),
        here: fact.logprob,
        server: said.logprob,
        best_here: show(&[fact.best]),
        best_server: said.top.iter().max_by(|a, b| a.1.total_cmp(&b.1)).map(|t| show(&[t.0])),
    })
}
