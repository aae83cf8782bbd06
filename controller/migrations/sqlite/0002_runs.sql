-- What was seen, packed: each row holds many edges of one node and is never changed, only replaced by one that holds more
-- (controller/src/store/run.rs tells the format). The table `edges` of schema 1 is read into it and dropped when the store is opened.
CREATE TABLE runs (
    id     INTEGER PRIMARY KEY NOT NULL,
    node   BIGINT NOT NULL REFERENCES nodes (id),
    edges  BIGINT NOT NULL,
    packed BLOB NOT NULL
);
