//! Chats as prompts: a server applies its template itself, so a "prompt" is the messages, written so that they can be
//! told from text and read back.

use serde::{Deserialize, Serialize};

use recoup_ground::model::Message;

/// Starts every prompt that holds messages. Control characters, which no task's text starts with.
const MARK: &str = "\u{1}recoup-chat\u{1}";

/// Messages for a server's template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Chat {
    pub messages: Vec<Message>,
    /// Whether the last message is an assistant's turn to be continued.
    pub continue_last: bool,
}

impl Chat {
    pub fn to_prompt(&self) -> Result<String, serde_json::Error> {
        Ok(format!("{MARK}{}", serde_json::to_string(self)?))
    }

    /// The messages of a prompt; `None` for one that holds text. What a task added after the messages is the start of the
    /// assistant's turn.
    pub fn from_prompt(prompt: &str) -> Option<Self> {
        let json = prompt.strip_prefix(MARK)?;
        let mut stream = serde_json::Deserializer::from_str(json).into_iter::<Self>();
        let mut chat = stream.next()?.ok()?;
        let added = &json[stream.byte_offset()..];
        if !added.is_empty() {
            match chat.messages.last_mut().filter(|_| chat.continue_last) {
                Some(last) => last.content.push_str(added),
                None => chat.messages.push(Message { role: "assistant".to_owned(), content: added.to_owned() }),
            }
            chat.continue_last = true;
        }
        Some(chat)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_being_a_prompt_and_text_added_to_it_starts_the_answer() {
        let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
        let messages = vec![message("system", "é \"quoted\" }\n"), message("user", "2 + 2?")];
        let chat = Chat { messages, continue_last: false };
        let prompt = chat.to_prompt().unwrap();
        assert_eq!(Chat::from_prompt(&prompt).as_ref(), Some(&chat));
        assert_eq!(Chat::from_prompt("{\"messages\": []}"), None);
        let added = Chat::from_prompt(&(prompt + "The answer is")).unwrap();
        assert_eq!(added.messages[..2], chat.messages);
        assert_eq!(added.messages[2], message("assistant", "The answer is"));
        let again = Chat::from_prompt(&(added.to_prompt().unwrap() + " 4")).unwrap();
        assert_eq!(again.messages[2].content, "The answer is 4");
        assert!(again.continue_last);
    }
}
