//! Why a message was not understood.

/// Why a message, or one element of it, was not understood: which field, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A field that must be there is not.
    #[error("{field} is missing")]
    Missing {
        /// Which.
        field: &'static str,
    },
    /// A number that stands for nothing, or that cannot be.
    #[error("{field} is {value}, it must be {allowed}")]
    Number {
        /// Which.
        field: &'static str,
        /// What was there.
        value: i128,
        /// What may be.
        allowed: &'static str,
    },
    /// A text that is not what it should be.
    #[error("{field} cannot be read: {why}")]
    Text {
        /// Which.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// Hours that don't come in pairs, or not in order.
    #[error("hour_runs is not a list of runs: {why}")]
    Hours {
        /// What is wrong with it.
        why: &'static str,
    },
    /// A document inside of a message.
    #[error("the {what} cannot be read: {why}")]
    Json {
        /// Which document.
        what: &'static str,
        /// What is wrong with it, and where.
        why: String,
    },
}

impl WireError {
    /// The reason without the particular value, to count by: there are only a few of them, whatever is sent.
    pub fn reason(&self) -> String {
        match self {
            Self::Missing { field } => format!("{field} is missing"),
            Self::Number { field, .. } => format!("{field} is out of range"),
            Self::Text { field, .. } => format!("{field} cannot be read"),
            Self::Hours { .. } => "hour_runs is not a list of runs".to_owned(),
            Self::Json { what, .. } => format!("the {what} cannot be read"),
        }
    }
}
