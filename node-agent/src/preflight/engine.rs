//! The engine: where it is, what it is, how its networks lie.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::{Check, chain};
use crate::inventory::endpoint::{self, EngineAddress, Environment};
use crate::inventory::engine::Engine;
use crate::inventory::facts::NetworkFact;

pub(super) async fn check(docker_host: Option<&str>) -> Vec<Check> {
    let address = match endpoint::locate(docker_host, &Environment::of_process()) {
        Ok(address) => address,
        Err(error) => return vec![Check::fail("engine", chain(&error), "")],
    };
    match ask(&address).await {
        Ok(checks) => checks,
        Err(error) => vec![Check::fail(
            "engine",
            format!("no answer at {address}: {}", chain(&error)),
            "start the engine, or name its socket with --docker-host or DOCKER_HOST; it takes root or the group docker",
        )],
    }
}

async fn ask(address: &EngineAddress) -> Result<Vec<Check>, bollard::errors::Error> {
    let engine = Engine::connect(&address.socket, &[]).await?;
    let about = engine.about().await?;
    let mut checks = Vec::new();
    checks.push(match &about.unmanaged {
        None => Check::ok("engine", format!("{} at {address}, rules by {}", about.version, about.firewall)),
        Some(why) => Check::fail("engine", format!("{} at {address}: {why}", about.version), "its containers are listed as unmanaged"),
    });
    checks.push(judge_proxy(about.userland_proxy, about.notes.is_empty()));
    checks.push(judge_subnets(&engine.networks().await?));
    Ok(checks)
}

fn judge_proxy(on: bool, seen: bool) -> Check {
    let name = "user-land proxy";
    match (on, seen) {
        (true, true) => Check::ok(name, "on: published ports are decided at the host's own door too"),
        (false, true) => Check::ok(name, "off"),
        (_, false) => Check::warn(
            name,
            "the engine's process is not visible: taken for on",
            "run on the host itself, where /proc shows dockerd with its flags",
        ),
    }
}

/// Two networks of one engine can't overlap; a bridge of the engine's and one of somebody else's can, and so can two that the
/// engine was given at different times by hand.
fn judge_subnets(networks: &BTreeMap<String, NetworkFact>) -> Check {
    let name = "subnets";
    let all: Vec<(&str, &IpNet)> =
        networks.values().flat_map(|network| network.subnets.iter().map(|subnet| (network.name.as_str(), subnet))).collect();
    let overlaps: Vec<String> = all
        .iter()
        .enumerate()
        .flat_map(|(index, one)| all[index + 1..].iter().map(move |other| (one, other)))
        .filter(|((_, one), (_, other))| one.contains(*other) || other.contains(*one))
        .map(|((one, first), (other, second))| format!("{one} ({first}) and {other} ({second})"))
        .collect();
    if overlaps.is_empty() {
        Check::ok(name, format!("{} networks, none overlaps another", networks.len()))
    } else {
        Check::warn(
            name,
            format!("networks overlap: {}", overlaps.join("; ")),
            "addresses are told apart by their bridge; where an address comes without one it counts as unknown",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::CheckState;
    use super::*;

    fn network(name: &str, subnets: &[&str]) -> (String, NetworkFact) {
        let fact = NetworkFact {
            name: name.to_owned(),
            project: None,
            driver: "bridge".to_owned(),
            bridge: Some(format!("br-{name}")),
            subnets: subnets.iter().map(|subnet| subnet.parse().unwrap()).collect(),
            internal: false,
            attached: BTreeMap::new(),
        };
        (name.to_owned(), fact)
    }

    #[test]
    fn overlapping_subnets_are_told_with_both_names() {
        let apart = BTreeMap::from([network("a", &["172.18.0.0/16"]), network("b", &["172.19.0.0/16", "2001:db8::/64"])]);
        assert_eq!(judge_subnets(&apart).state, CheckState::Ok);
        let over = BTreeMap::from([network("a", &["172.18.0.0/16"]), network("b", &["172.18.4.0/24"])]);
        let found = judge_subnets(&over);
        assert_eq!(found.state, CheckState::Warn);
        assert!(found.what.contains("a (172.18.0.0/16) and b (172.18.4.0/24)"), "{found}");
    }
}
