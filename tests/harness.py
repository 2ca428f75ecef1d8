"""A TaskQueue in this process, with a real journal and stand-ins for its engines and the output folder."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from engine.catalog.models import Catalog, Model
from engine.files.outputs import OwnFile
from engine.files.place import Place
from engine.job import Cancelled, EngineError, Job, OutputFile, Result
from engine.planning.machine import Machine
from engine.queue.endings import Limits
from engine.queue.journal import Journal
from engine.queue.queue import TaskQueue
from engine.queue.tasks import Status
from engine.workers.lanes import Progress
from tests.stand_ins import job

CATALOG = Catalog.load()
FILE = OutputFile("a.mp4", "video", 5, 64, 64, 9, 8, 1)
TIMINGS = {"loading": 10.0, "encoding": 1.0, "denoising": 20.0, "decoding": 1.0, "saving": 2.0}
PATIENCE_S = 20


class FakeEngine:
    """An Engine whose every job ends as the test says."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.patience: list[float] = []
        self.unloads = 0
        self.warm = ""
        self.device, self.plan = "cpu", ""
        self.machine: Machine | None = None
        self.shown: Progress | None = None
        self.broken: EngineError | None = None  # what a check finds
        self.checks = 0
        self.whole: dict[int, list[OutputFile]] = {}  # files of a run that is broken off
        self._running: dict[int, asyncio.Future[Result]] = {}

    async def run(self, task_id: int, _job: Job, model: Model, patience_s: float, free: Callable[[], object]) -> Result:
        self.free = free
        self.ran.append(task_id)
        self.patience.append(patience_s)
        self.warm = model.id
        self._running[task_id] = asyncio.get_running_loop().create_future()
        try:
            return await self._running[task_id]
        finally:
            del self._running[task_id]

    @property
    def busy(self) -> bool:
        """A job runs."""
        return bool(self._running)

    def finish(self, result: Result | Exception | None = None) -> None:
        """End the job that runs."""
        (future,) = self._running.values()
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result or Result((FILE,), TIMINGS, 7, step_s=1.0))

    async def load(self, model: Model) -> None:
        self.warm = model.id

    async def check(self) -> None:
        self.checks += 1
        if self.broken:
            raise self.broken

    def made(self, task_id: int) -> list[OutputFile]:
        return self.whole.pop(task_id, [])

    def loaded(self, model_id: str) -> bool:
        return self.warm == model_id

    def unload(self) -> bool:
        self.unloads += 1
        self.warm = ""
        return True

    def cancel(self, task_id: int) -> None:
        if task_id in self._running:
            self._running[task_id].set_exception(Cancelled("by request"))

    def progress(self, task_id: int) -> Progress | None:
        return self.shown if task_id in self._running else None


class FakeOutputs:
    """An output folder that only remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.full = ""  # what a look at the folder finds
        self.kept = ""  # why files can't be published
        self.fault: OSError | None = None

    def remove_attempt(self, task_id: int, _made: Iterable[str] = ()) -> int:
        self.told.append(("attempt", task_id))
        if self.fault:
            raise self.fault
        return 0

    keeps_all = False

    def made(self, _task_id: int, _names: Iterable[str] | None) -> list[OwnFile]:
        return []

    def publish_kept(self, names: Iterable[str] | None = None) -> str:  # noqa: ARG002 - all are alike
        return self.kept

    def prepare(self, _own: Iterable[OwnFile]) -> list[str]:
        if self.fault:
            raise self.fault
        return []


class FakeFolder:
    """What the queue sees of the folder of FakeOutputs."""

    def __init__(self, outputs: FakeOutputs) -> None:
        self._outputs, self.suspect = outputs, False

    def fault(self) -> str:
        return self._outputs.full


class Harness:
    """A queue with all that it needs; `open` may be entered again and again, as after a restart.

    `engine` is its engine, or the first of its `engines`.
    """

    def __init__(self, folder: Path, lanes: int = 1) -> None:
        self.folder = folder
        self.engines, self.outputs = [FakeEngine() for _ in range(lanes)], FakeOutputs()
        self.journal: Journal
        self.queue: TaskQueue

    @asynccontextmanager
    async def open(self, *, die: bool = False, paused: bool | None = None, **limits: Any) -> AsyncIterator[TaskQueue]:
        """A running queue; `die` ends it without a word, as SIGKILL would."""
        self.engines = [FakeEngine() for _ in self.engines]
        self.journal = Journal(self.folder / "journal.sqlite")
        await self.journal.open()
        place = Place([FakeFolder(self.outputs)])
        self.queue = TaskQueue(self.journal, self.engines, CATALOG, self.outputs, place=place, limits=Limits(**limits))
        running = self.queue.running(5)
        await running.__aenter__()
        if paused is not None:
            await self.queue.pause(paused)
        try:
            yield self.queue
        finally:
            if die:
                await give_up(self.queue._work)
            await running.__aexit__(None, None, None)
            await self.journal.close()

    @property
    def engine(self) -> FakeEngine:
        return self.engines[0]

    async def submit(self, count: int = 1, **changes: Any) -> list[int]:
        """The ids of new tasks."""
        return [(await self.queue.submit(job(**changes))).answer["task_id"] for _ in range(count)]

    async def started(self, task_id: int) -> None:
        await until(lambda: any(task_id in engine.ran for engine in self.engines))

    async def status(self, task_id: int) -> Status:
        return (await self.queue.get(task_id)).status

    async def end(self, task_id: int) -> Any:
        """The task, once it has ended."""
        task = await self.queue.wait(task_id, PATIENCE_S)
        assert task.status.ended
        return task

    async def learn(self) -> None:
        """Let one task of 20 steps and 9 frames of 64 x 64 teach what the model takes: 10 s to load, 24 s of work."""
        (task_id,) = await self.submit()
        await self.started(task_id)
        self.engine.finish()
        await self.end(task_id)
        await until(lambda: not self.queue.at_work)

    def waiting(self) -> list[int]:
        return [task.id for task in self.queue.listing()]

    def stored(self, column: str = "status") -> dict[int, Any]:
        """What the file says of each task."""
        with sqlite3.connect(self.folder / "journal.sqlite") as db:
            return dict(db.execute(f"SELECT id, {column} FROM tasks").fetchall())


async def give_up(runner: "asyncio.Task[None]") -> None:
    """End as SIGKILL would: the runner writes nothing more."""
    runner.cancel()
    with suppress(asyncio.CancelledError):
        await runner


async def until(test: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not test():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)
