//! What goes between ranks that have a GPU each: by NCCL from device to device, where all of them can.

use std::sync::Arc;

use super::nccl::{Group, Nccl, Part};
use super::{CudaBackend, CudaTensor};
use crate::backend::{Backend as _, BackendError, Result, Run};
use crate::ranks::{Link, ROOT};

/// This rank among all, and among those of its stage.
pub(super) struct Exchange {
    world: Group,
    /// `None`: all are of one stage.
    team: Option<Group>,
    version: String,
}

/// By what ranks exchange.
#[derive(Clone, Default)]
pub(super) enum Road {
    /// There are no others.
    #[default]
    Alone,
    /// Over the host, and why.
    Host(Arc<str>),
    Nccl(Arc<Exchange>),
}

/// What a rank says of itself: the machine and device that it has, or why it has no NCCL.
type Told = std::result::Result<(String, String), String>;

impl Road {
    /// The road that all ranks of `world` take, decided by the first one by what all say; `team` are those of this one's stage.
    pub(super) fn of(backend: &CudaBackend, world: &dyn Link, team: &dyn Link) -> Result<Self> {
        let nccl = Nccl::open();
        // Whatever is wrong here, the others have to know.
        let own: Told = match (&nccl, backend.device.identity()) {
            (Ok(_), Ok(device)) => Ok((world.host(), device)),
            (Ok(_), Err(e)) => Err(e.to_string()),
            (Err(reason), _) => Err(reason.clone()),
        };
        let told = world.gather(&said_by(&own));
        let mut against = if world.rank() == ROOT { against(&told).into_bytes() } else { Vec::new() };
        world.broadcast(&mut against);
        let nccl = match nccl {
            Ok(nccl) if against.is_empty() => Arc::new(nccl),
            _ => return Ok(Self::Host(String::from_utf8_lossy(&against).into())),
        };
        let group = |link: &dyn Link| -> Result<Group> {
            let mut meeting = if link.rank() == ROOT { nccl.meeting()? } else { Vec::new() };
            link.broadcast(&mut meeting);
            Group::join(&nccl, &backend.device, &meeting, link.rank(), link.size())
        };
        let world_group = group(world)?;
        let team = if team.size() > 1 && team.size() < world.size() { Some(group(team)?) } else { None };
        Ok(Self::Nccl(Arc::new(Exchange { world: world_group, team, version: nccl.version() })))
    }

    /// In words.
    pub(super) fn said(&self) -> Option<String> {
        match self {
            Self::Alone => None,
            Self::Host(why) => Some(format!("the host's memory ({why})")),
            Self::Nccl(exchange) => Some(format!("NCCL {}", exchange.version)),
        }
    }
}

fn failed(columns: usize) -> BackendError {
    let message = format!("the ranks have not all of {columns} columns");
    BackendError::Failed { context: "several GPUs", message }
}

fn said_by(told: &Told) -> Vec<u8> {
    serde_json::to_vec(told).unwrap_or_default()
}

/// Why not all ranks can use NCCL; nothing, where they can.
fn against(told: &[Vec<u8>]) -> String {
    let mut seen: Vec<(String, String)> = Vec::new();
    for (rank, bytes) in told.iter().enumerate() {
        match serde_json::from_slice::<Told>(bytes) {
            Ok(Ok(device)) => {
                if let Some(other) = seen.iter().position(|d| *d == device) {
                    return format!("NCCL: ranks {other} and {rank} have one device");
                }
                seen.push(device);
            }
            Ok(Err(reason)) => return format!("no NCCL at rank {rank}: {reason}"),
            Err(e) => return format!("rank {rank}: {e}"),
        }
    }
    String::new()
}

impl Exchange {
    fn group(&self, link: &dyn Link, ranks: usize) -> &Group {
        self.team.as_ref().filter(|_| link.size() < ranks).unwrap_or(&self.world)
    }
}

impl CudaBackend {
    /// The group that `link` is of, where NCCL is the road.
    fn group(&self, link: &dyn Link) -> Option<&Group> {
        match &self.road {
            Road::Nccl(exchange) => Some(exchange.group(link, exchange.world.ranks())),
            Road::Alone | Road::Host(_) => None,
        }
    }

    /// [`crate::backend::Backend::spread_rows`] from device to device; `None`: over the host.
    pub(super) fn spread_rows_by(
        &self,
        link: &dyn Link,
        own: &[CudaTensor],
        rows: &[usize],
        columns: usize,
    ) -> Result<Option<CudaTensor>> {
        let Some(group) = self.group(link) else { return Ok(None) };
        let me = link.rank();
        let all = self.empty(rows.iter().sum(), columns)?;
        let place = |rank: usize| 4 * columns * rows[..rank].iter().sum::<usize>();
        let part = |rank: usize| -> Part<'_> { (&all.data, place(rank), 4 * columns * rows[rank]) };
        let mut at = place(me);
        for x in own {
            let x = self.settled(x)?;
            self.device.copy((&all.data, at), (&x.data, 0), 4 * x.rows * x.columns)?;
            at += 4 * x.rows * x.columns;
        }
        let others = || (0..rows.len()).filter(|rank| *rank != me);
        let sent: Vec<_> = others().map(|rank| (rank, part(me))).collect();
        let received: Vec<_> = others().map(|rank| (rank, part(rank))).collect();
        group.exchange(&sent, &received)?;
        Ok(Some(all))
    }

    /// [`crate::backend::Backend::spread_columns`] from device to device; `None`: over the host.
    pub(super) fn spread_columns_by(
        &self,
        link: &dyn Link,
        own: Option<&CudaTensor>,
        pieces: &[(usize, usize)],
        (rows, columns): (usize, usize),
    ) -> Result<Option<CudaTensor>> {
        let Some(group) = self.group(link) else { return Ok(None) };
        let me = link.rank();
        let others = || (0..pieces.len()).filter(|rank| *rank != me);
        let own = own.map(|own| self.settled(own)).transpose()?;
        if rows == 1 {
            // Every piece goes where it stays.
            let out = self.empty(1, columns)?;
            let part = |rank: usize| -> Part<'_> { (&out.data, 4 * pieces[rank].0, 4 * pieces[rank].1) };
            if let Some(own) = &own {
                self.device.copy((&out.data, 4 * pieces[me].0), (&own.data, 0), 4 * own.columns)?;
            }
            let sent: Vec<_> = others().map(|rank| (rank, part(me))).collect();
            let received: Vec<_> = others().map(|rank| (rank, part(rank))).collect();
            group.exchange(&sent, &received)?;
            return Ok(Some(out));
        }
        let mut parts = Vec::with_capacity(pieces.len());
        for (rank, &(_, count)) in pieces.iter().enumerate() {
            parts.push(match &own {
                Some(own) if rank == me => own.clone(),
                _ => self.empty(rows, count)?,
            });
        }
        let part = |rank: usize| -> Part<'_> { (&parts[rank].data, 0, 4 * rows * pieces[rank].1) };
        let sent: Vec<_> = others().map(|rank| (rank, part(me))).collect();
        let received: Vec<_> = others().map(|rank| (rank, part(rank))).collect();
        group.exchange(&sent, &received)?;
        self.side_by_side(parts, pieces, columns).map(Some)
    }

    /// Neighbouring columns, two tensors at a time. Those that several have are the same in all of them.
    fn side_by_side(&self, parts: Vec<CudaTensor>, pieces: &[(usize, usize)], columns: usize) -> Result<CudaTensor> {
        let mut parts: Vec<(CudaTensor, usize)> =
            parts.into_iter().zip(pieces).filter(|(_, piece)| piece.1 > 0).map(|(x, piece)| (x, piece.0)).collect();
        while parts.len() > 1 {
            let mut joint = Vec::with_capacity(parts.len().div_ceil(2));
            for pair in parts.chunks(2) {
                joint.push(match pair {
                    [(a, first), (b, next)] => {
                        let again = (first + a.columns).saturating_sub(*next).min(b.columns);
                        if *next > first + a.columns {
                            return Err(failed(columns));
                        }
                        let runs = [Run::of(0, 0, a.columns), Run::of(1, again, b.columns - again)];
                        let runs = if again == b.columns { &runs[..1] } else { &runs[..] };
                        (self.rearrange(&[a, b], runs)?, *first)
                    }
                    [one, ..] => one.clone(),
                    [] => continue,
                });
            }
            parts = joint;
        }
        match parts.pop() {
            Some((x, 0)) if x.columns == columns => Ok(x),
            _ => Err(failed(columns)),
        }
    }

    /// [`crate::backend::Backend::give`]; whether it was done.
    pub(super) fn give_by(&self, link: &dyn Link, to: usize, x: &CudaTensor) -> Result<bool> {
        let Some(group) = self.group(link) else { return Ok(false) };
        let x = self.settled(x)?;
        group.exchange(&[(to, (&x.data, 0, 4 * x.rows * x.columns))], &[])?;
        Ok(true)
    }

    /// [`crate::backend::Backend::take`]; `None`: over the host.
    pub(super) fn take_by(
        &self,
        link: &dyn Link,
        from: usize,
        (rows, columns): (usize, usize),
    ) -> Result<Option<CudaTensor>> {
        let Some(group) = self.group(link) else { return Ok(None) };
        let x = self.empty(rows, columns)?;
        group.exchange(&[], &[(from, (&x.data, 0, 4 * rows * columns))])?;
        Ok(Some(x))
    }
}
