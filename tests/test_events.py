"""Events: each change once, in order, after its commit; what a client sees while a commit is under way."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.job import EngineError, Phase
from engine.queue import runner
from engine.queue.events import EventKind, Events, EventsEnded, EventsLost, Subscription
from engine.queue.queue import TaskQueue
from engine.queue.tasks import Status
from engine.workers.lanes import Progress
from tests.harness import Harness, until


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


def told(queue: TaskQueue, since: int) -> list[tuple[str, int]]:
    """Kind and task id of each event, progress left out."""
    events = [event for event in queue.events.since(since) if event.kind is not EventKind.PROGRESS]
    return [(event.kind.value, event.task.id if event.task else 0) for event in events]


# ---- the ring


def test_ids_grow_by_one_and_begin_above_those_of_an_earlier_start() -> None:
    first, second = Events(), Events()
    first.publish(EventKind.PAUSED)
    assert second.last_id >= first.last_id - 1  # by the clock, in microseconds
    before = first.last_id
    for _ in range(3):
        first.publish(EventKind.CLEARED)
    assert [event.id for event in first.since(before)] == [before + 1, before + 2, before + 3]


def test_what_followed_an_id_is_told_or_said_to_be_gone() -> None:
    events = Events(kept=3)
    ids = [events.last_id]
    for _ in range(5):
        events.publish(EventKind.CLEARED)
        ids.append(events.last_id)
    assert [event.id for event in events.since(ids[2])] == ids[3:]
    assert events.since(ids[5]) == []
    for gone in (ids[1], 0, ids[5] + 1):
        with pytest.raises(EventsLost):
            events.since(gone)


async def test_a_slow_subscriber_learns_that_it_lost_events_and_goes_on_from_there() -> None:
    events = Events(kept=3)
    subscription = events.subscribe()
    for _ in range(100):
        events.publish(EventKind.PAUSED)
    assert len(events._ring) == 3
    with pytest.raises(EventsLost):
        await subscription.read()
    events.publish(EventKind.RESUMED)
    assert [event.kind for event in await subscription.read()] == [EventKind.RESUMED]


async def test_every_subscriber_gets_every_event_in_order() -> None:
    events = Events()
    first = events.last_id

    async def read(subscription: Subscription) -> list[int]:
        seen: list[int] = []
        while len(seen) < 20:
            seen += [event.id for event in await subscription.read()]
        return seen

    readers = [asyncio.create_task(read(events.subscribe())) for _ in range(5)]
    for _ in range(20):
        events.publish(EventKind.CLEARED)
        await asyncio.sleep(0)
    assert await asyncio.gather(*readers) == [list(range(first + 1, first + 21))] * 5


async def test_a_subscriber_that_gives_up_costs_the_others_nothing() -> None:
    events = Events()
    leaving, staying = (asyncio.create_task(events.subscribe().read()) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.sleep(0)
    events.publish(EventKind.CLEARED)
    assert len(await staying) == 1


# ---- what is published


async def test_the_life_of_a_task_is_told_once_and_in_order(harness: Harness) -> None:
    async with harness.open() as queue:
        since = queue.events.last_id
        first, second, third = await harness.submit(3)
        await harness.started(first)
        await queue.move(third, 1)
        await queue.remove(second)
        harness.engine.finish(EngineError("It failed.", "failed"))
        await harness.end(first)
        await harness.started(third)
        await queue.remove(third)
        await harness.end(third)
        kinds = told(queue, since)
    assert sorted(kinds[:4]) == sorted([("queued", first), ("queued", second), ("queued", third), ("started", first)])
    assert kinds[4:] == [
        ("moved", third),
        ("cancelled", second),
        ("failed", first),
        ("started", third),
        ("cancelling", third),
        ("cancelled", third),
    ]


async def test_what_concerns_the_whole_queue_is_told_too(harness: Harness) -> None:
    async with harness.open() as queue:
        since = queue.events.last_id
        await queue.pause(True)
        await queue.pause(True)  # nothing changes
        ids = await harness.submit(2)
        await queue.clear()
        await queue.pause(False)
        kinds = told(queue, since)
    gone = [("cancelled", task_id) for task_id in ids]
    assert kinds == [("paused", 0), *(("queued", task_id) for task_id in ids), *gone, ("cleared", 0), ("resumed", 0)]


async def test_a_task_that_is_put_back_is_told_of(harness: Harness) -> None:
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        since = queue.events.last_id
    assert told(queue, since) == [("requeued", task_id)]


async def test_an_event_holds_the_task_as_it_was_then(harness: Harness) -> None:
    async with harness.open() as queue:
        since = queue.events.last_id
        await harness.learn()
        seen = {event.kind: event.task.status for event in queue.events.since(since) if event.task}
    assert seen == {
        EventKind.QUEUED: Status.QUEUED,
        EventKind.STARTED: Status.PROCESSING,
        EventKind.COMPLETED: Status.COMPLETED,
    }


# ---- the end


async def test_a_stop_ends_every_subscription_once_it_has_read_what_was_published() -> None:
    events = Events()
    early, waiting = events.subscribe(), asyncio.create_task(events.subscribe().read())
    await asyncio.sleep(0)
    events.close()
    with pytest.raises(EventsEnded):
        await waiting
    events.publish(EventKind.PAUSED)
    assert [event.kind for event in await early.read()] == [EventKind.PAUSED]
    for subscription in (early, events.subscribe()):
        with pytest.raises(EventsEnded):
            await subscription.read()


# ---- progress


async def test_progress_is_published_when_it_changes_and_getters_only_read(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "READ_S", 0.01)
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        since = queue.events.last_id
        for step in (5, 10):
            harness.engine.shown = Progress(Phase.DENOISING, 0, 1, step, 20)
            before = await queue.get(task_id)
            shown = queue.progress_percent(before), queue.steps_done(before), before.phase
            assert shown == (before.progress, (before.steps_done, 20), before.phase)
            await until(lambda step=step: queue.at_work[0].steps_done == step)
            await asyncio.sleep(0.05)  # several looks at a board that stays as it is
        events = queue.events.since(since)
        harness.engine.finish()
        await harness.end(task_id)
    seen = [(event.kind, event.task.steps_done, event.task.phase) for event in events if event.task]
    assert seen == [(EventKind.PROGRESS, 5, "denoising"), (EventKind.PROGRESS, 10, "denoising")]


def test_there_are_at_most_five_progress_events_a_second() -> None:
    assert runner.READ_S >= 0.2


async def test_nobody_looks_at_the_boards_while_nothing_runs(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "READ_S", 0.001)
    looks: list[int] = []
    async with harness.open() as queue:
        await harness.learn()
        await asyncio.sleep(0.01)
        monkeypatch.setattr(harness.engine, "progress", looks.append)
        monkeypatch.setattr(queue, "advance", looks.append)
        await asyncio.sleep(0.05)
        assert looks == []


# ---- committed, then shown


class HeldJournal:
    """Holds each commit of a change back until `release`, and then lets it through."""

    def __init__(self, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self._go_on = asyncio.Event(), asyncio.Event()
        save = harness.journal.save

        async def held(*tasks: Any, **more: Any) -> None:
            self.begun.set()
            await self._go_on.wait()
            await save(*tasks, **more)

        monkeypatch.setattr(harness.journal, "save", held)

    def release(self) -> None:
        self._go_on.set()


async def doors(queue: TaskQueue, task_id: int, since: int) -> dict[str, Any]:
    """What a client can see of a task, through every door."""
    ids, _ = await queue.journal.history(None, 10, 0)
    history = [await queue.get(each) for each in ids]
    return {
        "status": (await queue.get(task_id)).status,
        "queue": [(task.id, task.status) for task in queue.listing()],
        "tasks": [(task.id, task.status) for task in history],
        "wait": (await queue.wait(task_id, 0.01)).status,
        "position": queue.position(await queue.get(task_id)),
        "paused": queue.paused,
        "events": told(queue, since),
    }


Begin = Callable[[Harness, int], Awaitable[Any]]


@asynccontextmanager
async def running_task(harness: Harness) -> AsyncIterator[int]:
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await until(lambda: bool(queue.at_work))
        await harness.started(task_id)
        yield task_id


async def finish(harness: Harness, _task_id: int) -> None:
    harness.engine.finish()


async def fail(harness: Harness, _task_id: int) -> None:
    harness.engine.finish(EngineError("It failed.", "failed"))


async def remove(harness: Harness, task_id: int) -> None:
    await harness.queue.remove(task_id)


async def interrupt(harness: Harness, _task_id: int) -> None:
    harness.queue.runner.interrupt()


@pytest.mark.parametrize(
    ("begin", "kinds"),
    [(finish, ["completed"]), (fail, ["failed"]), (remove, ["cancelling", "cancelled"]), (interrupt, ["requeued"])],
)
async def test_a_running_task_looks_as_before_through_every_door_until_its_change_is_committed(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, begin: Begin, kinds: list[str]
) -> None:
    async with running_task(harness) as task_id:
        queue, since = harness.queue, harness.queue.events.last_id
        before, row = await doors(queue, task_id, since), harness.stored()[task_id]
        held = HeldJournal(harness, monkeypatch)
        beginning = asyncio.create_task(begin(harness, task_id))  # type: ignore[arg-type]
        await held.begun.wait()
        assert (await doors(queue, task_id, since), harness.stored()[task_id]) == (before, row)
        held.release()
        await beginning
        await until(lambda: told(queue, since) == [(kind, task_id) for kind in kinds])
        shown = queue.events.since(since)[-1].task
        assert shown
        assert harness.stored()[task_id] == shown.status == (await queue.get(task_id)).status


async def clear(harness: Harness, _task_id: int) -> None:
    await harness.queue.clear()


async def move(harness: Harness, task_id: int) -> None:
    await harness.queue.move(task_id, 1)


async def resume(harness: Harness, _task_id: int) -> None:
    await harness.queue.pause(False)


@pytest.mark.parametrize("begin", [remove, clear, move, resume])
async def test_a_waiting_task_looks_as_before_through_every_door_until_its_change_is_committed(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, begin: Begin
) -> None:
    async with harness.open(paused=True) as queue:
        _, task_id = await harness.submit(2)
        since = queue.events.last_id
        before = await doors(queue, task_id, since)
        held = HeldJournal(harness, monkeypatch)
        beginning = asyncio.create_task(begin(harness, task_id))  # type: ignore[arg-type]
        await held.begun.wait()
        assert await doors(queue, task_id, since) == before
        held.release()
        await beginning
        assert await doors(queue, task_id, since) != before


async def test_a_start_is_shown_once_it_is_committed(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    async with harness.open() as queue:
        held, since = HeldJournal(harness, monkeypatch), queue.events.last_id
        (task_id,) = await harness.submit()
        await held.begun.wait()
        seen = await doors(queue, task_id, since)
        assert (seen["status"], seen["position"], seen["events"]) == (Status.QUEUED, 1, [("queued", task_id)])
        assert harness.engine.ran == []
        held.release()
        await harness.started(task_id)
        assert told(queue, since)[-1] == ("started", task_id)


async def test_a_cancel_that_comes_while_an_end_is_being_committed_finds_the_end(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_task(harness) as task_id:
        held = HeldJournal(harness, monkeypatch)
        harness.engine.finish()
        await held.begun.wait()
        removing = asyncio.create_task(harness.queue.remove(task_id))
        await asyncio.sleep(0.01)
        held.release()
        with pytest.raises(Exception, match=rf"Task {task_id} has already ended \(completed\)"):
            await removing
        assert harness.stored()[task_id] == "completed"


async def test_a_task_that_is_removed_while_it_waits_for_its_turn_is_not_started(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness.open(paused=True) as queue:
        first, second = await harness.submit(2)
        held = HeldJournal(harness, monkeypatch)
        resuming = asyncio.create_task(queue.pause(False))
        removing = asyncio.create_task(queue.remove(first))
        await held.begun.wait()
        held.release()
        await asyncio.gather(resuming, removing)
        await harness.started(second)
        assert first not in harness.engine.ran
