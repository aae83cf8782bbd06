//! `crdgen`: the definitions of the kinds, as `kubectl apply -f` wants them. Without an argument to the standard output, with
//! a folder one file a kind.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crds::object::definitions;

/// Why the definitions were not written.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot write {}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("cannot write to the standard output")]
    Output(#[source] std::io::Error),
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let done = match arguments.as_slice() {
        [] => print(),
        [folder] if !folder.to_string_lossy().starts_with('-') => write(Path::new(folder)),
        _ => {
            eprintln!("usage: crdgen [FOLDER]");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
            eprintln!("crdgen: {error}{cause}");
            ExitCode::FAILURE
        }
    }
}

fn print() -> Result<(), Error> {
    let text = definitions().iter().map(crds::yaml::document).collect::<Vec<_>>().join("---\n");
    std::io::stdout().write_all(text.as_bytes()).map_err(Error::Output)
}

fn write(folder: &Path) -> Result<(), Error> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::File { path, source }
    };
    std::fs::create_dir_all(folder).map_err(failed(folder))?;
    for definition in definitions() {
        let path = folder.join(format!("{}.yaml", definition.spec.names.plural));
        std::fs::write(&path, crds::yaml::document(&definition)).map_err(failed(&path))?;
    }
    Ok(())
}
