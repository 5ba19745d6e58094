//! Which language a text is in, after langdetect (Nakatani Shuyo 2010): naive Bayes over n-grams of one to three letters.
//!
//! langdetect updates its probabilities with n-grams drawn at random until one language is certain; here every n-gram of
//! the text counts once, which is what its draws tend to. Its statistics come from langdetect's own profiles (see
//! `data/make.py`), all Han characters taken as one: Chinese is Chinese, simplified or not.
//!
//! Of the 3,990 verdicts about languages that `golden/ifeval.py --all` makes, 16 are others than langdetect's own, which
//! contradicts itself in 12; the crate `whatlang` 0.18, which has no Swahili, would make it 189.

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;

use super::patterns::fixed;

/// What IFEval asks for.
const CODES: [&str; 30] = [
    "en", "es", "pt", "ar", "hi", "fr", "ru", "de", "ja", "it", "bn", "uk", "th", "ur", "ta", "te", "bg", "ko", "pl",
    "he", "fa", "vi", "ne", "sw", "kn", "mr", "gu", "pa", "ml", "fi",
];

/// Only so many characters of a text are looked at, as in langdetect.
const MAX_CHARACTERS: usize = 10_000;

/// An ISO 639-1 code.
pub type Language = &'static str;

/// The language that IFEval has under this code.
pub fn by_code(code: &str) -> Option<Language> {
    CODES.into_iter().find(|known| *known == code)
}

/// `None`: no letter that any language would use.
pub fn detect(text: &str) -> Option<Language> {
    let text = letters(text);
    let mut scores = vec![0_u32; PROFILES.languages.len()];
    let mut found = false;
    for gram in grams(&text) {
        for (language, level) in PROFILES.grams.get(&gram).into_iter().flatten() {
            scores[*language] += level;
            found = true;
        }
    }
    let best = scores.iter().max()?;
    let first = scores.iter().position(|score| score == best)?;
    found.then_some(PROFILES.languages[first])
}

type Gram = [char; 3];

/// Fills up n-grams of fewer than three letters.
const NONE: char = '\0';

struct Profiles {
    languages: Vec<Language>,
    /// Levels: logarithms of how frequent an n-gram is, above what it weighs in a language that lacks it.
    grams: HashMap<Gram, Vec<(usize, u32)>>,
}

static PROFILES: LazyLock<Profiles> = LazyLock::new(|| {
    let mut lines = include_str!("data/languages.tsv").lines().filter(|line| !line.starts_with('#'));
    let languages = lines.next().unwrap_or_default().split(' ').collect();
    let names = ('A'..='Z').chain('a'..='z').chain('0'..='9');
    let order: HashMap<char, usize> = names.zip(0..).collect();
    let mut grams = HashMap::new();
    for line in lines {
        let mut cells = line.split('\t');
        let prefix = cells.next().unwrap_or_default();
        for cell in cells {
            let mut rest = cell.chars();
            let gram: Vec<char> = prefix.chars().chain(rest.next()).collect();
            let mut levels = Vec::new();
            while let (Some(name), Some(level)) = (rest.next(), rest.next()) {
                levels.push((order[&name], u32::from(level) - u32::from('!')));
            }
            grams.insert(pad(&gram), levels);
        }
    }
    Profiles { languages, grams }
});

fn pad(gram: &[char]) -> Gram {
    let mut padded = [NONE; 3];
    padded[..gram.len()].copy_from_slice(gram);
    padded
}

/// The characters that count: no addresses, and no Latin ones in a text that is mostly in another script.
fn letters(text: &str) -> Vec<char> {
    static ADDRESS: LazyLock<[Regex; 2]> = LazyLock::new(|| {
        [
            fixed(r"https?://[-_.?&~;+=/#0-9A-Za-z]{1,2076}"),
            fixed(r"[-_.0-9A-Za-z]{1,64}@[-_0-9A-Za-z]{1,255}[-_.0-9A-Za-z]{1,255}"),
        ]
    });
    let text = ADDRESS[0].replace_all(text, " ");
    let text = ADDRESS[1].replace_all(&text, " ");
    let mut letters: Vec<char> = text.chars().take(MAX_CHARACTERS).collect();
    letters.dedup_by(|one, before| *one == ' ' && *before == ' ');
    let latin = letters.iter().filter(|c| is_latin(**c)).count();
    let other = letters.iter().filter(|c| **c >= '\u{300}' && !('\u{1E00}'..='\u{1EFF}').contains(*c)).count();
    if latin * 2 < other {
        letters.retain(|c| !is_latin(*c));
    }
    letters
}

/// langdetect's range, with the six signs between the capitals and the small letters.
fn is_latin(c: char) -> bool {
    ('A'..='z').contains(&c)
}

/// What langdetect counts a character as; a space for all that is no letter.
fn normal(c: char) -> char {
    match c {
        'A'..='Z' | 'a'..='z' => c,
        '\0'..='\x7f' | '\u{a0}' | '«' | '°' | '»' | '\u{2000}'..='\u{206f}' => ' ',
        'ș' => 'ş',
        'ț' => 'ţ',
        'ی' => 'ي',
        '\u{1ea0}'..='\u{1eff}' => 'ể',
        '\u{3040}'..='\u{309f}' => 'あ',
        '\u{30a0}'..='\u{30ff}' => 'ア',
        '\u{3100}'..='\u{312f}' | '\u{31a0}'..='\u{31bf}' => 'ㄅ',
        '\u{4e00}'..='\u{9fff}' => '一',
        '\u{ac00}'..='\u{d7af}' => '가',
        c => c,
    }
}

/// Letters of Greek, Hebrew, Bengali, Gurmukhi, Gujarati, Tamil, Telugu, Kannada, Malayalam and Thai: each tells the
/// language, so the table has no longer n-grams of them, and a longer one counts as its last letter.
fn has_own_script(c: char) -> bool {
    matches!(c, '\u{370}'..='\u{3ff}' | '\u{590}'..='\u{5ff}' | '\u{980}'..='\u{aff}' | '\u{b80}'..='\u{d7f}' | '\u{e00}'..='\u{e7f}')
}

/// The n-grams of a text. Within a word of capitals there are none beyond its first letter, but those that end in the
/// space after it.
fn grams(text: &[char]) -> Vec<Gram> {
    let mut grams = Vec::new();
    let mut last = vec![' '];
    let mut capitals = false;
    for letter in text.iter().map(|c| normal(*c)) {
        let before = last.last().copied().unwrap_or(' ');
        if before == ' ' {
            if letter == ' ' {
                continue;
            }
            last = vec![' '];
        } else if last.len() == 3 {
            last.remove(0);
        }
        last.push(letter);
        capitals = letter.is_uppercase() && (capitals || before.is_uppercase());
        if !capitals {
            let from = |start: usize| if has_own_script(letter) { &last[last.len() - 1..] } else { &last[start..] };
            grams.extend((0..last.len()).map(|start| pad(from(start))));
        }
    }
    grams
}
