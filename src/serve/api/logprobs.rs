//! Log-probabilities as OpenAI's and vLLM's APIs write them.

use serde_json::{Map, Value, json};

use crate::engine::PromptScore;
use crate::logits::Sampled;
use crate::serve::model::ServedModel;

/// How tokens are named.
#[derive(Clone, Copy)]
pub struct Names<'a> {
    pub model: &'a ServedModel,
    /// `token_id:ID` instead of the text, of which several tokens may have the same.
    pub by_id: bool,
}

/// A log-probability as JSON has numbers: a forbidden token has -inf, and clients read -9999 so, as vLLM writes it.
fn number(logprob: f32) -> Value {
    json!(if logprob.is_finite() { logprob } else { -9999.0 })
}

impl Names<'_> {
    fn name(&self, id: u32) -> String {
        if self.by_id { format!("token_id:{id}") } else { self.model.token_text(id).0 }
    }

    /// Characters of the text that begin with a token: one that is split over tokens counts where its first byte is.
    fn characters(&self, id: u32, special: bool) -> usize {
        if !special && self.model.text.tokenizer().is_special(id) {
            return 0;
        }
        self.model.token_text(id).1.iter().filter(|byte| **byte & 0xc0 != 0x80).count()
    }

    /// Of a chat's answer: `logprobs.content`.
    #[must_use]
    pub fn chat(&self, tokens: &[Sampled]) -> Value {
        let entry = |id: u32, logprob: f32| {
            let (_, bytes) = self.model.token_text(id);
            json!({"token": self.name(id), "logprob": number(logprob), "bytes": bytes})
        };
        let content = tokens.iter().map(|token| {
            let mut this = entry(token.token, token.logprob.unwrap_or(0.0));
            this["top_logprobs"] = token.top_logprobs.iter().map(|(id, logprob)| entry(*id, *logprob)).collect();
            this
        });
        json!({"content": content.collect::<Vec<_>>(), "refusal": null})
    }

    /// Tokens of a chosen answer for [`Self::completion`].
    pub fn chosen<'t>(tokens: &'t [Sampled], special: bool) -> impl Iterator<Item = Scored<'t>> {
        tokens.iter().map(move |t| Scored { token: t.token, logprob: t.logprob, top: &t.top_logprobs, special })
    }

    /// A prompt's tokens for [`Self::completion`]; nothing is known of the first.
    ///
    /// `begins`: the text shows the first token too, where it is a special one; `special`: the others.
    pub fn given<'t>(
        first: Option<u32>,
        scores: &'t [PromptScore],
        begins: bool,
        special: bool,
    ) -> impl Iterator<Item = Scored<'t>> {
        let first = first.map(|token| Scored { token, logprob: None, top: &[], special: begins });
        let rest = scores.iter().map(move |s| Scored {
            token: s.token,
            logprob: Some(s.logprob),
            top: &s.top_logprobs,
            special,
        });
        first.into_iter().chain(rest)
    }

    /// Of a completion: four lists. `k`: alternatives told; `offset`: where the first token's text begins, moved on.
    #[must_use]
    pub fn completion<'t>(&self, tokens: impl Iterator<Item = Scored<'t>>, k: usize, offset: &mut usize) -> Value {
        let (mut names, mut logprobs, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for scored in tokens {
            let name = self.name(scored.token);
            offsets.push(*offset);
            *offset += self.characters(scored.token, scored.special);
            logprobs.push(scored.logprob.map_or(Value::Null, number));
            tops.push(match scored.logprob {
                None => Value::Null,
                Some(own) => {
                    let mut top = Map::new();
                    for (id, logprob) in scored.top.iter().take(k) {
                        // Of tokens of one text the most probable counts.
                        top.entry(self.name(*id)).or_insert_with(|| number(*logprob));
                    }
                    // The token itself always.
                    top.entry(name.clone()).or_insert_with(|| number(own));
                    top.into()
                }
            });
            names.push(name);
        }
        json!({"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets})
    }

    /// vLLM's `prompt_logprobs`: for each token of the prompt but the first, it and the most probable ones by their ids.
    #[must_use]
    pub fn prompt(&self, scores: &[PromptScore]) -> Value {
        let one = |score: &PromptScore| {
            let entry = |id: u32, logprob: f32, rank: usize| json!({"logprob": number(logprob), "rank": rank, "decoded_token": self.model.token_text(id).0});
            let mut all = Map::from_iter([(score.token.to_string(), entry(score.token, score.logprob, score.rank))]);
            for (rank, (id, logprob)) in score.top_logprobs.iter().enumerate() {
                all.entry(id.to_string()).or_insert_with(|| entry(*id, *logprob, rank + 1));
            }
            Value::Object(all)
        };
        std::iter::once(Value::Null).chain(scores.iter().map(one)).collect()
    }
}

/// A token and how probable it was.
#[derive(Clone, Copy, Debug)]
pub struct Scored<'a> {
    pub token: u32,
    pub logprob: Option<f32>,
    pub top: &'a [(u32, f32)],
    /// The text shows it where it is a special token.
    pub special: bool,
}
