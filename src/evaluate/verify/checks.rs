//! What tokens the server makes of texts and chats, beside what they are here.

use recoup_ground::model::Message;
use recoup_openai::{Error, Given, OpenAi};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::Kind;
use super::ask::Manner;
use super::texts::{Chat, Text};
use crate::text::{ModelText, TextError};

/// Tokens around a difference that are shown.
const AROUND: usize = 6;

/// A text or chat, as tokens on both sides.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tokens {
    pub name: String,
    /// How many there are here, and on the server.
    pub here: usize,
    pub server: Option<usize>,
    /// Whether they are the same, where the server says enough to tell.
    pub same: Option<bool>,
    /// Where they differ: the kind, and in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub difference: Option<(Kind, String)>,
}

/// Why the server's tokens could not be asked for, or ours not be made.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error(transparent)]
    Server(#[from] Error),
    #[error(transparent)]
    Text(#[from] TextError),
}

/// Texts as prompts.
///
/// # Errors
/// The server's, and texts that cannot be tokenized.
pub fn texts(server: &OpenAi, manner: &Manner, text: &ModelText, texts: &[Text]) -> Result<Vec<Tokens>, CheckError> {
    let mut all = Vec::new();
    for Text { name, text: prompt } in texts {
        let here = text.tokenizer().encode(prompt, true)?;
        let told = server.tell(manner.way, Given::Text(prompt), manner.top, 1)?;
        let ids = told.prompt_ids.or_else(|| server.tokens_of(prompt));
        // An endpoint that tokenizes otherwise than prompts are is no witness.
        let ids = ids.filter(|ids| told.prompt_tokens.is_none_or(|n| n == ids.len()));
        let server = ids.as_ref().map(Vec::len).or(told.prompt_tokens);
        let difference = ids.as_ref().and_then(|ids| difference(text, &here, ids, Kind::Tokenizer));
        all.push(Tokens { name: name.clone(), here: here.len(), server, same: ids.map(|ids| ids == here), difference });
    }
    judge_by_number(&mut all, Kind::Tokenizer);
    Ok(all)
}

/// Chats, as the templates on both sides write them; nothing where there is none here.
///
/// # Errors
/// A chat that the template here refuses. Where the server answers no chats, a note says so.
pub fn chats(
    server: &OpenAi,
    text: &ModelText,
    chats: &[Chat],
    arguments: &Map<String, Value>,
    notes: &mut Vec<String>,
) -> Result<Vec<Tokens>, CheckError> {
    let mut all = Vec::new();
    if text.template().is_none() {
        notes.push("the checkpoint has no chat template, so chats were not compared".into());
        return Ok(all);
    }
    for Chat { name, messages } in chats {
        let json: Vec<Value> =
            messages.iter().map(|Message { role, content }| json!({"role": role, "content": content})).collect();
        let (rendered, here) = match text.prompt(&json, None) {
            Ok(Some(prompt)) => prompt,
            Ok(None) => continue,
            Err(error) => {
                notes.push(format!("chat `{name}`: the template here refuses it ({error}), so it was not compared"));
                continue;
            }
        };
        let told = match server.chat_told(messages, arguments) {
            Ok(told) => told,
            Err(error) => {
                notes.push(format!("chats were not compared: {error}"));
                break;
            }
        };
        let own = |difference: Option<(Kind, String)>| difference;
        let mut tokens =
            Tokens { name: name.clone(), here: here.len(), server: told.count, same: None, difference: None };
        if let Some(ids) = &told.ids {
            tokens.server = Some(ids.len());
            tokens.same = Some(*ids == here);
            tokens.difference = own(difference(text, &here, ids, Kind::Template));
        } else if let Some(theirs) = &told.text {
            // The beginning of a text is often put in front later, with its token.
            let bos = text.tokenizer().bos_token().unwrap_or_default();
            let [ours, theirs] = [&rendered[..], theirs].map(|t| t.strip_prefix(bos).unwrap_or(t));
            tokens.same = Some(ours == theirs);
            tokens.difference = (ours != theirs).then(|| (Kind::Template, parting(ours, theirs)));
        }
        all.push(tokens);
    }
    judge_by_number(&mut all, Kind::Template);
    Ok(all)
}

/// Where only numbers are known: the same number is no difference that shows; one more or fewer everywhere is of the
/// beginning, anything else of `kind`.
fn judge_by_number(all: &mut [Tokens], kind: Kind) {
    let by: Vec<isize> = all.iter().filter_map(|t| Some(t.server? as isize - t.here as isize)).collect();
    let everywhere = by.first().copied().filter(|d| d.abs() == 1 && by.len() > 2 && by.iter().all(|x| x == d));
    for tokens in all.iter_mut().filter(|t| t.same.is_none()) {
        let Some(server) = tokens.server.filter(|s| *s != tokens.here) else { continue };
        tokens.same = Some(false);
        let (kind, why) = match everywhere {
            Some(1) => (Kind::Bos, "one more in every text: a token that begins texts, here not there"),
            Some(_) => (Kind::Bos, "one fewer in every text: the token that begins texts is missing"),
            None => (kind, "other tokens; which is not known, as the server gives their number only"),
        };
        tokens.difference = Some((kind, format!("{} tokens here, {server} on the server: {why}", tokens.here)));
    }
}

/// How the server's tokens differ from ours; `kind` where it is not the beginning alone.
fn difference(text: &ModelText, here: &[u32], server: &[u32], kind: Kind) -> Option<(Kind, String)> {
    if here == server {
        return None;
    }
    let name = |ids: &[u32]| text.tokenizer().decode(ids, false).unwrap_or_default();
    if server.get(1..) == Some(here) {
        let what = format!("the server puts `{}` (id {}) in front", name(&server[..1]), server[0]);
        return Some((Kind::Bos, what));
    }
    if here.get(1..) == Some(server) {
        let what = format!("`{}` (id {}) in front is missing on the server", name(&here[..1]), here[0]);
        return Some((Kind::Bos, what));
    }
    let at = here.iter().zip(server).take_while(|(a, b)| a == b).count();
    let show = |ids: &[u32]| match ids.get(at) {
        Some(id) => format!("`{}` (id {id})", name(&ids[at..ids.len().min(at + AROUND)]).escape_debug()),
        None => "the end".to_owned(),
    };
    let before = name(&here[at.saturating_sub(AROUND)..at]);
    let what =
        format!("token {at}, after `{}`: here {}, on the server {}", before.escape_debug(), show(here), show(server));
    Some((kind, what))
}

/// Where two texts part.
fn parting(ours: &str, theirs: &str) -> String {
    let same: usize = ours.chars().zip(theirs.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    let show = |text: &str| text[same..].chars().take(40).collect::<String>().escape_debug().to_string();
    let before: String = ours[..same].chars().rev().take(30).collect::<Vec<_>>().into_iter().rev().collect();
    format!("after `{}`: here `{}`, on the server `{}`", before.escape_debug(), show(ours), show(theirs))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(here: usize, server: usize) -> Tokens {
        Tokens { name: String::new(), here, server: Some(server), same: None, difference: None }
    }

    #[test]
    fn one_more_everywhere_is_the_beginning_and_numbers_that_vary_are_the_tokenizer() {
        let kinds = |numbers: &[(usize, usize)]| {
            let mut all: Vec<Tokens> = numbers.iter().map(|&(h, s)| tokens(h, s)).collect();
            judge_by_number(&mut all, Kind::Tokenizer);
            all.into_iter().map(|t| t.difference.map(|d| d.0)).collect::<Vec<_>>()
        };
        assert_eq!(kinds(&[(4, 5), (9, 10), (7, 8)]), [Some(Kind::Bos); 3]);
        assert_eq!(kinds(&[(5, 4), (10, 9), (8, 7)]), [Some(Kind::Bos); 3]);
        assert_eq!(kinds(&[(4, 5), (9, 9), (7, 9)]), [Some(Kind::Tokenizer), None, Some(Kind::Tokenizer)]);
    }

    #[test]
    fn texts_part_at_a_character() {
        assert_eq!(parting("naïve a", "naïve b"), "after `naïve `: here `a`, on the server `b`");
        assert_eq!(parting("a", "ab"), "after `a`: here ``, on the server `b`");
    }
}
