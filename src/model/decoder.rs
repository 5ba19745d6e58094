//! The decoder of every architecture, written once over [`Backend`].

use std::borrow::Borrow;
use std::collections::HashMap;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex};

use super::blocks::Blocks;
use super::layer::Layer;
use crate::backend::observe::{FirstBroken, Observed, Observer, held};
use crate::backend::rounded::{Rounded, Rounding};
use crate::backend::{self, Backend, BackendError, Batch, Named, one};
use crate::checkpoint::CheckpointError;

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// A decoder on backend `B`: its layers, and what stands before and behind them.
pub struct Decoder<B: Backend> {
    pub(super) blocks: Blocks<B>,
    pub(super) embedding: Named<B::Linear>,
    pub(super) norm: Named<B::Vector>,
    /// `None`: the embedding's weight is the head's.
    pub(super) head: Option<Named<B::Linear>>,
}

impl<B: Backend> Deref for Decoder<B> {
    type Target = Blocks<B>;

    fn deref(&self) -> &Blocks<B> {
        &self.blocks
    }
}

impl<B: Backend> Borrow<Blocks<B>> for Decoder<B> {
    fn borrow(&self) -> &Blocks<B> {
        &self.blocks
    }
}

impl<B: Backend> DerefMut for Decoder<B> {
    fn deref_mut(&mut self) -> &mut Blocks<B> {
        &mut self.blocks
    }
}

/// Which tokens of a batch get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Every token.
    All,
    /// The last of each span.
    Last,
}

impl<B: Backend> Decoder<B> {
    /// Every linear, embedding and head included, in the order of the forward pass.
    pub fn linears(&self) -> impl Iterator<Item = &Named<B::Linear>> {
        std::iter::once(&self.embedding).chain(self.layer_linears()).chain(&self.head)
    }

    /// Every norm or other vector and the decoder layer it is in (`None`: after the last).
    pub fn vectors(&self) -> impl Iterator<Item = (Option<usize>, &Named<B::Vector>)> {
        self.layer_vectors().map(|(i, n)| (Some(i), n)).chain(std::iter::once((None, &self.norm)))
    }

    /// The embedding.
    #[must_use]
    pub fn embedding(&self) -> &B::Linear {
        &self.embedding
    }

    /// This model with some layers taken from `donor`, a model of the same shape (its quantized form, say): the linears
    /// whose module `swap` names, and the vectors of decoder layers all of whose linears it names. Weights are shared, not
    /// copied.
    #[must_use]
    pub fn graft(&self, donor: &Self, swap: &dyn Fn(&str) -> bool) -> Self {
        let linears: HashMap<&str, &Named<B::Linear>> = donor.linears().map(|l| (&*l.name, l)).collect();
        let vectors: HashMap<&str, &Named<B::Vector>> = donor.vectors().map(|(_, n)| (&*n.name, n)).collect();
        let linear = |own: &Named<B::Linear>| {
            let other = linears.get(&*own.name).filter(|l| swap(&l.name));
            other.map_or_else(|| own.clone(), |l| (*l).clone())
        };
        let layer = |own: &Layer<B>| {
            let all = own.linears().iter().all(|l| swap(&l.name));
            own.map(linear, |n: &Named<B::Vector>| {
                let other = vectors.get(&*n.name).filter(|_| all);
                other.map_or_else(|| n.clone(), |n| (*n).clone())
            })
        };
        Self {
            blocks: self.blocks.map(self.backend.clone(), layer),
            embedding: linear(&self.embedding),
            head: self.head.as_ref().map(linear),
            norm: self.norm.clone(),
        }
    }

    /// This model, its weights shared, with an observer.
    #[must_use]
    pub fn observed(&self, observer: Box<dyn Observer + Send>) -> Decoder<Observed<B>> {
        let linear = |l: &Named<B::Linear>| Named::new(l.name.clone(), l.clone());
        let backend = Arc::new(Observed::shared(self.backend.clone(), observer));
        Decoder {
            blocks: self.blocks.map(backend, |l| l.map(linear, Named::clone)),
            embedding: linear(&self.embedding),
            norm: self.norm.clone(),
            head: self.head.as_ref().map(linear),
        }
    }

    /// This model, its weights shared, computed with every result rounded.
    #[must_use]
    pub fn rounded(&self, rounding: Rounding) -> Decoder<Rounded<B>> {
        let backend = Arc::new(Rounded::shared(self.backend.clone(), rounding));
        Decoder {
            blocks: self.blocks.map(backend, |l| l.map(Named::clone, Named::clone)),
            embedding: self.embedding.clone(),
            norm: self.norm.clone(),
            head: self.head.clone(),
        }
    }

    /// Runs `batch` and returns logits [wanted tokens, vocab].
    ///
    /// # Errors
    /// As [`Self::hidden`].
    pub fn forward(&self, batch: &Batch, cache: &mut B::Cache, wanted: Wanted) -> backend::Result<B::Tensor> {
        let mut x = self.hidden(batch, cache)?;
        if wanted == Wanted::Last {
            let ends = batch.spans.iter().scan(0, |end, s| {
                *end += s.len;
                Some(*end - 1)
            });
            x = self.backend.select_rows(&x, &ends.collect::<Vec<_>>())?;
        }
        self.logits(&x)
    }

    /// Logits [rows, vocab] of rows of [`Self::hidden`].
    ///
    /// # Errors
    /// The backend's own failure, or logits that are not finite.
    pub fn logits(&self, hidden: &B::Tensor) -> backend::Result<B::Tensor> {
        self.head_logits(&self.final_norm(hidden)?)
    }

    /// Logits [rows, vocab] of what enters the head, [rows, hidden].
    ///
    /// # Errors
    /// As [`Self::logits`].
    pub fn head_logits(&self, normed: &B::Tensor) -> backend::Result<B::Tensor> {
        let logits = one(self.backend.linears(normed, &[self.head()])?)?;
        if self.backend.is_finite(&logits)? {
            return Ok(logits);
        }
        let first = Arc::new(Mutex::new(FirstBroken::default()));
        let watched = self.observed(Box::new(first.clone()));
        watched.backend.linears(normed, &[watched.head()])?;
        Err(self.broken(held(&first).found()))
    }

    fn broken(&self, found: Option<(String, f32)>) -> BackendError {
        let (place, value) = found.unwrap_or_else(|| ("what comes out of the head".into(), f32::NAN));
        BackendError::NotFinite { model: self.folder.clone(), place, value }
    }

    /// What enters the head, [rows, hidden], of rows of [`Self::hidden`].
    ///
    /// # Errors
    /// The backend's own failure.
    pub fn final_norm(&self, hidden: &B::Tensor) -> backend::Result<B::Tensor> {
        self.backend.rms_norm(hidden, &self.norm, self.config.rms_eps)
    }

    /// The head; the embedding, where the two are tied.
    #[must_use]
    pub fn head(&self) -> &B::Linear {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Runs `batch` and returns what leaves the last layer, [tokens, hidden], before the final norm.
    ///
    /// # Errors
    /// A token outside the vocabulary, a cache too small, the backend's own failure, or states that are not finite.
    pub fn hidden(&self, batch: &Batch, cache: &mut B::Cache) -> backend::Result<B::Tensor> {
        let pass = self.pass(batch)?;
        self.blocks(0..self.layers.len(), &|| self.embed(&pass), &pass, cache)
    }

    /// What leaves the last of the decoder layers `range` when what `enter` gives, [tokens, hidden], enters the first.
    ///
    /// A residual stream keeps what is no number, and what is so large that its square is none and a norm makes zeros of it,
    /// so it is looked at once, at the end; where something is, the layers run again to find the first module that gives it
    /// (over the same cache, which changes nothing in what attention keeps; recurrent states have moved on).
    ///
    /// # Errors
    /// As [`Self::block`]; and when what leaves is not finite: with the first module to blame.
    pub fn blocks(
        &self,
        range: Range<usize>,
        enter: &dyn Fn() -> backend::Result<B::Tensor>,
        pass: &B::Pass,
        cache: &mut B::Cache,
    ) -> backend::Result<B::Tensor> {
        let x = self.run(range.clone(), enter()?, pass, cache)?;
        let width = self.config.hidden;
        if self.backend.squares_finite(&x, width)? {
            return Ok(x);
        }
        let first = Arc::new(Mutex::new(FirstBroken::default()));
        let watched = self.observed(Box::new(first.clone()));
        let found = || held(&first).found();
        if range.start == 0 {
            watched.embed(pass)?;
        }
        let mut x = enter()?;
        let mut place = format!("the square of what enters `{}.{}`", self.config.names.layers, range.start);
        for index in range {
            if found().is_some() || !self.backend.squares_finite(&x, width)? {
                break;
            }
            x = watched.block(index, x, pass, cache)?;
            place = format!("the square of what leaves `{}.{index}`", self.config.names.layers);
        }
        Err(self.broken(found().or(Some((place, f32::INFINITY)))))
    }

    /// Embeddings of a pass's tokens, [tokens, hidden].
    ///
    /// # Errors
    /// A token outside the vocabulary, or the backend's own failure.
    pub fn embed(&self, pass: &B::Pass) -> backend::Result<B::Tensor> {
        let embedded = self.backend.embed(&self.embedding, pass)?;
        match self.config.embedding_scale {
            Some(factor) => self.backend.scale(embedded, factor),
            None => Ok(embedded),
        }
    }
}
