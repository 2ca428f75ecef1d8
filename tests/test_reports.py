"""engine/workers/reports.py: what a worker sends once, whatever becomes of it meanwhile."""

import asyncio
import json
import math
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from engine.gpu import worker
from engine.job import STORAGE_FAULT, EngineError, OutputFile
from engine.planning.machine import Machine
from engine.workers.reports import Reports


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Connection, Connection]]:
    """The daemon's end and the worker's, on which the worker of this process sends."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    monkeypatch.setattr(worker, "_reports", theirs, raising=False)
    monkeypatch.setattr(worker, "_settled_count", 0)
    yield ours, theirs
    ours.close()
    theirs.close()


async def test_a_report_arrives_as_it_was_sent(pipe: tuple[Connection, Connection]) -> None:
    reports, machine = Reports(pipe[0], {}), Machine(0, 8 * 2**30, math.inf, 1e11)
    worker._report(machine=vars(machine))
    worker._report(plan="wan: all of it in RAM — “here”")
    reports.read()
    assert (reports.machine, reports.plan) == (machine, "wan: all of it in RAM — “here”")
    reports.close()


async def test_whoever_waits_for_files_learns_that_they_are_written_or_why_not(
    pipe: tuple[Connection, Connection],
) -> None:
    reports = Reports(pipe[0], {})
    waiting = [asyncio.create_task(reports.settled(number)) for number in (1, 2)]
    await asyncio.sleep(0)
    worker._settled(None)
    await waiting[0]
    worker._settled(EngineError("The disk is full.", STORAGE_FAULT))
    with pytest.raises(EngineError, match=r"The disk is full\.") as caught:
        await waiting[1]
    assert caught.value.code == STORAGE_FAULT
    worker._settled(None)  # before anybody asks
    reports.read()
    await reports.settled(3)
    reports.close()


async def test_whole_files_are_known_by_their_task_though_the_worker_is_killed(
    pipe: tuple[Connection, Connection],
) -> None:
    made: dict[int, list[OutputFile]] = {}
    reports, files = Reports(pipe[0], made), [OutputFile(f"{i}.mp4", "video", 5, 64, 64, 9, 8, i) for i in range(3)]
    worker._made(7, files[0])
    worker._made(8, files[1])
    worker._made(7, files[2])
    pipe[1].close()
    reports.read()
    assert (made, reports.ended) == ({7: [files[0], files[2]], 8: [files[1]]}, True)


async def test_the_longest_fault_is_sent_in_one_piece(pipe: tuple[Connection, Connection]) -> None:
    reports = Reports(pipe[0], {})
    worker._settled(EngineError("\N{MOVIE CAMERA}" * 10_000))
    report = {"settled": 1, "fault": "\N{MOVIE CAMERA}" * worker.MOST_REPORTED, "code": "generation_failed"}
    assert len(json.dumps(report)) < 4096  # PIPE_BUF
    with pytest.raises(EngineError) as caught:
        await reports.settled(1)
    assert str(caught.value) == "\N{MOVIE CAMERA}" * worker.MOST_REPORTED
    reports.close()


@pytest.mark.parametrize("torn", [b'{"plan": "half', b"", b'{"settled": 1, "fault": ""'])
async def test_what_a_killed_worker_had_not_sent_whole_is_dropped(
    pipe: tuple[Connection, Connection], torn: bytes
) -> None:
    reports = Reports(pipe[0], {})
    worker._report(plan="whole")
    pipe[1]._send(torn) if torn else None  # type: ignore[attr-defined]
    pipe[1].close()
    with pytest.raises(EOFError):  # the worker is gone
        await reports.settled(1)
    assert (reports.plan, reports.ended) == ("whole", True)


async def test_a_report_that_comes_in_pieces_is_put_together(pipe: tuple[Connection, Connection]) -> None:
    reports = Reports(pipe[0], {})
    for byte in b'{"plan": "slowly"}\n':
        pipe[1]._send(bytes([byte]))  # type: ignore[attr-defined]
        reports.read()
    assert reports.plan == "slowly"
    reports.close()
    reports.close()  # twice is as once
