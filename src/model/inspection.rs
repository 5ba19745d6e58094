//! What a checkpoint is, module by module, and everything that is wrong with it at once.

use super::ModelConfig;
use super::consistency::{self, Notes};
use crate::checkpoint::Checkpoint;

/// One module as the checkpoint has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub module: String,
    pub weight: String,
    pub activation: String,
    /// Outputs and inputs.
    pub shape: [usize; 2],
    /// In the files.
    pub bytes: usize,
    pub notes: Vec<&'static str>,
}

/// What was found: what can be read is there, and what cannot is a problem.
#[derive(Clone, Debug, Default)]
pub struct Inspection {
    pub config: Option<ModelConfig>,
    pub rows: Vec<Row>,
    /// What the files say twice and differently.
    pub notes: Vec<String>,
    pub problems: Vec<String>,
}

impl Inspection {
    /// Looks at all that is there.
    #[must_use]
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let mut out = Self::default();
        match ModelConfig::read(&checkpoint.config).and_then(|c| c.untied_where_stored(checkpoint)) {
            Ok(config) => out.config = Some(config),
            Err(e) => out.problems.push(e.to_string()),
        }
        out.notes = match out.config.as_ref().map(|c| consistency::notes(checkpoint, c)) {
            Some(Ok(Notes { important, minor })) => [important, minor].concat(),
            Some(Err(e)) => {
                out.problems.push(e.to_string());
                Vec::new()
            }
            None => checkpoint.notes.clone(),
        };
        out
    }

    /// Resolves every module; what fails becomes a problem instead of the end.
    pub fn resolve(&mut self, checkpoint: &Checkpoint) {
        let Some(config) = &self.config else { return };
        for m in config.modules() {
            match checkpoint.linear(&m.name, m.role) {
                Ok(t) => {
                    let parts =
                        [("pre_quant_scale", t.pre_quant_scale.is_some()), ("bias", t.bias.is_some())].into_iter();
                    self.rows.push(Row {
                        weight: t.weight_format().into(),
                        activation: t.activation.to_string(),
                        shape: [t.n, t.k],
                        bytes: t.stored_bytes(),
                        module: m.name,
                        notes: parts.filter(|(_, there)| *there).map(|(part, _)| part).collect(),
                    });
                }
                Err(e) => self.problems.push(e.to_string()),
            }
        }
        let vectors = config.vectors().into_iter().map(|(name, shape)| checkpoint.floats(&name, &shape).err());
        self.problems.extend(vectors.flatten().map(|e| e.to_string()));
        let scales = config.attentions().into_iter().map(|(_, module, _)| checkpoint.kv_scales(&module).err());
        self.problems.extend(scales.flatten().map(|e| e.to_string()));
        // Tensors of modules that failed are not leftovers of their own.
        if self.problems.is_empty()
            && let Err(e) = checkpoint.finish()
        {
            self.problems.push(e.to_string());
        }
    }

    /// Parameters of the linears that were resolved; nothing where none was.
    #[must_use]
    pub fn parameters(&self) -> Option<usize> {
        Some(self.rows.iter().map(|r| r.shape[0] * r.shape[1]).sum()).filter(|n| *n > 0)
    }
}
