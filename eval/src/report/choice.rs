//! Which model to take where a choice of sizes is compared: the best of each size, and the smallest that keeps enough.

use super::numbers::{bytes, estimate, fixed, percent, percent_interval, plain};
use super::tables::{Table, columns, or};
use super::verdict::apart;
use crate::comparison::Comparison;

/// Sizes nearer than this share are one: scales beside the codes make that much.
const ONE_SIZE: f64 = 0.01;
/// Shares of the baseline's score that a user may ask for.
const KEPT: [f64; 4] = [0.99, 0.98, 0.95, 0.9];

/// The best model of each size, and the smallest for each share that is to be kept. Nothing where all have one size.
pub(super) fn tables(c: &Comparison) -> Vec<Table> {
    let sizes = sizes(c);
    if sizes.len() < 2 {
        return Vec::new();
    }
    by_size(c, &sizes).into_iter().chain(by_share(c, &sizes)).collect()
}

/// Models beside the baseline by size, the smallest first; those of one size together.
fn sizes(c: &Comparison) -> Vec<Vec<usize>> {
    let size = |m: usize| c.models[m].facts.stored_bytes.filter(|b| *b > 0);
    let mut models: Vec<(u64, usize)> = c.others().filter_map(|m| Some((size(m)?, m))).collect();
    models.sort_unstable();
    let mut sizes: Vec<(u64, Vec<usize>)> = Vec::new();
    for (bytes, model) in models {
        match sizes.last_mut() {
            Some((first, alike)) if bytes as f64 <= *first as f64 * (1.0 + ONE_SIZE) => alike.push(model),
            _ => sizes.push((bytes, vec![model])),
        }
    }
    sizes.into_iter().map(|(_, alike)| alike).collect()
}

/// From small to large the best of each size, larger ones only where they are clearly better than all smaller ones.
fn by_size(c: &Comparison, sizes: &[Vec<usize>]) -> Option<Table> {
    let by_texts = c.others().all(|m| distance(c, m).is_some());
    let better = |a: usize, b: usize| if by_texts { nearer(c, a, b) } else { keeps_more(c, a, b) };
    let worth =
        |m: usize| if by_texts { distance(c, m).map(|kl| -kl) } else { Some(c.overall_of(m)?.recovery.estimate) };
    let mut taken: Vec<usize> = Vec::new();
    for alike in sizes {
        let known = alike.iter().filter_map(|&m| Some((worth(m)?, m)));
        let Some((_, best)) = known.reduce(|a, b| if b.0 > a.0 { b } else { a }) else { continue };
        if taken.last().is_none_or(|&last| better(best, last)) {
            taken.push(best);
        }
    }
    let base = c.baseline();
    let how = if by_texts {
        format!("nearest to {base} by KL, where it is clearly so on one text at least and farther on none")
    } else {
        format!("that keeps most of {base}'s score, where the intervals do not overlap")
    };
    let texts = c.texts();
    let mut heads = columns(&["Up to", "Take"], &["Bits per weight"]);
    heads.extend(columns(
        &[],
        &texts.iter().map(|t| format!("KL, {t}")).collect::<Vec<_>>().iter().map(String::as_str).collect::<Vec<_>>(),
    ));
    heads.extend(columns(&[], &["Recovery", "Decode"]));
    let lead = format!(
        "From small to large, the model {how}. What is not listed is no better than a smaller one, or one of its size."
    );
    let mut table = Table::new("The best of each size", lead, heads);
    for m in taken {
        let facts = &c.models[m].facts;
        let mut cells =
            vec![or(facts.stored_bytes, bytes), c.label(m).to_owned(), or(facts.bits_per_weight, |b| fixed(b, 2))];
        cells.extend(texts.iter().map(|t| or(c.divergence(t, m), |d| estimate(d.kl))));
        cells.push(or(c.overall_of(m).map(|o| o.recovery), percent_interval));
        cells.push(or(facts.decode_speed, |s| format!("{} tok/s", plain(s))));
        table.row(Some(m), cells);
    }
    table.filled(2)
}

/// For each share of the baseline's score, the smallest model whose interval lies above it.
fn by_share(c: &Comparison, sizes: &[Vec<usize>]) -> Option<Table> {
    c.overall.iter().flatten().next()?;
    let base = c.baseline();
    let lead = format!(
        "The smallest model whose mean recovery over tasks is at least this share of {base}'s score by the lower end of its {} interval.",
        c.confidence_text()
    );
    let mut table =
        Table::new("The smallest that keeps enough", lead, columns(&["At least", "Take"], &["Size", "Recovery"]));
    for share in KEPT {
        let keeps = |m: &usize| c.overall_of(*m).is_some_and(|o| o.recovery.low >= share);
        let lowest = |m: &usize| c.overall_of(*m).map_or(f64::NEG_INFINITY, |o| o.recovery.low);
        let of_size =
            |alike: &Vec<usize>| alike.iter().copied().filter(keeps).max_by(|a, b| lowest(a).total_cmp(&lowest(b)));
        let cells = match sizes.iter().find_map(of_size) {
            Some(m) => (
                Some(m),
                vec![
                    c.label(m).to_owned(),
                    or(c.models[m].facts.stored_bytes, bytes),
                    or(c.overall_of(m).map(|o| o.recovery), percent_interval),
                ],
            ),
            None => (None, vec!["none is shown to".to_owned(), String::new(), String::new()]),
        };
        table.row(cells.0, [vec![percent(share)], cells.1].concat());
    }
    Some(table)
}

/// Mean KL over all texts; `None` where one is missing.
fn distance(c: &Comparison, m: usize) -> Option<f64> {
    let texts = c.texts();
    let each: Vec<f64> =
        texts.iter().filter_map(|t| Some(c.divergence(t, m)?.kl.value)).filter(|kl| kl.is_finite()).collect();
    (!each.is_empty() && each.len() == texts.len()).then(|| each.iter().sum::<f64>() / each.len() as f64)
}

/// Whether `a` is nearer to the baseline than `b` by more than chance on one text, and farther by as much on none.
fn nearer(c: &Comparison, a: usize, b: usize) -> bool {
    let pairs = || c.texts().into_iter().filter_map(move |t| Some((c.divergence(t, a)?, c.divergence(t, b)?)));
    pairs().any(|(a, b)| apart(a, b)) && !pairs().any(|(a, b)| apart(b, a))
}

fn keeps_more(c: &Comparison, a: usize, b: usize) -> bool {
    c.overall_of(a).zip(c.overall_of(b)).is_some_and(|(a, b)| a.recovery.low > b.recovery.high)
}

#[cfg(test)]
mod tests {
    use super::super::sample::{keeps, only, sample};
    use super::*;

    /// The sample's models with these sizes, and KLs on all texts.
    fn with(sizes: &[u64], kls: &[f64]) -> Comparison {
        let mut c = sample();
        for (m, size) in sizes.iter().enumerate() {
            c.models[m + 1].facts.stored_bytes = Some(*size);
        }
        for d in &mut c.divergences {
            d.kl.value = kls[d.model - 1];
            d.kl.standard_error = 0.01;
        }
        c
    }

    fn taken(c: &Comparison) -> Vec<usize> {
        tables(c).first().map_or_else(Vec::new, |t| t.rows.iter().filter_map(|r| r.model).collect())
    }

    #[test]
    fn a_larger_model_is_taken_only_where_it_is_clearly_nearer() {
        // 1 and 2 have one size; 3 is larger and no nearer than chance explains; 4 is.
        let c = with(&[1_000, 1_004, 1_500, 2_000], &[0.4, 0.2, 0.18, 0.1]);
        assert_eq!(taken(&c), [2, 4]);
        // Nearer on one text and farther on the other: not better.
        let mut mixed = c.clone();
        let first = mixed.divergences[0].text.clone();
        mixed.divergences.iter_mut().filter(|d| d.model == 4 && d.text == first).for_each(|d| d.kl.value = 0.3);
        assert_eq!(taken(&mixed), [2]);
    }

    #[test]
    fn models_of_one_size_leave_nothing_to_choose() {
        assert!(tables(&with(&[1_000, 1_001, 1_002, 1_003], &[0.4, 0.3, 0.2, 0.1])).is_empty());
        let mut unknown = sample();
        unknown.models.iter_mut().for_each(|m| m.facts.stored_bytes = None);
        assert!(tables(&unknown).is_empty());
    }

    #[test]
    fn without_texts_tasks_decide() {
        let mut c = with(&[1_000, 2_000, 3_000, 4_000], &[0.4; 4]);
        c.divergences.clear();
        c.overall = vec![None, keeps(0.9, 0.02), keeps(0.93, 0.02), keeps(0.99, 0.005), None];
        assert_eq!(taken(&c), [1, 3]);
    }

    #[test]
    fn the_smallest_that_keeps_a_share_is_named_by_its_lower_end() {
        let mut c = with(&[1_000, 2_000, 3_000, 4_000], &[0.4; 4]);
        c.overall = vec![None, keeps(0.955, 0.01), keeps(0.97, 0.01), keeps(0.985, 0.004), keeps(0.999, 0.02)];
        let found: Vec<Option<usize>> = by_share(&c, &sizes(&c)).unwrap().rows.iter().map(|r| r.model).collect();
        assert_eq!(found, [None, Some(3), Some(2), Some(1)]);
        assert!(by_share(&Comparison { overall: vec![None; 2], ..only(&[0, 1]) }, &[vec![1]]).is_none());
    }
}
