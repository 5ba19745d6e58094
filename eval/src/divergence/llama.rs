//! The figures as llama-perplexity prints them (`--kl-divergence`): same labels, same layout.

use std::fmt::Write;

use crate::comparison::{Divergence, Estimate};

impl Divergence {
    /// PPL(Q) - PPL(base); its error by the delta method from those of the two and their correlation, as llama-perplexity
    /// has it.
    pub(crate) fn perplexity_difference(&self) -> Estimate {
        let (q, base) = (self.perplexity, self.baseline_perplexity);
        let covariance = self.log_perplexity_correlation * q.standard_error * base.standard_error;
        let variance = q.standard_error.powi(2) + base.standard_error.powi(2) - 2.0 * covariance;
        Estimate { value: q.value - base.value, standard_error: variance.max(0.0).sqrt() }
    }

    /// The block that llama-perplexity ends with. Errors are clustered by window (see [`crate::divergence`]), so they
    /// are larger than those it would print where a window's tokens depend on each other.
    #[must_use]
    pub fn llama_block(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_block(&mut out);
        out
    }

    fn write_block(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "====== Perplexity statistics ======")?;
        writeln!(out, "Mean PPL(Q)                   : {}", plain(self.perplexity))?;
        writeln!(out, "Mean PPL(base)                : {}", plain(self.baseline_perplexity))?;
        writeln!(out, "Cor(ln(PPL(Q)), ln(PPL(base))): {:6.2}%", 100.0 * self.log_perplexity_correlation)?;
        writeln!(out, "Mean ln(PPL(Q)/PPL(base))     : {}", plain(self.log_perplexity_ratio))?;
        writeln!(out, "Mean PPL(Q)/PPL(base)         : {}", plain(self.perplexity_ratio))?;
        writeln!(out, "Mean PPL(Q)-PPL(base)         : {}", plain(self.perplexity_difference()))?;
        writeln!(out, "\n====== KL divergence statistics ======")?;
        writeln!(out, "Mean    KLD: {}", plain(self.kl))?;
        for (share, value) in self.kl_percentiles.iter().rev() {
            writeln!(out, "{} KLD: {value:10.6}", label(*share))?;
        }
        writeln!(out, "\n====== Token probability statistics ======")?;
        writeln!(out, "Mean    Δp: {}", percent(self.delta_p))?;
        for (share, value) in self.delta_p_percentiles.iter().rev() {
            writeln!(out, "{} Δp: {:6.3}%", label(*share), 100.0 * value)?;
        }
        writeln!(out, "RMS Δp    : {}", percent(self.delta_p_rms))?;
        writeln!(out, "Same top p: {}", percent(self.same_top))
    }
}

fn plain(e: Estimate) -> String {
    format!("{:10.6} ± {:10.6}", e.value, e.standard_error)
}

fn percent(e: Estimate) -> String {
    format!("{:6.3} ± {:5.3} %", 100.0 * e.value, 100.0 * e.standard_error)
}

/// Seven characters: `Maximum`, `99.9%  `, `Median `, ` 5.0%  `.
fn label(share: f64) -> String {
    match share {
        0.0 => "Minimum".to_owned(),
        0.5 => "Median ".to_owned(),
        1.0 => "Maximum".to_owned(),
        _ => format!("{:4.1}%  ", 100.0 * share),
    }
}
