//! What came of it: the verdict, what it rests on, and its text.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::{Value, json};

use super::ask::Manner;
use super::{Agreement, CHAOS, Judged, Kind, Segment, Suspect, Tokens, Tolerance};

/// Explanations as good as the best by this factor cannot be told from it.
const AS_GOOD: f64 = 1.25;
/// Lines of a list.
const SHOWN: usize = 4;

/// Whether the server computes what the checkpoint says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Within the noise.
    Same,
    Differs,
    /// Nothing could be compared.
    Unknown,
}

/// A difference and what it comes from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    pub kind: Kind,
    pub what: String,
    /// What fits as well.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<String>,
}

/// Where the two part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Parting {
    pub text: String,
    /// Of the token in the text.
    pub position: usize,
    /// Whether the server generated it.
    pub generated: bool,
    /// The text before it, and its own.
    pub before: String,
    pub token: String,
    /// Its log-probability here and there.
    pub here: f64,
    pub server: Option<f64>,
    /// The most probable tokens.
    pub best_here: String,
    pub best_server: Option<String>,
}

/// Whether the server chose what it holds most probable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Sampling {
    /// Generated tokens whose rivals it names.
    pub generated: usize,
    /// Those of them to which it prefers another by its own account, and which stood in the text before.
    pub not_greedy: usize,
    pub repeated: usize,
}

impl Sampling {
    /// What is wrong, where a greedy answer was asked for.
    pub(super) fn finding(&self) -> Option<Finding> {
        let Self { generated, not_greedy, .. } = *self;
        (not_greedy > 1).then(|| Finding {
            kind: Kind::Sampling,
            what: format!(
                "asked for temperature 0, it chose a less probable token by its own account in {not_greedy} of {generated} \
                 places: a penalty on repetition, a bias or sampling that it applies by default"
            ),
            others: Vec::new(),
        })
    }
}

/// All that was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub verdict: Verdict,
    pub findings: Vec<Finding>,
    pub url: String,
    pub model: String,
    pub checkpoint: String,
    pub manner: Manner,
    pub tolerance: Tolerance,
    pub agreement: Agreement,
    /// Whether the log-probabilities alone are within the noise.
    pub within: bool,
    pub parting: Option<Parting>,
    /// Root mean square of differences between two positions.
    pub by_position: Vec<(usize, usize, f64)>,
    pub segments: Vec<Segment>,
    /// Of prompts, and of what was generated.
    pub phases: [Option<Judged>; 2],
    pub tokens: Vec<Tokens>,
    pub chats: Vec<Tokens>,
    pub sampling: Sampling,
    pub suspects: Vec<Suspect>,
    pub notes: Vec<String>,
}

/// What explains a difference. `within`: it is one that noise allows, which only a fault that fits much better makes one.
pub(super) fn explanation(
    suspects: &[Suspect],
    segments: &[Segment],
    phases: &[Option<Judged>; 2],
    within: bool,
) -> Option<Finding> {
    let fits = |s: &&Suspect| s.explains;
    let Some(best) = suspects.iter().find(fits) else {
        return (!within).then(|| unexplained(suspects, segments, phases));
    };
    let as_good = suspects.iter().filter(fits).filter(|s| !std::ptr::eq(*s, best) && s.after <= AS_GOOD * best.after);
    Some(Finding {
        kind: best.kind,
        what: format!("the server {} ({})", best.what, improvement(best)),
        others: as_good.map(|s| format!("the server {} ({})", s.what, improvement(s))).collect(),
    })
}

fn improvement(suspect: &Suspect) -> String {
    format!("differences of {:.4} nats become {:.4}", suspect.before, suspect.after)
}

/// What there is to say where no explanation fits.
fn unexplained(suspects: &[Suspect], segments: &[Segment], phases: &[Option<Judged>; 2]) -> Finding {
    let off: Vec<&Segment> = segments.iter().filter(|s| !s.within).collect();
    let prompts_agree = phases[0].is_some_and(|p| p.agrees) && !off.iter().any(|s| !s.generated);
    if prompts_agree && phases[1].is_some_and(|p| !p.agrees || off.iter().any(|s| s.generated)) {
        return Finding {
            kind: Kind::Decoding,
            what: "what it says of prompts agrees, what it says of tokens that it generates does not: look at the kernels of \
                   single tokens and at the cache"
                .into(),
            others: Vec::new(),
        };
    }
    let mut what = format!(
        "none of {} explanations fits: is it this checkpoint that is served? Or a fault that is not among them",
        suspects.len()
    );
    let begins = off.iter().map(|s| s.from).min().filter(|from| *from > 1);
    if let Some(from) = begins.filter(|from| !segments.iter().any(|s| s.to <= *from && !s.within)) {
        let _ = write!(what, "; every text agrees up to token {from} at least");
    }
    let nearer = suspects.iter().filter(|s| s.nearer).take(SHOWN);
    Finding {
        kind: Kind::Unknown,
        what,
        others: nearer
            .map(|s| format!("nearer, but not within the noise: the server {} ({})", s.what, improvement(s)))
            .collect(),
    }
}

impl Report {
    /// All of it.
    #[must_use]
    pub fn json(&self) -> Value {
        let Manner { way, by_ids, top, refused } = &self.manner;
        let refused: Vec<Value> = refused.iter().map(|(way, why)| json!({"way": way, "why": why})).collect();
        json!({
            "verdict": self.verdict,
            "findings": self.findings,
            "server": {"url": self.url, "model": self.model, "way": way, "prompts_as_ids": by_ids, "top": top,
                "refused": refused},
            "checkpoint": self.checkpoint,
            "tolerance": self.tolerance,
            "least_seen": self.agreement.all.least_seen(),
            "log_probabilities_within": self.within,
            "agreement": self.agreement,
            "parting": self.parting,
            "by_position": self.by_position,
            "segments": self.segments,
            "prompts": self.phases[0],
            "generated": self.phases[1],
            "texts": self.tokens,
            "chats": self.chats,
            "sampling": self.sampling,
            "suspects": self.suspects,
            "notes": self.notes,
            "recoup_version": env!("CARGO_PKG_VERSION"),
        })
    }

    /// For people, the verdict first.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |head: &str, text: String| {
            let _ = writeln!(out, "{head:<10} {text}");
        };
        line(
            match self.verdict {
                Verdict::Same => "SAME",
                Verdict::Differs => "DIFFERS",
                Verdict::Unknown => "UNKNOWN",
            },
            match self.verdict {
                Verdict::Same => "the server computes what the checkpoint says, within the noise".to_owned(),
                Verdict::Differs => "the server does not compute what the checkpoint says".to_owned(),
                Verdict::Unknown => "nothing that the server says could be compared".to_owned(),
            },
        );
        for finding in &self.findings {
            line(&kind(finding.kind), finding.what.clone());
            finding.others.iter().for_each(|other| line("", format!("or {other}")));
        }
        let Agreement { within, all, mean, mean_magnitude, mean_allowed, largest, kl, noise_kl, greedy, .. } =
            self.agreement;
        if all.tokens > 0 {
            line(
                "agreement",
                format!(
                    "{within} of {} log-probabilities within the noise; rms {:.4} nats to valid computations, which are \
                     {:.4} from each other; {:.4} is allowed; {:.4} to the exact one",
                    all.tokens, all.rms, all.noise, all.allowed, self.agreement.rms_exact
                ),
            );
            line(
                "",
                format!(
                    "farther from them than they are in {:.1} % of the comparisons ({:.1} % allowed)",
                    100.0 * all.farther,
                    100.0 * all.farther_allowed
                ),
            );
            let kl = kl.map_or_else(String::new, |kl| format!(", KL {kl:.5} (noise {noise_kl:.5})"));
            let greedy = match greedy {
                0 => String::new(),
                n => format!(", most probable token the same in {} of {n}", self.agreement.greedy_same),
            };
            line(
                "",
                format!(
                    "of the tokens themselves: mean {mean:+.4} (±{mean_allowed:.4} allowed), mean magnitude {mean_magnitude:.4}, largest {largest:+.3}{kl}{greedy}"
                ),
            );
        }
        if all.tokens > 0 && self.verdict == Verdict::Same {
            let why = match self.tolerance.growth < CHAOS {
                true => "; any rounding flips codes of quantized inputs here, which changes all that follows",
                false => "",
            };
            line(
                "power",
                format!("a fault of {:.4} nats (rms) would have been seen, not a smaller one{why}", all.least_seen()),
            );
        }
        if let [Some(prompts), Some(generated)] = &self.phases {
            let of = |p: &Judged| format!("{:.4} in {} (noise {:.4})", p.rms, p.tokens, p.noise);
            line("", format!("rms of prompts' tokens {}, of generated ones {}", of(prompts), of(generated)));
        }
        let off = self.segments.iter().filter(|s| !s.within).count();
        if off > 0 {
            let positions = self.by_position.iter().map(|(a, b, rms)| format!("{a}-{b}: {rms:.3}"));
            line(
                "where",
                format!(
                    "{off} of {} segments are beyond the noise; rms by position {}",
                    self.segments.len(),
                    positions.collect::<Vec<_>>().join(", ")
                ),
            );
        }
        if let Some(p) = &self.parting {
            let server = p.server.map_or_else(|| "nothing".to_owned(), |s| format!("{s:.3}"));
            let best = p.best_server.as_ref().map_or_else(String::new, |b| format!(", there `{}`", b.escape_debug()));
            line(
                "parts",
                format!(
                    "in `{}` at token {}{}: `{}` after `{}`: here {:.3}, the server {server}; most probable here `{}`{best}",
                    p.text,
                    p.position,
                    if p.generated { " (generated)" } else { "" },
                    p.token.escape_debug(),
                    p.before.escape_debug(),
                    p.here,
                    p.best_here.escape_debug()
                ),
            );
        }
        for (head, what, all) in [("texts", "texts", &self.tokens), ("chats", "chats", &self.chats)] {
            if all.is_empty() {
                continue;
            }
            let count = |same: Option<bool>| all.iter().filter(|t| t.same == same).count();
            let number = all.iter().filter(|t| t.same.is_none() && t.server.is_some()).count();
            let mut text = format!("{} of {} {what} become the same tokens", count(Some(true)), all.len());
            if number > 0 {
                let _ = write!(text, ", {number} as many (the server does not say which)");
            }
            if count(Some(false)) > 0 {
                let _ = write!(text, ", {} others", count(Some(false)));
            }
            line(head, text);
        }
        let way = format!(
            "{} ({}), model {}; prompts as {}, {} most probable tokens",
            self.manner.way.name(),
            self.url,
            self.model,
            if self.manner.by_ids { "token ids" } else { "texts" },
            self.manner.top
        );
        line("asked by", way);
        if !self.manner.way.is_of_prompts() {
            line("", "the server scores no given tokens: only those that it generated were compared".to_owned());
        }
        let fits = self.suspects.iter().filter(|s| s.nearer).count();
        if !self.suspects.is_empty() {
            line(
                "tried",
                format!(
                    "{} explanations, of which {fits} are nearer than the checkpoint as it is",
                    self.suspects.len()
                ),
            );
        }
        self.notes.iter().for_each(|note| line("note", note.clone()));
        out
    }
}

/// A kind's name in JSON, for lines.
fn kind(kind: Kind) -> String {
    serde_json::to_value(kind).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}
