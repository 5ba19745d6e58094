//! The server's side: in which way it can be asked, and what it says of a text's tokens.

use std::collections::HashMap;

use recoup_openai::{Error, Fault, Given, Name, OpenAi, Place, Told, Way};

use super::facts::{Said, Sequence};
use crate::text::Tokenizer;

/// Numbers of most probable tokens that are asked for, where a server does not give as many as are wanted.
const FEWER: [usize; 3] = [5, 1, 0];
/// Scored tokens without which a way is none.
const ENOUGH: usize = 3;

/// How a server is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Manner {
    pub way: Way,
    /// Whether prompts go as token ids.
    pub by_ids: bool,
    /// Most probable tokens that are asked for at each place.
    pub top: usize,
    /// Ways that were tried before, and why they are none.
    pub refused: Vec<(Way, String)>,
}

/// A server gives no log-probabilities.
#[derive(Debug, thiserror::Error)]
pub enum NoWay {
    #[error("the server gives no log-probabilities, so nothing can be said of what it computes: {}", listed(.0))]
    Refused(Vec<(Way, String)>),
    #[error(transparent)]
    Server(Box<Error>),
}

fn listed(refused: &[(Way, String)]) -> String {
    refused.iter().map(|(way, why)| format!("\n  {}: {why}", way.name())).collect()
}

/// Finds the best way to ask, by asking about `text`, whose tokens are `ids`.
///
/// # Errors
/// When there is none, or no server.
pub fn find(server: &OpenAi, text: &str, ids: &[u32], top: usize) -> Result<Manner, NoWay> {
    let mut refused = Vec::new();
    for way in Way::ALL {
        let mut why = String::new();
        for given in [Given::Ids(ids), Given::Text(text)] {
            for top in std::iter::once(top).chain(FEWER.into_iter().filter(|n| *n < top)) {
                match server.tell(way, given, top, 2) {
                    Ok(told) if is_enough(way, &told) => {
                        return Ok(Manner { way, by_ids: matches!(given, Given::Ids(_)), top, refused });
                    }
                    Ok(_) => why = "its answer has no log-probabilities".to_owned(),
                    Err(Error { fault: Fault::Transport(_), .. }) if refused.is_empty() && why.is_empty() => {
                        return match server.tell(way, given, top, 2) {
                            Err(error) => Err(NoWay::Server(Box::new(error))),
                            Ok(_) => continue,
                        };
                    }
                    Err(error) => why = error.fault.to_string(),
                }
            }
        }
        refused.push((way, why));
    }
    Err(NoWay::Refused(refused))
}

fn is_enough(way: Way, told: &Told) -> bool {
    let scored = |places: &[Place]| places.iter().filter(|p| p.logprob.is_some()).count();
    match way.is_of_prompts() {
        true => scored(&told.prompt) >= ENOUGH,
        false => scored(&told.generated) > 0,
    }
}

/// Ids of tokens by the texts that servers print for them, where only one token prints so.
pub struct Names(HashMap<String, Option<u32>>);

impl Names {
    /// Those of a tokenizer.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let mut names: HashMap<String, Option<u32>> = HashMap::new();
        let mut add = |name: String, id: u32| {
            let known = names.entry(name).or_insert(Some(id));
            if *known != Some(id) {
                *known = None;
            }
        };
        for id in 0..tokenizer.vocab_size() as u32 {
            let Ok(text) = tokenizer.decode(&[id], false) else { continue };
            // sentencepiece's words lose their space when they stand alone; servers print it or not.
            let spaced = tokenizer.id_to_token(id).filter(|t| t.starts_with('▁')).map(|t| t.replace('▁', " "));
            for name in [Some(text), spaced].into_iter().flatten().filter(|n| !n.is_empty()) {
                add(name, id);
            }
        }
        Self(names)
    }

    fn id(&self, name: &Name) -> Option<u32> {
        name.id.or_else(|| self.0.get(name.text.as_ref()?).copied().flatten())
    }

    /// What is said at a place; of the most probable tokens no more than `top`: some servers name the given one beside them.
    fn said(&self, place: &Place, top: usize) -> Said {
        let mut named: Vec<&(Name, f64)> = place.top.iter().collect();
        named.sort_by(|a, b| b.1.total_cmp(&a.1));
        named.truncate(top);
        let known: Vec<(u32, f64)> = named.iter().filter_map(|(name, l)| Some((self.id(name)?, *l))).collect();
        Said { logprob: place.logprob, complete: known.len() == named.len(), top: known }
    }
}

/// What a server said of one text.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// Nothing where the server read other tokens than these.
    pub sequence: Option<Sequence>,
    /// Tokens in the prompt that the server names otherwise.
    pub renamed: usize,
}

/// What the server says of `ids`, the tokens of `text`, and of `generate` tokens after them. `beginning`: the token that may
/// stand before a text.
///
/// # Errors
/// The server's.
pub fn hear(
    server: &OpenAi,
    manner: &Manner,
    names: &Names,
    (name, text, ids): (&str, &str, &[u32]),
    beginning: Option<u32>,
    generate: usize,
) -> Result<Heard, Error> {
    let given = if manner.by_ids { Given::Ids(ids) } else { Given::Text(text) };
    let told = server.tell(manner.way, given, manner.top, generate.max(1))?;
    let Some(ids) = read_by_server(&told, ids, beginning, manner.by_ids) else {
        return Ok(Heard::default());
    };
    let mut renamed = 0;
    let (mut tokens, mut said) = (ids.clone(), Vec::new());
    let mut first = ids.len();
    if manner.way.is_of_prompts() {
        first = 1;
        // By their distance from the end: some servers do not list what they put in front, some list more.
        let before = told.prompt.len() as isize - ids.len() as isize;
        for (i, id) in ids.iter().enumerate().skip(1) {
            let place = usize::try_from(i as isize + before).ok().and_then(|i| told.prompt.get(i));
            let place = place.cloned().unwrap_or_default();
            renamed += usize::from(names.id(&place.token).is_some_and(|named| named != *id));
            said.push(names.said(&place, manner.top));
        }
    }
    let generated = tokens.len();
    if generate > 0 {
        for place in &told.generated {
            // What comes after a token that is not known cannot be computed.
            let Some(id) = names.id(&place.token) else { break };
            tokens.push(id);
            said.push(names.said(place, manner.top));
        }
    }
    if tokens.len() == first {
        return Ok(Heard::default());
    }
    let sequence = Sequence { name: name.to_owned(), tokens, first, generated, said, compared: Vec::new() };
    let sequence = Some(sequence).filter(|_| renamed <= ids.len() / 2);
    Ok(Heard { sequence, renamed })
}

/// The tokens that the server read, as far as it shows: `ids`, or those without or with `beginning` in front.
fn read_by_server(told: &Told, ids: &[u32], beginning: Option<u32>, by_ids: bool) -> Option<Vec<u32>> {
    if by_ids {
        return Some(ids.to_vec());
    }
    let with = |token: u32| [&[token], ids].concat();
    let without = || (ids.first() == beginning.as_ref() && ids.len() > 2).then(|| ids[1..].to_vec());
    if let Some(listed) = &told.prompt_ids {
        let read = [Some(ids.to_vec()), without(), beginning.map(with)];
        return read.into_iter().flatten().find(|read| read == listed);
    }
    match told.prompt_tokens? as isize - ids.len() as isize {
        0 => Some(ids.to_vec()),
        1 => beginning.map(with),
        -1 => without(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_a_server_read_are_ours_or_differ_by_the_beginning() {
        let told = |count: Option<usize>, ids: Option<Vec<u32>>| Told {
            prompt_tokens: count,
            prompt_ids: ids,
            ..Told::default()
        };
        let ours = [9, 4, 5, 6];
        let read = |told: Told| read_by_server(&told, &ours, Some(9), false);
        assert_eq!(read(told(Some(4), None)), Some(ours.to_vec()));
        assert_eq!(read(told(Some(3), None)), Some(vec![4, 5, 6]));
        assert_eq!(read(told(Some(5), None)), Some(vec![9, 9, 4, 5, 6]));
        assert_eq!(read(told(Some(7), None)), None);
        assert_eq!(read(told(None, None)), None);
        assert_eq!(read(told(Some(4), Some(vec![9, 4, 5, 7]))), None);
        assert_eq!(read_by_server(&told(Some(9), None), &ours, None, true), Some(ours.to_vec()));
    }
}
