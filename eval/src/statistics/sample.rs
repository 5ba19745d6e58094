//! Documents' contributions to the scores of several models, and the standard error of a ratio of their sums.

/// What each document contributes to each model's score: a sum of values per model, and a weight common to all.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    models: usize,
    /// [documents, models] row-major.
    values: Vec<f64>,
    /// [documents]
    weights: Vec<f64>,
}

impl Sample {
    /// No documents of `models` models.
    #[must_use]
    pub fn new(models: usize) -> Self {
        Self { models, values: Vec::new(), weights: Vec::new() }
    }

    /// Adds a document: for each model the sum of its values over repeats (or tokens), and the sum of its weights.
    pub fn push(&mut self, values: impl IntoIterator<Item = f64>, weight: f64) {
        self.values.extend(values);
        self.weights.push(weight);
    }

    /// Appends all documents of `other`, a sample of the same models.
    pub fn extend(&mut self, other: &Self) {
        for i in 0..other.documents() {
            self.push(other.row(i).iter().copied(), other.weights[i]);
        }
    }

    #[must_use]
    pub fn models(&self) -> usize {
        self.models
    }

    #[must_use]
    pub fn documents(&self) -> usize {
        self.weights.len()
    }

    /// The values of one document, one per model.
    #[must_use]
    pub fn row(&self, document: usize) -> &[f64] {
        &self.values[document * self.models..(document + 1) * self.models]
    }

    #[must_use]
    pub fn weights(&self) -> &[f64] {
        &self.weights
    }

    /// The values of one model, document by document.
    pub fn column(&self, model: usize) -> impl Iterator<Item = f64> + Clone {
        self.values.iter().skip(model).step_by(self.models.max(1)).copied()
    }

    /// Sum of one model's values.
    #[must_use]
    pub fn sum(&self, model: usize) -> f64 {
        self.column(model).sum()
    }

    #[must_use]
    pub fn total_weight(&self) -> f64 {
        self.weights.iter().sum()
    }

    /// Whether each value is a share of its weight, that is in [0, 1] on average over the document.
    #[must_use]
    pub fn is_share(&self) -> bool {
        (0..self.documents()).all(|i| self.row(i).iter().all(|v| (0.0..=self.weights[i]).contains(v)))
    }
}

/// Σ value / Σ weight and its standard error, over (value, weight) of clusters: documents, or windows of tokens.
///
/// With weights of 1 this is the mean and the sample standard deviation over √n, as lm-evaluation-harness's
/// `mean_stderr`. Otherwise it is the linearised error of a ratio estimator, √(n/(n-1) Σ(value - ratio·weight)²) / Σ
/// weight (Cochran, Sampling Techniques, 6.4). `None` for the error of fewer than two clusters.
#[must_use]
pub fn mean_and_standard_error(clusters: impl Iterator<Item = (f64, f64)> + Clone) -> (f64, Option<f64>) {
    let (n, sum, weight) = clusters.clone().fold((0.0, 0.0, 0.0), |(n, s, w), (v, u)| (n + 1.0, s + v, w + u));
    let mean = sum / weight;
    let squares: f64 = clusters.map(|(v, w)| (v - mean * w).powi(2)).sum();
    (mean, (n > 1.0).then(|| (n / (n - 1.0) * squares).sqrt() / weight))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standard_error_is_that_of_lm_evaluation_harness() {
        // from lm_eval.api.metrics import mean_stderr; mean_stderr([0, 1, 1, 0, 1, 1, 1])
        let values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0];
        let (mean, error) = mean_and_standard_error(values.iter().map(|&v| (v, 1.0)));
        assert!((mean - 5.0 / 7.0).abs() < 1e-15);
        assert!((error.unwrap() - 0.184_427_778_390_829_38).abs() < 1e-15, "{error:?}");
        assert_eq!(mean_and_standard_error([(1.0, 1.0)].into_iter()).1, None);
    }

    #[test]
    fn the_error_of_a_ratio_is_the_jackknifes() {
        // numpy: v = [-30., -80, -21, -55, -40]; w = [9, 30, 6, 14, 15]; j = (v.sum() - v) / (w.sum() - w)
        //        sqrt(4 / 5 * ((j - j.mean())**2).sum())
        let v = [-30.0, -80.0, -21.0, -55.0, -40.0];
        let w = [9.0, 30.0, 6.0, 14.0, 15.0];
        let (ratio, error) = mean_and_standard_error(v.into_iter().zip(w));
        assert!((ratio + 226.0 / 74.0).abs() < 1e-12);
        // The jackknife and linearisation agree to first order only; the documents' weights are very uneven here.
        assert!((error.unwrap() / JACKKNIFE - 1.0).abs() < 0.25, "{error:?}");
    }

    const JACKKNIFE: f64 = 0.313493355766;
}
