-- The embedded store. Times are Unix microseconds, objects are JSON of the types in the policy crate.
-- A change of this schema is a new file; this one is never edited again (its checksum is in every store).

CREATE TABLE meta (
    name  TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL
);

CREATE TABLE nodes (
    id   INTEGER PRIMARY KEY NOT NULL,
    name TEXT NOT NULL UNIQUE
);

-- How far each spool of each agent is in here: a batch that is not beyond this number was applied before.
CREATE TABLE spools (
    node         BIGINT NOT NULL REFERENCES nodes (id),
    spool        TEXT NOT NULL,
    acknowledged BIGINT NOT NULL,
    PRIMARY KEY (node, spool)
);

-- Printed endpoints, once each: a million edges repeat a few thousand names.
CREATE TABLE endpoints (
    id   INTEGER PRIMARY KEY NOT NULL,
    name TEXT NOT NULL UNIQUE
);

CREATE TABLE edges (
    node              BIGINT NOT NULL REFERENCES nodes (id),
    client            BIGINT NOT NULL REFERENCES endpoints (id),
    server            BIGINT NOT NULL REFERENCES endpoints (id),
    protocol          INTEGER NOT NULL,
    port              INTEGER NOT NULL,
    direction_known   INTEGER NOT NULL,
    established       BIGINT NOT NULL,
    connected_no_data BIGINT NOT NULL,
    one_way           BIGINT NOT NULL,
    unanswered        BIGINT NOT NULL,
    refused           BIGINT NOT NULL,
    denied            BIGINT NOT NULL,
    would_deny        BIGINT NOT NULL,
    pre_existing      BIGINT NOT NULL,
    bytes_sent        BIGINT NOT NULL,
    bytes_received    BIGINT NOT NULL,
    first_us          BIGINT,
    last_us           BIGINT,
    hours             BLOB NOT NULL, -- runs of hours as varints: distance from the run before, length
    roads             INTEGER NOT NULL, -- bits: 1 direct, 2 published, 4 proxy
    PRIMARY KEY (node, client, server, protocol, port, direction_known)
) WITHOUT ROWID;

CREATE TABLE health (
    id           INTEGER PRIMARY KEY NOT NULL,
    node         BIGINT NOT NULL REFERENCES nodes (id),
    from_us      BIGINT NOT NULL,
    to_us        BIGINT NOT NULL,
    events       BIGINT NOT NULL,
    lost         BIGINT NOT NULL,
    unattributed BIGINT NOT NULL,
    healthy      INTEGER NOT NULL
);
CREATE INDEX health_by_end ON health (node, to_us);

-- What could not be read in a report and was left out.
CREATE TABLE skipped (
    node   BIGINT NOT NULL REFERENCES nodes (id),
    reason TEXT NOT NULL,
    count  BIGINT NOT NULL,
    PRIMARY KEY (node, reason)
);

-- What is in force: segments, policies, quarantines.
CREATE TABLE objects (
    kind       TEXT NOT NULL,
    name       TEXT NOT NULL,
    generation BIGINT NOT NULL,
    json       TEXT NOT NULL,
    PRIMARY KEY (kind, name)
);

-- Every policy a workload ever had; no JSON: it was taken away.
CREATE TABLE policy_history (
    workload   TEXT NOT NULL,
    revision   BIGINT NOT NULL,
    generation BIGINT NOT NULL,
    decision   BIGINT NOT NULL,
    json       TEXT,
    PRIMARY KEY (workload, revision)
);

-- Rules a person said no to: they don't come back by themselves.
CREATE TABLE rejected (
    workload  TEXT NOT NULL,
    direction TEXT NOT NULL,
    peer      TEXT NOT NULL,
    ports     TEXT NOT NULL,
    decision  BIGINT NOT NULL,
    PRIMARY KEY (workload, direction, peer, ports)
);

-- Revision and digest of the suggestion last shown for a workload, so that the numbers go on after a restart.
CREATE TABLE suggestions (
    workload TEXT PRIMARY KEY NOT NULL,
    revision BIGINT NOT NULL,
    digest   TEXT NOT NULL
);

CREATE TABLE decisions (
    number     BIGINT PRIMARY KEY NOT NULL,
    time_us    BIGINT NOT NULL,
    generation BIGINT NOT NULL,
    json       TEXT NOT NULL
);

-- The record is append-only: also for whoever opens the file with other tools and means well.
CREATE TRIGGER decisions_stay BEFORE UPDATE ON decisions
BEGIN
    SELECT RAISE(ABORT, 'the record of decisions is append-only');
END;
CREATE TRIGGER decisions_remain BEFORE DELETE ON decisions
BEGIN
    SELECT RAISE(ABORT, 'the record of decisions is append-only');
END;
CREATE TRIGGER decisions_follow BEFORE INSERT ON decisions
WHEN NEW.number <> (SELECT COALESCE(MAX(number), 0) + 1 FROM decisions)
BEGIN
    SELECT RAISE(ABORT, 'a decision follows the one before');
END;
