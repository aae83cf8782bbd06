//! Capabilities and groups.

use caps::{CapSet, Capability, CapsHashSet};
use nix::unistd::{Gid, getgroups, setgroups};

use super::ConfineError;

/// All that the running agent holds. CAP_NET_ADMIN: nf_tables, conntrack, NFLOG, the bridges' switches, the sysctls of conntrack, and
/// receive buffers large enough. Everything else it does as the owner of its files, which takes no capability.
pub(super) const AGENT: [Capability; 1] = [Capability::CAP_NET_ADMIN];

/// Keeps these capabilities, in this process and in all that it starts; the rest is gone for good.
pub(super) fn keep(these: &[Capability]) -> Result<(), ConfineError> {
    let these: CapsHashSet = these.iter().copied().collect();
    let effective = caps::read(None, CapSet::Effective)?;
    // Only with CAP_SETPCAP; without it the set was made small by who started us, or this process cannot gain by it anyway.
    if effective.contains(&Capability::CAP_SETPCAP) {
        for more in caps::read(None, CapSet::Bounding)?.difference(&these) {
            caps::drop(None, CapSet::Bounding, *more)?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    let kept: CapsHashSet = caps::read(None, CapSet::Permitted)?.intersection(&these).copied().collect();
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    Ok(())
}

/// Becomes a member of this group and no other, so that a socket which its members may open can be opened without CAP_DAC_OVERRIDE.
///
/// # Errors
/// `Group`: it is not a member, and may not become one.
pub fn join_group(gid: u32) -> Result<(), ConfineError> {
    let failed = |source| ConfineError::Group { gid, source };
    let gid = Gid::from_raw(gid);
    let is_member = getgroups().map_err(failed)?.contains(&gid);
    match setgroups(&[gid]) {
        // Whoever started us made us one, and took the right to change it.
        Err(_) if is_member => Ok(()),
        joined => joined.map_err(failed),
    }
}
