use bollard::models::PortBinding;

use super::*;

#[test]
fn a_mac_is_six_bytes_and_nothing_else() {
    assert_eq!(mac("02:42:ac:1f:00:02"), Some([2, 0x42, 0xac, 0x1f, 0, 2]));
    for wrong in ["", "02:42", "02:42:ac:1f:00:02:03", "02:42:ac:1f:00:zz", "024:2:ac:1f:00:02"] {
        assert_eq!(mac(wrong), None, "{wrong}");
    }
}

#[test]
fn a_mount_of_the_socket_or_of_a_folder_above_it_is_found_however_it_is_written() {
    let sockets = [plain(Path::new("/var/run/docker.sock")), PathBuf::from(CONTAINERD_SOCKET), PathBuf::from("/srv/lab/docker.sock")];
    for source in [
        "/run/docker.sock",
        "/var/run/docker.sock",
        "/var/run",
        "/run",
        "/",
        "/srv/lab",
        "/srv/./lab/../lab/docker.sock",
        "/run/containerd",
    ] {
        assert!(holds_socket(Path::new(source), &sockets), "{source}");
    }
    for source in ["/run/docker.sock2", "/srv/labs", "/var/lib/docker", "/var", "/srv/lab/data"] {
        assert!(!holds_socket(Path::new(source), &sockets), "{source}");
    }
}

#[test]
fn published_ports_are_read_and_what_makes_no_sense_is_noted() {
    let binding = |ip: &str, port: &str| PortBinding { host_ip: Some(ip.to_owned()), host_port: Some(port.to_owned()) };
    let ports = PortMap::from([
        ("80/tcp".to_owned(), Some(vec![binding("0.0.0.0", "8080"), binding("::", "8080")])),
        ("53/udp".to_owned(), Some(vec![binding("", "53")])),
        ("5060/sctp".to_owned(), Some(vec![binding("192.0.2.1", "5060")])),
        ("443/tcp".to_owned(), None),
        ("90/tcp".to_owned(), Some(vec![binding("nowhere", "90")])),
        ("x/tcp".to_owned(), Some(vec![binding("0.0.0.0", "91")])),
    ]);
    let mut notes = Vec::new();
    let found: Vec<String> = published("web", &ports, &mut notes)
        .iter()
        .map(|one| format!("{}:{} {}/{}", one.address, one.port, one.protocol, one.container_port))
        .collect();
    assert_eq!(found, ["0.0.0.0:53 udp/53", "0.0.0.0:8080 tcp/80", "192.0.2.1:5060 sctp/5060", ":::8080 tcp/80"]);
    assert_eq!(notes.len(), 2, "{notes:?}");
}

#[test]
fn a_bridge_that_nobody_named_has_the_first_twelve_digits_of_its_network() {
    let id = "74a41cbf52b24bcbf325c70220911eb1087f245cec0e277e92d90e37168a3db8";
    let told = |options: &[(&str, &str)], driver: &str| NetworkInspect {
        id: Some(id.to_owned()),
        driver: Some(driver.to_owned()),
        options: Some(options.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()),
        ..NetworkInspect::default()
    };
    let bridge = |told| network_fact(told).unwrap().1.bridge;
    assert_eq!(bridge(told(&[], "bridge")).as_deref(), Some("br-74a41cbf52b2"));
    assert_eq!(bridge(told(&[("com.docker.network.bridge.name", "docker0")], "bridge")).as_deref(), Some("docker0"));
    assert_eq!(bridge(told(&[("parent", "eth0")], "macvlan")), None);
}

#[test]
fn endpoints_without_a_container_are_left_out() {
    let endpoint = EndpointResource { ipv4_address: Some("10.0.0.2/24".to_owned()), ..EndpointResource::default() };
    let id = "a".repeat(64);
    let told = NetworkInspect {
        id: Some("n".to_owned()),
        containers: Some(HashMap::from([
            (format!("ep-{id}"), endpoint.clone()),
            ("lb-ingress".to_owned(), endpoint.clone()),
            (id.clone(), endpoint),
        ])),
        ..NetworkInspect::default()
    };
    let (_, fact) = network_fact(told).unwrap();
    assert_eq!(fact.attached.keys().collect::<Vec<_>>(), [&id]);
    assert_eq!(fact.attached[&id].addresses, BTreeSet::from(["10.0.0.2".parse::<IpAddr>().unwrap()]));
}

#[test]
fn a_link_gives_a_container_a_second_name_that_is_not_its_own() {
    let told = ContainerSummary {
        id: Some("c".to_owned()),
        names: Some(vec!["/app/db".to_owned(), "/db".to_owned()]),
        ..ContainerSummary::default()
    };
    assert_eq!(container_fact(told).unwrap().1.name, "db");
}

#[test]
fn who_has_net_raw_is_what_the_engine_makes_of_it() {
    let list = |names: &[&str]| -> Vec<String> { names.iter().map(|&name| name.to_owned()).collect() };
    for (what, privileged, add, drop, has) in [
        ("everybody, unless told otherwise", false, &[][..], &[][..], true),
        ("taken away", false, &[], &["CAP_NET_RAW"], false),
        ("written in another way", false, &[], &["net_raw"], false),
        ("all are taken away", false, &[], &["ALL"], false),
        ("all but this one", false, &["NET_RAW"], &["ALL"], true),
        ("all are given", false, &["ALL"], &[], true),
        ("all but this one are given", false, &["ALL"], &["NET_RAW"], false),
        ("given after it was taken away", false, &["NET_RAW"], &["NET_RAW"], true),
        ("privileged, whatever is said", true, &[], &["NET_RAW"], true),
    ] {
        assert_eq!(has_net_raw(privileged, Some(&list(add)), Some(&list(drop))), has, "{what}");
    }
    assert!(has_net_raw(false, None, None));
}
