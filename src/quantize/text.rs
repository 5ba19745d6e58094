//! What a model is calibrated on: windows of a text, documents and conversations, or token ids as they are.

use std::path::Path;

use recoup_ground::digest::Sha256;
use recoup_ground::records;

use super::QuantizeError;
use crate::corpus::{self, CorpusError, Documents, Enough, Opened, Reader};
use crate::text::ModelText;

/// What a model is calibrated on.
#[derive(Clone, Debug, PartialEq)]
pub struct CalibrationText {
    /// Token ids.
    pub sequences: Vec<Vec<u32>>,
    /// Where they came from, for the checkpoint's metadata.
    pub description: String,
}

/// How much of a text is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amount {
    /// Windows, or documents and conversations.
    pub samples: usize,
    /// Tokens in each at most.
    pub length: usize,
}

impl CalibrationText {
    /// For a recipe that runs no text.
    #[must_use]
    pub fn none() -> Self {
        Self { sequences: Vec::new(), description: "none needed".into() }
    }

    /// `amount` of what `source` holds, or of the built-in text where there is none, for a model with that many
    /// `positions`. Token ids need no `text` of the model; `note` is told what of the source is not used.
    ///
    /// # Errors
    /// A source that cannot be read or holds nothing; those of `text`.
    pub fn read<E: From<QuantizeError>>(
        source: Option<&Path>,
        amount: Amount,
        positions: usize,
        text: impl FnOnce() -> Result<ModelText, E>,
        note: &mut dyn FnMut(&str),
    ) -> Result<Self, E> {
        let amount = Amount { length: amount.length.min(positions), ..amount };
        let Some(source) = source else {
            return Ok(Self::windows("built-in text", corpus::BUILT_IN, amount, &text()?)?);
        };
        let name = records::distinct_file_names(&[source.into()], &[]).remove(0);
        let opened = Opened::read(source).map_err(QuantizeError::from)?;
        if let Some(rows) = opened.token_ids().map_err(QuantizeError::from)? {
            if let Some(row) = rows.iter().find(|r| r.len() > positions) {
                let long = format!("a row of {} tokens, but the model has {positions} positions", row.len());
                return Err(QuantizeError::Text { of: source.display().to_string(), detail: long }.into());
            }
            return Ok(Self { sequences: rows, description: name });
        }
        match (opened.texts.is_empty(), opened.records.is_empty()) {
            (true, _) => Ok(Self::documents(&name, &opened, amount, text()?, note)?),
            (false, true) => Ok(Self::windows(&name, &opened.texts.join("\n\n"), amount, &text()?)?),
            (false, false) => Err(QuantizeError::Text {
                of: source.display().to_string(),
                detail: "texts and records side by side; calibrate on one kind of file".into(),
            }
            .into()),
        }
    }

    /// Evenly spaced windows of a text.
    fn windows(name: &str, text: &str, amount: Amount, of_model: &ModelText) -> Result<Self, QuantizeError> {
        let tokens = of_model.tokenizer().encode(text, false).map_err(CorpusError::from)?;
        let sequences = corpus::windows(&tokens, amount.samples, amount.length);
        let Some(first) = sequences.first() else {
            return Err(QuantizeError::Text { of: name.into(), detail: "the calibration text is empty".into() });
        };
        Ok(Self { description: format!("{name}, {} x {} tokens", sequences.len(), first.len()), sequences })
    }

    /// Documents, and conversations by the model's chat template: each of the length at most, evenly spaced over the file.
    fn documents(
        name: &str,
        opened: &Opened,
        Amount { samples, length }: Amount,
        text: ModelText,
        note: &mut dyn FnMut(&str),
    ) -> Result<Self, QuantizeError> {
        let reader = Reader { text, assistant_only: false, ends: false };
        let Documents { texts, whole, ids, mut counts } =
            reader.read(opened, Enough { records: Some(samples), tokens: None })?;
        let documents = [texts, whole, ids].concat();
        // Of several files each gave its share, rounded up.
        let wanted = samples.min(documents.len());
        let mut documents: Vec<_> = (0..wanted).map(|i| documents[i * documents.len() / wanted].clone()).collect();
        let taken = documents.len();
        documents.retain(|d| !d.tokens.is_empty());
        counts.nothing_to_learn = taken - documents.len();
        let mut sequences = Vec::new();
        for mut document in documents {
            let lost = document.cut(length);
            counts.tokens_cut += lost;
            counts.cut += usize::from(lost > 0);
            sequences.push(document.tokens);
        }
        if sequences.is_empty() {
            return Err(QuantizeError::Text { of: name.into(), detail: "the calibration file is empty".into() });
        }
        counts.notes(name, length).iter().for_each(|n| note(n));
        let cut = if counts.cut > 0 { format!(", {} of them cut", counts.cut) } else { String::new() };
        Ok(Self {
            description: format!("{name}, {} documents of {length} tokens at most{cut}", sequences.len()),
            sequences,
        })
    }

    /// The description with a hash of the tokens.
    pub(super) fn described(&self) -> String {
        let mut hash = Sha256::new();
        for sequence in &self.sequences {
            hash.update((sequence.len() as u64).to_le_bytes());
            sequence.iter().for_each(|t| hash.update(t.to_le_bytes()));
        }
        format!("{}; sha256 of the tokens {}", self.description, hash.finish())
    }
}
