//! What may explain a difference: the same tokens computed as a faulty engine would, beside what the server says.

use serde::Serialize;

use super::Kind;
use super::agreement::{Rivals, Tolerance, square};
use super::altered::{Alteration, Altered, Possible};
use super::facts::{Fact, Sequence, facts};
use super::statistics::mean;
use super::{Subject, VerifyError};
use crate::backend::Backend;
use crate::backend::rounded::Rounding;
use crate::engine::EngineError;
use crate::evaluate::Watch;
use crate::formats::kv::KvFormat;
use crate::model::Decoder;

/// Log-probabilities below this say little of a temperature.
const SPREAD: f64 = -50.0;
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
}

impl Suspect {
    /// Judged by how it compares with the checkpoint.
    pub(super) fn judged(kind: Kind, what: impl Into<String>, rivals: Rivals, tolerance: &Tolerance) -> Self {
        let nearer = rivals.is_nearer(tolerance.noise);
        let explains = nearer && rivals.after <= tolerance.all(rivals.places);
        Self { kind, what: what.into(), before: rivals.before, after: rivals.after, nearer, explains }
    }
}

/// What explanations are tried on.
pub struct Tried {
    pub sequences: Vec<Sequence>,
    /// What the checkpoint says of them, exactly, and as engines may round it.
    pub exact: Vec<Vec<Fact>>,
    pub runs: Vec<Vec<Vec<Fact>>>,
}

/// The list of suspects for a checkpoint.
struct List<'a, 's, B: Backend> {
    subject: &'a Subject<'s, B>,
    tried: &'a Tried,
    tolerance: Tolerance,
    found: Vec<Suspect>,
}

/// How explanations are rounded: otherwise than any computation that they are compared with.
const ROUNDING: Rounding = Rounding::bf16(u64::MAX);

/// Tries all that concern the whole model.
///
/// # Errors
/// The engine's or the checkpoint's.
pub fn try_all<B: Backend + Clone>(
    subject: &Subject<'_, B>,
    tried: &Tried,
    tolerance: Tolerance,
    watch: &mut dyn Watch,
) -> Result<Vec<Suspect>, VerifyError> {
    let possible = Possible::of(subject.checkpoint, &subject.model.config)?;
    let alterations = alterations(&possible);
    let mut list = List { subject, tried, tolerance, found: Vec::new() };
    watch.begin("trying explanations", alterations.len() as u64 + 2, 0);
    list.shifts();
    list.temperature();
    watch.part();
    list.beginning()?;
    watch.part();
    for (alteration, kind, what) in alterations {
        let source = Altered::new(subject.checkpoint, &subject.model.config, alteration);
        let tried = match Decoder::load(subject.model.backend().clone(), &source) {
            // What overflows explains no numbers.
            Ok(model) => list.add(kind, what, &model, &list.tried.sequences).map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = tried {
            watch.say(&format!("note: not tried, that the server {what}: {error}"));
        }
        watch.part();
    }
    watch.end();
    list.found.sort_by(|a, b| a.after.total_cmp(&b.after));
    Ok(list.found)
}

/// Of each place, how far the server is from `facts`.
fn squares(sequences: &[Sequence], facts: &[Vec<Fact>]) -> Vec<Option<f64>> {
    let of = |(sequence, facts): (&Sequence, &Vec<Fact>)| -> Vec<Option<f64>> {
        facts.iter().enumerate().map(|(i, fact)| square(&sequence.said_at(i), &fact.values)).collect()
    };
    sequences.iter().zip(facts).flat_map(of).collect()
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
    /// Adds what `model` says of `sequences`, which are those that are tried on in the same order: exactly, which a server of
    /// the same arithmetic equals, and as an engine may round it, unless that is explained already.
    fn add<M: Backend>(
        &mut self,
        kind: Kind,
        what: &str,
        model: &Decoder<M>,
        sequences: &[Sequence],
    ) -> Result<(), EngineError> {
        let exact = facts(model, self.subject.kv, sequences, 1.0, &mut || {})?;
        let mut best = self.judged(kind, what, &self.tried.exact, exact);
        if !best.explains {
            let rounded = facts(&model.rounded(ROUNDING), KvFormat::Bf16, sequences, 1.0, &mut || {})?;
            let rounded = self.judged(kind, what, &self.tried.runs[0], rounded);
            if rounded.explains || rounded.nearer && !best.nearer || rounded.after < best.after {
                best = rounded;
            }
        }
        self.found.push(best);
        Ok(())
    }

    /// How `altered` compares with `own`, which the checkpoint says.
    fn judged(&self, kind: Kind, what: &str, own: &[Vec<Fact>], mut altered: Vec<Vec<Fact>>) -> Suspect {
        for (facts, sequence) in altered.iter_mut().zip(&self.tried.sequences) {
            // Nothing stands before the token that is the first where one is left out.
            if facts.len() < sequence.said.len() {
                facts.insert(0, Fact::default());
            }
        }
        let before = squares(&self.tried.sequences, own);
        let rivals = Rivals::of(before.into_iter().zip(squares(&self.tried.sequences, &altered)));
        Suspect::judged(kind, what, rivals, &self.tolerance)
    }

    /// Log-probabilities that belong to a neighbouring place. Only of the tokens themselves: what is most probable there
    /// was not computed.
    fn shifts(&mut self) {
        let mut against = |what: &str, of: &dyn Fn(&[Fact], usize) -> Option<f64>| {
            let places = self.tried.sequences.iter().zip(&self.tried.exact).flat_map(|(s, facts)| {
                s.said.iter().enumerate().filter_map(move |(i, said)| {
                    let (logprob, other) = (said.logprob?, of(facts, i)?);
                    Some((square(&[logprob], &[facts[i].logprob]), square(&[logprob], &[other])))
                })
            });
            let rivals = Rivals::of(places);
            self.found.push(Suspect::judged(Kind::Shift, what, rivals, &self.tolerance));
        };
        let late = "takes each token's log-probability from the logits after it instead of before it";
        against(late, &|facts, i| facts[i].late);
        against("gives each token the log-probability of the next one", &|facts, i| Some(facts.get(i + 1)?.logprob));
        let before = "gives each token the log-probability of the one before";
        against(before, &|facts, i| Some(facts.get(i.checked_sub(1)?)?.logprob));
    }

    /// Log-probabilities after a temperature: differences between tokens of one place are all divided by it.
    fn temperature(&mut self) {
        let sequences = &self.tried.sequences;
        let Some(temperature) = temperature(self.tried) else { return };
        let own = &self.tried.runs[0];
        let places = sequences.iter().zip(own).flat_map(|(sequence, own)| {
            own.iter().enumerate().map(move |(i, fact)| {
                let (server, here) = spreads(&told(sequence, i), &fact.values);
                let undone: Vec<f64> = server.iter().map(|s| s * temperature).collect();
                (square(&server, &here), square(&undone, &here))
            })
        });
        let what = format!("divides logits by a temperature of {temperature:.2} before it tells log-probabilities");
        self.found.push(Suspect::judged(Kind::Sampling, what, Rivals::of(places), &self.tolerance));
    }

    /// A token more or fewer at the beginning than was sent.
    fn beginning(&mut self) -> Result<(), VerifyError> {
        let subject = self.subject;
        let tried = self.tried;
        let sequences = &tried.sequences;
        let Ok(beginning) = subject.text.beginning() else { return Ok(()) };
        let with: Vec<Sequence> = sequences.iter().map(|s| preceded(s, beginning)).collect();
        let what = "puts the token that begins texts in front of tokens that it is given";
        self.add(Kind::Bos, what, subject.model, &with)?;
        let own = |s: &Sequence| s.tokens[0] == beginning && s.tokens.len() > 3;
        if sequences.iter().all(own) {
            let without: Vec<Sequence> = sequences.iter().map(beheaded).collect();
            self.add(Kind::Bos, "leaves out the token that begins texts", subject.model, &without)?;
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
        compared: sequence.compared[alone..].to_vec(),
    }
}

/// What the server says of the tokens that are compared at place `i`; not a number of what it does not name.
fn told(sequence: &Sequence, i: usize) -> Vec<f64> {
    let token = sequence.tokens[sequence.first + i];
    let value = |id: &u32| sequence.said[i].value(token, *id).filter(|l| *l > SPREAD);
    sequence.compared[i].iter().map(|id| value(id).unwrap_or(f64::NAN)).collect()
}

/// Two accounts of the same tokens, each less its mean, where both say something.
fn spreads(one: &[f64], other: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let both = one.iter().zip(other).filter(|(a, b)| a.is_finite() && b.is_finite());
    let (mut one, mut other): (Vec<f64>, Vec<f64>) = both.map(|(a, b)| (*a, *b)).unzip();
    for values in [&mut one, &mut other] {
        let mean = mean(values.iter().copied()).unwrap_or(0.0);
        values.iter_mut().for_each(|v| *v -= mean);
    }
    (one, other)
}

/// The temperature that the server's differences between tokens of one place show, if any: how steep they are on one valid
/// computation, beside how steep another valid one is on it. Noise makes both less steep.
fn temperature(tried: &Tried) -> Option<f64> {
    let [first, second, ..] = &tried.runs[..] else { return None };
    let (mut server, mut valid) = (0.0, 0.0);
    for (sequence, (first, second)) in tried.sequences.iter().zip(first.iter().zip(second)) {
        for (i, (x, y)) in first.iter().zip(second).enumerate() {
            let told = told(sequence, i);
            let known = |values: &[f64]| -> Vec<f64> {
                values.iter().zip(&told).map(|(v, t)| if t.is_nan() { f64::NAN } else { *v }).collect()
            };
            let product = |(a, b): (Vec<f64>, Vec<f64>)| a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>();
            server += product(spreads(&told, &x.values));
            valid += product(spreads(&known(&y.values), &x.values));
        }
    }
    let temperature = valid / server;
    (temperature > 0.05 && temperature < 20.0 && (temperature - 1.0).abs() > LEAST_TEMPERATURE).then_some(temperature)
}

#[cfg(test)]
mod tests {
    use super::super::facts::Said;
    use super::*;

    /// Places where a server says this of tokens 0, 1 and so on, of which 1 is given, and two computations say that.
    fn tried(places: Vec<(Vec<f64>, Vec<f64>, Vec<f64>)>) -> Tried {
        let sequence = |server: &[f64]| Sequence {
            tokens: vec![0, 1],
            first: 1,
            generated: 2,
            said: vec![Said {
                logprob: Some(server[1]),
                top: server.iter().enumerate().map(|(id, l)| (id as u32, *l)).collect(),
                complete: true,
            }],
            compared: vec![(0..server.len() as u32).collect()],
            ..Sequence::default()
        };
        let facts = |values: &[f64]| vec![Fact { values: values.to_vec(), ..Fact::default() }];
        Tried {
            sequences: places.iter().map(|p| sequence(&p.0)).collect(),
            exact: Vec::new(),
            runs: vec![places.iter().map(|p| facts(&p.1)).collect(), places.iter().map(|p| facts(&p.2)).collect()],
        }
    }

    #[test]
    fn a_temperature_shows_in_the_differences_between_tokens_whatever_the_noise() {
        let mut at = 1u32;
        let mut draw = move || {
            at = at.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(at >> 8) / f64::from(1u32 << 23) - 1.0
        };
        let mut found = |temperature: f64, noise: f64| {
            let places = (0..2000).map(|i| {
                let mut valid = || [-0.3, -1.5 - 0.1 * f64::from(i % 20), -4.0].map(|l| l + noise * draw());
                let server = valid();
                let total: f64 = server.iter().map(|l| (l / temperature).exp()).sum();
                (server.map(|l| l / temperature - total.ln()).to_vec(), valid().to_vec(), valid().to_vec())
            });
            super::temperature(&tried(places.collect()))
        };
        assert!((found(0.7, 0.0).unwrap() - 0.7).abs() < 1e-6);
        assert!((found(0.7, 2.0).unwrap() - 0.7).abs() < 0.05);
        assert_eq!(found(1.0, 0.0), None);
        assert!(found(1.0, 2.0).is_none_or(|t| (t - 1.0).abs() < 0.05));
    }

    #[test]
    fn a_token_more_or_fewer_keeps_what_is_said_beside_its_token() {
        let said: Vec<Said> = (1..4).map(|i| Said { logprob: Some(f64::from(-i)), ..Said::default() }).collect();
        let sequence = Sequence {
            name: "a".into(),
            tokens: vec![0, 5, 6, 7],
            first: 1,
            generated: 4,
            said: said.clone(),
            compared: vec![vec![5], vec![6], vec![7]],
        };
        let with = preceded(&sequence, 9);
        assert_eq!((with.tokens.len(), with.first, with.said.len()), (5, 2, 3));
        let without = beheaded(&sequence);
        assert_eq!((&without.tokens[..], without.first, &without.said[..]), (&[5, 6, 7][..], 1, &said[1..]));
        assert_eq!(without.compared, [[6], [7]]);
        let generated = Sequence { first: 3, said: said[2..].to_vec(), ..sequence };
        assert_eq!((beheaded(&generated).first, beheaded(&generated).said.len()), (2, 1));
    }
}
