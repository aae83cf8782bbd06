//! A YAML stream to objects. Strict: an unknown field, a key said twice, a value that can't be, each is an error that says
//! where. Nothing is skipped, and one bad document makes the whole stream bad: half an intent is not what was meant.
//!
//! # Why twice
//! A document is read once for what it is and once as that. In between there is no tree of values, so that every error
//! still knows its line, and an alias bomb has nothing to unfold into.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use kube::core::ObjectMeta;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::guardrail::Guardrail;
use crate::object::{Object, Refused};
use crate::policy_review::PolicyReview;
use crate::policy_suggestion::PolicySuggestion;
use crate::quarantine::Quarantine;
use crate::segment::Segment;
use crate::workload_policy::WorkloadPolicy;
use crate::{GROUP, VERSION};

/// The longest text that is read, in bytes. A policy of one workload takes some kilobytes.
pub const MAX_BYTES: usize = 8 << 20;

/// How many documents one text may hold.
pub const MAX_DOCUMENTS: usize = 10_000;

/// How deep brackets may nest. The kinds need 6; the scanner's time grows with length times depth.
pub const MAX_DEPTH: usize = 64;

/// Why a text is not a list of objects.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Longer than [`MAX_BYTES`].
    #[error("the text has {bytes} bytes, at most {MAX_BYTES} are read: split it")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// More than [`MAX_DOCUMENTS`].
    #[error("the text has more than {MAX_DOCUMENTS} documents: split it")]
    TooMany,
    /// Nested deeper than [`MAX_DEPTH`].
    #[error("line {line}: brackets nest deeper than {MAX_DEPTH}")]
    TooDeep {
        /// Where the limit was passed, from 1.
        line: usize,
    },
    /// Not YAML, or not what the kind says.
    #[error("{}{what}", place(*line, document))]
    Malformed {
        /// Line, from 1, where known.
        line: Option<usize>,
        /// Kind and name of the document, where known.
        document: Option<String>,
        /// Path, value and what is wrong with it.
        what: String,
    },
    /// A document that doesn't say what it is.
    #[error("document {number}: {field} is missing: a document starts with apiVersion and kind")]
    Nameless {
        /// Number of the document, from 1.
        number: usize,
        /// Which field.
        field: &'static str,
    },
    /// A kind, or a version of it, that is not ours.
    #[error(
        "document {number}: {kind} of {api_version} is not read here: the kinds are {} of {GROUP}/{VERSION}",
        Object::KINDS.join(", ")
    )]
    Foreign {
        /// Number of the document, from 1.
        number: usize,
        /// Its kind.
        kind: String,
        /// Its group and version.
        api_version: String,
    },
    /// One object in two documents.
    #[error("{object} is there twice, the second time as document {number}: which one is meant?")]
    Twice {
        /// Which object.
        object: String,
        /// Number of the second document, from 1.
        number: usize,
    },
    /// Readable, and yet no object.
    #[error(transparent)]
    Refused(#[from] Refused),
}

fn place(line: Option<usize>, document: &Option<String>) -> String {
    match (line, document) {
        (Some(line), Some(document)) => format!("line {line}, {document}: "),
        (Some(line), None) => format!("line {line}: "),
        (None, Some(document)) => format!("{document}: "),
        (None, None) => String::new(),
    }
}

/// What a document is, before it is read as that. Everything else is looked at in the second reading.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object: a map with apiVersion, kind, metadata and spec")]
struct Head {
    api_version: Option<String>,
    kind: Option<String>,
    metadata: Option<HeadMetadata>,
}

#[derive(serde::Deserialize)]
#[serde(expecting = "a map with a name")]
struct HeadMetadata {
    name: Option<String>,
    namespace: Option<String>,
}

impl Head {
    fn spoken(&self) -> String {
        let (kind, metadata) = (self.kind.as_deref().unwrap_or("object"), self.metadata.as_ref());
        match metadata.map(|m| (m.namespace.as_deref().filter(|n| !n.is_empty()), m.name.as_deref())) {
            Some((Some(namespace), Some(name))) => format!("{kind} {namespace}/{name}"),
            Some((None, Some(name))) => format!("{kind} {name}"),
            Some((_, None)) | None => format!("{kind} without a name"),
        }
    }
}

/// A whole document of a kind. In place of the kind's own type, because that one lets unknown fields pass.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Whole<S, T> {
    #[serde(rename = "apiVersion")]
    _api_version: IgnoredAny,
    #[serde(rename = "kind")]
    _kind: IgnoredAny,
    metadata: Metadata,
    spec: S,
    // Without a default, so that a kind without status (`T` = `Nothing`) has no such field.
    #[serde(default = "Option::default")]
    status: Option<T>,
}

/// The status of a kind that has none.
enum Nothing {}

impl<'de> Deserialize<'de> for Nothing {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(D::Error::custom("unknown field `status`: this kind has none"))
    }
}

/// What is ours of an object's metadata. The rest is the API server's own account: known, and left out.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    #[serde(default)]
    labels: Texts,
    #[serde(default)]
    annotations: Texts,
    #[serde(default, rename = "creationTimestamp")]
    _creation_timestamp: IgnoredAny,
    #[serde(default, rename = "deletionGracePeriodSeconds")]
    _deletion_grace_period_seconds: IgnoredAny,
    #[serde(default, rename = "deletionTimestamp")]
    _deletion_timestamp: IgnoredAny,
    #[serde(default, rename = "finalizers")]
    _finalizers: IgnoredAny,
    #[serde(default, rename = "generation")]
    _generation: IgnoredAny,
    #[serde(default, rename = "managedFields")]
    _managed_fields: IgnoredAny,
    #[serde(default, rename = "ownerReferences")]
    _owner_references: IgnoredAny,
    #[serde(default, rename = "resourceVersion")]
    _resource_version: IgnoredAny,
    #[serde(default, rename = "selfLink")]
    _self_link: IgnoredAny,
    #[serde(default, rename = "uid")]
    _uid: IgnoredAny,
}

impl From<Metadata> for ObjectMeta {
    fn from(from: Metadata) -> Self {
        Self { name: from.name, namespace: from.namespace, labels: from.labels.0, annotations: from.annotations.0, ..Self::default() }
    }
}

/// A map of texts in which no key is said twice.
#[derive(Default)]
struct Texts(Option<BTreeMap<String, String>>);

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;

        impl<'de> Visitor<'de> for Keys {
            type Value = Texts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of texts")
            }

            fn visit_unit<E>(self) -> Result<Texts, E> {
                Ok(Texts(None))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Texts, A::Error> {
                let mut texts = BTreeMap::new();
                while let Some((key, value)) = access.next_entry::<String, String>()? {
                    if texts.contains_key(&key) {
                        return Err(A::Error::custom(format_args!("duplicate key {key:?}")));
                    }
                    texts.insert(key, value);
                }
                Ok(Texts(Some(texts)))
            }
        }

        deserializer.deserialize_any(Keys)
    }
}

/// Objects in a stream of YAML (or JSON) documents, in their order. Empty documents are passed over.
///
/// # Errors
/// A [`ReadError`]: the first thing that is wrong, and where. Then nothing of the text was understood to be meant.
pub fn read(text: &str) -> Result<Vec<Object>, ReadError> {
    if text.len() > MAX_BYTES {
        return Err(ReadError::TooLong { bytes: text.len() });
    }
    nesting(text)?;
    let mut objects = Vec::new();
    let mut seen = BTreeSet::new();
    let (heads, wholes) = (serde_norway::Deserializer::from_str(text), serde_norway::Deserializer::from_str(text));
    for (number, (head, whole)) in (1..).zip(heads.zip(wholes)) {
        if number > MAX_DOCUMENTS {
            return Err(ReadError::TooMany);
        }
        let Some(head) = Option::<Head>::deserialize(head).map_err(|error| malformed(&error, None))? else { continue };
        let object = object(number, &head, whole)?;
        let subject = object.subject()?;
        if !seen.insert((object.kind(), subject.clone())) {
            return Err(ReadError::Twice { object: format!("{} {subject}", object.kind()), number });
        }
        objects.push(object);
    }
    Ok(objects)
}

fn object(number: usize, head: &Head, whole: serde_norway::Deserializer<'_>) -> Result<Object, ReadError> {
    let api_version = head.api_version.as_deref().ok_or(ReadError::Nameless { number, field: "apiVersion" })?;
    let kind = head.kind.as_deref().ok_or(ReadError::Nameless { number, field: "kind" })?;
    let foreign = || ReadError::Foreign { number, kind: kind.to_owned(), api_version: api_version.to_owned() };
    if api_version.split_once('/') != Some((GROUP, VERSION)) {
        return Err(foreign());
    }
    fn parts<S: DeserializeOwned, T: DeserializeOwned>(
        head: &Head,
        whole: serde_norway::Deserializer<'_>,
    ) -> Result<(ObjectMeta, S, Option<T>), ReadError> {
        let Whole { metadata, spec, status, .. } =
            Whole::<S, T>::deserialize(whole).map_err(|error| malformed(&error, Some(head.spoken())))?;
        Ok((metadata.into(), spec, status))
    }
    Ok(match kind {
        "Segment" => {
            let (metadata, spec, _) = parts::<_, Nothing>(head, whole)?;
            Segment { metadata, spec }.into()
        }
        "PolicySuggestion" => {
            let (metadata, spec, status) = parts(head, whole)?;
            PolicySuggestion { metadata, spec, status }.into()
        }
        "PolicyReview" => {
            let (metadata, spec, status) = parts(head, whole)?;
            PolicyReview { metadata, spec, status }.into()
        }
        "WorkloadPolicy" => {
            let (metadata, spec, _) = parts::<_, Nothing>(head, whole)?;
            WorkloadPolicy { metadata, spec }.into()
        }
        "Guardrail" => {
            let (metadata, spec, _) = parts::<_, Nothing>(head, whole)?;
            Guardrail { metadata, spec }.into()
        }
        "Quarantine" => {
            let (metadata, spec, _) = parts::<_, Nothing>(head, whole)?;
            Quarantine { metadata, spec }.into()
        }
        _ => return Err(foreign()),
    })
}

fn malformed(error: &serde_norway::Error, document: Option<String>) -> ReadError {
    let what = error.to_string();
    match error.location() {
        Some(at) => {
            // The place goes to the front, where people look for it.
            let tail = format!(" at line {} column {}", at.line(), at.column());
            let what = shortened(what.strip_suffix(&tail).unwrap_or(&what));
            ReadError::Malformed { line: Some(at.line()), document, what }
        }
        None => ReadError::Malformed { line: None, document, what: shortened(&what) },
    }
}

/// The parser quotes what it met, which may be a whole file; what it expected comes last.
fn shortened(what: &str) -> String {
    const BEGIN: usize = 160;
    const END: usize = 120;
    let cut = |nth: usize| what.char_indices().nth(nth).map_or(what.len(), |(at, _)| at);
    let count = what.chars().count();
    if count <= BEGIN + END { what.to_owned() } else { format!("{} ... {}", &what[..cut(BEGIN)], &what[cut(count - END)..]) }
}

/// Refuses brackets that nest deeper than [`MAX_DEPTH`], before the scanner sees them. Brackets within texts count too: only
/// what is never closed adds up, and a new document starts anew.
fn nesting(text: &str) -> Result<(), ReadError> {
    for (line, document) in documents(text) {
        let (mut line, mut depth) = (line, 0_usize);
        for byte in document.bytes() {
            match byte {
                b'\n' => line += 1,
                b'[' | b'{' => depth += 1,
                b']' | b'}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth > MAX_DEPTH {
                return Err(ReadError::TooDeep { line });
            }
        }
    }
    Ok(())
}

/// The documents' texts with the line each begins at. A line that begins with `---` ends a document wherever it stands
/// (YAML 1.2.2, production 206, c-forbidden).
fn documents(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut line = 1;
    text.split("\n---").map(move |document| {
        let at = line;
        line += document.matches('\n').count() + 1;
        (at, document)
    })
}
