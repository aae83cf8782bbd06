//! An error with its causes, in one line: for logs, alarms and what is told to the controller.

/// The error, then each of its causes that says something new (tonic and hyper repeat theirs).
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let said = next.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = next.source();
    }
    text
}
