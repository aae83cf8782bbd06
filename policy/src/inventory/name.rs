//! Which workload a container is, from its labels and its name.
//!
//! # Why
//! In this order: the label `bulkhead.dev/workload`, because a person wrote it for us; Compose's project and service, which
//! Compose v1 and v2 to v5 write alike; the container's name. A label that can't be read names nobody: the next in order is taken
//! and a note says so, because a guess would put the container under somebody else's policy.

use std::collections::BTreeMap;

use crate::workload::Workload;

/// Names the workload: NAME or NAMESPACE/NAME.
pub const WORKLOAD_LABEL: &str = "bulkhead.dev/workload";
/// Compose's project, of containers and of networks.
pub const PROJECT_LABEL: &str = "com.docker.compose.project";
const SERVICE_LABEL: &str = "com.docker.compose.service";
/// `True` for a container of `docker compose run`, `False` or absent for the service's own.
const ONE_OFF_LABEL: &str = "com.docker.compose.oneoff";

/// A container's place among the workloads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// What runs in it.
    pub workload: Workload,
    /// Made by `docker compose run`.
    pub one_off: bool,
    /// Named by nobody but the engine: see [`looks_engine_made`].
    pub engine_named: bool,
    /// Labels that could not be read, in sentences.
    pub notes: Vec<String>,
}

/// The workload of the container `name` (without the engine's leading slash) with these labels.
pub fn name(labels: &BTreeMap<String, String>, name: &str) -> Named {
    let mut notes = Vec::new();
    let one_off = labels.get(ONE_OFF_LABEL).is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let mut read = |what: String, text: &str| match text.parse::<Workload>() {
        Ok(workload) => Some(workload),
        Err(wrong) => {
            notes.push(format!("container {name}: {what}: {wrong}; it goes by the next name it has"));
            None
        }
    };
    let labelled = labels.get(WORKLOAD_LABEL).and_then(|text| read(format!("label {WORKLOAD_LABEL}"), text));
    let composed = || match (labels.get(PROJECT_LABEL), labels.get(SERVICE_LABEL)) {
        (Some(project), Some(service)) => read("Compose labels".to_owned(), &format!("{project}/{service}")),
        (_, _) => None,
    };
    let given = labelled.or_else(composed);
    // The engine allows [a-zA-Z0-9][a-zA-Z0-9_.-]+ in a name, all of which a workload may hold.
    let engine_named = given.is_none() && looks_engine_made(name);
    let workload = given.unwrap_or_else(|| Workload::new("", name));
    Named { workload, one_off, engine_named, notes }
}

/// Whether a container's name has the form of those that the engine makes up: two words of small letters joined by one
/// underscore, then a digit where the first choice was taken (moby, `pkg/namesgenerator`: "adjective_surname", a digit on retry).
///
/// # Why
/// The engine doesn't record who chose the name, and its word list changes between versions. The form alone errs to one side: a
/// person's `my_app` is taken for a made-up name and gets a finding that it does not deserve; a made-up name is never missed.
pub fn looks_engine_made(name: &str) -> bool {
    let word = |text: &str| text.len() >= 2 && text.bytes().all(|b| b.is_ascii_lowercase());
    let unnumbered = name.strip_suffix(|c: char| c.is_ascii_digit()).unwrap_or(name);
    unnumbered.split_once('_').is_some_and(|(adjective, surname)| word(adjective) && word(surname))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    fn named(pairs: &[(&str, &str)], container: &str) -> Named {
        name(&labels(pairs), container)
    }

    /// As docker-compose 1.29 writes them.
    const V1: &[(&str, &str)] = &[
        ("com.docker.compose.config-hash", "0c1e"),
        ("com.docker.compose.container-number", "1"),
        ("com.docker.compose.oneoff", "False"),
        ("com.docker.compose.project", "shop"),
        ("com.docker.compose.service", "db"),
        ("com.docker.compose.version", "1.29.2"),
    ];
    /// As docker compose 5 writes them.
    const V5: &[(&str, &str)] = &[
        ("com.docker.compose.config-hash", "0c1e"),
        ("com.docker.compose.container-number", "1"),
        ("com.docker.compose.depends_on", ""),
        ("com.docker.compose.image", "sha256:5acb"),
        ("com.docker.compose.oneoff", "False"),
        ("com.docker.compose.project", "shop"),
        ("com.docker.compose.project.config_files", "/srv/shop/compose.yaml"),
        ("com.docker.compose.project.working_dir", "/srv/shop"),
        ("com.docker.compose.service", "db"),
        ("com.docker.compose.version", "5.0.0"),
    ];

    #[test]
    fn compose_labels_of_old_and_new_name_the_service() {
        for (set, container) in [(V1, "shop_db_1"), (V5, "shop-db-1")] {
            let found = named(set, container);
            assert_eq!(found.workload.to_string(), "shop/db");
            assert!(!found.one_off && !found.engine_named && found.notes.is_empty());
        }
    }

    #[test]
    fn a_one_off_run_is_the_service_and_says_that_it_is_a_run() {
        let run: Vec<_> = V5.iter().map(|&(k, v)| if k.ends_with("oneoff") { (k, "True") } else { (k, v) }).collect();
        let found = named(&run, "shop-db-run-1f2e3d4c5b6a");
        assert_eq!((found.workload.to_string().as_str(), found.one_off), ("shop/db", true));
    }

    #[test]
    fn our_own_label_wins_and_may_name_a_namespace() {
        let mut set = V5.to_vec();
        set.push((WORKLOAD_LABEL, "billing/ledger"));
        assert_eq!(named(&set, "x").workload.to_string(), "billing/ledger");
        assert_eq!(named(&[(WORKLOAD_LABEL, "ledger")], "x").workload.to_string(), "ledger");
    }

    #[test]
    fn a_label_that_names_nobody_is_noted_and_the_next_name_is_taken() {
        for wrong in ["", "a/b/c", "two words", "/x", "x/", "a:b", "{\"name\":\"db\"}", "tab\there"] {
            let mut set = V5.to_vec();
            set.push((WORKLOAD_LABEL, wrong));
            let found = named(&set, "shop-db-1");
            assert_eq!(found.workload.to_string(), "shop/db", "{wrong:?}");
            assert_eq!(found.notes.len(), 1, "{wrong:?}");
        }
    }

    #[test]
    fn compose_labels_set_by_hand_to_nonsense_fall_back_to_the_container_name() {
        let found = named(&[(PROJECT_LABEL, "a b"), (SERVICE_LABEL, "c")], "job");
        assert_eq!(found.workload.to_string(), "job");
        assert_eq!(found.notes.len(), 1);
    }

    #[test]
    fn half_of_the_compose_labels_is_no_service() {
        assert_eq!(named(&[(PROJECT_LABEL, "shop")], "job").workload.to_string(), "job");
    }

    #[test]
    fn labels_with_odd_contents_do_not_disturb_the_name() {
        let odd =
            [("a", "b=c,d"), ("json", "{\"x\":[1,2]}"), ("empty", ""), ("", "no key"), ("k=v", "k=v,k=v"), ("unicode", "\u{1f6a2}\n")];
        assert_eq!(named(&odd, "web").workload.to_string(), "web");
    }

    #[test]
    fn names_of_the_form_the_engine_makes_up_are_recognised() {
        for name in ["quirky_einstein", "modest_hypatia", "elegant_rubin7"] {
            assert!(looks_engine_made(name), "{name}");
        }
        for name in ["web", "shop_db_1", "shop-db-1", "my-app", "Quirky_einstein", "a_b", "api_v2x", "_x", "x_", "one_two12"] {
            assert!(!looks_engine_made(name), "{name}");
        }
    }

    #[test]
    fn a_made_up_name_that_a_label_replaces_needs_no_finding() {
        assert!(named(&[], "quirky_einstein").engine_named);
        assert!(!named(&[(WORKLOAD_LABEL, "job")], "quirky_einstein").engine_named);
    }
}
