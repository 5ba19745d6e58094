//! Answers held to grammars: what may come is drawn at random, and what came is judged by others.

mod calls;
mod hostile;
mod json_schema;
mod speed;
mod texts;
mod walk;

use std::sync::LazyLock;

use recoup::logits::Constraint;
use recoup::text::Tokenizer;
use recoup::text::grammar::{Grammar, GrammarError, GrammarFactory};
use serde_json::{Value, json};

use super::{books, books_json, llama_2, tokenizer};

/// Rows of a model beyond its tokenizer.
const PADDING: usize = 37;

/// A tokenizer, and grammars for a model of it that ends answers with `ends`.
struct Held {
    tokenizer: Tokenizer,
    factory: GrammarFactory,
    ends: Vec<u32>,
    /// What each token stands for.
    bytes: Vec<(u32, Vec<u8>)>,
}

impl Held {
    fn new(tokenizer: Tokenizer, ends: &[&str]) -> Self {
        let ends: Vec<u32> = ends.iter().map(|end| tokenizer.token_to_id(end).unwrap()).collect();
        let factory = GrammarFactory::new(&tokenizer, tokenizer.vocab_size() + PADDING, &ends).unwrap();
        let bytes = (0..tokenizer.vocab_size() as u32).filter_map(|id| Some((id, tokenizer.token_bytes(id)?)));
        let bytes = bytes.filter(|(_, bytes)| !bytes.is_empty()).collect();
        Self { tokenizer, factory, ends, bytes }
    }

    fn constraint(&self, grammar: &Grammar) -> Result<Box<dyn Constraint>, GrammarError> {
        self.factory.constraint(grammar)
    }

    fn error(&self, grammar: &Grammar) -> String {
        self.constraint(grammar).map(drop).expect_err("the grammar is refused").to_string()
    }

    /// Whether `text`, cut into tokens in some way, follows the grammar to its end.
    fn accepts(&self, grammar: &Grammar, text: &str) -> bool {
        let mut constraint = self.constraint(grammar).unwrap();
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let allowed = if constraint.is_done() { None } else { constraint.allowed().ok() };
            let begins = self.bytes.iter().filter(|(_, bytes)| rest.starts_with(bytes));
            let next = begins.filter(|(id, _)| allowed.is_some_and(|a| a.contains(*id))).max_by_key(|(_, b)| b.len());
            let Some((id, bytes)) = next else { return false };
            rest = &rest[bytes.len()..];
            constraint.take(*id).unwrap();
        }
        constraint.is_done() || self.ends.iter().any(|end| constraint.allowed().unwrap().contains(*end))
    }
}

/// Byte-level tokens of a real tokenizer; two tokens end an answer.
static BOOKS: LazyLock<Held> = LazyLock::new(|| Held::new(books(), &["<|im_end|>", "<|endoftext|>"]));

/// Pieces with byte tokens.
static PIECES: LazyLock<Held> = LazyLock::new(|| Held::new(llama_2(), &["</s>"]));

/// The same as `BOOKS`, in which these are tokens: special ones, and ones that are only added, as in Qwen3.
fn with_tokens(special: &[&str], added: &[&str]) -> Tokenizer {
    let mut file: Value = serde_json::from_str(&books_json()).unwrap();
    let known = file["model"]["vocab"].as_object().unwrap().len();
    let all = special.iter().map(|token| (token, true)).chain(added.iter().map(|token| (token, false)));
    for (id, (token, special)) in (known..).zip(all) {
        let token = json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special});
        file["added_tokens"].as_array_mut().unwrap().push(token);
    }
    tokenizer(&file.to_string(), &[]).unwrap()
}

/// Whether there is an exponent in a text that makes a number too large.
fn overflows(text: &str) -> bool {
    let exponents = text.split(['e', 'E']).skip(1).map(|rest| rest.trim_start_matches(['+', '-', '0']));
    exponents.map(|rest| rest.bytes().take_while(u8::is_ascii_digit).count()).any(|digits| digits > 2)
}

fn schema(schema: Value) -> Grammar {
    Grammar::JsonSchema(schema)
}

#[test]
fn only_what_stands_for_something_is_ever_allowed() {
    let held = &*BOOKS;
    let vocab = held.tokenizer.vocab_size() as u32;
    let mut constraint = held.constraint(&Grammar::Lark("start: <[*]>{40}".into())).unwrap();
    let allowed = constraint.allowed().unwrap();
    assert!((0..vocab).any(|id| allowed.contains(id)));
    assert!((vocab..vocab + 64).all(|id| !allowed.contains(id)), "rows of padding");
    assert!(constraint.take(vocab).is_err());

    // A model with fewer rows than its tokenizer has ids.
    let few = GrammarFactory::new(&held.tokenizer, 300, &held.ends).unwrap();
    let mut constraint = few.constraint(&Grammar::Regex("[a-z ]+".into())).unwrap();
    let words = constraint.allowed().unwrap().words();
    assert_eq!(words.len(), 300usize.div_ceil(32));
    assert!(words.iter().any(|word| *word != 0));
}

#[test]
fn a_factory_is_for_all_threads() {
    fn shared<T: Send + Sync>(_: &T) {}
    shared(&BOOKS.factory);
    let constraint = BOOKS.constraint(&Grammar::JsonObject).unwrap();
    let done = std::thread::spawn(move || {
        let mut constraint = constraint;
        constraint.allowed().unwrap();
        constraint.is_done()
    });
    assert!(!done.join().unwrap());
}

#[test]
fn special_tokens_marks_and_ends_are_no_text() {
    let tokenizer = with_tokens(&["<|tool|>"], &["<tool_call>", "<table>"]);
    let held = Held::new(tokenizer, &["<|im_end|>", "Ċ"]);
    let id = |token: &str| held.tokenizer.token_to_id(token).unwrap();
    let mut constraint = held.constraint(&Grammar::Regex("(?s:.)+x".into())).unwrap();
    let allowed = constraint.allowed().unwrap();
    for token in ["<|tool|>", "<tool_call>", "<|im_end|>", "<|im_start|>", "Ċ"] {
        assert!(!allowed.contains(id(token)), "{token}");
    }
    // Added to the vocabulary for text, as whole tags of HTML are in some.
    assert!(allowed.contains(id("<table>")));

    let mut named = held.constraint(&Grammar::Lark("start: <|tool|> \"a\"".into())).unwrap();
    assert!(named.allowed().unwrap().contains(id("<|tool|>")));
    assert!(!named.allowed().unwrap().contains(id("a")));
    named.take(id("<|tool|>")).unwrap();
    assert!(named.allowed().unwrap().contains(id("a")));
    assert!(named.take(id("b")).is_err(), "what is not allowed is not taken");
}

#[test]
fn an_answer_ends_where_the_grammar_lets_it_and_where_nothing_can_follow() {
    let held = &*BOOKS;
    let mut constraint = held.constraint(&Grammar::Regex("ab?".into())).unwrap();
    let id = |token: &str| held.tokenizer.token_to_id(token).unwrap();
    let ends = |constraint: &mut Box<dyn Constraint>| {
        held.ends.iter().filter(|end| constraint.allowed().unwrap().contains(**end)).count()
    };
    assert_eq!((constraint.is_done(), ends(&mut constraint)), (false, 0));
    constraint.take(id("a")).unwrap();
    // Every token that ends an answer may.
    assert_eq!((constraint.is_done(), ends(&mut constraint)), (false, 2));
    let mut ended = held.constraint(&Grammar::Regex("ab?".into())).unwrap();
    ended.take(id("a")).unwrap();
    ended.take(held.ends[1]).unwrap();
    assert!(ended.is_done());
    constraint.take(id("b")).unwrap();
    assert!(constraint.is_done());
    assert_eq!(ends(&mut constraint), 2);

    // Without a token that ends answers, they end by themselves.
    let endless = GrammarFactory::new(&held.tokenizer, 4096, &[]).unwrap();
    let mut constraint = endless.constraint(&Grammar::Choice(vec!["a".into()])).unwrap();
    constraint.take(id("a")).unwrap();
    assert!(constraint.is_done());
}
