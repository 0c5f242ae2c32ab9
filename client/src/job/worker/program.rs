//! A job with an executable of its own: the node's worker fetches and checks it, and becomes it.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use cairn_proto::{Error, ErrorCode, Result, pb};
use prost::Message as _;
use rustix::fs::MemfdFlags;

use crate::job::ship;

/// First argument of a job's executable that a node started as a worker; the second one is the descriptor that the job is read from.
pub const WORKER_ARGUMENT: &str = "cairn-program-worker";
/// Longest description of a job that is taken from the descriptor.
const MAX_JOB_BYTES: u64 = 64 << 20;

/// Can this machine run it?
pub fn check_target(executable: &pb::Executable, host: &str) -> Result<()> {
    let refuse = |text: String| Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(host));
    let here = ship::target();
    if executable.target != here {
        return refuse(format!("the job's program was built for {}, node {host} is {here}", executable.target));
    }
    match own_glibc() {
        Some(own) if own < executable.glibc => refuse(format!(
            "the job's program needs glibc 2.{}, node {host} has 2.{own}: build it on a machine with that glibc or an older one, or for musl",
            executable.glibc
        )),
        _ => Ok(()),
    }
}

/// Minor version of the glibc 2 of this process.
#[cfg(target_env = "gnu")]
fn own_glibc() -> Option<u32> {
    // SAFETY: it returns a static string.
    let version = unsafe { std::ffi::CStr::from_ptr(libc::gnu_get_libc_version()) };
    version.to_str().ok()?.strip_prefix("2.")?.split('.').next()?.parse().ok()
}

#[cfg(not(target_env = "gnu"))]
fn own_glibc() -> Option<u32> {
    None
}

/// Becomes the program, which goes on with the pipes of this process. Returns only if that fails.
pub fn become_program(program: &File, name: &str, job: &pb::WorkerJob) -> Error {
    let failed = |error: std::io::Error| Error::io(format!("cannot start the job's program {name}"), &error);
    let handed_on = match hand_on(job) {
        Ok(handed_on) => handed_on,
        Err(error) => return failed(error),
    };
    // What was checked is what runs: the descriptor, not a name.
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command.arg0(name).arg(WORKER_ARGUMENT).arg(handed_on.as_raw_fd().to_string());
    failed(command.exec())
}

/// The job in a descriptor that stays open in what this process becomes.
fn hand_on(job: &pb::WorkerJob) -> std::io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("cairn-job", MemfdFlags::empty())?);
    file.write_all(&job.encode_to_vec())?;
    file.rewind()?;
    Ok(file)
}

/// What the process was handed before it became this program.
pub fn handed_on(descriptor: &str) -> Result<pb::WorkerJob> {
    let refuse = |why: &dyn std::fmt::Display| {
        Error::new(ErrorCode::InvalidArgument, format!("{WORKER_ARGUMENT} is for nodes to use: {why}"))
    };
    let number: i32 = descriptor.parse().map_err(|_| refuse(&"its argument is no descriptor"))?;
    if number <= 2 {
        return Err(refuse(&"its argument is no descriptor of a job"));
    }
    // SAFETY: the node's worker opened it for this process; nothing else in this program knows of it.
    let file = unsafe { OwnedFd::from_raw_fd(number) };
    let mut bytes = Vec::new();
    File::from(file).take(MAX_JOB_BYTES).read_to_end(&mut bytes).map_err(|error| refuse(&error))?;
    pb::WorkerJob::decode(&bytes[..]).map_err(|error| refuse(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_for_another_machine_is_refused() {
        let executable = |target: &str, glibc| pb::Executable { target: target.into(), glibc, ..Default::default() };
        check_target(&executable(&ship::target(), 0), "n1").unwrap();
        let error = check_target(&executable("sparc-linux-gnu", 0), "n1").unwrap_err();
        assert!(error.message().contains("built for sparc-linux-gnu, node n1 is "), "{error}");
        let newer = check_target(&executable(&ship::target(), 999), "n1");
        assert_eq!(newer.is_err(), own_glibc().is_some());
    }

    #[test]
    fn a_job_is_handed_on() {
        let job = pb::WorkerJob { node_id: "n".into(), rack: "/r".into(), ..Default::default() };
        let file = hand_on(&job).unwrap();
        let descriptor = std::os::fd::IntoRawFd::into_raw_fd(file).to_string();
        assert_eq!(handed_on(&descriptor).unwrap(), job);
        for bad in ["", "x", "-1", "0", "1"] {
            assert_eq!(handed_on(bad).unwrap_err().code(), ErrorCode::InvalidArgument, "{bad:?}");
        }
    }
}
