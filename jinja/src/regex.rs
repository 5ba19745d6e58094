//! Python's `re`, as far as tasks use it, on top of fancy-regex: the differences in syntax are translated.

use fancy_regex::{Captures, Regex};

/// A compiled pattern of Python's `re`.
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(try_from = "String")]
pub struct PythonRegex {
    regex: Regex,
}

impl TryFrom<String> for PythonRegex {
    type Error = String;

    fn try_from(pattern: String) -> Result<Self, String> {
        Self::new(&pattern)
    }
}

impl PythonRegex {
    /// `re.compile(pattern)`.
    ///
    /// # Errors
    /// What is wrong with the pattern.
    pub fn new(pattern: &str) -> Result<Self, String> {
        let regex =
            Regex::new(&translate(pattern)).map_err(|e| format!("invalid regular expression {pattern:?}: {e}"))?;
        Ok(Self { regex })
    }

    /// `findall`, with each match as its groups (the whole match where the pattern has none); a group that took no part
    /// is empty.
    ///
    /// # Errors
    /// When matching takes too many steps.
    pub fn find_all(&self, text: &str) -> Result<Vec<Vec<String>>, String> {
        let groups = |c: &Captures| {
            let first = usize::from(c.len() > 1);
            (first..c.len()).map(|i| c.get(i).map_or(String::new(), |m| m.as_str().to_owned())).collect()
        };
        Ok(self.captures(text)?.iter().map(groups).collect())
    }

    /// `re.sub(pattern, replacement, text, count)`; 0: all. In the replacement `\1` and `\g<name>` stand for groups.
    ///
    /// # Errors
    /// When matching takes too many steps, or the replacement names a group that is not there.
    pub fn sub(&self, replacement: &str, text: &str, count: usize) -> Result<String, String> {
        let (mut out, mut end) = (String::new(), 0);
        let limit = if count == 0 { usize::MAX } else { count };
        for captures in self.captures(text)?.iter().take(limit) {
            let whole = captures.get(0).ok_or("a match without text")?;
            out.push_str(&text[end..whole.start()]);
            expand(replacement, captures, &mut out)?;
            end = whole.end();
        }
        out.push_str(&text[end..]);
        Ok(out)
    }

    fn captures<'t>(&self, text: &'t str) -> Result<Vec<Captures<'t>>, String> {
        let (mut found, mut at) = (Vec::new(), 0);
        while at <= text.len() {
            let Some(captures) = self.regex.captures_from_pos(text, at).map_err(|e| e.to_string())? else { break };
            let Some(whole) = captures.get(0) else { break };
            let (start, end) = (whole.start(), whole.end());
            let step = text[end..].chars().next().map_or(1, char::len_utf8);
            at = if start == end { end + step } else { end };
            found.push(captures);
        }
        Ok(found)
    }
}

fn expand(replacement: &str, captures: &Captures, out: &mut String) -> Result<(), String> {
    let mut chars = replacement.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        let group = match chars.next() {
            Some('n') => {
                out.push('\n');
                continue;
            }
            Some('t') => {
                out.push('\t');
                continue;
            }
            Some('\\') | None => {
                out.push('\\');
                continue;
            }
            Some('g') => {
                let name: String = chars.by_ref().skip_while(|c| *c == '<').take_while(|c| *c != '>').collect();
                match name.parse::<usize>() {
                    Ok(i) => (i < captures.len()).then(|| captures.get(i)),
                    Err(_) => Some(captures.name(&name)),
                }
                .ok_or_else(|| format!("the pattern has no group {name}"))?
            }
            Some(d) if d.is_ascii_digit() => {
                let mut index = d.to_digit(10).unwrap_or(0) as usize;
                if let Some(second) = chars.peek().and_then(|c| c.to_digit(10)) {
                    index = index * 10 + second as usize;
                    chars.next();
                }
                if index >= captures.len() {
                    return Err(format!("the pattern has no group {index}"));
                }
                captures.get(index)
            }
            Some(other) => {
                out.extend(['\\', other]);
                continue;
            }
        };
        out.push_str(group.map_or("", |m| m.as_str()));
    }
    Ok(())
}

/// Python's syntax in fancy-regex's: `$` and `\Z`, white space, braces and brackets that stand for themselves.
fn translate(pattern: &str) -> String {
    let chars: Vec<char> = pattern.chars().collect();
    // Under `(?m)` a `$` means the same in both.
    let multiline = pattern.starts_with("(?") && pattern[2..].split(')').next().is_some_and(|f| f.contains('m'));
    let (mut out, mut i, mut class) = (String::with_capacity(pattern.len() + 8), 0, None);
    while i < chars.len() {
        let c = chars[i];
        let next = chars.get(i + 1).copied();
        i += 1;
        match (c, class) {
            ('\\', inside) => {
                i += 1;
                match (next, inside.is_some()) {
                    // Python counts the four information separators as white space.
                    (Some('s'), false) => out.push_str(r"[\s\x1c-\x1f]"),
                    (Some('s'), true) => out.push_str(r"\s\x1c-\x1f"),
                    (Some('S'), false) => out.push_str(r"[^\s\x1c-\x1f]"),
                    (Some('Z'), false) => out.push_str(r"\z"),
                    (Some(other), _) if other.is_ascii() || other.is_alphanumeric() => out.extend(['\\', other]),
                    (Some(other), _) => out.push(other),
                    (None, _) => out.push('\\'),
                }
            }
            ('[', None) => {
                out.push('[');
                if next == Some('^') {
                    out.push('^');
                    i += 1;
                }
                // A bracket that closes right at the beginning stands for itself.
                if chars.get(i) == Some(&']') {
                    out.push_str(r"\]");
                    i += 1;
                }
                class = Some(());
            }
            (']', Some(())) => {
                out.push(']');
                class = None;
            }
            ('[' | '&' | '~', Some(())) => out.extend(['\\', c]),
            ('$', None) if !multiline => out.push_str(r"(?=\n?\z)"),
            ('{', None) => match quantifier(&chars[i..]) {
                Some(text) => {
                    i += text.chars().count();
                    out.push('{');
                    out.push_str(&if text.starts_with(',') { format!("0{text}") } else { text });
                }
                None => out.push_str(r"\{"),
            },
            ('}', None) => {
                out.push_str(if out.ends_with(|c: char| c.is_ascii_digit() || c == ',') { "}" } else { r"\}" })
            }
            (c, _) => out.push(c),
        }
    }
    out
}

/// What stands between the braces of a repetition (`2,`), if that is what it is.
fn quantifier(rest: &[char]) -> Option<String> {
    let inside: String = rest.iter().take_while(|c| **c != '}').collect();
    let closed = rest.len() > inside.chars().count();
    let numbers = inside.split(',').all(|n| n.chars().all(|c| c.is_ascii_digit()));
    (closed && numbers && inside.contains(|c: char| c.is_ascii_digit()) && inside.matches(',').count() < 2)
        .then_some(inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(pattern: &str, text: &str) -> Vec<Vec<String>> {
        PythonRegex::new(pattern).unwrap().find_all(text).unwrap()
    }

    fn sub(pattern: &str, replacement: &str, text: &str) -> String {
        PythonRegex::new(pattern).unwrap().sub(replacement, text, 0).unwrap()
    }

    #[test]
    fn matches_are_those_of_python() {
        // re.findall of Python 3.11.
        assert_eq!(all("(-?[$0-9.,]{2,})|(-?[0-9]+)", "a -1,200.50 b 3"), [["-1,200.50", ""], ["", "3"]]);
        assert_eq!(all("a", "banana"), [["a"], ["a"], ["a"]]);
        assert_eq!(all(r"end$", "the end\n"), [["end"]]);
        assert_eq!(all(r"end\Z", "the end\n"), [[""; 1]; 0]);
        assert_eq!(all(r"\d+", "٣4"), [["٣4"]]);
        assert_eq!(all(r"{x}", "{x}"), [["{x}"]]);
        assert_eq!(all("[[]x[]]", "[x]"), [["[x]"]]);
        assert_eq!(all("a{,2}", "aaa"), [["aa"], ["a"], [""]]);
    }

    #[test]
    fn replacements_are_those_of_python() {
        // re.sub of Python 3.11.
        assert_eq!(sub("x*", "-", "abxd"), "-a-b--d-");
        assert_eq!(sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", "f ( a b ) ( c )"), "f (a b) (c)");
        assert_eq!(sub(r"{\s*([^}]*?)\s*}", r"{\1}", "{ a } b"), "{a} b");
        assert_eq!(sub(r"(?s).*#### ", "", "a\nb #### 7"), "7");
        assert_eq!(sub(r"\.$", "", "7.\n"), "7\n");
        assert_eq!(sub(r"(?P<a>b)", r"\g<a>\g<1>\\", "abc"), "abb\\c");
        assert_eq!(PythonRegex::new("a").unwrap().sub("b", "aaa", 2).unwrap(), "bba");
    }

    #[test]
    fn a_pattern_that_is_none_is_refused() {
        assert!(PythonRegex::new("(a").unwrap_err().contains("invalid regular expression"));
        assert!(PythonRegex::new("a").unwrap().sub(r"\1", "a", 0).unwrap_err().contains("no group 1"));
    }
}
