"""The agent's durable memory: what it accepted, what it started, what ended, what storage confirmed.

A restarted agent must neither do a command twice nor forget a trainer. So every decision is written here, and
is on the disk, before it touches the world; an agent killed between the two finds the decision and performs it
again, and every act is idempotent. What is not here did not happen.

Rules:
- one transaction for all entries of one step of the machine: a state that the machine never was in is never read;
- synchronous=FULL: a transaction that returned survives a power cut;
- bounded: one generation a job, ranks of older ones only until they are gone, the newest commands only;
- the journal's identity is random and made once: a coordinator that sees a new one knows the old memory is lost.
"""

import secrets
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import assert_never

import msgspec

from dtrain.common import failpoints
from dtrain.common.errors import InvariantError, UserError
from dtrain.common.failpoints import Point
from dtrain.common.names import Generation, JobName, Term, WorkerId
from dtrain.worker.core.actions import (
    JournalAssignment,
    JournalCommand,
    JournalEntry,
    JournalForgotten,
    JournalRetired,
    JournalShard,
    JournalTerm,
)
from dtrain.worker.core.states import (
    COMMANDS_MAX,
    Assignment,
    CheckpointRequest,
    CommandRecord,
    ExitFact,
    GenerationStage,
    LogPosition,
    NodeState,
    RankRun,
    RankStage,
    RestoreProgress,
    RetiringRank,
    ShardAttempt,
    ShardStage,
    TrainersSpec,
)

VERSION = "1"
BUSY_TIMEOUT_S = 5.0  # nobody else writes; only a person looking with sqlite3 could hold it for a moment

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE commands (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, record TEXT NOT NULL);
CREATE TABLE generations (
    number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL UNIQUE, generation INTEGER NOT NULL,
    stopped_through INTEGER NOT NULL, grace_s REAL NOT NULL, fenced TEXT NOT NULL,
    spec TEXT NOT NULL, checkpoint TEXT NOT NULL, restore TEXT NOT NULL);
CREATE TABLE ranks (
    job TEXT NOT NULL, generation INTEGER NOT NULL, rank INTEGER NOT NULL,
    spawned INTEGER NOT NULL, exited TEXT NOT NULL, last_word TEXT NOT NULL,
    PRIMARY KEY (job, generation, rank)) WITHOUT ROWID;
CREATE TABLE shards (
    job TEXT NOT NULL, generation INTEGER NOT NULL, attempt INTEGER NOT NULL, rank INTEGER NOT NULL,
    shard TEXT NOT NULL, PRIMARY KEY (job, rank)) WITHOUT ROWID;
CREATE TABLE positions (job TEXT PRIMARY KEY, seq INTEGER NOT NULL, digest TEXT NOT NULL) WITHOUT ROWID;
"""

_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}  # all else is the disk's, or another process's


class Journal:
    """The journal of one worker's data folder. Used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open the journal at ``path`` or make it. Raises UserError if it is of another version."""
        self._path = path
        self._db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._make_tables()
            version = self._meta("version")
        except sqlite3.DatabaseError as error:
            self._db.close()
            if error.sqlite_errorcode & 0xFF not in _BROKEN:
                raise UserError(
                    f"the worker's journal {path} cannot be opened now ({error}): see that its disk has room and may "
                    "be written. It holds what runs on this node: leave it where it is."
                ) from error
            raise UserError(
                f"the worker's journal {path} cannot be read ({error}): move it away, and the worker starts anew."
            ) from error
        if version != VERSION:
            self._db.close()
            raise UserError(
                f"the worker's journal {path} is of version {version}, this dtrain reads version {VERSION}: "
                "use the dtrain that wrote it, or another --data-dir."
            )
        self.id = self._meta("journal")

    def close(self) -> None:
        self._db.close()

    def _make_tables(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            for statement in filter(None, map(str.strip, _TABLES.split(";"))):
                self._db.execute(statement)
            made = {"version": VERSION, "journal": secrets.token_hex(16), "term": "0"}
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", made.items())
        self._db.execute("COMMIT")

    def _meta(self, name: str) -> str:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else ""

    # ---- writing -----------------------------------------------------------------------------------------

    def write(self, entries: Iterable[JournalEntry]) -> None:
        """Write the entries of one step; on return they are on the disk, or nothing of them is."""
        failpoints.hit(Point.JOURNAL_BEFORE)
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for entry in entries:
                self._write_one(entry)
            failpoints.hit(Point.JOURNAL_WITHIN)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
        failpoints.hit(Point.JOURNAL_AFTER)

    def _write_one(self, entry: JournalEntry) -> None:
        match entry:
            case JournalTerm(term=term):
                self._db.execute("UPDATE meta SET value = ? WHERE name = 'term'", (str(term),))
            case JournalCommand(record=record):
                self._db.execute(
                    "INSERT INTO commands (id, record) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET record = ?2",
                    (record.id, _json(record)),
                )
                self._db.execute(
                    "DELETE FROM commands WHERE number NOT IN "
                    "(SELECT number FROM commands ORDER BY number DESC LIMIT ?)",
                    (COMMANDS_MAX,),
                )
            case JournalAssignment(assignment=assignment):
                self._write_assignment(assignment)
            case JournalRetired(job=job, generation=generation, rank=rank):
                self._db.execute(
                    "DELETE FROM ranks WHERE job = ? AND generation = ? AND rank = ?", (job, generation, rank)
                )
            case JournalShard(job=job, generation=generation, shard=shard):
                self._db.execute(
                    "INSERT OR REPLACE INTO shards VALUES (?, ?, ?, ?, ?)",
                    (job, generation, shard.attempt, shard.rank, _json(shard)),
                )
            case JournalForgotten(job=job):
                for table in ("generations", "ranks", "shards", "positions"):
                    self._db.execute(f"DELETE FROM {table} WHERE job = ?", (job,))
            case _ as never:
                assert_never(never)

    def _write_assignment(self, assignment: Assignment) -> None:
        job = assignment.job
        self._db.execute(
            "INSERT INTO generations (job, generation, stopped_through, grace_s, fenced, spec, checkpoint, restore) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (job) DO UPDATE SET generation = ?2, stopped_through = ?3, "
            "grace_s = ?4, fenced = ?5, spec = ?6, checkpoint = ?7, restore = ?8",
            (
                job,
                assignment.generation,
                assignment.stopped_through,
                assignment.grace_s,
                assignment.fenced,
                _json(assignment.spec),
                _json(assignment.checkpoint),
                _json(assignment.restore),
            ),
        )
        self._db.execute("DELETE FROM ranks WHERE job = ?", (job,))
        rows = [
            (job, assignment.generation, run.rank, run.stage is not RankStage.PENDING, _json(run.exit), _last_word(run))
            for run in assignment.ranks
        ]
        rows += [(job, retiring.generation, retiring.rank, True, "null", "{}") for retiring in assignment.retiring]
        self._db.executemany("INSERT INTO ranks VALUES (?, ?, ?, ?, ?, ?)", rows)
        attempt = assignment.checkpoint.attempt if assignment.checkpoint is not None else 0
        self._db.execute(
            "DELETE FROM shards WHERE job = ? AND (generation != ? OR attempt != ?)",
            (job, assignment.generation, attempt),
        )
        if assignment.position is not None:
            self._db.execute(
                "INSERT OR REPLACE INTO positions VALUES (?, ?, ?)",
                (job, assignment.position.seq, assignment.position.digest),
            )

    # ---- reading -----------------------------------------------------------------------------------------

    def load(self, *, worker: WorkerId, slots: int, fence_after_s: float) -> NodeState:
        """Return the state as the last committed step left it, as far as the journal knows it.

        Ranks that were spawned and have no exit come back as SPAWNING: whether they run is for the shell to find out.
        """
        commands = tuple(
            msgspec.json.decode(row[0], type=CommandRecord)
            for row in self._db.execute("SELECT record FROM commands ORDER BY number").fetchall()
        )
        jobs = self._db.execute("SELECT job FROM generations ORDER BY number").fetchall()
        return NodeState(
            worker=worker,
            slots=slots,
            fence_after_s=fence_after_s,
            term=Term(int(self._meta("term"))),
            assignments={JobName(job): self._load_assignment(JobName(job)) for (job,) in jobs},
            commands=commands[-COMMANDS_MAX:],
        )

    def _load_assignment(self, job: JobName) -> Assignment:
        row = self._db.execute(
            "SELECT generation, stopped_through, grace_s, fenced, spec, checkpoint, restore FROM generations "
            "WHERE job = ?",
            (job,),
        ).fetchone()
        generation, stopped_through, grace_s, fenced = Generation(row[0]), int(row[1]), float(row[2]), str(row[3])
        spec = msgspec.json.decode(row[4], type=TrainersSpec | None)
        checkpoint = msgspec.json.decode(row[5], type=CheckpointRequest | None)
        ranks, retiring = self._load_ranks(job, generation)
        position = self._db.execute("SELECT seq, digest FROM positions WHERE job = ?", (job,)).fetchone()
        return Assignment(
            job=job,
            generation=generation,
            stage=_stage_of(spec, ranks, stopping=stopped_through >= generation or bool(fenced)),
            spec=spec,
            ranks=ranks,
            retiring=retiring,
            stopped_through=stopped_through,
            grace_s=grace_s,
            fenced=fenced,
            checkpoint=checkpoint,
            shards=self._load_shards(job, checkpoint, ranks),
            restore=msgspec.json.decode(row[6], type=RestoreProgress),
            position=LogPosition(seq=position[0], digest=position[1]) if position else None,
            cleaned=spec is None,
        )

    def _load_ranks(self, job: JobName, generation: Generation) -> tuple[tuple[RankRun, ...], tuple[RetiringRank, ...]]:
        ranks: list[RankRun] = []
        retiring: list[RetiringRank] = []
        rows = self._db.execute(
            "SELECT generation, rank, spawned, exited, last_word FROM ranks WHERE job = ? ORDER BY generation, rank",
            (job,),
        )
        for of, rank, spawned, exited, last_word in rows.fetchall():
            if of != generation:
                retiring.append(RetiringRank(generation=Generation(of), rank=rank))
                continue
            fact = msgspec.json.decode(exited, type=ExitFact | None)
            stage = RankStage.EXITED if fact else RankStage.SPAWNING if spawned else RankStage.PENDING
            word = msgspec.json.decode(last_word, type=_LastWord)
            ranks.append(
                RankRun(
                    rank=rank,
                    stage=stage,
                    exit=fact,
                    phase=word.phase,
                    completed_step=word.completed_step,
                    until_step=word.until_step,
                    tracking=word.tracking,
                )
            )
        return tuple(ranks), tuple(retiring)

    def _load_shards(
        self, job: JobName, request: CheckpointRequest | None, ranks: tuple[RankRun, ...]
    ) -> tuple[ShardAttempt, ...]:
        if request is None:
            return ()
        rows = self._db.execute("SELECT rank, shard FROM shards WHERE job = ?", (job,)).fetchall()
        durable = {rank: msgspec.json.decode(shard, type=ShardAttempt) for rank, shard in rows}
        if any(shard.stage is not ShardStage.DURABLE for shard in durable.values()):
            raise InvariantError(f"{self._path}: a shard of {job} is in the journal but not durable")
        return tuple(
            durable.get(run.rank)
            or ShardAttempt(checkpoint=request.checkpoint, attempt=request.attempt, step=request.step, rank=run.rank)
            for run in ranks
        )


class _LastWord(msgspec.Struct, frozen=True):
    """What an exited rank said last; its mailbox may be gone when the agent comes back."""

    phase: str = "starting"
    completed_step: int = 0
    until_step: int = 0
    tracking: bool = False


def _last_word(run: RankRun) -> str:
    return _json(_LastWord(run.phase, run.completed_step, run.until_step, run.tracking))


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _stage_of(spec: TrainersSpec | None, ranks: tuple[RankRun, ...], *, stopping: bool) -> GenerationStage:
    if spec is None or all(run.stage is RankStage.EXITED for run in ranks):
        return GenerationStage.OVER
    if all(run.stage is RankStage.PENDING for run in ranks):
        return GenerationStage.ACCEPTED
    return GenerationStage.ENDING if stopping else GenerationStage.LIVE
