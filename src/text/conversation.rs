//! A conversation that has to fit into a context: the oldest turns go.

use serde_json::Value;

/// Takes the oldest turns from `messages` until the tokens of their `prompt` leave room: `most` tokens at most. A turn is a user's
/// message and what follows it up to the next; system messages at the beginning and the last turn stay. Returns how many
/// messages went, and the prompt of what is left, of more than `most` tokens where the last turn alone has them.
///
/// # Errors
/// Those of `prompt`.
pub fn fit<E, P>(
    messages: &mut Vec<Value>,
    most: usize,
    mut prompt: impl FnMut(&[Value]) -> Result<(P, Vec<u32>), E>,
) -> Result<(usize, P, Vec<u32>), E> {
    let role = |message: &Value, role: &str| message["role"] == role;
    let opening = messages.iter().take_while(|m| role(m, "system") || role(m, "developer")).count();
    let mut dropped = 0;
    loop {
        let (written, own) = prompt(messages)?;
        let next = messages.iter().skip(opening + 1).position(|m| role(m, "user"));
        match next {
            Some(at) if own.len() > most => {
                dropped += at + 1;
                messages.drain(opening..=opening + at);
            }
            _ => return Ok((dropped, written, own)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// As many tokens as the messages have characters.
    fn count(messages: &[Value]) -> Result<((), Vec<u32>), std::convert::Infallible> {
        Ok(((), vec![0; messages.iter().map(|m| m["content"].as_str().unwrap().len()).sum()]))
    }

    fn conversation() -> Vec<Value> {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        vec![
            message("system", "sys"),
            message("user", "one one"),
            message("assistant", "1"),
            message("tool", "t"),
            message("user", "two"),
            message("assistant", "22"),
            message("user", "three"),
        ]
    }

    #[test]
    fn the_oldest_turns_go_and_the_system_message_and_the_last_turn_stay() {
        let contents = |messages: &[Value]| -> Vec<String> {
            messages.iter().map(|m| m["content"].as_str().unwrap().to_owned()).collect()
        };
        let mut fits = conversation();
        assert_eq!(fit(&mut fits, 22, count).unwrap().0, 0);
        assert_eq!(fits, conversation());
        let mut one_less = conversation();
        let (dropped, (), tokens) = fit(&mut one_less, 21, count).unwrap();
        assert_eq!((dropped, tokens.len()), (3, 13));
        assert_eq!(contents(&one_less), ["sys", "two", "22", "three"]);
        let mut last = conversation();
        let (dropped, (), tokens) = fit(&mut last, 5, count).unwrap();
        assert_eq!((dropped, tokens.len()), (5, 8));
        assert_eq!(contents(&last), ["sys", "three"]);
    }
}
