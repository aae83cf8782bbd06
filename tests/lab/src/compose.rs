//! Docker Compose on an engine of the lab.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::engine::{Engine, cache_dir};
use crate::process::{self, found};

/// A Compose project.
#[derive(Debug)]
pub struct Compose<'e> {
    engine: &'e Engine,
    project: String,
    files: Vec<PathBuf>,
    program: Vec<PathBuf>,
    environment: Vec<(String, String)>,
}

impl<'e> Compose<'e> {
    /// A project of this name from these files; later ones override earlier ones.
    ///
    /// # Errors
    /// The reason, for [`crate::skip!`], where there is no Compose.
    pub fn new(engine: &'e Engine, project: &str, files: &[&Path]) -> Result<Self, String> {
        let files = files.iter().map(|f| f.to_path_buf()).collect();
        Ok(Self { engine, project: project.to_owned(), files, program: program()?, environment: Vec::new() })
    }

    /// A variable that the files ask for.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// `docker compose` with these words.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("compose can be started")
    }

    /// `docker compose` with these words, which must succeed.
    pub fn run(&self, args: &[&str]) -> String {
        process::check(&mut self.command(args))
    }

    /// Starts the project without building or pulling anything.
    pub fn up(&self) {
        self.run(&["up", "-d", "--no-build"]);
    }

    /// The id of the container of a service.
    ///
    /// # Panics
    /// Where it has none, or several.
    pub fn container(&self, service: &str) -> String {
        let ids = self.run(&["ps", "-q", service]);
        let ids: Vec<&str> = ids.split_whitespace().collect();
        assert_eq!(ids.len(), 1, "the service {service} has the containers {ids:?}");
        ids[0].to_owned()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.engine.command(&self.program[0]);
        command.args(&self.program[1..]).args(["-p", &self.project]);
        for file in &self.files {
            command.arg("-f").arg(file);
        }
        command.envs(self.environment.iter().cloned());
        command.args(args).stdin(std::process::Stdio::null());
        command
    }
}

fn program() -> Result<Vec<PathBuf>, String> {
    let built = cache_dir().join("engine29/bin/docker-compose");
    if built.is_file() {
        return Ok(vec![built]);
    }
    if found("docker-compose") {
        return Ok(vec!["docker-compose".into()]);
    }
    let plugin = Command::new("docker").args(["compose", "version"]).output().is_ok_and(|o| o.status.success());
    if plugin { Ok(vec!["docker".into(), "compose".into()]) } else { Err("needs Compose: run tests/setup/compose".to_owned()) }
}
