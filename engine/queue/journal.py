"""The journal: what must outlive the process, in one SQLite file.

One connection, used by one thread. Every change is committed and synced to the disk before its call returns, so an
answer that follows it is a promise that a power cut can't break.
"""

import asyncio
import json
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from engine.queue.tasks import ENDED, Status, Task

# One script a schema version, applied in order: entry i brings a journal from version i to i + 1.
MIGRATIONS = (
    """
    CREATE TABLE tasks (
        id INTEGER PRIMARY KEY AUTOINCREMENT,  -- AUTOINCREMENT: an id is never used twice, also after a deletion
        status TEXT NOT NULL,
        rank REAL NOT NULL,  -- the order in which tasks wait
        finished_at REAL,  -- NULL until the task has ended
        record TEXT NOT NULL
    );
    CREATE INDEX tasks_by_status ON tasks (status, rank);
    CREATE INDEX tasks_by_end ON tasks (finished_at);  -- with it, forgetting costs no more as the history grows
    CREATE TABLE replies (  -- idempotency keys
        key TEXT PRIMARY KEY,
        request TEXT NOT NULL,  -- digest of the request that the key was used for
        answer TEXT NOT NULL,
        created_at REAL NOT NULL
    );
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    """,
)
KEY_LIFETIME_S = 24 * 3600
# Errors of what is in the file; any other is of the disk, the folder or the lock, and says nothing against the file.
FILE_FAULTS = frozenset({sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
UPDATE = "UPDATE tasks SET status = ?, finished_at = ?, record = ? WHERE id = ?"
UNFINISHED = f"WHERE status NOT IN ({', '.join(repr(str(status)) for status in sorted(ENDED))}) ORDER BY rank, id"
P = ParamSpec("P")
T = TypeVar("T")


class KeyReused(Exception):
    """The idempotency key was used for another request."""


class JournalFault(Exception):
    """The journal can't be written or read now, most often because its disk is full: one sentence."""


def _in_thread(method: "Callable[Concatenate[Journal, P], T]") -> "Callable[Concatenate[Journal, P], Awaitable[T]]":
    """Make of `method` an async one, which runs it in the journal's own thread. Raises JournalFault."""

    @wraps(method)
    def call(self: "Journal", /, *arguments: P.args, **options: P.kwargs) -> Awaitable[T]:
        return self._call(partial(method, self, *arguments, **options))

    return call


class Journal:
    """The rows. `set_aside` is where an unreadable journal was moved at `open`, or None."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._db: sqlite3.Connection
        self.set_aside: Path | None = None

    async def _call(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise JournalFault(
                f"The queue's journal can't be used now ({error}); free its disk, then try again"
            ) from error

    @_in_thread
    def open(self, id_floor: int = 0) -> None:
        """Open or create the file; one that can't be read is moved aside, and an empty one takes its place.

        The next id is above `id_floor` in any case, so that a lost journal does not make ids start again.
        Raises OSError or JournalFault if there is no place to write.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = _connect(self._path)
        except (sqlite3.DatabaseError, TypeError, ValueError, LookupError) as error:
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF not in FILE_FAULTS:
                raise
            self.set_aside = _move_aside(self._path)
            self._db = _connect(self._path)
        with self._db:
            self._db.execute("DELETE FROM sqlite_sequence WHERE name = 'tasks' AND seq < ?", (id_floor,))
            self._db.execute(
                "INSERT INTO sqlite_sequence SELECT 'tasks', ?"
                " WHERE NOT EXISTS (SELECT * FROM sqlite_sequence WHERE name = 'tasks')",
                (id_floor,),
            )

    async def close(self) -> None:
        """Close the file. Nothing is lost without it."""
        await self._call(self._db.close)
        self._thread.shutdown()

    @_in_thread
    def add(self, task: Task, key: str | None, request: str, answer: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Store a new task and, under `key`, the answer that its client gets. `task.id` is set from the row.

        If `key` was used in the last 24 hours, nothing is stored and the answer of that time comes back. Raises
        KeyReused if that was for a request with another digest than `request`.
        """
        with self._db:
            if key is not None and (known := self._answer(key, request)):
                return known
            row = self._db.execute("INSERT INTO tasks (status, rank, record) VALUES (?, 0, '')", (task.status,))
            assert row.lastrowid is not None
            task.id = row.lastrowid
            self._db.execute("UPDATE tasks SET rank = id WHERE id = ?", (task.id,))
            self._db.execute(UPDATE, _row(task))
            if key is not None:
                values = key, request, json.dumps({**answer, "task_id": task.id}), time.time()
                self._db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", values)
        return None

    def _answer(self, key: str, request: str) -> Mapping[str, Any] | None:
        row = self._db.execute(
            "SELECT request, answer FROM replies WHERE key = ? AND created_at >= ?", (key, time.time() - KEY_LIFETIME_S)
        ).fetchone()
        if row and row[0] != request:
            raise KeyReused("Idempotency-Key: it was used for another request; take a new key")
        return json.loads(row[1]) if row else None

    @_in_thread
    def answer(self, key: str, request: str) -> Mapping[str, Any] | None:
        """The answer that was given under this idempotency key in the last 24 hours. Raises KeyReused."""
        return self._answer(key, request)

    @_in_thread
    def save(self, /, *tasks: Task, ranks: Mapping[int, float] | None = None, **facts: Any) -> None:
        """Commit these versions of tasks, ranks by task id, and JSON values under the names of `facts`, together."""
        with self._db:
            self._db.executemany(UPDATE, map(_row, tasks))
            ranked = ((rank, task_id) for task_id, rank in (ranks or {}).items())
            self._db.executemany("UPDATE tasks SET rank = ? WHERE id = ?", ranked)
            values = ((name, json.dumps(value)) for name, value in facts.items())
            self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", values)

    @_in_thread
    def unfinished(self) -> list[Task]:
        """The tasks that have not ended, in the order in which they wait."""
        return _tasks(self._db, UNFINISHED)

    @_in_thread
    def get(self, task_id: int) -> Task | None:
        """The task with this id, or None if there is no such row (any more)."""
        if abs(task_id) >= 2**63:
            return None  # beyond what SQLite can hold
        return next(iter(_tasks(self._db, "WHERE id = ?", task_id)), None)

    @_in_thread
    def history(self, status: Status | None, limit: int, offset: int) -> tuple[list[Task], int]:
        """A page of all tasks, newest first, and how many there are."""
        where, values = ("WHERE status = ?", (status,)) if status else ("", ())
        total = self._db.execute(f"SELECT count(*) FROM tasks {where}", values).fetchone()[0]
        return _tasks(self._db, f"{where} ORDER BY id DESC LIMIT ? OFFSET ?", *values, limit, offset), total

    @_in_thread
    def prune(self, keep_count: int, keep_s: float) -> None:
        """Forget ended tasks beyond the newest `keep_count`, and those that ended over `keep_s` seconds ago."""
        newest_too_many = (
            "SELECT finished_at, id FROM tasks WHERE finished_at IS NOT NULL"
            " ORDER BY finished_at DESC, id DESC LIMIT 1 OFFSET ?"
        )
        with self._db:
            self._db.execute("DELETE FROM tasks WHERE finished_at < ?", (time.time() - keep_s,))
            self._db.execute(f"DELETE FROM tasks WHERE (finished_at, id) <= ({newest_too_many})", (keep_count,))
            self._db.execute("DELETE FROM replies WHERE created_at < ?", (time.time() - KEY_LIFETIME_S,))

    @_in_thread
    def inputs(self) -> set[str]:
        """The names of all stored input files that some row still needs."""
        tasks = _tasks(self._db, "WHERE json_extract(record, '$.job.inputs') != '{}'")
        return {path.name for task in tasks for paths in task.job.inputs.values() for path in paths}

    @_in_thread
    def fact(self, name: str, default: Any = None) -> Any:
        """The JSON value last stored under `name`."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else default


def _row(task: Task) -> tuple[Any, ...]:
    return task.status, task.finished_at, task.record(), task.id


def _tasks(db: sqlite3.Connection, rest: str, *values: Any) -> list[Task]:
    return [Task.restore(record) for (record,) in db.execute(f"SELECT record FROM tasks {rest}", values)]


def _connect(path: Path) -> sqlite3.Connection:
    """An open, checked and up-to-date journal. Raises sqlite3.DatabaseError if the file is not one.

    A row that waits and can't be read raises what `Task.restore` raises: better now than when its turn comes.
    """
    db = sqlite3.connect(path)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        if db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("quick_check failed")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise sqlite3.DatabaseError(f"schema version {version} is newer than this wangpd")
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
        _tasks(db, UNFINISHED)
    except BaseException:
        db.close()
        raise
    return db


def _move_aside(path: Path) -> Path:
    """Rename the journal and its WAL, so that a person can still look at them."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    aside = path.with_name(f"{path.name}.unreadable-{stamp}")
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside
