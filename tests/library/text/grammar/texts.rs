//! Regular expressions, choices, Lark and GBNF.

use recoup::text::grammar::Grammar;

use super::{BOOKS, Held, PIECES};
use crate::support::random::Random;

fn check(grammar: &Grammar, accepted: &[&str], refused: &[&str]) {
    for held in [&*BOOKS, &*PIECES] {
        for text in accepted {
            assert!(held.accepts(grammar, text), "{grammar:?} accepts {text:?}");
        }
        for text in refused {
            assert!(!held.accepts(grammar, text), "{grammar:?} does not accept {text:?}");
        }
    }
}

fn regex(expression: &str) -> Grammar {
    Grammar::Regex(expression.into())
}

/// Right-hand sides: `re.fullmatch` of Python 3.11.
#[test]
fn regular_expressions_mean_what_python_means() {
    check(&regex(r"\d{3}-\d{4}"), &["555-1234", "٣٣٣-1234"], &["555-123", "x555-1234", "555-12345"]);
    check(&regex(r"^(?:a|b){,2}$"), &["a", "ba"], &["aba", "c"]);
    check(&regex(r"(?P<stop>a)b"), &["ab"], &["a", "b"]);
    check(&regex(r#"{"a": [0-9]+}"#), &[r#"{"a": 12}"#], &[r#"{"a": }"#, "a"]);
    check(&regex(r"[[&&]+"), &["[&"], &["a"]);
    check(&regex(r"\w+\s\W"), &["aé\u{1c}-", "_9 ."], &["a\u{301} -", "a a"]);
    check(&regex(r"(?i)yes|no"), &["YES", "No"], &["yesno", "maybe"]);
    check(&regex("a.b"), &["axb", "aéb"], &["a\nb", "ab"]);
    check(&regex("(?s)a.b"), &["a\nb"], &["ab"]);
    check(&regex("a*?b+?"), &["b", "aabbb"], &["a"]);
    check(&regex(r"[^\S\n]x|^y$|\Az\Z"), &["\tx", "y", "z"], &["\nx", "zz"]);
    for refused in [r"a\b", "(?=a)a", "(^a)+", "a$b"] {
        assert!(BOOKS.error(&regex(refused)).starts_with("regular expression: "), "{refused}");
    }
}

#[test]
fn a_choice_is_one_of_its_texts_exactly() {
    let choice = |texts: &[&str]| Grammar::Choice(texts.iter().map(|text| (*text).to_owned()).collect());
    let texts = ["yes", "yes, sir", "no \"x\"\n", "a\\b", "/é<|im_end|>", "\u{1}"];
    check(
        &choice(&["yes", "yes, sir", "no \"x\"\n", "a\\b", "é/"]),
        &["yes", "yes, sir", "no \"x\"\n", "a\\b", "é/"],
        &["ye", "yes,", "no", "", "yesyes"],
    );
    let mut random = Random(1);
    for _ in 0..40 {
        let answer = BOOKS.walk(BOOKS.constraint(&choice(&texts)).unwrap(), &mut random).unwrap();
        assert!(texts.contains(&&answer[..]), "{answer:?}");
    }
    assert!(BOOKS.error(&choice(&[])).contains("there is none"));
    check(&choice(&["", "a"]), &["", "a"], &["b", "aa"]);
    check(&choice(&[""]), &[""], &["a"]);
    check(&regex(""), &[""], &["a"]);
}

#[test]
fn lark_is_llguidances() {
    let grammar =
        Grammar::Lark("start: item (\", \" item)*\nitem: NUMBER | \"(\" start \")\"\nNUMBER: /[0-9]+/".into());
    check(&grammar, &["1, (2, 3), 45", "7"], &["", "1,", "(1"]);
    for (text, why) in [("start: x", "unknown name"), ("root: \"x\"", "no start"), ("start: \"x", "lexer error")] {
        let error = BOOKS.error(&Grammar::Lark(text.into()));
        assert!(error.starts_with("grammar: ") && error.contains(why), "{text}: {error}");
        assert!(!error.contains("<state>") && !error.contains("backtrace"), "{error}");
    }
}

/// llama.cpp's grammar of JSON.
const GBNF_JSON: &str = r#"root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws

# Optional space: by convention, applied in this grammar after literal chars when allowed
ws ::= | " " | "\n" [ \t]{0,20}
"#;

#[test]
fn gbnf_derives_what_it_derives_in_llama_cpp() {
    let json = Grammar::Lark(GBNF_JSON.into());
    check(
        &json,
        &[r#"{}"#, r#"{"a": [1, -2.5e+1, "x\n\u00e9", {"b":null}], "é":true}"#, "{\n  \"a\":1}"],
        &["[1]", r#"{"a"}"#, r#"{"a": 01}"#, r#"{"a": "b}"#],
    );
    let mut random = Random(2);
    let mut ended = 0;
    for _ in 0..30 {
        let Some(answer) = BOOKS.walk(BOOKS.constraint(&json).unwrap(), &mut random) else { continue };
        let read: serde_json::Value = serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{answer:?}: {e}"));
        assert!(read.is_object());
        ended += 1;
    }
    assert!(ended > 10, "{ended}");
    let chess = "root ::= \"1. \" move \" \" move\nmove ::= ([KQRBN]? [a-h] [1-8] | \"O-O\" \"-O\"?) [+#]?";
    check(&Grammar::Lark(chess.into()), &["1. e4 Nf6+", "1. O-O-O O-O#"], &["1. e9 e4", "1. e4"]);
    assert!(BOOKS.error(&Grammar::Lark("root ::= missing".into())).contains("no rule `missing`"));
}

#[test]
fn a_token_may_be_named() {
    let held: &Held = &BOOKS;
    let im_start = held.tokenizer.token_to_id("<|im_start|>").unwrap();
    for text in ["start: \"a\" <|im_start|> \"b\"".to_owned(), format!("root ::= \"a\" <[{im_start}]> \"b\"")] {
        check_one(held, &Grammar::Lark(text), "a<|im_start|>b");
    }
}

fn check_one(held: &Held, grammar: &Grammar, text: &str) {
    assert!(held.accepts(grammar, text), "{grammar:?}");
}

#[test]
fn schemas_within_a_grammar_are_enforced_or_refused_as_those_by_themselves() {
    let lark = |text: &str| Grammar::Lark(text.into());
    let number = r#"start: "x=" %json {"title": "t", "type": "integer", "minimum": 1, "maximum": 3}"#;
    check(&lark(number), &["x=2"], &["x=4", "2", "x=\"2\""]);
    let unique = r#"{"type": "array", "uniqueItems": true}"#;
    for (text, place) in [
        (format!("start: %json{unique}"), "#/uniqueItems"),
        (format!("start: a\na: \"\\\"\" /\\/\"/ <|im_end|> %json\n  {unique}"), "#/uniqueItems"),
        (format!("start: %lark {{ start: %json {unique} }}"), "#/uniqueItems"),
        (format!("start: %json {{}} | %json {{\"properties\": {{\"a\": {unique}}}}}"), "#/properties/a/uniqueItems"),
        (r#"start: %json {"$ref": "http://x/y"}"#.to_owned(), "#/$ref"),
        (r#"start: %json {"x-guidance": {"lenient": true}, "not": {}}"#.to_owned(), "x-guidance"),
    ] {
        let error = BOOKS.error(&lark(&text));
        assert!(error.contains(place), "{text}: {error}");
    }
    assert!(BOOKS.error(&lark("start: %json {")).contains("followed by no JSON"));
    // What only looks like one.
    let quoted = "start: \"%json {\" A // %json {\nA: /%json [{]\\/x/ # %json {\"not\": 1}\n";
    check(&lark(quoted), &["%json {%json {/x"], &["%json {"]);
    let inside = r#"start: %regex {"substring_words": "a %json b"} "!""#;
    check(&lark(inside), &["a %json!"], &["c!"]);
}
