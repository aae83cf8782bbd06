//! Names of objects. Kubernetes wants DNS labels; Compose allows capitals and underscores, a person allows himself more. So
//! the name in the metadata is derived, and the name that counts is in the spec: nothing is lost and nothing is guessed.

use policy::Workload;
use sha2::{Digest, Sha256};

/// The longest DNS label (RFC 1123, 2.1).
const LABEL: usize = 63;

/// The object name of something called `raw`: the same where that is a DNS label already; else in small letters, with `-`
/// for everything that a label can't hold, and eight hex digits of its SHA-256, so that two names never become one.
pub fn label(raw: &str) -> String {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let edge = |c: Option<char>| c.is_some_and(|c| c != '-' && fits(c));
    if raw.len() <= LABEL && raw.chars().all(fits) && edge(raw.chars().next()) && edge(raw.chars().next_back()) {
        return raw.to_owned();
    }
    let digest: String = Sha256::digest(raw.as_bytes()).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let mapped: String = raw.chars().map(|c| c.to_ascii_lowercase()).map(|c| if fits(c) { c } else { '-' }).take(LABEL - 9).collect();
    match mapped.trim_matches('-') {
        "" => format!("x-{digest}"),
        kept => format!("{kept}-{digest}"),
    }
}

/// Namespace and name of the object that belongs to a workload. A container started by hand has no namespace.
pub fn of_workload(workload: &Workload) -> (Option<String>, String) {
    let namespace = (!workload.namespace().is_empty()).then(|| label(workload.namespace()));
    (namespace, label(workload.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dns_label_stays_as_it_is() {
        for name in ["db", "a", "my-app-2", "0day"] {
            assert_eq!(label(name), name);
        }
    }

    #[test]
    fn what_is_no_label_becomes_one_and_two_never_become_the_same() {
        let raw = ["my_app", "my-App", "My_App", "-db", "db-", "ünï", "___", &"x".repeat(64), &"x".repeat(65), "a.b"];
        let mapped: std::collections::BTreeSet<String> = raw.iter().map(|r| label(r)).collect();
        assert_eq!(mapped.len(), raw.len());
        for name in &mapped {
            assert!(name.len() <= LABEL, "{name}");
            assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'), "{name}");
            assert!(!name.starts_with('-') && !name.ends_with('-'), "{name}");
            assert_eq!(label(name), *name, "a derived name is a label itself");
        }
    }
}
