//! Whether Python's `json.loads` takes a text: JSON, with NaN, infinities and halves of surrogate pairs besides.

/// Python turns no longer integer into a number (`sys.int_info.default_max_str_digits`).
const MAX_INTEGER_DIGITS: usize = 4300;

pub fn is_json(text: &str) -> bool {
    let mut reader = Reader(text.as_bytes());
    reader.document().is_some() && reader.0.is_empty()
}

/// What is yet to be read.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    /// No recursion: depth is what a response likes.
    fn document(&mut self) -> Option<()> {
        let mut closers: Vec<u8> = Vec::new();
        loop {
            self.spaces();
            if self.take(b"{") {
                self.spaces();
                if !self.take(b"}") {
                    self.key()?;
                    closers.push(b'}');
                    continue;
                }
            } else if self.take(b"[") {
                self.spaces();
                if !self.take(b"]") {
                    closers.push(b']');
                    continue;
                }
            } else {
                self.scalar()?;
            }
            loop {
                self.spaces();
                let Some(closer) = closers.last() else { return Some(()) };
                if self.take(b",") {
                    if *closer == b'}' {
                        self.spaces();
                        self.key()?;
                    }
                    break;
                }
                self.expect(&[*closer])?;
                closers.pop();
            }
        }
    }

    fn key(&mut self) -> Option<()> {
        self.expect(b"\"")?;
        self.string()?;
        self.spaces();
        self.expect(b":")
    }

    fn scalar(&mut self) -> Option<()> {
        if self.take(b"\"") {
            return self.string();
        }
        let words: [&[u8]; 6] = [b"null", b"true", b"false", b"NaN", b"Infinity", b"-Infinity"];
        if words.iter().any(|word| self.take(word)) { Some(()) } else { self.number() }
    }

    /// After its opening quote.
    fn string(&mut self) -> Option<()> {
        loop {
            match self.next()? {
                b'"' => return Some(()),
                b'\\' => match self.next()? {
                    b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {}
                    b'u' => (0..4).try_for_each(|_| self.next().filter(u8::is_ascii_hexdigit).map(|_| ()))?,
                    _ => return None,
                },
                0..=0x1f => return None,
                _ => {}
            }
        }
    }

    fn number(&mut self) -> Option<()> {
        self.take(b"-");
        let integer = if self.take(b"0") { 1 } else { self.digits() };
        if integer == 0 {
            return None;
        }
        // Whatever of a fraction or exponent is not complete stays unread, and is refused as more than one value.
        let before = self.0;
        let fraction = self.take(b".") && self.digits() > 0;
        if !fraction {
            self.0 = before;
        }
        let before = self.0;
        let exponent = (self.take(b"e") || self.take(b"E")) && {
            let _ = self.take(b"-") || self.take(b"+");
            self.digits() > 0
        };
        if !exponent {
            self.0 = before;
        }
        (fraction || exponent || integer <= MAX_INTEGER_DIGITS).then_some(())
    }

    fn digits(&mut self) -> usize {
        let digits = self.0.iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.0 = &self.0[digits..];
        digits
    }

    fn spaces(&mut self) {
        self.0 = &self.0[self.0.iter().take_while(|byte| b" \t\n\r".contains(byte)).count()..];
    }

    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn take(&mut self, start: &[u8]) -> bool {
        self.0.strip_prefix(start).map(|rest| self.0 = rest).is_some()
    }

    fn expect(&mut self, start: &[u8]) -> Option<()> {
        self.take(start).then_some(())
    }
}
