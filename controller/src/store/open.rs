//! Opening: what is there is looked at before anything is written, and what cannot be understood is refused and left alone.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection, Row, SqliteConnection, SqlitePool};

use super::tidy::{self, Tidy};
use super::{Inner, Store, StoreError, schema1};

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// The schema this program writes: the number of the last migration.
pub const SCHEMA: i64 = 2;

/// sqlite.org/fileformat.html, 1.3.1.
const MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// How long to wait for another tool (a backup, an administrator's shell) that holds the file.
const BUSY: Duration = Duration::from_secs(5);

impl Store {
    /// Opens the store, or makes a new one where there is no file. The clock's time is written into a new store.
    ///
    /// # Errors
    /// The file is in use, damaged, of a newer version or something else; or the disk says no. In each of these cases the file stays
    /// as it is.
    pub async fn open(path: &Path, now: Timestamp) -> Result<Self, StoreError> {
        let lock = lock(path)?;
        if !exists(path)? {
            create(path, now).await?;
        }
        look(path).await?;
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(BUSY + BUSY)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(options(path).journal_mode(SqliteJournalMode::Wal))
            .await
            .map_err(StoreError::database("open"))?;
        migrate(&pool, path).await?;
        let mut connection = pool.acquire().await.map_err(StoreError::database("open"))?;
        let id = meta(&mut connection, "store")
            .await
            .map_err(StoreError::database("read its id"))?
            .ok_or_else(|| StoreError::NotAStore { path: path.to_owned(), why: "it has no id".to_owned() })?;
        let runs = tidy::all(&mut connection).await.map_err(StoreError::database("list what was seen"))?;
        drop(connection);
        Ok(Self {
            inner: Arc::new(Inner { id, path: path.to_owned(), pool, names: Default::default(), tidy: Tidy::of(runs), _lock: lock }),
        })
    }
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(false)
        .busy_timeout(BUSY)
        .foreign_keys(true)
        .synchronous(SqliteSynchronous::Normal)
        // Statements are logged by sqlx at debug otherwise, which costs more than running them.
        .disable_statement_logging()
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { what, path, source }
}

/// Whether there is a log with anything in it beyond its header of 32 bytes (sqlite.org/fileformat2.html, 4.1).
fn has_log(path: &Path) -> Result<bool, StoreError> {
    let log = beside(path, "-wal");
    match log.metadata() {
        Ok(found) => Ok(found.len() > 32),
        // One look, not two: a connection that was dropped takes its empty log away when its thread comes to it.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io("look at", &log)(error)),
    }
}

fn exists(path: &Path) -> Result<bool, StoreError> {
    path.try_exists().map_err(io("look for", path))
}

/// SQLite's own locks come and go with transactions; this one says that a process lives on the store. The kernel drops it with the
/// process, however that ends.
fn lock(path: &Path) -> Result<Flock<File>, StoreError> {
    let lock = beside(path, ".lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock).map_err(io("open", &lock))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => StoreError::InUse { path: path.to_owned() },
        other => StoreError::Io { what: "lock", path: lock.clone(), source: other.into() },
    })
}

/// Makes a whole store under another name and then gives it its own, so that a half-made one is never found: an empty or cut file
/// under the store's name is damage, not a beginning.
async fn create(path: &Path, now: Timestamp) -> Result<(), StoreError> {
    let new = beside(path, ".new");
    for leftover in [new.clone(), beside(&new, "-journal")] {
        match std::fs::remove_file(&leftover) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(io("remove", &leftover)(e)),
        }
    }
    OpenOptions::new().create_new(true).write(true).mode(0o600).open(&new).map_err(io("make", &new))?;
    let mut connection = options(&new)
        .journal_mode(SqliteJournalMode::Delete)
        .synchronous(SqliteSynchronous::Full)
        .connect()
        .await
        .map_err(StoreError::database("make a new file"))?;
    MIGRATIONS.run_direct(None, &mut connection, false).await.map_err(|source| StoreError::Migration { path: path.to_owned(), source })?;
    schema1::convert(&mut connection).await?;
    let mut tx = connection.begin().await.map_err(StoreError::database("make a new file"))?;
    for (name, value) in
        [("store", new_id()?), ("schema", SCHEMA.to_string()), ("created", now.to_string()), ("generation", "0".to_owned())]
    {
        sqlx::query("INSERT INTO meta (name, value) VALUES ($1, $2)")
            .bind(name)
            .bind(value)
            .execute(&mut *tx)
            .await
            .map_err(StoreError::database("make a new file"))?;
    }
    tx.commit().await.map_err(StoreError::database("make a new file"))?;
    connection.close().await.map_err(StoreError::database("make a new file"))?;
    std::fs::rename(&new, path).map_err(io("rename to its place", &new))?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|f| f.sync_all()).map_err(io("write down", folder))
}

/// 128 random bits in hex.
fn new_id() -> Result<String, StoreError> {
    let source = Path::new("/dev/urandom");
    let mut bits = [0; 16];
    File::open(source).and_then(|mut f| f.read_exact(&mut bits)).map_err(io("read", source))?;
    Ok(bits.iter().map(|b| format!("{b:02x}")).collect())
}

/// Looks at an existing file and refuses what is not a whole store of a version we know.
async fn look(path: &Path) -> Result<(), StoreError> {
    let not_a_store = |why: &str| StoreError::NotAStore { path: path.to_owned(), why: why.to_owned() };
    let damaged = |why: String| StoreError::Damaged { path: path.to_owned(), why };
    let mut file = File::open(path).map_err(io("open", path))?;
    let meta_data = file.metadata().map_err(io("look at", path))?;
    if !meta_data.is_file() {
        return Err(not_a_store("it is not a file"));
    }
    if meta_data.len() == 0 {
        return Err(damaged("it is empty".to_owned()));
    }
    let mut header = Vec::new();
    file.by_ref().take(18).read_to_end(&mut header).map_err(io("read", path))?;
    let [magic @ .., high, low] = header.as_slice() else { return Err(damaged("it was cut".to_owned())) };
    if magic != &MAGIC[..magic.len()] {
        return Err(not_a_store("it is not an SQLite file"));
    }
    if magic.len() < MAGIC.len() {
        return Err(damaged("it was cut".to_owned()));
    }
    // SQLite itself overlooks a last page that was cut. While there is a log, that page may be whole there.
    let page = match u16::from_be_bytes([*high, *low]) {
        1 => 65_536,
        size => u64::from(size.max(1)),
    };
    if meta_data.len() % page != 0 && !has_log(path)? {
        return Err(damaged(format!("its {} bytes are not whole pages of {page}: it was cut", meta_data.len())));
    }
    drop(file);
    let told = |e: sqlx::Error| match e {
        sqlx::Error::Database(ref cause) => match cause.code().as_deref().and_then(|code| code.parse::<i64>().ok()).map(|code| code & 0xff)
        {
            // SQLITE_CORRUPT and SQLITE_NOTADB, in any of their extended forms (sqlite.org/rescode.html).
            Some(11 | 26) => StoreError::Damaged { path: path.to_owned(), why: cause.message().to_owned() },
            _ => StoreError::Database { what: "be opened", source: e },
        },
        e => StoreError::Database { what: "be opened", source: e },
    };
    let mut connection = options(path).connect().await.map_err(told)?;
    let outcome = look_inside(path, &mut connection).await;
    let closed = connection.close().await;
    match outcome {
        Ok(verdict) => verdict.and(closed.map_err(told)),
        Err(e) => Err(told(e)),
    }
}

async fn look_inside(path: &Path, connection: &mut SqliteConnection) -> Result<Result<(), StoreError>, sqlx::Error> {
    let not_a_store = |why: &str| Err(StoreError::NotAStore { path: path.to_owned(), why: why.to_owned() });
    let found: Vec<String> = sqlx::query_scalar("PRAGMA quick_check(3)").fetch_all(&mut *connection).await?;
    if found != ["ok"] {
        return Ok(Err(StoreError::Damaged { path: path.to_owned(), why: found.join("; ") }));
    }
    let tables: Vec<String> = sqlx::query_scalar("SELECT name FROM sqlite_schema WHERE type = 'table'").fetch_all(&mut *connection).await?;
    if !tables.iter().any(|t| t == "meta") {
        return Ok(not_a_store("it is an SQLite file of another program"));
    }
    let schema = match meta(connection, "schema").await {
        Ok(Some(schema)) => schema,
        Ok(None) => return Ok(not_a_store("it says no schema")),
        Err(sqlx::Error::Database(e)) => return Ok(not_a_store(e.message())),
        Err(e) => return Err(e),
    };
    Ok(match schema.parse::<i64>() {
        Ok(found) if found > SCHEMA => Err(StoreError::Newer { path: path.to_owned(), found, understood: SCHEMA }),
        Ok(_) => Ok(()),
        Err(_) => not_a_store(&format!("its schema is {schema:?}")),
    })
}

async fn meta(connection: &mut SqliteConnection, name: &str) -> Result<Option<String>, sqlx::Error> {
    let row = sqlx::query("SELECT value FROM meta WHERE name = $1").bind(name).fetch_optional(connection).await?;
    row.map(|row| row.try_get(0)).transpose()
}

async fn migrate(pool: &SqlitePool, path: &Path) -> Result<(), StoreError> {
    MIGRATIONS.run(pool).await.map_err(|source| StoreError::Migration { path: path.to_owned(), source })?;
    schema1::convert(&mut *pool.acquire().await.map_err(StoreError::database("open"))?).await?;
    sqlx::query("UPDATE meta SET value = $1 WHERE name = 'schema' AND value <> $1")
        .bind(SCHEMA.to_string())
        .execute(pool)
        .await
        .map_err(StoreError::database("write its schema"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_is_the_number_of_the_last_migration() {
        assert_eq!(MIGRATIONS.iter().map(|m| m.version).max(), Some(SCHEMA));
    }
}
