//! One model over several ranks: `--tensor-parallel-size` and `--pipeline-parallel-size`.

use std::process::ExitCode;

use anyhow::{Result, bail};

use super::device::AnyBackend;
use super::options::EngineOptions;
use crate::checkpoint::Checkpoint;
use crate::formats::kv::KvFormat;

#[cfg(feature = "parallel")]
pub(super) use self::ranks::{enter, for_model, joined, leave, several};

#[cfg(not(feature = "parallel"))]
fn refuse(options: &EngineOptions) -> Result<()> {
    if options.tensor_parallel_size * options.pipeline_parallel_size > 1 {
        bail!(
            "--tensor-parallel-size and --pipeline-parallel-size: this build of recoup runs a model on one device; build it with \
             --features parallel for several GPUs, or cluster for several machines"
        );
    }
    Ok(())
}

#[cfg(not(feature = "parallel"))]
pub(super) fn enter(options: &EngineOptions) -> Result<Option<ExitCode>> {
    refuse(options).map(|()| None)
}

#[cfg(not(feature = "parallel"))]
pub(super) fn several(options: &EngineOptions) -> Result<Option<AnyBackend>> {
    refuse(options).map(|()| None)
}

#[cfg(not(feature = "parallel"))]
pub(super) fn for_model(backend: AnyBackend, _: &Checkpoint, _: (usize, KvFormat)) -> Result<AnyBackend> {
    Ok(backend)
}

#[cfg(not(feature = "parallel"))]
pub(super) fn leave() {}

#[cfg(not(feature = "parallel"))]
pub(super) fn joined() -> bool {
    false
}

#[cfg(feature = "parallel")]
mod ranks {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
    use std::thread;

    use anyhow::anyhow;

    use super::super::device::{DeviceChoice, Own};
    use super::super::options::threads;
    use super::super::rank_room::{self, Place};
    use super::super::ranks as processes;
    use super::{AnyBackend, Checkpoint, EngineOptions, ExitCode, KvFormat, Result, bail};
    use crate::backend::cuda::Device;
    use crate::backend::parallel::{Parallel, Size, help};
    use crate::backend::{Backend as _, Either};
    use crate::model::Source as _;
    use crate::model::parallel::rank_bytes;
    use crate::ranks::threads::Thread;
    use crate::ranks::{Link, ROOT};

    fn size(options: &EngineOptions) -> Size {
        Size { tensor: options.tensor_parallel_size, pipeline: options.pipeline_parallel_size }
    }

    /// The other processes, from when they have been found to when a model needs them.
    static WAITING: Mutex<Option<(Arc<dyn Link>, Local)>> = Mutex::new(None);

    /// Whether there are, or were, such.
    static JOINED: AtomicBool = AtomicBool::new(false);

    /// What the first one says when it has a model for the others.
    const WANTED: &[u8] = b"a model";

    fn waiting() -> Option<(Arc<dyn Link>, Local)> {
        WAITING.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What a process has of its machine: threads, and its number among the processes there.
    #[derive(Clone, Copy)]
    struct Local {
        threads: usize,
        number: usize,
    }

    /// Where several processes were begun for one model, all but the first do their part in here, and end with the code.
    ///
    /// # Errors
    /// When they are more or fewer than the options say, or cannot find each other.
    pub(in super::super) fn enter(options: &EngineOptions) -> Result<Option<ExitCode>> {
        let size = size(options);
        if size.ranks() == 1 {
            return Ok(None);
        }
        let Some(link) = processes::here()? else { return Ok(None) };
        if link.size() != size.ranks() {
            bail!(
                "{} processes were begun together, and --tensor-parallel-size {} with --pipeline-parallel-size {} is for {}",
                link.size(),
                size.tensor,
                size.pipeline,
                size.ranks()
            );
        }
        let threads = processes::share(&*link, options.threads)?.threads;
        let local = Local { threads, number: number(&*link) };
        if link.rank() == ROOT {
            JOINED.store(true, Ordering::Relaxed);
            *WAITING.lock().unwrap_or_else(PoisonError::into_inner) = Some((link, local));
            return Ok(None);
        }
        // A signal to all of them is the first one's to heed.
        super::super::interrupt::leave_to_another();
        let mut wanted = Vec::new();
        link.broadcast(&mut wanted);
        if wanted != WANTED {
            return Ok(Some(ExitCode::SUCCESS));
        }
        let helped = own(options, local).and_then(|own| {
            agree(&*link, &own)?;
            Ok(help(own, link.clone(), size)?)
        });
        if let Err(e) = helped {
            super::super::say!("error: process {} ({}): {e:#}", link.rank(), link.host());
            link.abort();
        }
        Ok(Some(ExitCode::SUCCESS))
    }

    /// Whether processes that were begun together are ranks of one model.
    pub(in super::super) fn joined() -> bool {
        JOINED.load(Ordering::Relaxed)
    }

    /// Lets the others go, where the first one had no model for them.
    pub(in super::super) fn leave() {
        if let Some((link, _)) = waiting() {
            link.broadcast(&mut Vec::new());
        }
    }

    /// The number of this process among those of its machine.
    fn number(link: &dyn Link) -> usize {
        let hosts = link.gather(link.host().as_bytes());
        let mut numbers: Vec<u8> = (0..hosts.len())
            .flat_map(|i| (hosts[..i].iter().filter(|h| **h == hosts[i]).count() as u64).to_le_bytes())
            .collect();
        link.broadcast(&mut numbers);
        numbers.as_chunks::<8>().0.get(link.rank()).map_or(0, |n| u64::from_le_bytes(*n) as usize)
    }

    /// The device of one of several ranks of this machine: GPUs from the one that is asked for on.
    fn own(options: &EngineOptions, local: Local) -> Result<Own> {
        let device = match options.device {
            DeviceChoice::Cuda(first) => DeviceChoice::Cuda(first + local.number),
            // All on GPUs, or none.
            DeviceChoice::Auto if Device::driver_present() && Device::count().is_ok_and(|n| n > local.number) => {
                DeviceChoice::Cuda(local.number)
            }
            DeviceChoice::Auto | DeviceChoice::Cpu => DeviceChoice::Cpu,
        };
        options.own(device, local.threads, 0)
    }

    /// Where the ranks are, known to the first one.
    static PLACES: Mutex<Vec<Place>> = Mutex::new(Vec::new());

    fn places() -> MutexGuard<'static, Vec<Place>> {
        PLACES.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What computes, in words; other words may be other bits.
    fn kind(own: &Own) -> String {
        match own {
            Either::A(_) => "the CPU".into(),
            Either::B(gpu) => format!("a GPU of {} with kernels {}", gpu.device().architecture(), gpu.kernels()),
        }
    }

    /// All ranks have to compute alike.
    fn agree(link: &dyn Link, own: &Own) -> Result<()> {
        let mine = (kind(own), Place::of(own, &link.host()));
        let all = link.gather(&serde_json::to_vec(&mine).unwrap_or_default());
        let (kinds, all): (Vec<String>, Vec<Place>) =
            all.iter().map(|told| serde_json::from_slice::<(String, Place)>(told)).collect::<Result<_, _>>()?;
        *places() = all;
        if let Some((rank, other)) = kinds.iter().enumerate().find(|(_, other)| **other != kinds[0]) {
            bail!(
                "all ranks of a model have to be alike: rank 0 is on {}, rank {rank} on {other}; --device says which",
                kinds[0]
            );
        }
        Ok(())
    }

    /// All ranks of the options; `None`: one device is enough.
    pub(in super::super) fn several(options: &EngineOptions) -> Result<Option<AnyBackend>> {
        let size = size(options);
        if size.ranks() == 1 {
            return Ok(None);
        }
        if let Some((link, local)) = waiting() {
            link.broadcast(&mut WANTED.to_vec());
            let made = own(options, local).and_then(|own| agree(&*link, &own).map(|()| own));
            return match made {
                Ok(own) => match Parallel::new(own, link.clone(), size) {
                    Ok(several) => Ok(Some(Either::B(told(several)))),
                    Err(e) => {
                        super::super::say!("error: {e}");
                        link.abort()
                    }
                },
                Err(e) => {
                    super::super::say!("error: {e:#}");
                    link.abort()
                }
            };
        }
        if joined() {
            bail!(
                "the processes that were begun together have a model already, and this verb asks for another backend"
            );
        }
        // Threads of this process.
        let each = (threads(options.threads) / size.ranks()).max(1);
        let owns = (0..size.ranks())
            .map(|number| own(options, Local { threads: each, number }))
            .collect::<Result<Vec<_>>>()?;
        if let Some(other) = owns.iter().find(|o| kind(o) != kind(&owns[0])) {
            bail!(
                "all ranks of a model have to be alike: there are {} and {}; --device says which",
                kind(&owns[0]),
                kind(other)
            );
        }
        *places() = owns.iter().map(|own| Place::of(own, "this machine")).collect();
        let mut links = Thread::all(size.ranks()).into_iter();
        let mut owns = owns.into_iter();
        let (Some(own), Some(first)) = (owns.next(), links.next()) else { return Ok(None) };
        let helpers = owns
            .zip(links)
            .map(|(own, link)| {
                thread::Builder::new().name(format!("rank {}", link.rank())).spawn(move || {
                    let (rank, _ends) = (link.rank(), EndsAll);
                    if let Err(e) = help(own, Arc::new(link), size) {
                        super::super::say!("error: rank {rank}: {e}");
                        std::process::exit(1);
                    }
                })
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        let several = Parallel::new(own, Arc::new(first), size)?;
        several.wait_for(helpers);
        Ok(Some(Either::B(told(several))))
    }

    /// Says by what GPUs exchange.
    fn told(several: Parallel<Own>) -> Parallel<Own> {
        if let Some(by) = several.exchanges_by() {
            super::super::say!("note: ranks exchange by {by}");
        }
        several
    }

    /// The others would wait for ever for a thread that panics.
    struct EndsAll;

    impl Drop for EndsAll {
        fn drop(&mut self) {
            if thread::panicking() {
                std::process::exit(1);
            }
        }
    }

    /// The same ranks for the model of `checkpoint`, and `tokens` of it in a cache in `kv`. What finds no room is told, or refused.
    pub(in super::super) fn for_model(
        backend: AnyBackend,
        checkpoint: &Checkpoint,
        cache: (usize, KvFormat),
    ) -> Result<AnyBackend> {
        let Either::B(several) = backend else { return Ok(backend) };
        let (config, size) = (checkpoint.config()?, several.size());
        let plan = config.plan(size)?;
        let needs = rank_bytes(checkpoint, &config, (&plan, size), cache);
        let folder = checkpoint.tensors.folder().display();
        for note in rank_room::check(&places(), &needs).map_err(|e| anyhow!("{folder}: {e}"))? {
            super::super::say!("note: {folder}: {note}");
        }
        Ok(Either::B(several.with_plan(plan)))
    }
}
