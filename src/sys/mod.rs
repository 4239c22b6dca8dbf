//! The only unsafe code: system calls that no crate wraps, behind safe signatures.
//!
//! Each file wraps one corner of the kernel and says which manual it follows. Descriptors are owned
//! values, errors are [`std::io::Error`]. No policy and no logging: callers decide and report.
#![allow(
    unsafe_code,
    reason = "this is the room for it; every block says why it is sound"
)]

pub mod datagrams;
pub mod fd;
pub mod memory;
pub mod netlink;
pub mod privileges;
pub mod process;
pub mod readiness;
pub mod reserve;
pub mod signals;
pub mod socket;
pub mod tap;
