//! A template's text to tokens, with Jinja2's treatment of line ends and of white space around tags.

use std::sync::Arc;

use crate::Settings;
use crate::ast::Name;
use crate::error::{Error, ErrorKind, Result};
use crate::python::is_space;

#[derive(Clone, Debug, PartialEq)]
pub enum Token {
    Text(Name),
    BlockBegin,
    BlockEnd,
    PrintBegin,
    PrintEnd,
    Name(Name),
    String(String),
    Int(i128),
    Float(f64),
    Operator(&'static str),
    End,
}

/// Longest first, so that the first that fits is the one.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";",
];

/// `\r\n` and `\r` as `\n`.
pub fn plain_newlines(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\r', "\n")
}

/// Tokens and their lines; the last is [`Token::End`].
pub fn tokens(source: &str, settings: Settings) -> Result<Vec<(Token, u32)>> {
    let mut text = plain_newlines(source);
    if !settings.keep_trailing_newline && text.ends_with('\n') {
        text.pop();
    }
    let mut lexer = Lexer { rest: &text, line: 1, line_starts: true, out: Vec::new(), settings };
    lexer.root()?;
    let line = lexer.line;
    lexer.out.push((Token::End, line));
    Ok(lexer.out)
}

struct Lexer<'a> {
    rest: &'a str,
    line: u32,
    /// Whether what was read last ended a line.
    line_starts: bool,
    out: Vec<(Token, u32)>,
    settings: Settings,
}

impl<'a> Lexer<'a> {
    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Error::new(ErrorKind::Syntax, message).at(self.line))
    }

    /// Moves over `bytes` of the text.
    fn take(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(bytes);
        self.rest = rest;
        self.line += taken.matches('\n').count() as u32;
        if let Some(c) = taken.chars().next_back() {
            self.line_starts = c == '\n';
        }
        taken
    }

    fn text(&mut self, text: &str, line: u32) {
        if !text.is_empty() {
            self.out.push((Token::Text(Arc::from(text)), line));
        }
    }

    fn root(&mut self) -> Result<()> {
        while !self.rest.is_empty() {
            let (line, starts) = (self.line, self.line_starts);
            let begin = ["{%", "{{", "{#"].iter().filter_map(|tag| self.rest.find(tag)).min();
            let Some(at) = begin else {
                let rest = self.take(self.rest.len());
                self.text(rest, line);
                return Ok(());
            };
            let before = self.take(at);
            let tag = self.take(2);
            let sign = self.rest.chars().next().filter(|c| matches!(c, '-' | '+'));
            let kept = self.strip(before, sign, tag == "{{", starts);
            self.text(kept, line);
            if sign.is_some() {
                self.take(1);
            }
            match tag {
                "{#" => self.comment()?,
                "{{" => {
                    self.out.push((Token::PrintBegin, self.line));
                    self.expression("}}")?;
                }
                _ => match self.raw_tag() {
                    Some(length) => {
                        self.take(length);
                        self.raw()?;
                    }
                    None => {
                        self.out.push((Token::BlockBegin, self.line));
                        self.expression("%}")?;
                    }
                },
            }
        }
        Ok(())
    }

    /// What is left of the text before a tag with this sign.
    fn strip(&self, before: &'a str, sign: Option<char>, prints: bool, starts: bool) -> &'a str {
        if sign == Some('-') {
            return before.trim_end_matches(is_space);
        }
        if sign != Some('+') && self.settings.lstrip_blocks && !prints {
            let start = before.rfind('\n').map_or(0, |at| at + 1);
            let blank = !before[start..].is_empty() && before[start..].chars().all(is_space);
            if blank && (start > 0 || starts) {
                return &before[..start];
            }
        }
        before
    }

    /// Reads the end of a tag if it is here, and what it trims after it.
    fn tag_end(&mut self, end: &str) -> bool {
        for (sign, strips) in [("-", true), ("", false), ("+", false)] {
            // `+}}` is no end: only blocks and comments trim.
            if sign == "+" && end == "}}" {
                continue;
            }
            let Some(after) = self.rest.strip_prefix(sign).and_then(|r| r.strip_prefix(end)) else { continue };
            let mut length = self.rest.len() - after.len();
            if strips {
                length += after.len() - after.trim_start_matches(is_space).len();
            } else if sign.is_empty() && end != "}}" && self.settings.trim_blocks && after.starts_with('\n') {
                length += 1;
            }
            self.take(length);
            return true;
        }
        false
    }

    fn comment(&mut self) -> Result<()> {
        let Some(at) = self.rest.find("#}") else { return self.fail("Missing end of comment tag") };
        // The sign stands before the end.
        let signed = self.rest[..at].ends_with(['-', '+']);
        self.take(at - usize::from(signed));
        self.tag_end("#}");
        Ok(())
    }

    /// Length of ` raw %}` after a tag's beginning, if that is what stands here.
    fn raw_tag(&self) -> Option<usize> {
        let after = self.rest.trim_start_matches(is_space).strip_prefix("raw")?.trim_start_matches(is_space);
        let end = match after.strip_prefix("-%}") {
            Some(end) => end.trim_start_matches(is_space),
            None => after.strip_prefix("%}")?,
        };
        Some(self.rest.len() - end.len())
    }

    fn raw(&mut self) -> Result<()> {
        let (line, starts) = (self.line, self.line_starts);
        let mut from = 0;
        while let Some(at) = self.rest[from..].find("{%").map(|at| at + from) {
            let inside = &self.rest[at + 2..];
            let sign = inside.chars().next().filter(|c| matches!(c, '-' | '+'));
            let after = inside[sign.map_or(0, char::len_utf8)..].trim_start_matches(is_space);
            let after = after.strip_prefix("endraw").map(|a| a.trim_start_matches(is_space));
            if let Some(after) = after.filter(|a| ["%}", "-%}", "+%}"].iter().any(|end| a.starts_with(end))) {
                let length = self.rest.len() - after.len();
                let before = self.take(at);
                let kept = self.strip(before, sign, false, starts);
                self.text(kept, line);
                self.take(length - at);
                self.tag_end("%}");
                return Ok(());
            }
            from = at + 2;
        }
        self.fail("Missing end of raw directive")
    }

    fn expression(&mut self, end: &str) -> Result<()> {
        let mut open: Vec<&str> = Vec::new();
        loop {
            if open.is_empty() {
                let line = self.line;
                if self.tag_end(end) {
                    self.out.push((if end == "}}" { Token::PrintEnd } else { Token::BlockEnd }, line));
                    return Ok(());
                }
            }
            let line = self.line;
            let Some(c) = self.rest.chars().next() else {
                return self.fail(format!("unexpected end of template, expected '{end}'"));
            };
            if is_space(c) {
                let length = self.rest.len() - self.rest.trim_start_matches(is_space).len();
                self.take(length);
                continue;
            }
            if c == '_' || c.is_alphanumeric() {
                let token = self.word()?;
                self.out.push((token, line));
                continue;
            }
            if c == '\'' || c == '"' {
                let token = self.string()?;
                self.out.push((token, line));
                continue;
            }
            let Some(operator) = OPERATORS.iter().find(|o| self.rest.starts_with(**o)) else {
                return self.fail(format!("unexpected char {c:?}"));
            };
            match *operator {
                "(" => open.push(")"),
                "[" => open.push("]"),
                "{" => open.push("}"),
                ")" | "]" | "}" => match open.pop() {
                    Some(expected) if expected == *operator => {}
                    Some(expected) => return self.fail(format!("unexpected '{operator}', expected '{expected}'")),
                    None => return self.fail(format!("unexpected '{operator}'")),
                },
                _ => {}
            }
            self.take(operator.len());
            self.out.push((Token::Operator(operator), line));
        }
    }

    /// A number or a name.
    fn word(&mut self) -> Result<Token> {
        let digits = |text: &str| text.chars().take_while(|c| c.is_ascii_digit() || *c == '_').count();
        let rest = self.rest;
        let word: usize = rest.chars().take_while(|c| *c == '_' || c.is_alphanumeric()).map(char::len_utf8).sum();
        if !rest.starts_with(|c: char| c.is_ascii_digit()) {
            let name = self.take(word);
            return Ok(Token::Name(Arc::from(name)));
        }
        let number = |text: &str| -> Result<Token> {
            let plain = text.replace('_', "");
            let well = !text.ends_with('_') && !text.contains("__");
            match plain.parse::<f64>() {
                Ok(value) if well => Ok(Token::Float(value)),
                _ => Err(Error::new(ErrorKind::Syntax, format!("{text:?} is no number")).at(self.line)),
            }
        };
        let whole = digits(rest);
        // `1.5`, `1e5`, `1.5e-5`; not `1.real`, and not after a point, where the digits are an index (`x.0.1`).
        let after_point = matches!(self.out.last(), Some((Token::Operator("."), _)));
        let mut length = whole;
        let fraction = rest[whole..].strip_prefix('.').filter(|r| r.starts_with(|c: char| c.is_ascii_digit()));
        if let Some(fraction) = fraction.filter(|_| !after_point) {
            length += 1 + digits(fraction);
        }
        let exponent = rest[length..].strip_prefix(['e', 'E']).map(|e| (e, e.strip_prefix(['+', '-']).unwrap_or(e)));
        if let Some((e, digits_of)) =
            exponent.filter(|(_, d)| !after_point && d.starts_with(|c: char| c.is_ascii_digit()))
        {
            length += 1 + (e.len() - digits_of.len()) + digits(digits_of);
        }
        if length > whole {
            let token = number(&rest[..length])?;
            self.take(length);
            return Ok(token);
        }
        let lower = rest[..word].to_ascii_lowercase();
        let (radix, prefix) = match lower.get(..2) {
            Some("0x") => (16, 2),
            Some("0o") => (8, 2),
            Some("0b") => (2, 2),
            _ => (10, 0),
        };
        let length = if radix == 10 { whole } else { word };
        let text = lower[prefix..length].replace('_', "");
        let leading_zero = radix == 10 && text.len() > 1 && text.starts_with('0') && text.bytes().any(|b| b != b'0');
        if leading_zero {
            return self.fail(format!("{:?} is no number", &rest[..length]));
        }
        match i128::from_str_radix(&text, radix) {
            Ok(value) => {
                self.take(length);
                Ok(Token::Int(value))
            }
            Err(_) if text.len() > 38 => {
                Err(Error::unsupported(format!("{text} is larger than whole numbers may be here")).at(self.line))
            }
            Err(_) => self.fail(format!("{:?} is no number", &rest[..length])),
        }
    }

    fn string(&mut self) -> Result<Token> {
        let (text, length) = quoted(self.rest).map_err(|e| e.at(self.line))?;
        self.take(length);
        Ok(Token::String(text))
    }
}

/// The text that the string at the beginning of `source` stands for, with Python's escapes, and how many bytes it takes.
pub fn quoted(source: &str) -> Result<(String, usize)> {
    let fail = |message: String| Error::new(ErrorKind::Syntax, message);
    let mut out = String::new();
    let mut chars = source.char_indices();
    let quote = chars.next().map_or('"', |(_, c)| c);
    while let Some((at, c)) = chars.next() {
        match c {
            c if c == quote => return Ok((out, at + c.len_utf8())),
            '\\' => {
                let Some((_, escape)) = chars.next() else { break };
                let mut hex = |digits: usize| -> Result<char> {
                    let text: String = chars.by_ref().take(digits).map(|(_, c)| c).collect();
                    let code = u32::from_str_radix(&text, 16).ok().filter(|_| text.len() == digits);
                    code.and_then(char::from_u32)
                        .ok_or_else(|| fail(format!("\\{escape}{text} in a string is no character")))
                };
                match escape {
                    '\n' => {}
                    'n' => out.push('\n'),
                    't' => out.push('\t'),
                    'r' => out.push('\r'),
                    'a' => out.push('\u{7}'),
                    'b' => out.push('\u{8}'),
                    'f' => out.push('\u{c}'),
                    'v' => out.push('\u{b}'),
                    '\\' | '\'' | '"' => out.push(escape),
                    'x' => out.push(hex(2)?),
                    'u' => out.push(hex(4)?),
                    'U' => out.push(hex(8)?),
                    'N' => return Err(Error::unsupported("\\N{…} in a string is not supported")),
                    '0'..='7' => {
                        let mut code = escape.to_digit(8).unwrap_or(0);
                        for _ in 0..2 {
                            let mut ahead = chars.clone();
                            let Some(digit) = ahead.next().and_then(|(_, c)| c.to_digit(8)) else { break };
                            code = code * 8 + digit;
                            chars = ahead;
                        }
                        out.extend(char::from_u32(code));
                    }
                    // Python keeps the backslash of an escape that it does not know.
                    other => out.extend(['\\', other]),
                }
            }
            c => out.push(c),
        }
    }
    Err(fail(format!("a string that begins with {quote} does not end")))
}
