//! What known devices allow by their makers' figures: a model's floor there, without having one.

use super::{Case, Load};

/// A device by its data sheet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Device {
    pub name: &'static str,
    /// Bytes of memory.
    pub memory: f64,
    /// Bytes a second.
    pub bandwidth: f64,
    /// BF16 multiply-adds a second of tensor cores, without sparsity, sums in f32.
    pub products: f64,
    /// Bytes a second to another one of the same machine, one way: NVLink, or PCIe.
    pub link: f64,
}

const fn device(name: &'static str, gigabytes: f64, gigabytes_per_second: [f64; 2], teraflops: f64) -> Device {
    let [bandwidth, link] = gigabytes_per_second;
    let (memory, products) = (gigabytes * 1e9, teraflops * 1e12 / 2.0);
    Device { name, memory, bandwidth: bandwidth * 1e9, products, link: link * 1e9 }
}

/// The makers' figures (data sheets of A100 80GB SXM, H100 SXM, H200 SXM, L40S, HGX B200; the Ada and Blackwell RTX
/// whitepapers; of GB10 NVIDIA says 1 PFLOP of sparse FP4, an eighth of which is taken for BF16 here,
/// and that its network has 200 Gb/s).
pub const DEVICES: [Device; 8] = [
    device("A100 80 GB", 80.0, [2039.0, 300.0], 312.0),
    device("L40S", 48.0, [864.0, 32.0], 362.0),
    device("RTX 4090", 24.0, [1008.0, 32.0], 165.2),
    device("H100 SXM", 80.0, [3350.0, 450.0], 989.4),
    device("H200 SXM", 141.0, [4800.0, 450.0], 989.4),
    device("RTX 5090", 32.0, [1792.0, 64.0], 209.5),
    device("B200", 180.0, [8000.0, 900.0], 2250.0),
    device("GB10", 128.0, [273.0, 25.0], 125.0),
];

impl Device {
    /// Whether weights and the cache of a case fit.
    #[must_use]
    pub fn holds(&self, load: &Load, case: Case) -> bool {
        let cache = (case.batch * (case.prompt + case.generate)) as f64 * load.cache;
        load.resident + cache <= self.memory
    }

    /// Seconds that a step takes at least: by what it reads, or multiplies.
    #[must_use]
    pub fn step(&self, load: &Load, case: Case) -> f64 {
        let read = load.step_bytes(case.batch, case.prompt + case.generate / 2) / self.bandwidth;
        read.max(case.batch as f64 * (load.products + load.head) / self.products)
    }

    /// Seconds that a prompt takes at least.
    #[must_use]
    pub fn first_token(&self, load: &Load, case: Case) -> f64 {
        let read = load.step_bytes(case.prompt, 0) / self.bandwidth;
        read.max(load.prompt_products(case.prompt) / self.products)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama-3.1-8B in NVFP4 with a head in BF16, as docs/cuda.md counts it.
    fn load() -> Load {
        let (weights, head) = (6.98e9, 0.525e9);
        let bytes = weights * 4.5 / 8.0 + 2.0 * head;
        Load {
            weights: bytes,
            resident: bytes + 2.0 * head,
            cache: 131_072.0,
            products: weights,
            head,
            ..Load::default()
        }
    }

    #[test]
    fn floors_are_those_of_the_documents() {
        let case = Case { batch: 1, prompt: 1, generate: 1 };
        for (name, milliseconds) in [("A100 80 GB", 2.4), ("RTX 4090", 4.9), ("H100 SXM", 1.5), ("B200", 0.62)] {
            let device = DEVICES.iter().find(|d| d.name == name).unwrap();
            let step = 1e3 * device.step(&load(), case);
            assert!((step / milliseconds - 1.0).abs() < 0.04, "{name}: {step}");
        }
    }

    #[test]
    fn a_prompt_is_bound_by_products_and_a_large_cache_does_not_fit() {
        let device = DEVICES.iter().find(|d| d.name == "RTX 4090").unwrap();
        let case = Case { batch: 1, prompt: 4096, generate: 32 };
        let products = 4096.0 * 6.98e9 + 0.525e9;
        assert!((device.first_token(&load(), case) * device.products / products - 1.0).abs() < 1e-9);
        assert!(device.holds(&load(), case) && !device.holds(&load(), Case { batch: 64, ..case }));
    }
}
