//! The binary as its users run it: each command is a process of its own.

#[path = "../support/mod.rs"]
mod support;

mod bench;
mod chat;
mod compare;
mod convert;
mod device;
mod eval;
mod hub;
mod lab;
mod output;
mod pretrain;
mod quantize;
mod recover;
mod recover_blocks;
mod recover_plan;
mod serve;
mod settings;
mod sweep;
mod until;
mod verify;
mod verify_serve;
