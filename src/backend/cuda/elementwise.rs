//! What stands between products in some architectures only: activations, gates, factors, picked columns (kernels/rows.cu).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{Args, Memory};
use super::{CudaBackend, CudaTensor};
use crate::backend::{Activation, BackendError, Result, Run};

/// Lists of runs that are remembered at most.
const REMEMBERED: usize = 4096;

/// A list of runs, and its columns on the device.
type Uploaded = (Vec<Run>, Arc<Memory>);

/// Columns of rearranged tensors as the kernel reads them, by where the list of their runs lies; that may lie elsewhere later, so
/// the list is compared.
#[derive(Debug, Default)]
pub(super) struct Columns(Mutex<HashMap<usize, Uploaded>>);

/// Number and limit of an activation as kernels/activation.cuh has them.
pub(super) fn activation_number(activation: Activation) -> (usize, f32) {
    match activation {
        Activation::Relu2 => (0, 0.0),
        Activation::GeluTanh => (1, 0.0),
        Activation::ClampedSwiglu { limit } => (2, limit),
        Activation::Silu => (3, 0.0),
    }
}

impl CudaBackend {
    /// [`crate::backend::Backend::activate`].
    pub(super) fn activated(
        &self,
        x: CudaTensor,
        up: Option<&CudaTensor>,
        activation: Activation,
    ) -> Result<CudaTensor> {
        if activation.is_gated() != up.is_some() {
            let gate = if up.is_some() { "with" } else { "without" };
            let message = format!("{activation:?} {gate} a gate is no activation");
            return Err(BackendError::Failed { context: "activate", message });
        }
        let (kind, limit) = activation_number(activation);
        let x = self.own(self.settle(x)?)?;
        let up = up.map(|up| self.settled(up)).transpose()?;
        let args =
            Args::new().memory(&x.data).optional(up.as_ref().map(|up| &*up.data)).int(kind).float(limit).int(x.columns);
        self.launch("activate", [x.rows, 1, 1], 128, args)?;
        Ok(x)
    }

    /// [`crate::backend::Backend::gate`].
    pub(super) fn gated(&self, x: CudaTensor, gate: &CudaTensor) -> Result<CudaTensor> {
        let (x, gate) = (self.own(self.settle(x)?)?, self.settled(gate)?);
        let args = Args::new().memory(&x.data).memory(&gate.data).int(gate.columns).int(x.columns);
        self.launch("gate", [x.rows, 1, 1], 128, args)?;
        Ok(x)
    }

    /// [`crate::backend::Backend::scale`].
    pub(super) fn scaled(&self, x: CudaTensor, factor: f32) -> Result<CudaTensor> {
        let x = self.own(self.settle(x)?)?;
        self.launch("scale", [x.rows, 1, 1], 128, Args::new().memory(&x.data).float(factor).int(x.columns))?;
        Ok(x)
    }

    /// [`crate::backend::Backend::rearrange`], of two tensors at most.
    pub(super) fn rearranged(&self, sources: &[&CudaTensor], runs: &[Run]) -> Result<CudaTensor> {
        let failed = |message: String| BackendError::Failed { context: "rearranging columns", message };
        let (first, second) = match sources {
            [first] => (*first, None),
            [first, second] => (*first, Some(*second)),
            _ => return Err(failed(format!("of {} tensors; one or two", sources.len()))),
        };
        let inside = |r: &Run| sources.get(r.source).is_some_and(|s| r.first + r.count <= s.columns);
        if let Some(run) = runs.iter().find(|r| !inside(r)) {
            return Err(failed(format!("{run:?} is not within its tensor")));
        }
        let columns = self.columns(runs)?;
        let (a, b) = (self.settled(first)?, second.map(|b| self.settled(b)).transpose()?);
        let out = self.empty(a.rows, runs.iter().map(|r| r.count).sum())?;
        let args = Args::new()
            .memory(&a.data)
            .optional(b.as_ref().map(|b| &*b.data))
            .int(a.columns)
            .int(b.as_ref().map_or(0, |b| b.columns))
            .memory(&columns)
            .memory(&out.data)
            .int(out.columns);
        self.launch("rearrange", [out.rows, 1, 1], 128, args)?;
        Ok(out)
    }

    /// Of each column of what `runs` make: that of the first tensor, or -1 - that of the second. Uploaded once.
    fn columns(&self, runs: &[Run]) -> Result<Arc<Memory>> {
        let mut held = self.columns.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = runs.as_ptr() as usize;
        if let Some((_, columns)) = held.get(&place).filter(|(of, _)| of == runs) {
            return Ok(columns.clone());
        }
        let of_run = |r: &Run| {
            let second = r.source == 1;
            (r.first..r.first + r.count).map(move |c| if second { -1 - c as i32 } else { c as i32 })
        };
        let columns: Vec<i32> = runs.iter().flat_map(of_run).collect();
        let columns = Arc::new(self.device.upload(&columns)?);
        if held.len() >= REMEMBERED {
            held.clear();
        }
        held.insert(place, (runs.to_vec(), columns.clone()));
        Ok(columns)
    }
}
