//! What a server is asked: texts of several kinds, long ones, and chats.

use recoup_ground::model::Message;
use serde::Deserialize;

use crate::corpus::BUILT_IN;

/// A text to be scored.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Text {
    pub name: String,
    pub text: String,
}

/// A chat to be written by the template.
#[derive(Clone, Debug, Deserialize)]
pub struct Chat {
    pub name: String,
    pub messages: Vec<Message>,
}

/// Texts and chats.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Texts {
    pub texts: Vec<Text>,
    pub chats: Vec<Chat>,
}

impl Texts {
    /// Those that are built in, and a long text, which is cut to the tokens that are wanted of it.
    ///
    /// # Errors
    /// Never, unless the file in the binary is broken.
    pub fn built_in() -> Result<Self, serde_json::Error> {
        let mut texts: Self = serde_json::from_str(include_str!("texts.json"))?;
        texts.texts.push(Text { name: "long".into(), text: BUILT_IN.to_owned() });
        Ok(texts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_in_can_be_read_and_has_names_of_its_own() {
        let texts = Texts::built_in().unwrap();
        let mut names: Vec<&str> = texts.texts.iter().map(|t| &t.name[..]).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), texts.texts.len());
        assert!(texts.chats.len() > 2 && texts.texts.iter().any(|t| t.text.len() > 20_000));
    }
}
