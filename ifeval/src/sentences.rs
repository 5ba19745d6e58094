//! Where sentences end, after Punkt (Kiss & Strunk 2006, Computational Linguistics 32(4)) as NLTK 3.10 applies it.
//!
//! Every `.`, `?` or `!` before white space or closing punctuation may end a sentence; what stands around it decides:
//! known abbreviations, initials, numbers and ellipses do not end one unless the next word is one that starts sentences.
//! White space and letters are the Unicode standard's, for NLTK has its patterns matched by Python's package `regex`.
//! The words come from NLTK's English model (see `data/make.py`), the frequent ones of it.

use std::collections::HashSet;
use std::sync::LazyLock;

use regex::Regex;

use super::patterns::{fixed, is_digit, is_word};
use super::text::{strip, strip_end};

/// The sentences of a text.
pub fn split(text: &str) -> Vec<&str> {
    let mut slices = Vec::new();
    let mut start = 0;
    for candidate in candidates(text) {
        if ends_sentence(candidate.context) {
            slices.push((start, candidate.end));
            start = candidate.next;
        }
    }
    slices.push((start, strip_end(text).len().max(start)));

    let mut sentences = Vec::new();
    // What of a slice belongs to the sentence before it: closing quotes and brackets.
    let mut taken = 0;
    for (index, (start, end)) in slices.iter().enumerate() {
        let start = start + taken;
        let closing = slices.get(index + 1).and_then(|next| Some((next, closing_marks(&text[next.0..next.1])?)));
        let end = closing.map_or(*end, |(next, (marks, _))| next.0 + marks);
        if start < end {
            sentences.push(&text[start..end]);
        }
        taken = closing.map_or(0, |(_, (_, with_space))| with_space);
    }
    sentences
}

/// A place where a sentence may end, in bytes.
struct Candidate<'a> {
    end: usize,
    /// Where the next sentence would start.
    next: usize,
    /// The word that ends there, with what follows it up to the end of the next word.
    context: &'a str,
}

fn candidates(text: &str) -> Vec<Candidate<'_>> {
    let mut found = Vec::new();
    let mut previous: Option<(usize, Candidate)> = None;
    // The word before the previous end, as a range.
    let mut word = (0, 0);
    for (at, _) in text.match_indices(['.', '?', '!']) {
        let end = at + 1;
        let after = &text[end..];
        let Some(next) = after.chars().next() else { continue };
        let (next, context_end) = if is_no_word(next) {
            (end, end + next.len_utf8())
        } else {
            let rest = after.trim_start_matches(char::is_whitespace);
            if !next.is_whitespace() || rest.is_empty() {
                continue;
            }
            let next = text.len() - rest.len();
            (next, next + rest.find(char::is_whitespace).unwrap_or(rest.len()))
        };
        // White space right after the previous end does not count, and then the words run together.
        let gap = text[word.1..at].rfind([' ', '\t', '\n', '\r', '\x0b', '\x0c']).filter(|space| *space > 0);
        let start = gap.map_or(word.0, |space| word.1 + space + 1);
        if let Some((word_end, candidate)) = previous.take()
            && word_end <= start
        {
            found.push(candidate);
        }
        word = (start, at);
        previous = Some((at, Candidate { end, next, context: &text[start..context_end] }));
    }
    found.extend(previous.map(|(_, candidate)| candidate));
    found
}

/// Closing marks at the start of a slice that belong to the sentence before: their length, and with white space.
fn closing_marks(slice: &str) -> Option<(usize, usize)> {
    let rest = slice.trim_start_matches(['"', '\'', ')', ']', '}', '‘', '’', '“', '”', '«', '»']);
    let marks = slice.len() - rest.len();
    let spaces = rest.len() - rest.trim_start_matches(char::is_whitespace).len();
    (marks > 0 && (rest.is_empty() || spaces > 0 || rest.starts_with("--"))).then_some((marks, marks + spaces))
}

fn ends_sentence(context: &str) -> bool {
    let mut tokens: Vec<Token> = context.split('\n').filter(|line| !strip(line).is_empty()).flat_map(tokens).collect();
    for token in &mut tokens {
        token.judge_alone();
    }
    for index in 1..tokens.len() {
        let (before, after) = tokens.split_at_mut(index);
        if let (Some(token), Some(next)) = (before.last_mut(), after.first()) {
            token.judge_before(next);
            if token.ends_sentence {
                return true;
            }
        }
    }
    false
}

/// Characters that are no part of a word.
fn is_no_word(c: char) -> bool {
    ")\";}]*:@'({[‘’“”«»?!".contains(c)
}

/// Characters that no word starts with.
fn starts_no_word(c: char) -> bool {
    "(\"`{[:;&#*@)}]-,".contains(c)
}

struct Token<'a> {
    text: &'a str,
    /// In lower case, numbers all alike.
    kind: String,
    ends_sentence: bool,
    is_abbreviation: bool,
}

const NUMBER: &str = "##number##";

impl<'a> Token<'a> {
    fn new(text: &'a str) -> Self {
        static NUMERIC: LazyLock<Regex> = LazyLock::new(|| fixed(r"\A-?[.,]?\d[\d,.\-]*\.?\z"));
        let lower = text.to_lowercase();
        let kind = if NUMERIC.is_match(&lower) { NUMBER.to_owned() } else { lower };
        Self { text, kind, ends_sentence: false, is_abbreviation: false }
    }

    /// The first pass: by its type only.
    fn judge_alone(&mut self) {
        if matches!(self.text, "." | "?" | "!") {
            self.ends_sentence = true;
        } else if let Some(word) = self.text.strip_suffix('.').filter(|word| !word.ends_with('.')) {
            let word = word.to_lowercase();
            let last = word.rsplit('-').next().unwrap_or_default();
            self.is_abbreviation = MODEL.abbreviations.contains(&*word) || MODEL.abbreviations.contains(last);
            self.ends_sentence = !self.is_abbreviation;
        }
    }

    /// The second pass: by the word that follows.
    fn judge_before(&mut self, next: &Self) {
        if !self.text.ends_with('.') {
            return;
        }
        let kind = without_period(&self.kind);
        let next_kind = if next.ends_sentence { without_period(&next.kind) } else { &next.kind };
        let initial = self.is_initial();
        if MODEL.collocations.contains(&(kind, next_kind)) {
            self.ends_sentence = false;
            return;
        }
        let starts = next.starts_sentence(next_kind);
        let capital = next.text.starts_with(char::is_uppercase);
        let abbreviated = (self.is_abbreviation || self.is_ellipsis()) && !initial;
        if abbreviated && (starts == Some(true) || capital && MODEL.starters.contains(next_kind)) {
            self.ends_sentence = true;
            return;
        }
        if initial || kind == NUMBER {
            let name = initial && capital && !MODEL.orthography_knows(next_kind);
            if starts == Some(false) || starts.is_none() && name {
                self.ends_sentence = false;
            }
        }
    }

    /// Whether its case tells that it starts a sentence; `None`: it does not tell.
    fn starts_sentence(&self, kind: &str) -> Option<bool> {
        if matches!(self.text, ";" | ":" | "," | "." | "!" | "?") || self.text.starts_with(char::is_lowercase) {
            return Some(false);
        }
        (self.text.starts_with(char::is_uppercase) && MODEL.capital_at_starts.contains(kind)).then_some(true)
    }

    fn is_ellipsis(&self) -> bool {
        self.text.len() > 1 && self.text.bytes().all(|byte| byte == b'.')
    }

    fn is_initial(&self) -> bool {
        let mut letters = self.text.chars();
        letters.next().is_some_and(|c| is_word(c) && !is_digit(c)) && letters.as_str() == "."
    }
}

fn without_period(kind: &str) -> &str {
    kind.strip_suffix('.').filter(|rest| !rest.is_empty()).unwrap_or(kind)
}

/// Tokens of a line; a period stays with its word.
fn tokens(line: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut rest = line.trim_start_matches(char::is_whitespace);
    while let Some(first) = rest.chars().next() {
        let length = match run_of_marks(rest) {
            0 if starts_no_word(first) => first.len_utf8(),
            0 => word_length(rest),
            marks => marks,
        };
        tokens.push(Token::new(&rest[..length]));
        rest = rest[length..].trim_start_matches(char::is_whitespace);
    }
    tokens
}

/// Length of a word that `text` starts with, one character at least.
fn word_length(text: &str) -> usize {
    let ends = |rest: &str| {
        rest.starts_with(|c: char| c.is_whitespace() || is_no_word(c)) || rest.is_empty() || run_of_marks(rest) > 0
    };
    let mut places = text.char_indices().map(|(at, _)| at).skip(1);
    let end = places.find(|at| ends(&text[*at..]) || text[*at..].strip_prefix(',').is_some_and(ends));
    end.unwrap_or(text.len())
}

/// Length of the dashes, periods or spaced periods that `text` starts with; 0 for one alone.
fn run_of_marks(text: &str) -> usize {
    for mark in ['-', '.'] {
        let run = text.len() - text.trim_start_matches(mark).len();
        if run > 1 {
            return run;
        }
    }
    // Periods with one white space between, three at least.
    let mut length = 0;
    let mut periods = 0;
    let mut rest = text;
    while let Some(after) = rest.strip_prefix('.') {
        periods += 1;
        length = text.len() - after.len();
        let mut letters = after.chars();
        if !letters.next().is_some_and(char::is_whitespace) {
            break;
        }
        rest = letters.as_str();
    }
    if periods > 2 { length } else { 0 }
}

/// What Punkt learnt of English.
struct Model {
    abbreviations: HashSet<&'static str>,
    /// Words that often start a sentence after an abbreviation.
    starters: HashSet<&'static str>,
    /// Pairs that belong together although the first ends in a period.
    collocations: HashSet<(&'static str, &'static str)>,
    /// Words that occur in lower case, and with a capital only where a sentence starts.
    capital_at_starts: HashSet<&'static str>,
    /// Words that occur in lower case, and with a capital anywhere.
    capital_anywhere: HashSet<&'static str>,
}

impl Model {
    /// Whether the word is known to occur in lower case.
    fn orthography_knows(&self, kind: &str) -> bool {
        self.capital_at_starts.contains(kind) || self.capital_anywhere.contains(kind)
    }
}

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let list = |title: &str| {
        let mut lines = include_str!("data/english.txt").lines();
        let line = lines.find_map(|line| line.strip_prefix(title)?.strip_prefix('\t'));
        line.into_iter().flat_map(|words| words.split('\t'))
    };
    Model {
        abbreviations: list("abbreviations").collect(),
        starters: list("starters").collect(),
        collocations: list("collocations").filter_map(|pair| pair.split_once(' ')).collect(),
        capital_at_starts: list("capitalised only at starts").collect(),
        capital_anywhere: list("capitalised anywhere").collect(),
    }
});
