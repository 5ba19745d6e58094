//! Grammars in GBNF, llama.cpp's form of EBNF, written in Lark.
//!
//! GBNF derives characters, Lark's rules derive terminals, each of which is as long as it can be. A rule that leads to no
//! recursion becomes one terminal, which is exact; so is a grammar without any. Where a recursive rule has terminals one
//! after the other of which the first could take what belongs to the next, the answer may be less than what GBNF derives,
//! never more.

use std::collections::HashMap;
use std::fmt::Write;

use super::compile::MAX_RULES;
use super::lark;

/// Groups in each other; llguidance takes no more.
const MAX_NESTING: usize = 24;

/// Whether a text is GBNF, and not Lark, which has no `::=`.
pub(super) fn is_one(text: &str) -> bool {
    text.lines().any(|line| line.split('#').next().is_some_and(|code| code.contains("::=")))
}

/// The same grammar in llguidance's dialect of Lark.
///
/// # Errors
/// What is not understood, and where.
pub(super) fn to_lark(text: &str) -> Result<String, String> {
    let mut reader = Reader { text, at: 0, depth: 0, rules: Rules::default() };
    reader.grammar()?;
    reader.rules.lark()
}

/// What a rule derives.
#[derive(Debug, Clone)]
enum Node {
    Text(String),
    /// A class of characters, as Rust's regular expressions have it.
    Class(String),
    /// A rule by its number.
    Rule(usize),
    /// A token, as Lark writes it.
    Token(String),
    All(Vec<Node>),
    AnyOf(Vec<Node>),
    Repeat(Box<Node>, u32, Option<u32>),
}

#[derive(Default)]
struct Rules {
    numbers: HashMap<String, usize>,
    names: Vec<String>,
    bodies: Vec<Option<Node>>,
}

impl Rules {
    fn number(&mut self, name: &str) -> Result<usize, String> {
        if let Some(number) = self.numbers.get(name) {
            return Ok(*number);
        }
        let number = self.names.len();
        if number == MAX_RULES {
            return Err(format!("it has more rules than the {MAX_RULES} that are allowed"));
        }
        self.numbers.insert(name.to_owned(), number);
        self.names.push(name.to_owned());
        self.bodies.push(None);
        Ok(number)
    }

    fn lark(&self) -> Result<String, String> {
        let root = *self.numbers.get("root").ok_or("there is no rule `root`")?;
        let mut bodies = Vec::with_capacity(self.bodies.len());
        for (body, name) in self.bodies.iter().zip(&self.names) {
            bodies.push(body.as_ref().ok_or_else(|| format!("there is no rule `{name}`, which another asks for"))?);
        }
        let mut writer = Writer { is_terminal: terminals(&bodies), hoisted: String::new(), count: 0 };
        let mut out = format!("start: {}\n", writer.name(root));
        for (number, body) in bodies.iter().enumerate() {
            let is_terminal = writer.is_terminal[number];
            let body = writer.node(body, is_terminal);
            _ = writeln!(out, "{}: {body}", writer.name(number));
        }
        Ok(out + &writer.hoisted)
    }
}

/// Which rules lead to no recursion and no token: those all of whose rules are such.
fn terminals(bodies: &[&Node]) -> Vec<bool> {
    let mut is_terminal = vec![false; bodies.len()];
    let mut asked_by = vec![Vec::new(); bodies.len()];
    let mut open: Vec<usize> = Vec::new();
    for (number, body) in bodies.iter().enumerate() {
        let mut asks = Vec::new();
        let has_token = body.rules(&mut asks);
        asks.sort_unstable();
        asks.dedup();
        // One that has a token never closes.
        open.push(asks.len() + usize::from(has_token));
        asks.iter().for_each(|asked| asked_by[*asked].push(number));
    }
    let mut closed: Vec<usize> = (0..bodies.len()).filter(|number| open[*number] == 0).collect();
    while let Some(number) = closed.pop() {
        is_terminal[number] = true;
        for &asking in &asked_by[number] {
            open[asking] -= 1;
            if open[asking] == 0 {
                closed.push(asking);
            }
        }
    }
    is_terminal
}

impl Node {
    /// The rules it asks for; whether there is a token in it.
    fn rules(&self, asks: &mut Vec<usize>) -> bool {
        match self {
            Self::Text(_) | Self::Class(_) => false,
            Self::Token(_) => true,
            Self::Rule(number) => {
                asks.push(*number);
                false
            }
            Self::All(nodes) | Self::AnyOf(nodes) => nodes.iter().fold(false, |has, node| node.rules(asks) | has),
            Self::Repeat(node, ..) => node.rules(asks),
        }
    }
}

struct Writer {
    is_terminal: Vec<bool>,
    /// Terminals made of parts of rules.
    hoisted: String,
    count: usize,
}

impl Writer {
    fn name(&self, number: usize) -> String {
        format!("{}{number}", if self.is_terminal[number] { 'T' } else { 'r' })
    }

    /// An expression of Lark, within a terminal or a rule.
    fn node(&mut self, node: &Node, in_terminal: bool) -> String {
        match node {
            Node::Text(text) => lark::literal(text),
            Node::Class(class) => lark::regex(class),
            Node::Rule(number) => self.name(*number),
            Node::Token(token) => token.clone(),
            Node::All(nodes) if nodes.is_empty() => lark::literal(""),
            Node::All(nodes) => {
                let nodes: Vec<String> = nodes.iter().map(|node| self.node(node, in_terminal)).collect();
                nodes.join(" ")
            }
            Node::AnyOf(nodes) => {
                let nodes: Vec<String> = nodes.iter().map(|node| self.node(node, in_terminal)).collect();
                format!("({})", nodes.join(" | "))
            }
            Node::Repeat(inner, ..) if !in_terminal && self.is_regular(inner) => {
                let terminal = self.node(node, true);
                let name = format!("H{}", self.count);
                self.count += 1;
                _ = writeln!(self.hoisted, "{name}: {terminal}");
                name
            }
            Node::Repeat(inner, least, most) => {
                let inner = self.node(inner, in_terminal);
                match (least, most) {
                    (_, Some(0)) => lark::literal(""),
                    (0, None) => format!("({inner})*"),
                    (1, None) => format!("({inner})+"),
                    (0, Some(1)) => format!("({inner})?"),
                    (least, None) => format!("({inner}){{{least},}}"),
                    (least, Some(most)) => format!("({inner}){{{least},{most}}}"),
                }
            }
        }
    }

    fn is_regular(&self, node: &Node) -> bool {
        let mut asks = Vec::new();
        !node.rules(&mut asks) && asks.iter().all(|number| self.is_terminal[*number])
    }
}

struct Reader<'t> {
    text: &'t str,
    at: usize,
    depth: usize,
    rules: Rules,
}

impl Reader<'_> {
    fn error<T>(&self, what: &str) -> Result<T, String> {
        let line = self.text[..self.at].matches('\n').count() + 1;
        Err(format!("line {line}: {what}"))
    }

    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    /// Takes `text` if it comes next.
    fn takes(&mut self, text: &str) -> bool {
        let has = self.rest().starts_with(text);
        self.at += if has { text.len() } else { 0 };
        has
    }

    /// White space and comments.
    fn space(&mut self) {
        loop {
            let rest = self.rest();
            let blank = rest.len() - rest.trim_start().len();
            self.at += blank;
            if self.peek() != Some('#') {
                return;
            }
            self.at += self.rest().find('\n').unwrap_or(self.rest().len());
        }
    }

    /// A name that comes next, left where it is.
    fn name(&self) -> &str {
        let rest = self.rest();
        let is_of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let end = rest.find(|c| !is_of_name(c)).unwrap_or(rest.len());
        let name = &rest[..end];
        if name.starts_with(['.', '-']) { "" } else { name }
    }

    /// The length of `name ::=`, if that comes next.
    fn definition(&self) -> Option<usize> {
        let name = self.name();
        let after = self.rest()[name.len()..].trim_start_matches([' ', '\t']);
        (!name.is_empty() && after.starts_with("::=")).then(|| self.rest().len() - after.len() + 3)
    }

    fn grammar(&mut self) -> Result<(), String> {
        self.space();
        while self.at < self.text.len() {
            let Some(length) = self.definition() else { return self.error("expected NAME ::= …") };
            let name = self.name().to_owned();
            let number = self.rules.number(&name)?;
            if self.rules.bodies[number].is_some() {
                return self.error(&format!("`{name}` is there twice"));
            }
            self.at += length;
            let body = self.any_of()?;
            self.rules.bodies[number] = Some(body);
            self.space();
        }
        Ok(())
    }

    /// Alternatives, up to what ends them.
    fn any_of(&mut self) -> Result<Node, String> {
        self.depth += 1;
        if self.depth > MAX_NESTING {
            return self.error(&format!("more than {MAX_NESTING} groups in each other"));
        }
        let mut options = vec![self.all()?];
        while self.takes("|") {
            options.push(self.all()?);
        }
        self.depth -= 1;
        Ok(if options.len() == 1 { options.remove(0) } else { Node::AnyOf(options) })
    }

    /// What follows each other, up to what ends it.
    fn all(&mut self) -> Result<Node, String> {
        let mut nodes = Vec::new();
        loop {
            self.space();
            match self.peek() {
                None | Some('|' | ')') => break,
                Some(_) if self.definition().is_some() => break,
                Some(_) => {
                    let node = self.one()?;
                    nodes.push(self.repeated(node)?);
                }
            }
        }
        Ok(if nodes.len() == 1 { nodes.remove(0) } else { Node::All(nodes) })
    }

    fn one(&mut self) -> Result<Node, String> {
        let name = self.name().to_owned();
        if !name.is_empty() {
            self.at += name.len();
            return self.rules.number(&name).map(Node::Rule);
        }
        match self.next() {
            Some('"') => self.string(),
            Some('[') => self.class(),
            Some('.') => Ok(Node::Class("(?s:.)".to_owned())),
            Some('(') if self.rest().starts_with('=') => self.error("a look ahead cannot be enforced"),
            Some('(') => {
                let group = self.any_of()?;
                if self.takes(")") { Ok(group) } else { self.error("a group is not closed") }
            }
            Some('<') => {
                let Some(end) = self.rest().find('>') else { return self.error("a `<` is not closed") };
                let token = format!("<{}>", &self.rest()[..end]);
                if token.contains(char::is_whitespace) {
                    return self.error("there is white space in the name of a token");
                }
                self.at += end + 1;
                Ok(Node::Token(token))
            }
            Some(c) => self.error(&format!("`{c}` means nothing here")),
            None => self.error("something is missing at the end"),
        }
    }

    /// A part and how often it is there.
    fn repeated(&mut self, mut node: Node) -> Result<Node, String> {
        loop {
            let (least, most) = match self.peek() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => {
                    let Some(end) = self.rest().find('}') else { return self.error("a `{` is not closed") };
                    let counts = self.rest()[1..end].to_owned();
                    self.at += end;
                    let number = |text: &str| text.trim().parse::<u32>().ok().filter(|n| *n <= 100_000);
                    let bounds = match counts.split_once(',') {
                        None => number(&counts).map(|n| (n, Some(n))),
                        Some((least, most)) if most.trim().is_empty() => number(least).map(|n| (n, None)),
                        Some((least, most)) => number(least).zip(number(most)).map(|(least, most)| (least, Some(most))),
                    };
                    match bounds.filter(|(least, most)| most.is_none_or(|most| *least <= most)) {
                        Some(bounds) => bounds,
                        None => return self.error(&format!("`{{{counts}}}` is no number of times up to 100000")),
                    }
                }
                _ => return Ok(node),
            };
            self.next();
            node = Node::Repeat(Box::new(node), least, most);
        }
    }

    fn string(&mut self) -> Result<Node, String> {
        let mut text = String::new();
        loop {
            match self.next() {
                Some('"') => return Ok(Node::Text(text)),
                Some('\\') => text.push(self.escape()?),
                Some(c) if c != '\n' => text.push(c),
                _ => return self.error("a text is not closed"),
            }
        }
    }

    fn class(&mut self) -> Result<Node, String> {
        let mut out = String::from(if self.takes("^") { "[^" } else { "[" });
        let mut is_empty = true;
        loop {
            let from = match self.next() {
                Some(']') => break,
                Some('\\') => self.escape()?,
                Some(c) => c,
                None => return self.error("a `[` is not closed"),
            };
            is_empty = false;
            _ = write!(out, "\\x{{{:X}}}", u32::from(from));
            if self.rest().starts_with('-') && !self.rest().starts_with("-]") {
                self.next();
                let to = match self.next() {
                    Some('\\') => self.escape()?,
                    Some(c) => c,
                    None => return self.error("a `[` is not closed"),
                };
                if to < from {
                    return self.error(&format!("`{from}-{to}` is no range"));
                }
                _ = write!(out, "-\\x{{{:X}}}", u32::from(to));
            }
        }
        match (is_empty, out.len()) {
            (true, 1) => self.error("`[]` is nothing"),
            (true, _) => Ok(Node::Class("(?s:.)".to_owned())),
            (false, _) => Ok(Node::Class(out + "]")),
        }
    }

    /// What follows a backslash.
    fn escape(&mut self) -> Result<char, String> {
        let digits = match self.next() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(c) if !c.is_ascii_alphanumeric() => return Ok(c),
            _ => return self.error("a backslash before what it says nothing of"),
        };
        let code =
            self.rest().get(..digits).and_then(|code| u32::from_str_radix(code, 16).ok()).and_then(char::from_u32);
        match code {
            Some(c) => {
                self.at += digits;
                Ok(c)
            }
            None => self.error("the number of no character"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_without_recursion_are_terminals() {
        let gbnf = "# a list\nroot ::= \"[\" ws (item (\",\" ws item)*)? \"]\" | number\n\
                    item ::= root ws # recursive\nnumber ::= [0-9]{1,3} (\".\" [0-9]+)?\nws ::= [ \\n\\t]*\n";
        assert!(is_one(gbnf));
        let lark = to_lark(gbnf).unwrap();
        let expected = "start: r0\n\
             r0: (\"[\" T1 (r2 (\",\" T1 r2)*)? \"]\" | T3)\n\
             T1: (/[\\x{20}\\x{A}\\x{9}]/)*\n\
             r2: r0 T1\n\
             T3: (/[\\x{30}-\\x{39}]/){1,3} (\".\" (/[\\x{30}-\\x{39}]/)+)?\n";
        assert_eq!(lark, expected);
    }

    #[test]
    fn repetition_of_characters_within_a_recursive_rule_is_a_terminal() {
        let lark = to_lark("root ::= \"(\" [^()]* root? \")\"").unwrap();
        assert_eq!(lark, "start: r0\nr0: \"(\" H0 (r0)? \")\"\nH0: (/[^\\x{28}\\x{29}]/)*\n");
    }

    #[test]
    fn what_is_wrong_is_told_by_its_line() {
        for (gbnf, why) in [
            ("a ::= \"x\"", "no rule `root`"),
            ("root ::= a", "no rule `a`"),
            ("root ::= \"x\"\nroot ::= \"y\"", "line 2: `root` is there twice"),
            ("root ::= (\"x\"", "a group is not closed"),
            ("root ::= \"x", "a text is not closed"),
            ("root ::= [z-a]", "no range"),
            ("root ::= \"x\"{2,1}", "no number of times"),
            ("root ::= \"x\"{999999999}", "no number of times"),
            ("root ::= (=\"x\") \"x\"", "look ahead"),
            ("root ::= \"\\q\"", "backslash"),
            ("root ::= !x", "`!` means nothing"),
        ] {
            let error = to_lark(gbnf).unwrap_err();
            assert!(error.contains(why), "{gbnf}: {error}");
        }
        assert!(
            to_lark(&format!("root ::= {}{}", "(".repeat(9999), ")".repeat(9999)))
                .unwrap_err()
                .contains("in each other")
        );
        let many: String = (0..9999).map(|i| format!("r{i} ::= \"x\"\n")).collect();
        assert!(to_lark(&many).unwrap_err().contains("rules"));
        assert!(!is_one("start: \"a\" # like root ::= a"));
    }
}
