//! What a rank's machine takes for each thing: measured here, or a maker's figures.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::timeline::rounds;
use crate::backend::parallel::paper::Work;
use crate::backend::{Backend, BackendError};
use crate::evaluate::bench::devices::Device;
use crate::evaluate::throughput;
use crate::formats::linear::LinearTensors;
use crate::ranks::Link;

/// What goes between two ranks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Wire {
    /// Seconds of a message without content.
    pub latency: f64,
    /// Bytes a second, into one rank.
    pub bandwidth: f64,
}

impl Wire {
    /// Seconds that the content of a message takes.
    #[must_use]
    pub fn carries(&self, bytes: usize) -> f64 {
        bytes as f64 / self.bandwidth
    }
}

/// Unit costs of one rank while all of them work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// Bytes a second of weights that one token reads.
    pub memory: f64,
    /// Multiply-adds a second of many tokens, of floats and of integers.
    pub floats: f64,
    pub integers: f64,
    /// Seconds of an operation without work: a launch.
    pub call: f64,
    /// Bytes a second between host and device, where what goes between ranks goes over the host.
    pub copies: Option<f64>,
    /// Between ranks of one machine, and of two.
    pub near: Wire,
    pub far: Wire,
    /// Ranks of a machine.
    pub node: usize,
}

/// Tokens that are many.
const MANY: usize = 256;
/// Times that a message is sent to be measured.
const MESSAGES: usize = 200;
/// Values of a large one.
const LARGE: usize = 1 << 20;

/// Seconds of a launch within a graph, of a message between GPUs of one machine and of two: assumed.
const LAUNCH: f64 = 2e-6;
const NEAR: f64 = 5e-6;
const FAR: f64 = 12e-6;

impl Costs {
    /// Of GPUs by their makers' figures, `node` of them in a machine, with a network of `network` bytes a second for each.
    #[must_use]
    pub fn of_device(device: &Device, node: usize, network: f64) -> Self {
        Self {
            memory: device.bandwidth,
            floats: device.products,
            integers: device.products,
            call: LAUNCH,
            copies: None,
            near: Wire { latency: NEAR, bandwidth: device.link },
            far: Wire { latency: FAR, bandwidth: network },
            node,
        }
    }

    /// Of this machine: `block` is a linear of the model's blocks and `plain` one of floats, of each of which there are `copies`, so
    /// that they come from where the model's would. All ranks of `link` measure at the same time.
    ///
    /// # Errors
    /// The backend's own, and too little memory.
    pub fn measure<B: Backend>(
        backend: &B,
        (block, plain): (&LinearTensors<'_>, &LinearTensors<'_>),
        copies: usize,
        link: Option<&dyn Link>,
    ) -> Result<Self, BackendError> {
        let meet = || {
            if let Some(link) = link {
                link.spread(&[0.0], &vec![1; link.size()], &mut vec![0.0; link.size()]);
            }
        };
        meet();
        let call = launch(backend)?;
        meet();
        let (one, many) = throughput::one_and_many(backend, block, copies, MANY)?;
        meet();
        let (_, plain_many) = throughput::one_and_many(backend, plain, 1, MANY)?;
        meet();
        let products = |of: &LinearTensors<'_>, seconds: f64| (MANY * of.n * of.k) as f64 / seconds;
        let of_block = products(block, many);
        let wire = link.filter(|link| link.size() > 1).map_or(Wire { latency: 0.0, bandwidth: f64::MAX }, wire);
        Ok(Self {
            memory: block.stored_bytes() as f64 / (one - call).max(one / 2.0),
            floats: products(plain, plain_many),
            integers: of_block,
            call,
            copies: None,
            near: wire,
            far: wire,
            node: usize::MAX,
        })
    }

    /// Between two ranks.
    #[must_use]
    pub fn wire(&self, a: usize, b: usize) -> Wire {
        if a / self.node.max(1) == b / self.node.max(1) { self.near } else { self.far }
    }

    /// Seconds of an operation: what it reads, or what it multiplies.
    #[must_use]
    pub fn seconds(&self, work: &Work) -> f64 {
        self.call + (work.bytes / self.memory).max(work.floats / self.floats + work.integers / self.integers)
    }

    /// Seconds that bytes take between host and device.
    #[must_use]
    pub fn copied(&self, bytes: usize) -> f64 {
        self.copies.map_or(0.0, |rate| bytes as f64 / rate)
    }
}

/// Seconds of an operation on next to nothing.
fn launch<B: Backend>(backend: &B) -> Result<f64, BackendError> {
    const WIDTH: usize = 64;
    let norm = backend.load_vector(vec![1.0; WIDTH])?;
    let mut x = backend.tensor(vec![1.0; WIDTH], WIDTH)?;
    let start = Instant::now();
    for _ in 0..MESSAGES {
        x = backend.rms_norm(&x, &norm, 1e-5)?;
    }
    backend.to_host(&x)?;
    Ok(start.elapsed().as_secs_f64() / MESSAGES as f64)
}

/// What everyone's giving everyone something says of what is between them.
fn wire(link: &dyn Link) -> Wire {
    let ranks = link.size();
    let seconds = |values: usize, times: usize| {
        let (own, mut all) = (vec![1.0; values], vec![0.0; values * ranks]);
        let mut once = || {
            let start = Instant::now();
            link.spread(&own, &vec![values; ranks], &mut all);
            start.elapsed().as_secs_f64()
        };
        once();
        let mut seconds: Vec<f64> = (0..times).map(|_| once()).collect();
        seconds.sort_by(f64::total_cmp);
        seconds[times / 2]
    };
    let latency = seconds(1, MESSAGES);
    let content = (seconds(LARGE, 9) - latency).max(1e-9);
    Wire { latency: latency / rounds(ranks), bandwidth: (4 * LARGE * (ranks - 1)) as f64 / content }
}
