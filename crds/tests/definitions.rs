//! The files under `crds/yaml` are what `crdgen` writes. UPDATE=1 rewrites them.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::path::Path;

use crds::object::definitions;

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("yaml")
}

#[test]
fn the_definitions_on_file_are_those_of_the_kinds() {
    let wanted: BTreeMap<String, String> =
        definitions().iter().map(|d| (format!("{}.yaml", d.spec.names.plural), crds::yaml::document(d))).collect();
    if std::env::var_os("UPDATE").is_some() {
        for (name, text) in &wanted {
            std::fs::write(folder().join(name), text).unwrap();
        }
    }
    let found: BTreeMap<String, String> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read_to_string(entry.path()).unwrap()))
        .collect();
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        wanted.keys().collect::<Vec<_>>(),
        "other files than kinds; UPDATE=1 adds, remove by hand"
    );
    for (name, wanted) in &wanted {
        assert!(
            found[name] == *wanted,
            "crds/yaml/{name} differs; UPDATE=1 rewrites it\n--- on file\n{}\n--- wanted\n{wanted}",
            found[name]
        );
    }
}

#[test]
fn every_field_of_every_kind_is_described() {
    use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{JSONSchemaProps, JSONSchemaPropsOrArray};

    fn walk(path: &str, schema: &JSONSchemaProps, missing: &mut Vec<String>) {
        for (name, property) in schema.properties.iter().flatten() {
            let path = format!("{path}.{name}");
            if property.description.as_deref().is_none_or(str::is_empty) {
                missing.push(path.clone());
            }
            walk(&path, property, missing);
        }
        if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
            walk(&format!("{path}[]"), items, missing);
        }
    }

    let mut missing = Vec::new();
    for definition in definitions() {
        for version in &definition.spec.versions {
            let schema = version.schema.as_ref().unwrap().open_api_v3_schema.as_ref().unwrap();
            walk(&definition.spec.names.kind, schema, &mut missing);
        }
    }
    assert_eq!(missing, Vec::<String>::new(), "field docs are the user's manual");
}

#[test]
fn every_kind_has_columns_and_stands_in_the_category() {
    for definition in definitions() {
        assert_eq!(definition.spec.names.categories.as_deref(), Some(&["bulkhead".to_owned()][..]));
        assert!(definition.spec.versions.iter().all(|v| v.additional_printer_columns.is_some()));
        assert_eq!(definition.spec.group, crds::GROUP);
    }
}
