//! The kinds as text: a stream of YAML documents, read strictly and written so that every reader reads the same.

mod read;
mod write;

pub use read::{MAX_BYTES, MAX_DEPTH, MAX_DOCUMENTS, ReadError, read};
pub use write::{document, write};

#[cfg(test)]
mod tests;
