//! Launches wait in a queue until something depends on them. A run of launches that came before, with other pointers
//! and numbers perhaps, goes to the driver as one graph: a decoded token is such a run.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::driver::sys;

use super::driver::check;
use crate::backend::Result;

/// Launches below which a graph gains nothing.
const WORTH: usize = 16;
/// Launches that wait at most: a long pass begins before it is told to its end.
const LONGEST: usize = 1024;
/// Runs that are remembered, and graphs that are kept, at most.
const REMEMBERED: usize = 256;
const KEPT: usize = 32;

/// A kernel to be launched over a grid of blocks.
pub struct Launch {
    pub kernel: &'static str,
    pub function: sys::CUfunction,
    pub grid: [u32; 3],
    pub threads: u32,
    /// Bytes of shared memory beside what the kernel declares.
    pub shared: u32,
    /// Arguments, each in the low bytes of a word.
    pub values: Vec<u64>,
}

/// What two launches must have in common to be the same node of a graph.
type Shape = (usize, [u32; 3]);

/// A run of launches that came before.
#[derive(Default)]
struct Known {
    graph: Option<Graph>,
}

struct Graph {
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
    nodes: Vec<sys::CUgraphNode>,
    /// Each node's arguments as they are in `exec`.
    values: Vec<Vec<u64>>,
}

/// Launches that wait, and graphs of those that came before.
#[derive(Default)]
pub struct Queue {
    launches: Vec<Launch>,
    known: HashMap<Vec<Shape>, Known>,
    /// Kernels that went to the driver, and graphs.
    pub launched: u64,
    pub graphs: u64,
}

impl Launch {
    /// Calls `f` with the launch as a node's parameters.
    fn with_node<T>(&mut self, f: impl FnOnce(&sys::CUDA_KERNEL_NODE_PARAMS) -> T) -> T {
        let mut pointers = self.pointers();
        let [x, y, z] = self.grid;
        f(&sys::CUDA_KERNEL_NODE_PARAMS {
            func: self.function,
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared,
            kernelParams: pointers.as_mut_ptr(),
            extra: std::ptr::null_mut(),
            kern: std::ptr::null_mut(),
            ctx: std::ptr::null_mut(),
        })
    }

    fn pointers(&mut self) -> Vec<*mut c_void> {
        self.values.iter_mut().map(|v| std::ptr::from_mut(v).cast()).collect()
    }

    /// # Safety
    /// As [`Queue::push`].
    unsafe fn run(&mut self, stream: sys::CUstream) -> Result<()> {
        let mut pointers = self.pointers();
        let ([x, y, z], none) = (self.grid, std::ptr::null_mut());
        // SAFETY: the caller's; values and pointers live until the call returns, which copies them.
        let code = unsafe {
            sys::cuLaunchKernel(
                self.function,
                x,
                y,
                z,
                self.threads,
                1,
                1,
                self.shared,
                stream,
                pointers.as_mut_ptr(),
                none,
            )
        };
        check(self.kernel, code)
    }
}

impl Queue {
    /// Whether so many launches wait that they should go.
    pub fn is_long(&self) -> bool {
        self.launches.len() >= LONGEST
    }

    /// Lets `launch` wait.
    ///
    /// # Safety
    /// Its arguments are what the kernel's parameters say, in number, order and size, and the memory they point to is
    /// the device's, and large enough, until [`Self::flush`]; what was written to it otherwise went to the stream
    /// before.
    pub unsafe fn push(&mut self, launch: Launch) {
        self.launches.push(launch);
    }

    /// Gives all that waits to the driver, in order; where `graphs`, as one graph if it came before.
    ///
    /// # Errors
    /// When the driver does not take a launch. What waited after it is forgotten.
    pub fn flush(&mut self, stream: sys::CUstream, graphs: bool) -> Result<()> {
        let mut launches = std::mem::take(&mut self.launches);
        if launches.is_empty() {
            return Ok(());
        }
        self.launched += launches.len() as u64;
        let shapes: Vec<Shape> = launches.iter().map(|l| (l.function as usize, l.grid)).collect();
        if graphs && launches.len() >= WORTH {
            if let Some(known) = self.known.get_mut(&shapes) {
                if known.graph.is_none() {
                    known.graph = Some(Graph::new(&mut launches)?);
                }
                if let Some(graph) = &mut known.graph {
                    self.graphs += 1;
                    let done = graph.run(&mut launches, stream);
                    self.forget(&shapes)?;
                    return done;
                }
            }
            if self.known.len() >= REMEMBERED {
                self.known.retain(|_, known| known.graph.is_some());
            }
            self.known.insert(shapes, Known::default());
        }
        for launch in &mut launches {
            // SAFETY: as `push` asks.
            unsafe { launch.run(stream)? };
        }
        Ok(())
    }

    /// Drops all graphs but that of `shapes` where there are too many.
    fn forget(&mut self, shapes: &[Shape]) -> Result<()> {
        if self.known.values().filter(|k| k.graph.is_some()).count() <= KEPT {
            return Ok(());
        }
        for (_, known) in self.known.iter_mut().filter(|(key, _)| &key[..] != shapes) {
            if let Some(graph) = known.graph.take() {
                // SAFETY: made below; nobody else has them. The driver keeps what still runs until it is done.
                unsafe {
                    check("dropping a graph", sys::cuGraphExecDestroy(graph.exec))?;
                    check("dropping a graph", sys::cuGraphDestroy(graph.graph))?;
                }
            }
        }
        Ok(())
    }
}

impl Graph {
    /// Launches in a row, each after the one before.
    fn new(launches: &mut [Launch]) -> Result<Self> {
        let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
        let mut nodes: Vec<sys::CUgraphNode> = Vec::with_capacity(launches.len());
        // SAFETY: out-parameters live until their calls return; launches are as `Queue::push` asks.
        unsafe {
            check("making a graph", sys::cuGraphCreate(&mut graph, 0))?;
            for launch in launches.iter_mut() {
                let before = nodes.last().copied();
                let (count, first) = (usize::from(before.is_some()), before.as_ref().map_or(std::ptr::null(), |n| n));
                let mut node = std::ptr::null_mut();
                let code = launch.with_node(|p| sys::cuGraphAddKernelNode_v2(&mut node, graph, first, count, p));
                check(launch.kernel, code)?;
                nodes.push(node);
            }
            check("making a graph", sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0))?;
        }
        Ok(Self { graph, exec, nodes, values: launches.iter().map(|l| l.values.clone()).collect() })
    }

    /// Launches it with these arguments. Launches of it that still run keep theirs.
    fn run(&mut self, launches: &mut [Launch], stream: sys::CUstream) -> Result<()> {
        for ((launch, node), held) in launches.iter_mut().zip(&self.nodes).zip(&mut self.values) {
            if launch.values == *held {
                continue;
            }
            // SAFETY: a node of the graph that `exec` was made of, and a launch as `Queue::push` asks, of the same
            // kernel.
            let code = launch.with_node(|p| unsafe { sys::cuGraphExecKernelNodeSetParams_v2(self.exec, *node, p) });
            check(launch.kernel, code)?;
            held.clone_from(&launch.values);
        }
        // SAFETY: made in `new`, and nothing else uses it: the queue's lock is held.
        check("launching a graph", unsafe { sys::cuGraphLaunch(self.exec, stream) })
    }
}
