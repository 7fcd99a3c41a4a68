-- Parley's schema, the same on SQLite and PostgreSQL. Statements end at a semicolon at a line's end.
-- A step is applied once, in order, under a lock; a change of the schema is a new step at the end, never an edit.
-- Times are integer milliseconds since 1970, yes and no are 1 and 0, JSON is text this service wrote itself.

-- step 1

-- A row is a person or guest who may own sessions. token_version going up revokes every token given before.
CREATE TABLE accounts (
    id            TEXT PRIMARY KEY,
    display_name  TEXT NOT NULL,
    preferences   TEXT NOT NULL,
    token_version INTEGER NOT NULL,
    created_at    BIGINT NOT NULL,
    updated_at    BIGINT NOT NULL,
    expires_at    BIGINT NOT NULL
);

-- A row is a chat session. model_a and model_b are ids from settings.toml, chosen by the server in random mode.
-- is_open: made by a socket without credentials on a local start; anyone there may join. voted_at: the reveal.
CREATE TABLE sessions (
    id              TEXT PRIMARY KEY,
    account_id      TEXT NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    mode            TEXT NOT NULL,
    title           TEXT,
    session_type    TEXT,
    model_a         TEXT,
    model_b         TEXT,
    is_public       INTEGER NOT NULL,
    is_open         INTEGER NOT NULL,
    is_pinned       INTEGER NOT NULL,
    share_token     TEXT UNIQUE,
    metadata        TEXT NOT NULL,
    next_position   INTEGER NOT NULL,
    version         INTEGER NOT NULL,
    voted_at        BIGINT,
    last_message_at BIGINT,
    created_at      BIGINT NOT NULL,
    updated_at      BIGINT NOT NULL
);
CREATE INDEX sessions_by_account ON sessions (account_id, updated_at DESC, id DESC);

-- A row is one user message and the replies it asked for. While status is 'running' the worker named by owner writes
-- it, until lease_until; whoever finds the lease run out may take it. seq: the last event of its log when it ended.
CREATE TABLE turns (
    id              TEXT PRIMARY KEY,
    session_id      TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    account_id      TEXT NOT NULL,
    user_message_id TEXT NOT NULL,
    position        INTEGER NOT NULL,
    status          TEXT NOT NULL,
    owner           TEXT NOT NULL,
    lease_until     BIGINT NOT NULL,
    stop_requested  INTEGER NOT NULL,
    seq             INTEGER NOT NULL,
    created_at      BIGINT NOT NULL,
    ended_at        BIGINT
);
-- One running turn per session, decided by the database whatever the workers think.
CREATE UNIQUE INDEX turns_running ON turns (session_id) WHERE status = 'running';
CREATE INDEX turns_by_session ON turns (session_id, position);
CREATE INDEX turns_by_owner ON turns (owner) WHERE status = 'running';
CREATE INDEX turns_by_account ON turns (account_id) WHERE status = 'running';

-- A row is what a member wrote or a model answered. content and seq of a running reply are its last checkpoint:
-- the text so far and the event of the turn's log it covers. feedback: its owner's, on a reply; or the vote.
CREATE TABLE messages (
    session_id     TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    id             TEXT NOT NULL,
    turn_id        TEXT NOT NULL,
    role           TEXT NOT NULL,
    participant    TEXT,
    model          TEXT,
    content        TEXT NOT NULL,
    status         TEXT NOT NULL,
    failure_reason TEXT,
    position       INTEGER NOT NULL,
    parent_ids     TEXT NOT NULL,
    seq            INTEGER NOT NULL,
    latency_ms     INTEGER,
    first_token_ms INTEGER,
    feedback       TEXT,
    created_at     BIGINT NOT NULL,
    updated_at     BIGINT NOT NULL,
    PRIMARY KEY (session_id, id),
    UNIQUE (session_id, position)
);
CREATE INDEX messages_by_id ON messages (id);
CREATE INDEX messages_by_turn ON messages (turn_id);

-- A row is a vote: a fact, credited to the models the server chose, kept when its session is deleted.
-- counted 0 carries its reason (the session was revealed, a model named itself).
CREATE TABLE votes (
    id         TEXT PRIMARY KEY,
    turn_id    TEXT NOT NULL UNIQUE,
    session_id TEXT NOT NULL,
    account_id TEXT NOT NULL,
    mode       TEXT NOT NULL,
    model_a    TEXT NOT NULL,
    model_b    TEXT NOT NULL,
    preference TEXT NOT NULL,
    counted    INTEGER NOT NULL,
    reason     TEXT,
    created_at BIGINT NOT NULL
);
CREATE INDEX votes_by_time ON votes (created_at);

-- A row is a ticket that was used; "<ticket> <session> <turn>" is a stream that this ticket may open again.
CREATE TABLE used_tokens (
    id         TEXT PRIMARY KEY,
    expires_at BIGINT NOT NULL
);

-- A row is what one account ('account:<id>') or the whole service ('service') has spent on one UTC day.
CREATE TABLE budgets (
    name     TEXT NOT NULL,
    day      TEXT NOT NULL,
    tokens   BIGINT NOT NULL,
    messages INTEGER NOT NULL,
    PRIMARY KEY (name, day)
);

-- step 2

-- Leaderboards count who met whom and how it ended, over all votes: read from this alone.
CREATE INDEX votes_by_pair ON votes (counted, mode, model_a, model_b, preference, created_at);

-- step 3

-- A turn has no numbered log any more, so neither a turn nor a checkpoint has a last event.
ALTER TABLE turns DROP COLUMN seq;
ALTER TABLE messages DROP COLUMN seq;
-- resumable: 0 for turns of earlier releases, whose readers hold cursors of another kind and are given a snapshot.
ALTER TABLE turns ADD COLUMN resumable INTEGER NOT NULL DEFAULT 0;

-- step 4

-- A vote is shown on its turn's user message, too: votes cast before that was so are copied there.
UPDATE messages SET feedback = (SELECT '"' || v.preference || '"' FROM votes v WHERE v.turn_id = messages.turn_id)
 WHERE role = 'user' AND turn_id IN (SELECT turn_id FROM votes);

-- step 5

-- What is over is found and deleted in small pieces. accounts.expires_at: 30 days after the account was made, its tokens
-- were last renewed or one of its sessions last changed (which is looked up when it is reached); 0 while it is deleted.
CREATE INDEX accounts_by_expiry ON accounts (expires_at);
CREATE INDEX used_tokens_by_expiry ON used_tokens (expires_at);
CREATE INDEX budgets_by_day ON budgets (day);
CREATE INDEX votes_by_account ON votes (account_id);

-- step 6

-- operator: the name of the person who answers in the place of the session's model; NULL while the model does. A message
-- of a person has 'person:<name>' for its model, and the person's own words are a turn without a user message.
ALTER TABLE sessions ADD COLUMN operator TEXT;
CREATE INDEX sessions_by_change ON sessions (updated_at);
