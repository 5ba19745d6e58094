//! NVIDIA's cuBLAS, as far as training uses it: found at run time, one product of matrices.
//!
//! Nothing links it, and nothing looks for it before training on a GPU is asked for. cudarc's own loader is not used: it takes
//! names only, no folder, and panics where a function is missing.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::driver::{Device, Memory};
use super::libraries::{function, named, said, usual_folders};
use crate::backend::{BackendError, Result};

/// The library, or the folder that it is in: the variable that says so.
pub const VARIABLE: &str = "RECOUP_CUBLAS";

/// Names that it has, the newest first, and that of the library which does its work.
const NAMES: [(&str, &str); 2] = [("libcublas.so.13", "libcublasLt.so.13"), ("libcublas.so.12", "libcublasLt.so.12")];

/// The oldest version whose calls are those below.
const OLDEST: i32 = 120_000;

/// Bytes that it computes in: NVIDIA's recommendation for the largest devices. Given once, so that the same products get the
/// same algorithms.
const WORKSPACE: usize = 32 << 20;

type Handle = *mut c_void;
type Status = c_int;

/// `cublasGemmEx`, of cublas_api.h.
type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    u64,
    c_int,
    c_int,
    u64,
    c_int,
    c_int,
    *const c_void,
    u64,
    c_int,
    c_int,
    c_int,
    c_int,
) -> Status;

/// The library, of which these functions are used.
pub struct Library {
    create: unsafe extern "C" fn(*mut Handle) -> Status,
    destroy: unsafe extern "C" fn(Handle) -> Status,
    version: unsafe extern "C" fn(Handle, *mut c_int) -> Status,
    set_stream: unsafe extern "C" fn(Handle, *mut c_void) -> Status,
    set_workspace: unsafe extern "C" fn(Handle, u64, usize) -> Status,
    set_math: unsafe extern "C" fn(Handle, c_int) -> Status,
    set_atomics: unsafe extern "C" fn(Handle, c_int) -> Status,
    gemm: GemmEx,
    describe: unsafe extern "C" fn(Status) -> *const c_char,
    /// Open as long as its functions are at hand; what it needs is open as long as it.
    _open: Vec<libloading::Library>,
}

fn failed(message: impl Into<String>) -> BackendError {
    BackendError::Failed { context: "cuBLAS", message: message.into() }
}

impl Library {
    /// The library: the one that [`VARIABLE`] names, else where the system finds it, else in the usual folders.
    ///
    /// # Errors
    /// Where there is none, or none that can be used: says what was looked for, and what to install.
    pub fn open() -> Result<Self> {
        if let Some(named) = named(VARIABLE) {
            let found = candidates(&named).into_iter().find(|c| c.0.is_file()).ok_or_else(|| {
                let names = NAMES.map(|n| n.0).join(" or ");
                failed(format!("{VARIABLE} is {}: expected {names}, or a folder that has one", named.display()))
            })?;
            return Self::load(&found.0, found.1.as_deref()).map_err(failed);
        }
        let mut reasons = Vec::new();
        for (name, _) in NAMES {
            match Self::load(Path::new(name), None) {
                Ok(library) => return Ok(library),
                // Its own name: not there. Another's: something that it needs is not.
                Err(reason) if reason.starts_with(name) => {}
                Err(reason) => reasons.push(reason),
            }
        }
        for (file, beside) in usual_folders(&["cu13", "cublas"]).iter().flat_map(|folder| candidates(folder)) {
            if file.is_file() {
                match Self::load(&file, beside.as_deref()) {
                    Ok(library) => return Ok(library),
                    Err(reason) => reasons.push(reason),
                }
            }
        }
        let install = format!(
            "pip install nvidia-cublas, or NVIDIA's CUDA toolkit; or let {VARIABLE} name the folder that {} is in",
            NAMES[0].0
        );
        Err(failed(match reasons.is_empty() {
            true => format!(
                "training on a GPU needs {} or {}, which was not found (by its name, CUDA_HOME, /usr/local/cuda, and \
                 Python's nvidia/cu13): {install}",
                NAMES[0].0, NAMES[1].0
            ),
            false => format!("what was found cannot be used ({}): {install}", reasons.join("; ")),
        }))
    }

    /// The library of one file, after the one that it needs, where that lies beside it.
    fn load(file: &Path, beside: Option<&Path>) -> std::result::Result<Self, String> {
        let mut open = Vec::new();
        for path in beside.filter(|b| b.is_file()).into_iter().chain([file]) {
            // SAFETY: libraries of NVIDIA's names, whose initialisation may be run at any time.
            open.push(unsafe { libloading::Library::new(path) }.map_err(|e| said(&e))?);
        }
        let library = open.last().ok_or("no library")?;
        // SAFETY: the types are those of cublas_api.h, which are the same in 12 and 13.
        unsafe {
            Ok(Self {
                create: function(library, file, "cublasCreate_v2")?,
                destroy: function(library, file, "cublasDestroy_v2")?,
                version: function(library, file, "cublasGetVersion_v2")?,
                set_stream: function(library, file, "cublasSetStream_v2")?,
                set_workspace: function(library, file, "cublasSetWorkspace_v2")?,
                set_math: function(library, file, "cublasSetMathMode")?,
                set_atomics: function(library, file, "cublasSetAtomicsMode")?,
                gemm: function(library, file, "cublasGemmEx")?,
                describe: function(library, file, "cublasGetStatusString")?,
                _open: open,
            })
        }
    }

    fn check(&self, what: &str, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the library gives a text of its own for every number, or null.
        let said = unsafe {
            let text = (self.describe)(status);
            if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
        };
        let said = if said.is_empty() { format!("error {status}") } else { said };
        Err(failed(format!("{what}: {said}")))
    }
}

/// Files that `place` may mean, a file or a folder of them, each with the one that it needs beside it.
fn candidates(place: &Path) -> Vec<(PathBuf, Option<PathBuf>)> {
    if place.is_file() {
        let beside = NAMES.iter().find(|n| place.ends_with(n.0)).map(|n| place.with_file_name(n.1));
        return vec![(place.to_owned(), beside)];
    }
    NAMES.iter().map(|(name, beside)| (place.join(name), Some(place.join(beside)))).collect()
}

/// What the operands of a product are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    F32,
    Bf16,
}

impl Numbers {
    /// Bytes of one.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// As library_types.h has it.
    fn data_type(self) -> c_int {
        match self {
            Self::F32 => 0,
            Self::Bf16 => 14,
        }
    }

    /// Sums are in f32 either way; of f32 nothing is rounded before it is multiplied.
    fn compute_type(self) -> c_int {
        match self {
            Self::F32 => 69,
            Self::Bf16 => 68,
        }
    }
}

/// One side of a product: row-major numbers on the device, and whether they are transposed first.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    pub memory: &'a Memory,
    /// As they lie there.
    pub rows: usize,
    pub columns: usize,
    pub transposed: bool,
}

impl Side<'_> {
    /// Rows and columns as the product sees them.
    fn shape(&self) -> (usize, usize) {
        if self.transposed { (self.columns, self.rows) } else { (self.rows, self.columns) }
    }
}

/// cuBLAS on a device, in the device's stream.
pub struct Blas {
    library: Library,
    handle: Handle,
    device: Arc<Device>,
    version: i32,
    /// It computes in this.
    _workspace: Memory,
}

// SAFETY: a handle may be used from any thread, one at a time: `product` takes `&self`, and whoever has it keeps it behind a
// lock (the stream would order the work, but not the workspace of two calls that are made at once).
unsafe impl Send for Blas {}

impl Blas {
    /// Takes cuBLAS into use on `device`: one workspace, no atomics, no sums in less than f32, so that the same products have
    /// the same bits each time.
    ///
    /// # Errors
    /// What the library or the driver says; a library that is too old.
    pub fn new(library: Library, device: &Arc<Device>) -> Result<Self> {
        let workspace = device.take(WORKSPACE)?;
        device.send()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the context is current, and the out-parameter lives until the call returns.
        library.check("starting it", unsafe { (library.create)(&mut handle) })?;
        let mut blas = Self { library, handle, device: device.clone(), version: 0, _workspace: workspace };
        let library = &blas.library;
        // SAFETY: the handle was made above; the stream lives as long as the device, the workspace as long as the handle. Setting the
        // stream takes a workspace away, so that comes second.
        unsafe {
            library.check("asking for its version", (library.version)(handle, &mut blas.version))?;
            library.check("giving it the stream", (library.set_stream)(handle, device.stream().cast()))?;
            let given = (library.set_workspace)(handle, blas._workspace.address(), WORKSPACE);
            library.check("giving it memory", given)?;
            // CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION.
            library.check("choosing its arithmetic", (library.set_math)(handle, 16))?;
            library.check("choosing its arithmetic", (library.set_atomics)(handle, 0))?;
        }
        if blas.version < OLDEST {
            let found = blas.version();
            return Err(failed(format!(
                "version {found} was found, 12.0 or newer is needed: pip install nvidia-cublas"
            )));
        }
        Ok(blas)
    }

    /// Its version, `13.1.0`.
    #[must_use]
    pub fn version(&self) -> String {
        format!("{}.{}.{}", self.version / 10_000, self.version / 100 % 100, self.version % 100)
    }

    /// `c = alpha · a · b`, row-major, f32.
    ///
    /// # Errors
    /// What the library says; shapes or memory that do not fit.
    pub fn product(&self, c: &Memory, alpha: f32, a: Side<'_>, b: Side<'_>, numbers: Numbers) -> Result<()> {
        let ((m, k), (inner, n)) = (a.shape(), b.shape());
        let fits = |side: &Side<'_>| side.memory.bytes() == side.rows * side.columns * numbers.bytes();
        if k != inner || !fits(&a) || !fits(&b) || c.bytes() != 4 * m * n {
            return Err(failed(format!("a product of {m} x {k} by {inner} x {n} in memory of other sizes")));
        }
        if m == 0 || n == 0 {
            return Ok(());
        }
        if k == 0 {
            return Err(failed(format!("a product of {m} x 0 by 0 x {n}")));
        }
        let int = |size: usize| {
            c_int::try_from(size)
                .map_err(|_| failed(format!("a matrix with {size} rows or columns; {} are its most", i32::MAX)))
        };
        // Row-major c is, read by columns, its own transpose: bᵀ · aᵀ, and a row-major side is its transpose there already.
        let operation = |side: &Side<'_>| c_int::from(side.transposed);
        let (of_b, of_a) = (operation(&b), operation(&a));
        let (rows, columns, depth) = (int(n)?, int(m)?, int(k)?);
        let (stride_a, stride_b, zero, kind) = (int(a.columns)?, int(b.columns)?, 0.0f32, numbers.data_type());
        self.device.send()?;
        // SAFETY: the context is current; each matrix lies whole in its memory by `fits`; alpha and beta are f32, as the compute type
        // says, and are read before the call returns.
        let status = unsafe {
            (self.library.gemm)(
                self.handle,
                of_b,
                of_a,
                rows,
                columns,
                depth,
                (&raw const alpha).cast(),
                b.memory.address(),
                kind,
                stride_b,
                a.memory.address(),
                kind,
                stride_a,
                (&raw const zero).cast(),
                c.address(),
                0,
                rows,
                numbers.compute_type(),
                // CUBLAS_GEMM_DEFAULT: its own choice, by shape and device.
                -1,
            )
        };
        self.library.check("multiplying", status)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if self.device.wait().is_ok() {
            // SAFETY: the handle was made by `new`, and nobody has it any more; what it computed is done.
            unsafe { (self.library.destroy)(self.handle) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_a_folder_and_what_lies_beside_it_are_what_is_looked_for() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("libcublas.so.12");
        std::fs::write(&file, "no library").unwrap();
        let beside = Some(folder.path().join("libcublasLt.so.12"));
        assert_eq!(candidates(&file), [(file.clone(), beside.clone())]);
        assert_eq!(candidates(folder.path())[1], (file.clone(), beside));
        let reason = Library::load(&file, None).map(drop).unwrap_err();
        assert!(reason.contains("libcublas.so.12"), "{reason}");
    }
}
