//! What takes features that need more than crates: several processes of MPI, an object store. scripts/cluster-check.sh installs what that
//! takes and runs this.

#[path = "cluster/begun.rs"]
mod begun;
#[path = "cluster/processes.rs"]
mod processes;
#[path = "cluster/ranks.rs"]
mod ranks;
#[path = "cluster/scale.rs"]
mod scale;
#[path = "cluster/store.rs"]
mod store;
#[path = "support/mod.rs"]
mod support;
#[path = "cluster/training.rs"]
mod training;
