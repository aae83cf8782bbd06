//! A made-up world of many workloads: a few services are everybody's, most are few people's.

use policy::{EdgeDelta, EdgeKey, Endpoint, Evidence, HourSet, Service, Workload};

/// The nth workload: ten to a project.
pub(crate) fn workload(n: usize) -> Workload {
    Workload::new(format!("project-{}", n / 10), format!("service-{n}"))
}

/// A number from 0 up to 1 that looks drawn, the same in each run.
pub(crate) fn random(n: usize, salt: u64) -> f64 {
    // splitmix64 (Steele, Lea, Flood 2014).
    let mut z = (n as u64).wrapping_mul(4).wrapping_add(salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// Something seen of the nth edge. Servers are drawn by Zipf's law with exponent 1, clients evenly; each
/// server listens on four ports.
pub(crate) fn edge(n: usize, workloads: usize) -> EdgeDelta {
    let server = ((workloads as f64).powf(random(n, 1)) - 1.0) as usize % workloads;
    let client = (random(n, 2) * workloads as f64) as usize % workloads;
    let key = EdgeKey {
        from: Endpoint::Workload(workload(client)),
        to: Endpoint::Workload(workload(server)),
        service: Service::tcp(8000 + (random(n, 3) * 4.0) as u16),
        direction_known: true,
    };
    let when = crate::stage::now();
    let mut hours = HourSet::default();
    hours.insert(HourSet::hour_of(when));
    let seen = Evidence {
        established: 3,
        bytes_sent: 1000,
        bytes_received: 1000,
        first: Some(when),
        last: Some(when),
        hours,
        roads: [policy::evidence::Road::Direct].into(),
        ..Evidence::default()
    };
    EdgeDelta { key, seen }
}

/// So many edges, all different.
pub(crate) fn edges(count: usize, workloads: usize) -> Vec<EdgeDelta> {
    let mut seen = std::collections::HashSet::with_capacity(count);
    let mut edges = Vec::with_capacity(count);
    let mut n = 0;
    while edges.len() < count {
        let edge = edge(n, workloads);
        n += 1;
        if seen.insert(edge.key.clone()) {
            edges.push(edge);
        }
    }
    edges
}
