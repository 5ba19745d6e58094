//! What is trained: a model that is in memory, or one that is there a block at a time.

use super::streamed::Streamed;
use super::student::Student;
use super::written::Trained;
use crate::backend::autograd::AutogradBackend;
use crate::model::Decoder;

/// A student with its teacher.
pub enum Trainee<'a> {
    /// Both in memory. Without a teacher only the text is learned from.
    Whole { student: Box<Student>, teacher: Option<Box<Decoder<AutogradBackend>>> },
    /// A block of each at a time.
    Streamed(Box<Streamed<'a>>),
}

impl Trainee<'_> {
    /// What training made of the student.
    #[must_use]
    pub fn trained(&self) -> Box<dyn Trained + '_> {
        match self {
            Self::Whole { student, .. } => Box::new(student.trained()),
            Self::Streamed(model) => Box::new(&**model),
        }
    }

    /// Whether some weights have four bits.
    #[must_use]
    pub fn coarse(&self) -> bool {
        match self {
            Self::Whole { student, .. } => student.parameters.iter().any(|p| p.has_four_bits()),
            Self::Streamed(model) => model.sizes.iter().any(|s| s.coarse),
        }
    }

    /// How many linears are quantized, and the weights that these have.
    #[must_use]
    pub fn quantized(&self) -> (usize, usize) {
        match self {
            Self::Whole { student, .. } => {
                let quantized = student.parameters.iter().filter(|p| p.is_quantized());
                quantized.fold((0, 0), |(count, weights), p| (count + 1, weights + p.master().len()))
            }
            Self::Streamed(model) => {
                model.sizes.iter().fold((0, 0), |(count, weights), s| (count + s.linears, weights + s.quantized))
            }
        }
    }
}
