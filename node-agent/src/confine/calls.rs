//! System calls that are refused with EPERM, whoever asks (seccomp). A list of what is denied, not of what is allowed: the C library
//! and the runtime may take up a new call with any release, and an agent that is ended by its own fence enforces nothing. What is on
//! it is what turns a foothold into the host: other namespaces and mounts, other processes' memory, the kernel's own code, clocks,
//! and the interfaces in which most holes were found (bpf, io_uring, userfaultfd, keys, perf).

use std::collections::BTreeMap;

use nix::libc::{self, c_long};
use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Is, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use super::ConfineError;

/// Refused for both processes.
const NEVER: [c_long; 57] = [
    // Mounts, roots and namespaces. Of the last, the engine's is entered before this.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_mknodat,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_fanotify_init,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    // The kernel itself.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_vhangup,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_personality,
    // Wide interfaces.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_keyctl,
    libc::SYS_request_key,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS_memfd_secret,
];

/// Kinds of sockets that the agent opens: the controller and the engine filter, the kernel, and metrics.
const AGENT: [i32; 4] = [libc::AF_UNIX, libc::AF_NETLINK, libc::AF_INET, libc::AF_INET6];
/// Kinds of sockets that the filter opens.
const FILTER: [i32; 1] = [libc::AF_UNIX];

/// Namespaces that `clone` could make (CLONE_NEW*).
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWCGROUP,
];

pub(super) fn agent() -> Result<Option<String>, ConfineError> {
    refuse(&AGENT, &[])
}

/// The filter starts no program either.
pub(super) fn filter() -> Result<Option<String>, ConfineError> {
    refuse(&FILTER, &[libc::SYS_execve, libc::SYS_execveat])
}

fn refuse(sockets: &[i32], more: &[c_long]) -> Result<Option<String>, ConfineError> {
    let programs = [denied(sockets, more), unknown()].into_iter().collect::<Result<Vec<_>, _>>();
    let programs = match programs {
        Ok(programs) => programs,
        Err(BackendError::InvalidTargetArch(arch)) => return Ok(Some(format!("system calls are not limited on {arch}"))),
        Err(error) => return Err(Error::Backend(error).into()),
    };
    for program in programs {
        match apply_filter(&program) {
            Ok(()) => {}
            Err(Error::Prctl(error) | Error::Seccomp(error)) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => {
                return Ok(Some("this kernel has no seccomp: the agent's system calls are not limited".to_owned()));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

fn denied(sockets: &[i32], more: &[c_long]) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = NEVER.iter().chain(more).map(|&call| (call, Vec::new())).collect();
    let is_other = |&kind: &i32| SeccompCondition::new(0, Length::Dword, Is::Ne, kind as u64);
    rules.insert(libc::SYS_socket, vec![SeccompRule::new(sockets.iter().map(is_other).collect::<Result<_, _>>()?)?]);
    let makes = |&kind: &i32| {
        let kind = kind as u64;
        SeccompRule::new(vec![SeccompCondition::new(0, Length::Qword, Is::MaskedEq(kind), kind)?])
    };
    rules.insert(libc::SYS_clone, NAMESPACES.iter().map(makes).collect::<Result<_, _>>()?);
    program(rules, libc::EPERM)
}

/// `clone3` takes its flags from memory, where a filter can't look. The C library goes back to `clone` where it isn't there.
fn unknown() -> Result<BpfProgram, BackendError> {
    program(BTreeMap::from([(libc::SYS_clone3, Vec::new())]), libc::ENOSYS)
}

fn program(rules: BTreeMap<i64, Vec<SeccompRule>>, errno: i32) -> Result<BpfProgram, BackendError> {
    let here = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno as u32), here)?.try_into()
}
