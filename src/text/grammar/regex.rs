//! Regular expressions of Python's `re`, written as Rust's `regex-syntax` reads them; what is none of a regular language is
//! refused.

use std::fmt::Write;
use std::iter::Peekable;
use std::str::Chars;

/// Of an expression's text.
const MAX_LENGTH: usize = 16 * 1024;

/// Python's white space has four characters more than Unicode's.
const SPACE: &str = r"\s\x1c-\x1f";
/// Python's `\w`: letters, numbers and the underscore; no marks.
const WORD: &str = r"\p{L}\p{N}_";

/// The expression that matches what `re.fullmatch` matches, in Rust's syntax.
///
/// # Errors
/// What cannot be had, or means nothing.
pub(super) fn of_python(expression: &str) -> Result<String, String> {
    if expression.len() > MAX_LENGTH {
        return Err(format!("it has {} bytes; {MAX_LENGTH} are allowed", expression.len()));
    }
    let mut reader = Reader { rest: expression.chars().peekable(), out: String::new(), repeatable: false };
    while let Some(c) = reader.rest.next() {
        reader.take(c)?;
    }
    Ok(reader.out)
}

struct Reader<'a> {
    rest: Peekable<Chars<'a>>,
    out: String,
    /// Whether a quantifier may follow.
    repeatable: bool,
}

impl Reader<'_> {
    fn take(&mut self, c: char) -> Result<(), String> {
        match c {
            '\\' => {
                let escape = self.escape(false)?;
                self.out.push_str(&escape);
                self.repeatable = true;
            }
            '[' => {
                self.class()?;
                self.repeatable = true;
            }
            '(' => {
                self.group()?;
                self.repeatable = false;
            }
            '*' | '+' | '?' => self.quantifier(&c.to_string())?,
            '{' => match self.counts() {
                Some(counts) => self.quantifier(&counts)?,
                None => self.character('{'),
            },
            '|' | '^' | '$' | '.' | ')' => {
                self.out.push(c);
                self.repeatable = matches!(c, '.' | ')');
            }
            c => self.character(c),
        }
        Ok(())
    }

    /// A character that stands for itself.
    fn character(&mut self, c: char) {
        push_literal(&mut self.out, c);
        self.repeatable = true;
    }

    fn quantifier(&mut self, quantifier: &str) -> Result<(), String> {
        if !self.repeatable {
            return Err(format!("nothing to repeat before `{quantifier}`"));
        }
        self.out.push_str(quantifier);
        self.repeatable = false;
        match self.rest.peek() {
            // Which way is tried first makes no difference for a whole match.
            Some('?') => drop(self.rest.next()),
            Some('+') => return Err(format!("`{quantifier}+` gives nothing back, which cannot be enforced")),
            _ => {}
        }
        Ok(())
    }

    /// What stands in braces after the first, where that is a number of times.
    fn counts(&mut self) -> Option<String> {
        let ahead: String = self.rest.clone().take_while(|c| *c != '}').take(24).collect();
        let is_number = |text: &str| text.chars().all(|c| c.is_ascii_digit());
        let (least, most) = ahead.split_once(',').map_or((&ahead[..], None), |(least, most)| (least, Some(most)));
        let closes = self.rest.clone().nth(ahead.chars().count()) == Some('}');
        if !closes || ahead.is_empty() || !is_number(least) || !most.is_none_or(is_number) {
            return None;
        }
        // Python takes `{,}` for any number of times.
        let counts = match most {
            None => format!("{{{least}}}"),
            Some(most) => format!("{{{},{most}}}", if least.is_empty() { "0" } else { least }),
        };
        self.rest.by_ref().take(ahead.chars().count() + 1).for_each(drop);
        Some(counts)
    }

    /// What follows an opening parenthesis.
    fn group(&mut self) -> Result<(), String> {
        if self.rest.peek() != Some(&'?') {
            self.out.push_str("(?:");
            return Ok(());
        }
        self.rest.next();
        let no = |what: &str| Err(format!("{what} cannot be enforced by a grammar; write it without"));
        match self.rest.next() {
            Some(':') => self.out.push_str("(?:"),
            Some('#') => while self.rest.next().is_some_and(|c| c != ')') {},
            Some('=' | '!') => return no("a look ahead"),
            Some('>') => return no("an atomic group"),
            Some('(') => return no("a condition"),
            Some('<') => return no("a look behind"),
            Some('P') => match self.rest.next() {
                Some('<') => {
                    while self.rest.next().is_some_and(|c| c != '>') {}
                    self.out.push_str("(?:");
                }
                _ => return no("a reference to a group"),
            },
            first => {
                let mut flags = String::new();
                let mut next = first;
                while let Some(c) = next.filter(|c| !matches!(c, ')' | ':')) {
                    flags.push(c);
                    next = self.rest.next();
                }
                let known = |c: char| matches!(c, 'i' | 's' | 'm' | 'u' | '-');
                if let Some(c) = flags.chars().find(|c| !known(*c)) {
                    return Err(format!("flag `{c}` is not known here; there are i, s and m"));
                }
                let flags = flags.replace('u', "");
                match next {
                    Some(':') => _ = write!(self.out, "(?{flags}:"),
                    Some(_) if flags.is_empty() => {}
                    Some(_) => _ = write!(self.out, "(?{flags})"),
                    None => return Err("a group is not closed".to_owned()),
                }
            }
        }
        Ok(())
    }

    /// What follows a backslash.
    fn escape(&mut self, in_class: bool) -> Result<String, String> {
        let class = |of: &str, not: bool| match (in_class, not) {
            (true, false) => of.to_owned(),
            (_, true) => format!("[^{of}]"),
            (false, false) => format!("[{of}]"),
        };
        let c = self.rest.next().ok_or("it ends with a backslash")?;
        Ok(match c {
            'd' | 'D' => format!("\\{c}"),
            's' | 'S' => class(SPACE, c == 'S'),
            'w' | 'W' => class(WORD, c == 'W'),
            'n' | 't' | 'r' | 'f' | 'v' | 'a' => format!("\\{c}"),
            'b' if in_class => "\\x08".to_owned(),
            'x' => self.code(c, 2)?,
            'u' => self.code(c, 4)?,
            'U' => self.code(c, 8)?,
            '0' => self.octal(),
            'A' if !in_class => "\\A".to_owned(),
            'Z' | 'z' if !in_class => "\\z".to_owned(),
            'b' | 'B' => return Err(format!("`\\{c}`, the edge of a word, cannot be enforced by a grammar")),
            '1'..='9' => return Err(format!("`\\{c}`, a reference to a group, cannot be enforced by a grammar")),
            c if c.is_ascii_alphabetic() => return Err(format!("`\\{c}` means nothing")),
            c => {
                let mut out = String::new();
                push_literal(&mut out, c);
                out
            }
        })
    }

    /// A character by its hexadecimal number.
    fn code(&mut self, letter: char, digits: usize) -> Result<String, String> {
        let number: String = self.rest.by_ref().take(digits).collect();
        let code = u32::from_str_radix(&number, 16).ok().filter(|_| number.len() == digits).and_then(char::from_u32);
        code.map(|c| format!("\\x{{{:X}}}", u32::from(c)))
            .ok_or_else(|| format!("`\\{letter}{number}` is no character"))
    }

    /// A character by its octal number, of which the zero was read.
    fn octal(&mut self) -> String {
        let mut code = 0;
        for _ in 0..2 {
            let Some(digit) = self.rest.peek().and_then(|c| c.to_digit(8)) else { break };
            code = code * 8 + digit;
            self.rest.next();
        }
        format!("\\x{{{code:X}}}")
    }

    /// What follows an opening bracket.
    fn class(&mut self) -> Result<(), String> {
        self.out.push('[');
        if self.rest.peek() == Some(&'^') {
            self.rest.next();
            self.out.push('^');
        }
        let mut is_first = true;
        loop {
            let c = self.rest.next().ok_or("a `[` is not closed")?;
            if c == ']' && !is_first {
                break;
            }
            is_first = false;
            let from = self.member(c)?;
            self.out.push_str(&from);
            let mut ahead = self.rest.clone();
            if ahead.next() == Some('-') && ahead.next().is_some_and(|c| c != ']') {
                self.rest.next();
                let c = self.rest.next().ok_or("a `[` is not closed")?;
                let to = self.member(c)?;
                if is_class(&from) || is_class(&to) {
                    return Err("a range in brackets has a class at one end".to_owned());
                }
                self.out.push('-');
                self.out.push_str(&to);
            }
        }
        self.out.push(']');
        Ok(())
    }

    /// A member of a class, which begins with `c`.
    fn member(&mut self, c: char) -> Result<String, String> {
        if c == '\\' {
            return self.escape(true);
        }
        let mut out = String::new();
        push_literal(&mut out, c);
        Ok(out)
    }
}

fn is_class(member: &str) -> bool {
    matches!(member, "\\d" | "\\D") || member == SPACE || member == WORD || member.starts_with('[')
}

/// A character that stands for itself, in brackets and outside of them.
fn push_literal(out: &mut String, c: char) {
    if c.is_ascii_punctuation() && !matches!(c, '<' | '>' | '/' | '"' | '\'' | '_') {
        out.push('\\');
    }
    out.push(c);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_python_writes_otherwise_is_written_as_rust_reads_it() {
        for (python, rust) in [
            (r"\d{3}-\d{4}", r"\d{3}\-\d{4}"),
            (r"^(?P<stop>a|b)*?\Z", r"^(?:a|b)*\z"),
            (r#"{"a": [0-9]{,3}}"#, r#"\{"a"\: [0-9]{0,3}\}"#),
            (r"[[&&~~a-c\-\]]", r"[\[\&\&\~\~a-c\-\]]"),
            (r"[]a-]", r"[\]a\-]"),
            (r"[+--]", r"[\+-\-]"),
            (r"\<\>\/\x41\u00e9\0\012", r"<>/\x{41}\x{E9}\x{0}\x{A}"),
            (r"(?i)a(?#no)b", r"(?i)ab"),
            (r"\s[\s\b]", r"[\s\x1c-\x1f][\s\x1c-\x1f\x08]"),
            ("a{x}", r"a\{x\}"),
            ("a{,}", "a{0,}"),
        ] {
            assert_eq!(of_python(python).as_deref(), Ok(rust), "{python}");
        }
    }

    #[test]
    fn what_no_grammar_has_is_refused_by_name() {
        for (python, why) in [
            (r"(?=a)", "a look ahead"),
            (r"(?<!a)b", "a look behind"),
            (r"(a)\1", "a reference to a group"),
            (r"(?P<n>a)(?P=n)", "a reference to a group"),
            (r"\bword\b", "the edge of a word"),
            ("(?>a)", "an atomic group"),
            ("a++", "gives nothing back"),
            ("(?x) a", "flag `x`"),
            ("*a", "nothing to repeat"),
            ("[a", "not closed"),
            (r"\q", "means nothing"),
            (r"\uD800", "no character"),
            (r"[\d-z]", "a class at one end"),
            ("a\\", "backslash"),
        ] {
            let error = of_python(python).unwrap_err();
            assert!(error.contains(why), "{python}: {error}");
        }
    }
}
