//! SHA-256, in hexadecimal.

use std::io::Read;

use sha2::Digest as _;

/// Of pieces, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Sha256(sha2::Sha256);

impl Sha256 {
    /// Of nothing so far.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a piece.
    pub fn update(&mut self, piece: impl AsRef<[u8]>) {
        self.0.update(piece);
    }

    /// Of all pieces: 64 digits, in small letters.
    #[must_use]
    pub fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Of `bytes`.
#[must_use]
pub fn sha256(bytes: impl AsRef<[u8]>) -> String {
    let mut hash = Sha256::new();
    hash.update(bytes);
    hash.finish()
}

/// Of all that `source` has left.
///
/// # Errors
/// When it cannot be read.
pub fn sha256_of(mut source: impl Read) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return Ok(hash.finish()),
            Ok(n) => hash.update(&buffer[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standards_example_in_one_piece_and_in_several() {
        // FIPS 180-4's example, printf abc | sha256sum.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256("abc"), abc);
        assert_eq!(sha256_of(&b"abc"[..]).unwrap(), abc);
        let mut pieces = Sha256::new();
        ["a", "", "bc"].iter().for_each(|piece| pieces.update(piece));
        assert_eq!(pieces.finish(), abc);
    }
}
