//! What training made of a checkpoint: written, and held against what it was.

use std::path::Path;

use super::{RecoverError, Result};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::store::{Content, content};
use crate::checkpoint::fused::FusedTensor;
use crate::checkpoint::write::{FolderWriter, Pending, SHARD_BYTES, metadata};
use crate::formats::linear::{BlockScales, Element};
use crate::model::{LoadError, ModelConfig};

/// Tensors that training gives in the place of a checkpoint's. Names are those of modules, or of tensors that are no linear's.
pub trait Trained {
    /// Whether it has elements of `name`, or scales.
    fn has(&self, name: &str, content: Content) -> bool;

    /// Those, as the checkpoint holds them.
    fn bytes(&self, name: &str, content: Content) -> Option<Vec<u8>>;
}

impl<T: Trained + ?Sized> Trained for &T {
    fn has(&self, name: &str, content: Content) -> bool {
        (**self).has(name, content)
    }

    fn bytes(&self, name: &str, content: Content) -> Option<Vec<u8>> {
        (**self).bytes(name, content)
    }
}

/// Writes what was trained: the checkpoint it came from with other codes, and `files` about how it was trained.
///
/// # Errors
/// When `out` is in the way or cannot be written.
pub fn write(from: &Checkpoint, trained: &dyn Trained, files: &[(&str, Vec<u8>)], out: &Path) -> Result<()> {
    let writer = FolderWriter::create(out)?;
    let tensor = |name| {
        let view = from.tensors.peek(name)?;
        let stored = from.tensors.stored_name(name);
        if let Some(fused) = FusedTensor::of(from, name) {
            return Some(Pending::new(stored, view.dtype, view.shape, move || {
                Ok(fused.with(view.bytes, &|module, content| trained.bytes(module, content)))
            }));
        }
        let part = str::rsplit_once(name, '.').and_then(|(module, suffix)| Some((module, content(suffix)?)));
        // A tensor of a linear, or one that is no linear's.
        let own =
            part.into_iter().chain([(name, Content::Elements)]).find(|(module, content)| trained.has(module, *content));
        let Some((module, content)) = own else { return Pending::copy(&from.tensors, name) };
        Some(Pending::new(stored, view.dtype, view.shape, move || {
            Ok(trained.bytes(module, content).unwrap_or_default())
        }))
    };
    let own = from.tensors.names().filter_map(tensor);
    let tensors: Vec<Pending<'_, RecoverError>> = own.chain(Pending::aside(&from.tensors)).collect();
    writer.tensors(tensors, SHARD_BYTES, &metadata([]))?;
    writer.copy_settings(from.tensors.folder())?;
    files.iter().try_for_each(|(name, contents)| writer.file(name, contents))?;
    writer.copy_text_files(from.tensors.folder())?;
    writer.commit()?;
    Ok(())
}

/// How much of what `from` holds is another in what was `trained` of it.
///
/// # Errors
/// When a tensor cannot be read.
pub fn changed(from: &Checkpoint, trained: &dyn Trained) -> Result<Changed> {
    let mut changed = Changed::default();
    for m in ModelConfig::read(&from.config).map_err(LoadError::from)?.modules() {
        if !m.is_block_linear() {
            continue;
        }
        let before = from.linear(&m.name, m.role)?;
        if before.element.is_float() {
            continue;
        }
        match trained.bytes(&m.name, Content::Elements) {
            Some(codes) => changed.codes.count(&before.data, &codes, before.element == Element::E2m1),
            None => changed.codes.all += m.role.n * m.role.k,
        }
        if let BlockScales::E4m3 { codes, .. } = &before.block_scales
            && let Some(scales) = trained.bytes(&m.name, Content::Scales)
        {
            changed.scales.count(codes, &scales, false);
        }
        from.tensors.release_pages();
    }
    Ok(changed)
}

/// How many of a student's codes training moved to others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Changed {
    /// Of weights.
    pub codes: Count,
    /// Of block scales, where they were learned.
    pub scales: Count,
}

/// So many of so many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Count {
    pub changed: usize,
    pub all: usize,
}

impl Count {
    /// Counts the codes of `before` and `after`, two to a byte or one. A zero is one, whatever its sign: what training rounds anew
    /// has none, and the tools write both.
    fn count(&mut self, before: &[u8], after: &[u8], nibbles: bool) {
        let differ = |a: u8, b: u8, negative_zero: u8| {
            let plain = |code: u8| if code == negative_zero { 0 } else { code };
            usize::from(plain(a) != plain(b))
        };
        let codes = |(a, b): (&u8, &u8)| match nibbles {
            true => differ(a & 15, b & 15, 8) + differ(a >> 4, b >> 4, 8),
            false => differ(*a, *b, 0x80),
        };
        self.changed += before.iter().zip(after).map(codes).sum::<usize>();
        self.all += before.len().max(after.len()) * if nibbles { 2 } else { 1 };
    }

    /// The share that changed; of nothing, none.
    #[must_use]
    pub fn share(self) -> f64 {
        self.changed as f64 / self.all.max(1) as f64
    }
}
