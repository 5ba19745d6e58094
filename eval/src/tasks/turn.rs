//! Questions and answers as turns: joined to a text, or as the messages of a conversation.

use crate::Message;

/// A turn, and what follows it where turns are joined to a text.
#[derive(Clone, Debug)]
pub struct Turn {
    pub role: &'static str,
    pub content: String,
    pub delimiter: String,
}

/// `maybe_delimit`: the delimiter stands only where there is no white space anyway.
pub fn join(prefix: &str, suffix: &str, delimiter: &str) -> String {
    let spaced = prefix.is_empty()
        || suffix.is_empty()
        || prefix.ends_with(char::is_whitespace)
        || suffix.starts_with(char::is_whitespace);
    if spaced { format!("{prefix}{suffix}") } else { format!("{prefix}{delimiter}{suffix}") }
}

/// `build_qa_turn`: a question, and its answer or the beginning of one (empty: none).
pub fn turn(question: String, answer: Option<String>, prefix: &str, target: &str, after: &str) -> Vec<Turn> {
    let answer = answer.filter(|a| !a.is_empty());
    let spaced = question.is_empty() || question.ends_with(char::is_whitespace);
    let delimiter = match prefix.chars().next() {
        Some(first) if spaced || first.is_whitespace() => "",
        None if answer.is_none() => "",
        _ => target,
    };
    let mut turns = vec![Turn { role: "user", content: question, delimiter: delimiter.into() }];
    let (content, after) = match answer {
        Some(answer) => (join(prefix, &answer, " "), after),
        None => (prefix.to_owned(), ""),
    };
    if !content.is_empty() {
        turns.push(Turn { role: "assistant", content, delimiter: after.into() });
    }
    turns
}

/// The turns as they are, without what follows them.
pub fn messages(turns: Vec<Turn>) -> Vec<Message> {
    turns.into_iter().map(|t| Message { role: t.role.into(), content: t.content }).collect()
}

/// `multiturn_to_singleturn`: all in one user's message, but for the system's and an answer that is begun.
pub fn single_turn(mut turns: Vec<Turn>) -> Vec<Message> {
    let system = if turns.first().is_some_and(|t| t.role == "system") { Some(turns.remove(0)) } else { None };
    let begun = if turns.last().is_some_and(|t| t.role == "assistant") { turns.pop() } else { None };
    if let Some(last) = turns.last_mut() {
        last.delimiter.clear();
    }
    let content = turns.into_iter().map(|t| t.content + &t.delimiter).collect();
    let user = Turn { role: "user", content, delimiter: String::new() };
    messages(system.into_iter().chain([user]).chain(begun).collect())
}
