//! The CUDA driver, as far as it is used here: found at run time, one device, one stream, memory, launches. Errors say what was
//! being done.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use cudarc::driver::sys::{self, CUdevice_attribute, CUdeviceptr, CUfunction_attribute_enum, CUresult};

use super::graph::{Launch, Queue};
use super::table::shared_bytes;
use crate::backend::{BackendError, Result};

/// The oldest driver that runs what is embedded here: release 580, CUDA 13.0.
pub const DRIVER: i32 = 13000;

/// Kernels for every architecture, as nvcc wrote them.
static IMAGE: &[u8] = include_bytes!("images/kernels.fatbin");

/// What errors are about where the device has too little memory.
pub const MEMORY: &str = "GPU memory";

/// Bytes of a memory block's size classes: multiples of this, up to a power of two above it.
const GRAIN: usize = 512;

/// What the driver said to a call.
pub(super) fn check(what: &'static str, code: CUresult) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: the driver writes a pointer to a text of its own, or leaves the pointer as it is.
    let said = unsafe {
        if sys::cuGetErrorString(code, &mut text) == CUresult::CUDA_SUCCESS && !text.is_null() {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        } else {
            format!("error {}", code as u32)
        }
    };
    Err(BackendError::Failed { context: what, message: format!("the CUDA driver says: {said}") })
}

/// A number that the driver has of a device.
fn attribute(device: sys::CUdevice, attribute: CUdevice_attribute) -> Result<i32> {
    let mut value = 0;
    // SAFETY: the out-parameter lives until the call returns.
    check("asking what the device is", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
    Ok(value)
}

fn failed(context: &'static str, message: impl Into<String>) -> BackendError {
    BackendError::Failed { context, message: message.into() }
}

/// A GPU, with a stream on which everything runs in order.
pub struct Device {
    pub ordinal: usize,
    pub name: String,
    /// Compute capability, 9.0 as (9, 0).
    pub capability: (i32, i32),
    pub driver: i32,
    handle: sys::CUdevice,
    pub multiprocessors: usize,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// With the bytes of shared memory that a launch gives.
    functions: HashMap<&'static str, (sys::CUfunction, u32)>,
    /// Memory that was given back, by size; what is taken again was freed earlier on the same stream.
    free: Mutex<BTreeMap<usize, Vec<CUdeviceptr>>>,
    /// Launches on their way to the stream: whatever else goes there sends them first, so that all of it keeps its order.
    queue: Mutex<Queue>,
    graphs: bool,
    downloaded: AtomicU64,
}

// SAFETY: a context and its stream may be used from any thread on which the context is current, and `bind` sees to that; the
// driver locks what it shares between threads.
unsafe impl Send for Device {}
// SAFETY: as above; everything else in it is not changed after it was made, or has a lock.
unsafe impl Sync for Device {}

thread_local! {
    /// The context that is current on this thread.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (major, minor) = (self.driver / 1000, self.driver % 1000 / 10);
        write!(f, "{} ({}, driver for CUDA {major}.{minor})", self.name, self.architecture())
    }
}

impl Device {
    /// Whether there is a library of the driver's name; nothing is said of what it is or finds.
    #[must_use]
    pub fn driver_present() -> bool {
        // SAFETY: only tries to open a library.
        unsafe { sys::is_culib_present() }
    }

    /// The device's kind as compilers name it, `sm_90`.
    #[must_use]
    pub fn architecture(&self) -> String {
        format!("sm_{}{}", self.capability.0, self.capability.1)
    }

    /// Which kernels are embedded here: the beginning of their hash.
    #[must_use]
    pub fn kernels(&self) -> String {
        blake3::hash(IMAGE).to_hex()[..12].to_owned()
    }

    /// How many GPUs there are.
    ///
    /// # Errors
    /// No driver, one that is too old, or its own failure.
    pub fn count() -> Result<usize> {
        if !Self::driver_present() {
            return Err(failed("CUDA", "there is no CUDA driver (libcuda.so.1) on this machine"));
        }
        let (mut driver, mut count) = (0, 0);
        // SAFETY: the out-parameters live until the calls return.
        unsafe {
            let started = sys::cuInit(0);
            if started == CUresult::CUDA_ERROR_NO_DEVICE {
                return Ok(0);
            }
            check("starting CUDA", started)?;
            check("asking for the driver's version", sys::cuDriverGetVersion(&mut driver))?;
            if driver < DRIVER {
                let version = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
                return Err(failed(
                    "CUDA",
                    format!(
                        "the driver supports CUDA {}; {} or newer is needed (driver release 580): update the driver",
                        version(driver),
                        version(DRIVER)
                    ),
                ));
            }
            check("counting devices", sys::cuDeviceGetCount(&mut count))?;
        }
        Ok(count as usize)
    }

    /// Takes device `ordinal` into use and loads the kernels `names`, and of `more` those that its image has.
    ///
    /// # Errors
    /// As [`Self::count`], and no such device, or kernels that the driver does not take.
    pub fn open(ordinal: usize, names: &[&'static str], more: &[&'static str]) -> Result<Self> {
        let mut device = Self::look(ordinal)?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the out-parameter lives until the call returns; the image is a whole fatbin.
        check("loading the kernels", unsafe { sys::cuModuleLoadData(&mut module, IMAGE.as_ptr().cast()) })?;
        for &name in names.iter().chain(more) {
            let mut function = std::ptr::null_mut();
            let text = CString::new(name).map_err(|e| failed("loading the kernels", e.to_string()))?;
            // SAFETY: the module was loaded above and is never unloaded; the name lives until the call returns.
            let code = unsafe { sys::cuModuleGetFunction(&mut function, module, text.as_ptr()) };
            if code == CUresult::CUDA_ERROR_NOT_FOUND && more.contains(&name) {
                continue;
            }
            check("loading the kernels", code)?;
            let shared = shared_bytes(name);
            if shared > 0 {
                let most = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function was found above.
                check(name, unsafe { sys::cuFuncSetAttribute(function, most, shared as i32) })?;
            }
            device.functions.insert(name, (function, shared));
        }
        Ok(device)
    }

    /// Whether a kernel was loaded.
    pub fn has(&self, kernel: &str) -> bool {
        self.functions.contains_key(kernel)
    }

    /// Device `ordinal` without kernels: what it is and what memory it has.
    ///
    /// # Errors
    /// As [`Self::count`], no such device, or one that is too old.
    pub fn look(ordinal: usize) -> Result<Self> {
        let count = Self::count()?;
        if ordinal >= count {
            let there = if count == 0 { "there is none".to_owned() } else { format!("there are {count}, from 0 on") };
            return Err(failed("CUDA", format!("no device {ordinal}: {there}")));
        }
        let mut handle = 0;
        let mut text = [0; 256];
        let mut driver = 0;
        let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: every out-parameter lives until its call returns.
        unsafe {
            check("opening the device", sys::cuDeviceGet(&mut handle, ordinal as i32))?;
            check("asking the device's name", sys::cuDeviceGetName(text.as_mut_ptr(), text.len() as i32, handle))?;
        }
        let major = attribute(handle, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(handle, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let multiprocessors = attribute(handle, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        if major < 8 {
            let message = format!("{major}.{minor} is the device's compute capability; 8.0 or newer is needed");
            return Err(failed("CUDA", message));
        }
        // SAFETY: as above.
        unsafe {
            check("asking for the driver's version", sys::cuDriverGetVersion(&mut driver))?;
            check("making a context", sys::cuDevicePrimaryCtxRetain(&mut context, handle))?;
            check("making a context", sys::cuCtxSetCurrent(context))?;
            CURRENT.set(context as usize);
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            check("making a stream", sys::cuStreamCreate(&mut stream, flags))?;
        }
        let bytes: Vec<u8> = text.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
        let name = String::from_utf8_lossy(&bytes).into_owned();
        let graphs = std::env::var_os("RECOUP_CUDA_GRAPHS").is_none_or(|v| v != "0");
        let (functions, free, queue, downloaded) = Default::default();
        let multiprocessors = multiprocessors as usize;
        let capability = (major, minor);
        Ok(Self {
            ordinal,
            name,
            capability,
            driver,
            multiprocessors,
            handle,
            context,
            stream,
            functions,
            free,
            queue,
            graphs,
            downloaded,
        })
    }

    /// What tells it from every other device.
    ///
    /// # Errors
    /// The driver's failure.
    pub fn identity(&self) -> Result<String> {
        let mut uuid = sys::CUuuid_st { bytes: [0; 16] };
        // SAFETY: the out-parameter lives until the call returns.
        check("asking who the device is", unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, self.handle) })?;
        Ok(uuid.bytes.iter().map(|b| format!("{:02x}", *b as u8)).collect())
    }

    /// Kernels launched so far, those that wait not counted.
    pub fn launches(&self) -> u64 {
        self.waiting().launched
    }

    /// Graphs launched so far.
    pub fn graphs(&self) -> u64 {
        self.waiting().graphs
    }

    /// Bytes copied to the host so far.
    pub fn downloaded(&self) -> u64 {
        self.downloaded.load(Ordering::Relaxed)
    }

    /// Notes that bytes were copied to the host.
    pub(super) fn count_download(&self, bytes: usize) {
        self.downloaded.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn waiting(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream that everything runs on; what a library is to put there comes after [`Self::send`].
    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Sends the launches that wait to the stream, with the context current: whatever is called next comes after them.
    pub(super) fn send(&self) -> Result<()> {
        self.bind()?;
        self.waiting().flush(self.stream, self.graphs)
    }

    /// Bytes per second of a copy within the device, read and written together: the most that any kernel can move.
    ///
    /// # Errors
    /// The driver's failure.
    pub fn copy_speed(self: &Arc<Self>) -> Result<f64> {
        let (free, _) = self.memory()?;
        // Beyond every cache; a stand-in has less time.
        let bytes = (free / 8).min(1 << 30);
        let (from, to) = (self.zeros(bytes)?, self.zeros(bytes)?);
        let mut fastest = f64::INFINITY;
        for _ in 0..8 {
            self.wait()?;
            let start = Instant::now();
            for _ in 0..4 {
                self.copy((&to, 0), (&from, 0), bytes)?;
            }
            self.wait()?;
            fastest = fastest.min(start.elapsed().as_secs_f64() / 4.0);
        }
        Ok(2.0 * bytes as f64 / fastest)
    }

    /// Multiply-adds per second of BF16 tensor cores by their number and clock; 0 where the driver does not say.
    ///
    /// # Errors
    /// The driver's failure.
    pub fn tensor_peak(&self) -> Result<f64> {
        let kilohertz = attribute(self.handle, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?;
        // Dense, a clock and multiprocessor, from the architectures' white papers; 9.0 and 10.x by wgmma and tcgen05.
        let each = match self.capability {
            (8, 0) => 1024,
            (9, _) => 2048,
            (10 | 11, _) => 4096,
            _ => 512,
        };
        Ok(self.multiprocessors as f64 * f64::from(kilohertz) * 1e3 * f64::from(each))
    }

    /// Makes the context current on this thread.
    fn bind(&self) -> Result<()> {
        if CURRENT.get() == self.context as usize {
            return Ok(());
        }
        // SAFETY: the context lives as long as the process.
        check("using the device", unsafe { sys::cuCtxSetCurrent(self.context) })?;
        CURRENT.set(self.context as usize);
        Ok(())
    }

    /// Bytes of memory that are free, and all there are.
    ///
    /// # Errors
    /// The driver's failure.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the out-parameters live until the call returns.
        check("asking for memory", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free, total))
    }

    fn pool(&self) -> MutexGuard<'_, BTreeMap<usize, Vec<CUdeviceptr>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that [`Self::take`] takes for so many.
    #[must_use]
    pub fn block(bytes: usize) -> usize {
        if bytes <= 1 << 20 { bytes.max(GRAIN).next_power_of_two() } else { bytes.next_multiple_of(1 << 20) }
    }

    /// Memory of `bytes` bytes, of any content.
    ///
    /// # Errors
    /// When there is not enough.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Result<Memory> {
        let capacity = Self::block(bytes);
        // Taken out of the pool's lock before anything else is asked of the device.
        let held = self.pool().get_mut(&capacity).and_then(Vec::pop);
        if let Some(address) = held {
            return Ok(Memory { device: self.clone(), address, capacity, bytes });
        }
        self.bind()?;
        let mut address = 0;
        // SAFETY: the out-parameter lives until the call returns.
        let mut code = unsafe { sys::cuMemAlloc_v2(&mut address, capacity) };
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            self.shrink()?;
            // SAFETY: as above.
            code = unsafe { sys::cuMemAlloc_v2(&mut address, capacity) };
        }
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (free, total) = self.memory()?;
            let mib = |n: usize| format!("{:.1}", n as f64 / f64::from(1 << 20));
            return Err(failed(
                MEMORY,
                format!(
                    "{} MiB are needed at once, {} of {} MiB are free: a smaller context, another device, or --device cpu",
                    mib(capacity),
                    mib(free),
                    mib(total)
                ),
            ));
        }
        check("taking memory", code)?;
        Ok(Memory { device: self.clone(), address, capacity, bytes })
    }

    /// Gives memory that waits for its next use back to the driver.
    fn shrink(&self) -> Result<()> {
        self.wait()?;
        for (_, addresses) in std::mem::take(&mut *self.pool()) {
            for address in addresses {
                // SAFETY: from `cuMemAlloc_v2`, in nobody's hands, and nothing runs that could use it.
                check("giving memory back", unsafe { sys::cuMemFree_v2(address) })?;
            }
        }
        Ok(())
    }

    /// A copy of `data` on the device.
    ///
    /// # Errors
    /// Not enough memory, or the driver's failure.
    pub fn upload<T: Plain>(self: &Arc<Self>, data: &[T]) -> Result<Memory> {
        let bytes = size_of_val(data);
        let memory = self.take(bytes)?;
        if bytes > 0 {
            self.send()?;
            // SAFETY: the source has `bytes` bytes; pageable memory is copied before the call returns.
            let code = unsafe { sys::cuMemcpyHtoDAsync_v2(memory.address, data.as_ptr().cast(), bytes, self.stream) };
            check("copying to the device", code)?;
        }
        Ok(memory)
    }

    /// Memory of `bytes` bytes, all zero.
    ///
    /// # Errors
    /// As [`Self::upload`].
    pub fn zeros(self: &Arc<Self>, bytes: usize) -> Result<Memory> {
        let memory = self.take(bytes)?;
        if bytes > 0 {
            self.send()?;
            // SAFETY: the memory has `bytes` bytes.
            check("clearing memory", unsafe { sys::cuMemsetD8Async(memory.address, 0, bytes, self.stream) })?;
        }
        Ok(memory)
    }

    /// The first `count` values of `memory`, when all that was launched before is done.
    ///
    /// # Errors
    /// The driver's failure, also that of a kernel launched before.
    pub fn download<T: Plain>(&self, memory: &Memory, count: usize) -> Result<Vec<T>> {
        self.download_from(memory, 0, count)
    }

    /// [`Self::download`] from value `start` on.
    ///
    /// # Errors
    /// Values beyond the memory's end, and as there.
    pub fn download_from<T: Plain>(&self, memory: &Memory, start: usize, count: usize) -> Result<Vec<T>> {
        let (start, bytes) = (start * size_of::<T>(), count * size_of::<T>());
        if start + bytes > memory.bytes {
            return Err(failed("copying from the device", "beyond the memory's end"));
        }
        let mut out: Vec<T> = Vec::with_capacity(count);
        if bytes > 0 {
            self.send()?;
            let from = memory.address + start as u64;
            // SAFETY: both sides have room for `bytes` bytes, and `wait` below lets `out` be read only after the copy.
            let code = unsafe { sys::cuMemcpyDtoHAsync_v2(out.as_mut_ptr().cast(), from, bytes, self.stream) };
            check("copying from the device", code)?;
            self.wait()?;
            self.count_download(bytes);
        }
        // SAFETY: the copy, which has ended, wrote all of them, and any bytes are plain numbers.
        unsafe { out.set_len(count) };
        Ok(out)
    }

    /// Copies `bytes` bytes within the device.
    ///
    /// # Errors
    /// The driver's failure.
    pub fn copy(&self, to: (&Memory, usize), from: (&Memory, usize), bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        if to.1 + bytes > to.0.bytes || from.1 + bytes > from.0.bytes {
            return Err(failed("copying on the device", "beyond the memory's end"));
        }
        self.send()?;
        let (to, from) = (to.0.address + to.1 as u64, from.0.address + from.1 as u64);
        // SAFETY: both ranges lie in memory that was checked above.
        check("copying on the device", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream) })
    }

    /// Waits until all that was launched is done.
    ///
    /// # Errors
    /// The driver's failure, also that of a kernel.
    pub fn wait(&self) -> Result<()> {
        self.send()?;
        // SAFETY: the stream lives as long as the device.
        check("computing", unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    /// Launches a kernel over a grid of blocks, when something waits for it.
    ///
    /// # Errors
    /// When the driver does not take a launch, this one or one before.
    ///
    /// # Safety
    /// `args` are what the kernel's parameters say, in number, order and size; memory they point to is large enough, and this
    /// device's.
    pub unsafe fn launch(&self, kernel: &'static str, grid: [usize; 3], threads: u32, args: Args<'_>) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let loaded = self.functions.get(kernel).ok_or_else(|| failed(kernel, "this kernel was not loaded"))?;
        let (function, shared) = *loaded;
        let launch = Launch { kernel, function, grid: grid.map(|n| n as u32), threads, shared, values: args.values };
        let mut queue = self.waiting();
        // SAFETY: the caller's. Memory goes back to the driver in `shrink` only, after all that waits; what is taken from the pool
        // again is written by what comes to the queue or the stream later.
        unsafe { queue.push(launch) };
        if !self.graphs || queue.is_long() {
            self.bind()?;
            queue.flush(self.stream, self.graphs)?;
        }
        Ok(())
    }
}

/// A plain number that can be copied to the device as it lies in memory.
pub trait Plain: Copy + Default {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for u64 {}
impl Plain for i32 {}
impl Plain for f32 {}
impl Plain for f64 {}

/// Memory of a device; it goes back to the device's pool when nobody has it any more.
pub struct Memory {
    device: Arc<Device>,
    address: CUdeviceptr,
    capacity: usize,
    bytes: usize,
}

impl Memory {
    /// Bytes in use.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whose it is.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Where it lies on the device.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Whatever is launched later on the stream runs after what still uses it.
        self.device.pool().entry(self.capacity).or_default().push(self.address);
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes on device {}", self.bytes, self.device.ordinal)
    }
}

/// Arguments of a launch, in the order of the kernel's parameters.
#[derive(Default)]
pub struct Args<'a> {
    /// Each in the low bytes of a word, as little-endian machines have them.
    values: Vec<u64>,
    /// What they point to stays until the launch was made.
    memory: std::marker::PhantomData<&'a Memory>,
}

impl<'a> Args<'a> {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A pointer.
    pub fn memory(mut self, memory: &'a Memory) -> Self {
        self.values.push(memory.address);
        self
    }

    /// A pointer to byte `offset`.
    pub fn memory_at(mut self, memory: &'a Memory, offset: usize) -> Self {
        self.values.push(memory.address + offset as u64);
        self
    }

    /// A pointer, or null.
    pub fn optional(mut self, memory: Option<&'a Memory>) -> Self {
        self.values.push(memory.map_or(0, |m| m.address));
        self
    }

    /// An `int`.
    pub fn int(mut self, value: usize) -> Self {
        self.values.push(value as u64);
        self
    }

    /// A `float`.
    pub fn float(mut self, value: f32) -> Self {
        self.values.push(u64::from(value.to_bits()));
        self
    }

    /// A `double`.
    pub fn double(mut self, value: f64) -> Self {
        self.values.push(value.to_bits());
        self
    }
}
