//! What goes between ranks by way of the host: copies there, a link, and copies back.

use super::{Backend, Result};
use crate::ranks::Link;

/// [`Backend::spread_rows`].
pub(super) fn spread_rows<B: Backend>(
    backend: &B,
    link: &dyn Link,
    own: &[B::Tensor],
    rows: &[usize],
    columns: usize,
) -> Result<B::Tensor> {
    let own: Vec<Vec<f32>> = own.iter().map(|x| backend.to_host(x)).collect::<Result<_>>()?;
    let counts: Vec<usize> = rows.iter().map(|rows| rows * columns).collect();
    let mut all = vec![0.0; counts.iter().sum()];
    link.spread(&own.concat(), &counts, &mut all);
    backend.tensor(all, columns)
}

/// [`Backend::spread_columns`].
pub(super) fn spread_columns<B: Backend>(
    backend: &B,
    link: &dyn Link,
    own: Option<&B::Tensor>,
    pieces: &[(usize, usize)],
    (rows, columns): (usize, usize),
) -> Result<B::Tensor> {
    let own = own.map(|x| backend.to_host(x)).transpose()?.unwrap_or_default();
    let counts: Vec<usize> = pieces.iter().map(|piece| piece.1 * rows).collect();
    let mut all = vec![0.0; counts.iter().sum()];
    link.spread(&own, &counts, &mut all);
    let data = if rows == 1 && all.len() == columns { all } else { side_by_side(&all, pieces, (rows, columns)) };
    backend.tensor(data, columns)
}

/// [`Backend::give`].
pub(super) fn give<B: Backend>(backend: &B, link: &dyn Link, to: usize, x: &B::Tensor) -> Result<()> {
    link.send(to, &backend.to_host(x)?);
    Ok(())
}

/// [`Backend::take`].
pub(super) fn take<B: Backend>(
    backend: &B,
    link: &dyn Link,
    from: usize,
    (rows, columns): (usize, usize),
) -> Result<B::Tensor> {
    let mut data = vec![0.0; rows * columns];
    link.receive(from, &mut data);
    backend.tensor(data, columns)
}

/// Rows of all columns, of the rows that each rank has of its own.
fn side_by_side(all: &[f32], pieces: &[(usize, usize)], (rows, columns): (usize, usize)) -> Vec<f32> {
    let mut data = vec![0.0; rows * columns];
    let mut rest = all;
    for &(first, count) in pieces.iter().filter(|piece| piece.1 > 0) {
        let (own, others) = rest.split_at(count * rows);
        rest = others;
        for (row, own) in data.chunks_exact_mut(columns).zip(own.chunks_exact(count)) {
            row[first..first + count].copy_from_slice(own);
        }
    }
    data
}
