"""The journal: what must outlive the process, in one SQLite file.

One connection, used by one thread. Every change is committed and synced to the disk before its call returns, so an
answer that follows it is a promise that a power cut can't break.
"""

import asyncio
import json
import logging
import math
import re
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from engine.admission import BadRequest
from engine.clock import Clock
from engine.files.outputs import OwnFile
from engine.queue.tasks import ENDED, Status, Task, unreadable

log = logging.getLogger("wangpd.queue")
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
    CREATE TABLE replies (  -- idempotency keys
        key TEXT PRIMARY KEY,
        request TEXT NOT NULL,  -- digest of the request that the key was used for
        answer TEXT NOT NULL,
        created_at REAL NOT NULL
    );
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    """,
)
# What versions before it can do without, so that they still open the journal; done at each start.
ADDITIONS = """
    CREATE INDEX IF NOT EXISTS tasks_by_end ON tasks (finished_at);  -- forgetting costs no more as the history grows
    CREATE INDEX IF NOT EXISTS tasks_with_inputs ON tasks (status) WHERE instr(record, '/inputs/');
    CREATE INDEX IF NOT EXISTS replies_by_age ON replies (created_at);
    CREATE TABLE IF NOT EXISTS files (  -- the daemon's own in the output folder, whether their task is kept or not
        name TEXT PRIMARY KEY,
        task_id INTEGER NOT NULL,
        size_bytes INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        made_at REAL NOT NULL  -- as finished_at, by the Clock
    );
    INSERT OR IGNORE INTO files (name, task_id, size_bytes, mtime_ns, made_at)  -- what a version without it has made
        SELECT json_extract(file.value, '$.filename'), tasks.id, json_extract(file.value, '$.size_bytes'),
            CAST(finished_at * 1e9 AS INTEGER), finished_at
        FROM tasks, json_each(CASE WHEN json_valid(record) THEN record ELSE '{}' END, '$.files') AS file
        WHERE file.type = 'object' AND tasks.id > (SELECT coalesce(max(task_id), 0) FROM files);
"""
# An older journal has no reading of the clock: its newest end or key is the last that is known of the time.
READING = """
    SELECT value FROM facts WHERE name = 'clock' UNION ALL
    SELECT json_array(max(at), max(at)) FROM (SELECT finished_at AS at FROM tasks UNION SELECT created_at FROM replies)
"""
KEY_LIFETIME_S = 24 * 3600
MOST_KEYS = 10_000
# The largest request needs 0.4 MiB: three texts of 10,000 characters, of which JSON makes up to twelve bytes each.
MOST_RECORD_BYTES = 512 * 2**10
# All rows may take the most, or a quarter of their disk if that is less, but the least in any case. Beyond that, the
# oldest ended tasks are forgotten, however few there are.
LEAST_BYTES, MOST_BYTES = 16 * 2**20, 512 * 2**20
FREE_PAGES = 1024  # that stay in the file for what comes next, and the most that a change takes out of it
WAL_BYTES = 4 * 2**20
# Errors of what is in the file; any other is of the disk, the folder or the lock, and says nothing against the file.
FILE_FAULTS = frozenset({sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
UPDATE = "UPDATE tasks SET status = ?, finished_at = ?, record = ? WHERE id = ?"
ENDS = ", ".join(repr(str(status)) for status in sorted(ENDED))
UNFINISHED = f"status NOT IN ({ENDS}) AND finished_at IS NULL"
PAGES = "pragma_page_count, pragma_freelist_count, pragma_page_size"
USED_BYTES = f"SELECT (page_count - freelist_count) * page_size FROM {PAGES}"
OLDEST = "SELECT id FROM tasks WHERE finished_at IS NOT NULL ORDER BY finished_at LIMIT 100"
FILE = "name, task_id, size_bytes, mtime_ns, made_at"  # as OwnFile
P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")


class KeyReused(Exception):
    """The idempotency key was used for another request."""


class JournalFault(Exception):
    """The journal can't be written or read now, most often because its disk is full: one sentence."""


class NewerJournal(Exception):
    """The journal is of a newer version of wangpd: one sentence."""


def _in_thread(method: "Callable[Concatenate[Journal, P], T]") -> "Callable[Concatenate[Journal, P], Awaitable[T]]":
    """Make of `method` an async one, which runs it in the journal's own thread. Raises JournalFault."""

    @wraps(method)
    def call(self: "Journal", /, *arguments: P.args, **options: P.kwargs) -> Awaitable[T]:
        return self._call(partial(method, self, *arguments, **options))

    return call


class Journal:
    """The rows. `set_aside` is where an unreadable journal was moved at `open`, or None.

    `clock` goes on from what the journal has of it. Times in columns are by it, those in records by the wall clock.
    """

    def __init__(self, path: Path, clock: Clock | None = None) -> None:
        self._path, self._clock = path, clock or Clock()
        self._reported: set[int] = set()  # ids of rows that can't be read
        self._keep: tuple[int, float] = (2**63 - 1, math.inf)  # ended tasks, and their seconds
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._db: sqlite3.Connection
        self.set_aside: Path | None = None

    async def _call(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            sentence = f"The queue's journal can't be used now ({error}); free its disk, then try again"
            raise JournalFault(sentence) from error

    @_in_thread
    def open(self, id_floor: int = 0) -> None:
        """Open or create the file; one that can't be read is moved aside, and an empty one takes its place.

        The next id is above `id_floor` in any case, so that a lost journal does not make ids start again.
        Raises OSError or JournalFault if there is no place to write, and NewerJournal having changed nothing.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _refuse_newer(self._path)
            self._db = _connect(self._path)
        except sqlite3.DatabaseError as error:
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
        with suppress(TypeError, ValueError):  # it is new, or another version has written something else there
            self._clock.resume(*map(float, json.loads(self._db.execute(READING).fetchone()[0])))

    async def close(self) -> None:
        """Close the file. Nothing is lost without it."""
        await self._call(self._db.close)
        self._thread.shutdown()

    @_in_thread
    def add(self, task: Task, key: str | None, request: str, answer: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Store a new task and, under `key`, the answer that its client gets. `task.id` is set from the row.

        If `key` was used in the last 24 hours, nothing is stored and the answer of that time comes back. Raises
        KeyReused if that was for a request with another digest than `request`, and BadRequest for too large a task.
        """
        with self._db:
            if key is not None and (known := self._answer(key, request)):
                return known
            row = self._db.execute("INSERT INTO tasks (status, rank, record) VALUES (?, 0, '')", (task.status,))
            assert row.lastrowid is not None
            task.id = row.lastrowid
            self._db.execute("UPDATE tasks SET rank = id WHERE id = ?", (task.id,))
            values = self._row(task)
            if (size := len(values[2])) > MOST_RECORD_BYTES:
                rule = f"at most {MOST_RECORD_BYTES} are kept; send shorter texts"
                raise BadRequest(f"The task would take {size} bytes in the journal, and {rule}")
            self._db.execute(UPDATE, values)
            if key is not None:
                insert = "INSERT OR REPLACE INTO replies (key, request, answer, created_at) VALUES (?, ?, ?, ?)"
                self._db.execute(insert, (key, request, json.dumps({**answer, "task_id": task.id}), self._clock.now()))
        return None

    def _answer(self, key: str, request: str) -> Mapping[str, Any] | None:
        """The answer that was given under this idempotency key in the last 24 hours. Raises KeyReused."""
        row = self._db.execute(
            "SELECT request, answer FROM replies WHERE key = ? AND created_at >= ?",
            (key, self._clock.now() - KEY_LIFETIME_S),
        ).fetchone()
        if row and row[0] != request:
            raise KeyReused("Idempotency-Key: it was used for another request; take a new key")
        return json.loads(row[1]) if row else None

    answer = _in_thread(_answer)

    @_in_thread
    def save(
        self, /, *tasks: Task, ranks: Mapping[int, float] | None = None, made: Iterable[OwnFile] = (), **facts: Any
    ) -> None:
        """Commit, together: these versions of tasks, ranks by task id, files that were made, JSON values by name."""
        with self._db:
            self._db.executemany(UPDATE, map(self._row, tasks))
            self._db.executemany(f"INSERT OR REPLACE INTO files ({FILE}) VALUES (?, ?, ?, ?, ?)", made)
            ranked = ((rank, task_id) for task_id, rank in (ranks or {}).items())
            self._db.executemany("UPDATE tasks SET rank = ? WHERE id = ?", ranked)
            self._save_facts({**facts, "clock": self._clock.reading()})
        if not tasks or any(task.status.ended for task in tasks):  # the start of a task makes nothing too much
            self._prune()

    def _save_facts(self, facts: Mapping[str, Any]) -> None:
        values = ((name, json.dumps(value)) for name, value in facts.items())
        self._db.executemany("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", values)

    @_in_thread
    def unfinished(self) -> list[Task]:
        """The tasks that have not ended, in the order in which they wait. Those that can't be read end as failed."""
        tasks = []
        with self._db:
            for task_id, record, task in self._read(f"WHERE {UNFINISHED} ORDER BY rank, id"):
                if task:
                    tasks.append(task)
                    continue
                self._save_facts({f"unreadable {task_id}": record})
                self._db.execute(UPDATE, self._row(unreadable(task_id, record)))
        return tasks

    @_in_thread
    def get(self, task_id: int) -> Task | None:
        """The task with this id, or None if there is no such row (any more)."""
        if abs(task_id) >= 2**63:
            return None  # beyond what SQLite can hold
        return next((task for _, _, task in self._read("WHERE id = ?", task_id)), None)

    @_in_thread
    def history(self, status: Status | None, limit: int, offset: int) -> tuple[list[int], int]:
        """A page of the ids of all tasks, newest first, and how many there are."""
        where, values = ("WHERE status = ?", (status,)) if status else ("", ())
        total = self._db.execute(f"SELECT count(*) FROM tasks {where}", values).fetchone()[0]
        return self._ids(f"{where} ORDER BY id DESC LIMIT ? OFFSET ?", *values, limit, offset), total

    @_in_thread
    def prune(self, keep_count: int, keep_s: float) -> None:
        """Forget ended tasks beyond the newest `keep_count` or over `keep_s` seconds old, now and after each `save`."""
        self._keep = keep_count, keep_s
        self._prune()

    def _prune(self) -> None:
        try:
            with self._db:
                self._forget()
            if self._db.execute("PRAGMA freelist_count").fetchone()[0] > FREE_PAGES:
                self._db.executescript(f"PRAGMA incremental_vacuum({FREE_PAGES})")  # by `execute` it would be one page
        except Exception as fault:  # whatever it was, the change is committed, and the next one tries again
            log.warning("old tasks can't be forgotten now: %s", fault)

    def _forget(self) -> None:
        (keep_count, keep_s), now, run = self._keep, self._clock.now(), self._db.execute
        newest_too_many = (
            "SELECT finished_at, id FROM tasks WHERE finished_at IS NOT NULL"
            " ORDER BY finished_at DESC, id DESC LIMIT 1 OFFSET ?"
        )
        too_old = "SELECT created_at FROM replies ORDER BY created_at DESC LIMIT 1 OFFSET ?"
        run("DELETE FROM tasks WHERE finished_at < ?", (now - keep_s,))
        run(f"DELETE FROM tasks WHERE (finished_at, id) <= ({newest_too_many})", (keep_count,))
        run(f"DELETE FROM replies WHERE created_at < ? OR created_at <= ({too_old})", (now - KEY_LIFETIME_S, MOST_KEYS))
        while self._too_large() and run(f"DELETE FROM tasks WHERE id IN ({OLDEST})").rowcount > 0:
            pass
        run("DELETE FROM facts WHERE name LIKE 'unreadable %' AND substr(name, 12) NOT IN (SELECT id FROM tasks)")

    def _too_large(self) -> bool:
        used = int(self._db.execute(USED_BYTES).fetchone()[0])
        room = used + shutil.disk_usage(self._path.parent).free
        return used > min(MOST_BYTES, max(LEAST_BYTES, room // 4))

    @_in_thread
    def sweep(self, remove: Callable[[set[str]], S], unfinished_only: bool = False) -> S:
        """Return what `remove` returns for the names of the input files that are needed; no task is added meanwhile.

        All tasks but the cancelled ones need theirs, or with `unfinished_only` only those that have not ended.
        """
        which = UNFINISHED if unfinished_only else f"status != '{Status.CANCELLED}'"
        query = f"SELECT record FROM tasks WHERE instr(record, '/inputs/') AND {which}"
        rows = self._db.execute(query if unfinished_only else f"{query} UNION ALL SELECT value FROM facts")
        return remove({name for (record,) in rows for name in re.findall(r'/([^/"\\]+)\\*"', record)})

    @_in_thread
    def files(self) -> list[OwnFile]:
        """The files that are the daemon's own."""
        return [OwnFile(*row) for row in self._db.execute(f"SELECT {FILE} FROM files")]

    @_in_thread
    def disown(self, names: Iterable[str]) -> None:
        """Forget files: they are deleted, or a user's by now."""
        with self._db:
            self._db.executemany("DELETE FROM files WHERE name = ?", ((name,) for name in names))

    @_in_thread
    def fact(self, name: str, default: Any = None) -> Any:
        """The JSON value last stored under `name`; the default if there is none that can be read."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        try:
            return json.loads(row[0]) if row else default
        except ValueError:
            log.warning("the fact %s of the journal can't be read and is ignored", name)
            return default

    def _row(self, task: Task) -> tuple[Any, ...]:
        at = task.finished_at
        return task.status, at and self._clock.dated(at), task.record(), task.id

    def _read(self, rest: str, *values: Any) -> Iterator[tuple[int, str, Task | None]]:
        """Id, record and task of rows; None and a line in the log for one that can't be read."""
        for task_id in self._ids(rest, *values):  # one record at a time: all of them would take much memory
            record = self._db.execute("SELECT record FROM tasks WHERE id = ?", (task_id,)).fetchone()[0]
            try:
                yield task_id, record, Task.restore(record, self._path.parent / "inputs")
            except Exception as fault:  # whatever another version, or a person, has written there
                if task_id not in self._reported:
                    self._reported.add(task_id)
                    log.error("the record of task %d can't be read: %.300r", task_id, fault)
                yield task_id, record, None

    def _ids(self, rest: str, *values: Any) -> list[int]:
        return [task_id for (task_id,) in self._db.execute(f"SELECT id FROM tasks {rest}", values)]


def _refuse_newer(path: Path) -> None:
    """Raises NewerJournal, and leaves no trace: what SQLite writes to look into a WAL is removed."""
    if not path.exists():
        return
    wal, shm = (path.with_name(f"{path.name}-{suffix}") for suffix in ("wal", "shm"))
    mode, leave = ("mode=ro", shm.exists()) if wal.exists() else ("immutable=1", True)
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True)) as db:
            version, newest = db.execute("PRAGMA user_version").fetchone()[0], len(MIGRATIONS)
    finally:
        if not leave:
            shm.unlink(missing_ok=True)
    if version > newest:
        raise NewerJournal(
            f"state_path: {path} has version {version}, of a newer wangpd, and this one reads up to version {newest};"
            " start the newer one again, or choose another state_path"
        )


def _connect(path: Path) -> sqlite3.Connection:
    """An open, checked and up-to-date journal. Raises sqlite3.DatabaseError if the file is not one."""
    db = sqlite3.connect(path)
    try:
        if not db.execute("PRAGMA page_count").fetchone()[0]:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # which only a new file can be given
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        db.execute("PRAGMA secure_delete = OFF")  # where it is on by default, a deletion writes all that it deletes
        db.execute("PRAGMA synchronous = FULL")
        if db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("quick_check failed")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
        db.executescript(f"BEGIN; {ADDITIONS} COMMIT;")
    except BaseException:
        db.close()
        raise
    return db


def _move_aside(path: Path) -> Path:
    """Rename the journal and its WAL, so that a person can still look at them."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    aside = path.with_name(f"{path.name}.unreadable-{stamp}")
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside
