//! Where `apply -f` gets its documents from: a file, the input, or a folder as `export -d` writes it.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::exit;
use super::output::Failed;
use crate::api::view::Document;

/// What `export -d` writes, and what kubectl takes from a folder.
const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];

fn unreadable(path: &Path, error: &io::Error) -> Failed {
    let next = match error.kind() {
        io::ErrorKind::NotFound => "Name a file or a folder of files that is there, or - for the input.",
        io::ErrorKind::InvalidData => "Documents are text in UTF-8, as YAML or JSON.",
        _ => "Name a file or a folder of files that you may read, or - for the input.",
    };
    Failed::new(exit::FAILED, format!("cannot read {}: {error}", path.display()), next)
}

/// The texts behind a path, each with the name that errors give it.
pub(super) fn read(path: &Path) -> Result<Vec<Document>, Failed> {
    if path == Path::new("-") {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).map_err(|e| unreadable(Path::new("the input"), &e))?;
        return Ok(vec![Document { file: "-".to_owned(), text }]);
    }
    let files = if path.is_dir() { of_folder(path)? } else { vec![path.to_owned()] };
    let one = |file: PathBuf| {
        let text = fs::read_to_string(&file).map_err(|e| unreadable(&file, &e))?;
        Ok(Document { file: file.display().to_string(), text })
    };
    files.into_iter().map(one).collect()
}

/// Its files, in the order of their names; not those of folders in it.
fn of_folder(folder: &Path) -> Result<Vec<PathBuf>, Failed> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| unreadable(folder, &e))? {
        let path = entry.map_err(|e| unreadable(folder, &e))?.path();
        if path.extension().is_some_and(|extension| EXTENSIONS.iter().any(|known| extension == *known)) && !path.is_dir() {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        let next = "`bulkhead export -d DIR` writes such a folder; folders in a folder are not looked into.";
        return Err(Failed::new(exit::USAGE, format!("{}: there is no .yaml, .yml or .json file in it", folder.display()), next));
    }
    Ok(files)
}
