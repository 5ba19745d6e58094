//! What may explain a difference: the same tokens computed as a faulty engine would, beside what the server says.

use serde::Serialize;

use super::Kind;
use super::agreement::{Rivals, Tolerance, apart, pairs};
use super::altered::{Alteration, Altered, Possible};
use super::facts::{Fact, Said, Sequence, facts};
use super::{Subject, VerifyError};
use crate::backend::Backend;
use crate::evaluate::Watch;
use crate::formats::kv::KvFormat;
use crate::model::Decoder;

/// A temperature nearer to 1 than this is noise.
const LEAST_TEMPERATURE: f64 = 0.02;

/// One explanation, and how well it fits.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Suspect {
    pub kind: Kind,
    /// What the engine would do, as a sentence's rest: "keeps keys and values …".
    pub what: String,
    /// Root mean square of differences under the checkpoint as it is, and under this.
    pub before: f64,
    pub after: f64,
    /// Nearer to the server than the checkpoint, beyond chance.
    pub nearer: bool,
    /// And within the noise.
    pub explains: bool,
    /// Whether it is a fault; what some engines do by design is none.
    pub fault: bool,
}

impl Suspect {
    /// Judged by how it compares with the checkpoint.
    pub(super) fn judged(
        kind: Kind,
        what: impl Into<String>,
        rivals: Rivals,
        tolerance: &Tolerance,
        fault: bool,
    ) -> Self {
        let nearer = rivals.is_nearer();
        let explains = nearer && rivals.after <= tolerance.all(rivals.places);
        Self { kind, what: what.into(), before: rivals.before, after: rivals.after, nearer, explains, fault }
    }
}

/// The list of suspects for a checkpoint.
struct List<'a, 's, B: Backend> {
    subject: &'a Subject<'s, B>,
    sequences: &'a [Sequence],
    here: &'a [Vec<Fact>],
    tolerance: Tolerance,
    found: Vec<Suspect>,
}

/// Tries all that concern the whole model. `sequences` are those to try on, and `here` their facts.
///
/// # Errors
/// The engine's or the checkpoint's.
pub fn try_all<B: Backend + Clone>(
    subject: &Subject<'_, B>,
    sequences: &[Sequence],
    here: &[Vec<Fact>],
    tolerance: Tolerance,
    watch: &mut dyn Watch,
) -> Result<Vec<Suspect>, VerifyError> {
    let possible = Possible::of(subject.checkpoint, &subject.model.config)?;
    let alterations = alterations(&possible);
    let mut list = List { subject, sequences, here, tolerance, found: Vec::new() };
    watch.begin("trying explanations", alterations.len() as u64 + 3, 0);
    list.shifts();
    list.temperature()?;
    watch.part();
    list.beginning()?;
    watch.part();
    let cache = subject.model.cache_format(subject.kv);
    if cache == KvFormat::F32 {
        let altered = facts(subject.model, KvFormat::Bf16, sequences, 1.0, &mut || {})?;
        list.add(Kind::KvCache, "keeps keys and values in BF16", &altered, false);
    }
    watch.part();
    for (alteration, kind, what) in alterations {
        let source = Altered::new(subject.checkpoint, &subject.model.config, alteration);
        match Decoder::load(subject.model.backend().clone(), &source) {
            Ok(model) => match facts(&model, subject.kv, sequences, 1.0, &mut || {}) {
                Ok(altered) => list.add(kind, what, &altered, true),
                // What overflows explains no numbers.
                Err(error) => watch.say(&format!("note: not tried, that the server {what}: {error}")),
            },
            Err(error) => watch.say(&format!("note: not tried, that the server {what}: {error}")),
        }
        watch.part();
    }
    watch.end();
    list.found.sort_by(|a, b| a.after.total_cmp(&b.after));
    Ok(list.found)
}

/// Those that make a difference for a checkpoint.
fn alterations(possible: &Possible) -> Vec<(Alteration, Kind, &'static str)> {
    let all = [
        (
            possible.fp8_cache,
            Alteration::Cache(KvFormat::F32),
            Kind::KvCache,
            "does not quantize keys and values, which the checkpoint has in FP8",
        ),
        (
            true,
            Alteration::Cache(KvFormat::Fp8 { k_scale: 1.0, v_scale: 1.0 }),
            Kind::KvCache,
            "keeps keys and values in FP8 under scales of 1.0",
        ),
        (
            possible.fp8_cache_scales_differ,
            Alteration::CacheScalesSwapped,
            Kind::KvCache,
            "takes the scales of keys and values for each other",
        ),
        (
            possible.quantized_inputs,
            Alteration::FloatInputs,
            Kind::Activations,
            "does not quantize inputs of products: weights alone are quantized (W4A16, W8A16)",
        ),
        (
            possible.calibrated_inputs,
            Alteration::UnitInputScales,
            Kind::Activations,
            "takes the calibrated scales of inputs for 1.0",
        ),
        (possible.gates, Alteration::GateUpSwapped, Kind::Weights, "takes gate and up for each other in every layer"),
        (
            possible.scales_differ,
            Alteration::LargestScale,
            Kind::Scale,
            "has q, k and v, and gate and up, under the largest of their global scales",
        ),
        (possible.window.is_some(), Alteration::NoWindow, Kind::Window, "ignores the sliding window"),
        (
            possible.stretched,
            Alteration::NoRopeScaling,
            Kind::Rope,
            "ignores how positions are stretched (rope scaling)",
        ),
    ];
    all.into_iter().filter(|(possible, ..)| *possible).map(|(_, a, kind, what)| (a, kind, what)).collect()
}

impl<B: Backend> List<'_, '_, B> {
    fn add(&mut self, kind: Kind, what: &str, altered: &[Vec<Fact>], fault: bool) {
        let here = pairs(self.sequences, self.here).map(|(s, f)| apart(s, f));
        let other = pairs(self.sequences, altered).map(|(s, f)| apart(s, f));
        self.found.push(Suspect::judged(kind, what, Rivals::of(here.zip(other)), &self.tolerance, fault));
    }

    /// Log-probabilities that belong to a neighbouring place. Only of the tokens themselves: what is most probable there
    /// was not computed.
    fn shifts(&mut self) {
        let alone = |logprob: f64, fact: f64| {
            apart(&Said { logprob: Some(logprob), top: Vec::new() }, &Fact { logprob: fact, ..Fact::default() })
        };
        let mut against = |what: &str, of: &dyn Fn(&[Fact], usize) -> Option<f64>| {
            let places = self.sequences.iter().zip(self.here).flat_map(|(s, facts)| {
                s.said.iter().enumerate().filter_map(move |(i, said)| {
                    let (logprob, other) = (said.logprob?, of(facts, i)?);
                    Some((alone(logprob, facts[i].logprob), alone(logprob, other)))
                })
            });
            let rivals = Rivals::of(places);
            self.found.push(Suspect::judged(Kind::Shift, what, rivals, &self.tolerance, true));
        };
        let late = "takes each token's log-probability from the logits after it instead of before it";
        against(late, &|facts, i| facts[i].late);
        against("gives each token the log-probability of the next one", &|facts, i| Some(facts.get(i + 1)?.logprob));
        let before = "gives each token the log-probability of the one before";
        against(before, &|facts, i| Some(facts.get(i.checked_sub(1)?)?.logprob));
    }

    /// Log-probabilities after a temperature: differences between tokens of one place are all divided by it.
    fn temperature(&mut self) -> Result<(), VerifyError> {
        let Some(temperature) = temperature(pairs(self.sequences, self.here)) else { return Ok(()) };
        let subject = self.subject;
        let altered = facts(subject.model, subject.kv, self.sequences, temperature as f32, &mut || {})?;
        let what = format!("divides logits by a temperature of {temperature:.2} before it tells log-probabilities");
        self.add(Kind::Sampling, &what, &altered, true);
        Ok(())
    }

    /// A token more or fewer at the beginning than was sent.
    fn beginning(&mut self) -> Result<(), VerifyError> {
        let subject = self.subject;
        let Ok(beginning) = subject.text.beginning() else { return Ok(()) };
        let with: Vec<Sequence> = self.sequences.iter().map(|s| preceded(s, beginning)).collect();
        let altered = facts(subject.model, subject.kv, &with, 1.0, &mut || {})?;
        self.add(Kind::Bos, "puts the token that begins texts in front of tokens that it is given", &altered, true);
        let own = |s: &Sequence| s.tokens[0] == beginning && s.tokens.len() > 3;
        if self.sequences.iter().all(own) {
            let without: Vec<Sequence> = self.sequences.iter().map(beheaded).collect();
            let mut altered = facts(subject.model, subject.kv, &without, 1.0, &mut || {})?;
            for (facts, sequence) in altered.iter_mut().zip(self.sequences) {
                // Nothing stands before the token that is the first then.
                if facts.len() < sequence.said.len() {
                    facts.insert(0, Fact { logprob: f64::NAN, ..Fact::default() });
                }
            }
            self.add(Kind::Bos, "leaves out the token that begins texts", &altered, true);
        }
        Ok(())
    }
}

/// The same sequence after another token.
fn preceded(sequence: &Sequence, token: u32) -> Sequence {
    Sequence {
        tokens: [&[token], &sequence.tokens[..]].concat(),
        first: sequence.first + 1,
        generated: sequence.generated + 1,
        ..sequence.clone()
    }
}

/// The same sequence without its first token, and without what is said of the second where it is.
fn beheaded(sequence: &Sequence) -> Sequence {
    let alone = usize::from(sequence.first == 1);
    Sequence {
        name: sequence.name.clone(),
        tokens: sequence.tokens[1..].to_vec(),
        first: sequence.first.max(2) - 1,
        generated: sequence.generated - 1,
        said: sequence.said[alone..].to_vec(),
    }
}

/// The temperature that the server's differences between tokens of one place show: least squares of ours on theirs.
fn temperature<'a>(places: impl Iterator<Item = (&'a Said, &'a Fact)>) -> Option<f64> {
    let (mut both, mut own, mut n) = (0.0, 0.0, 0usize);
    for (said, fact) in places {
        let Some(best) = said.top.iter().map(|t| t.1).zip(&fact.top).max_by(|a, b| a.0.total_cmp(&b.0)) else {
            continue;
        };
        let entries = said.top.iter().map(|t| t.1).zip(fact.top.iter().copied());
        for (server, here) in entries.chain(said.logprob.map(|l| (l, fact.logprob))) {
            let (server, here) = (server - best.0, here - best.1);
            if server.is_finite() && here.is_finite() && server > -50.0 {
                (both, own, n) = (both + server * here, own + here * here, n + 1);
            }
        }
    }
    let temperature = own / both;
    (n > 8 && temperature > 0.05 && temperature < 20.0 && (temperature - 1.0).abs() > LEAST_TEMPERATURE)
        .then_some(temperature)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temperature_shows_in_the_differences_between_tokens() {
        let places: Vec<(Said, Fact)> = (0..20)
            .map(|i| {
                let here = [-0.3, -1.5 - 0.1 * f64::from(i), -4.0];
                let total: f64 = here.iter().map(|l| (l / 0.7).exp()).sum();
                let server = here.map(|l| l / 0.7 - total.ln());
                let top = server.iter().enumerate().map(|(id, l)| (id as u32, *l)).collect();
                let said = Said { logprob: Some(server[1]), top };
                (said, Fact { logprob: here[1], best: 0, top: here.to_vec(), late: None })
            })
            .collect();
        let found = temperature(places.iter().map(|(s, f)| (s, f))).unwrap();
        assert!((found - 0.7).abs() < 1e-6, "{found}");
        let same = places.iter().map(|(_, f)| {
            let top = f.top.iter().enumerate().map(|(id, l)| (id as u32, *l)).collect();
            (Said { logprob: Some(f.logprob), top }, f)
        });
        let same: Vec<(Said, &Fact)> = same.collect();
        assert_eq!(temperature(same.iter().map(|(s, f)| (s, *f))), None);
    }

    #[test]
    fn a_token_more_or_fewer_keeps_what_is_said_beside_its_token() {
        let said: Vec<Said> = (1..4).map(|i| Said { logprob: Some(f64::from(-i)), top: Vec::new() }).collect();
        let sequence =
            Sequence { name: "a".into(), tokens: vec![0, 5, 6, 7], first: 1, generated: 4, said: said.clone() };
        let with = preceded(&sequence, 9);
        assert_eq!((with.tokens.len(), with.first, with.said.len()), (5, 2, 3));
        let without = beheaded(&sequence);
        assert_eq!((&without.tokens[..], without.first, &without.said[..]), (&[5, 6, 7][..], 1, &said[1..]));
        let generated = Sequence { first: 3, said: said[2..].to_vec(), ..sequence };
        assert_eq!((beheaded(&generated).first, beheaded(&generated).said.len()), (2, 1));
    }
}
