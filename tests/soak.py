"""A soak: what clients, the machine and time do to a daemon, for minutes, and what must be true all the while.

Clients submit, cancel, move, pause and retry; hostile ones hang up, lie and come in crowds; daemon and worker are
killed, stopped and frozen; disks fill up, folders can't be written to or are away; the clock jumps. The first part
has restarts; in the second one the daemon lives on, and what it holds of the machine is measured.

`python -m tests.soak --seconds 600 --seed 7` shows what became of it; the seed makes the same choices again, though the
machine's own timing does not repeat. `--phases kill_daemon,save_full` plays only these.
"""

import argparse
import base64
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import av
import requests

from tests import crash, hostile, soak_worker
from tests.daemon import ENDED, ROOT, Daemon
from tests.place import Disk, Foreigners, namespace, obey_permissions
from tests.processes import alive, workers
from tests.raiders import RAIDS, Raiders
from tests.sentry import READY, Footprint, Readiness, Sentry
from tests.stub_daemon import WORKER
from tests.wire import Answer, answered, connected, head

PROMISES = (
    *(promise for promise in crash.PROMISES if promise != "no answer is a 5xx"),
    "no answer is a 5xx but 503",
    "a 503 says why, and when to come again",
    "no task is failed by its place",
    "no task runs again after its end",
    "a stop costs no attempt and ends in order",
    "whole files are told of, whatever became of their task",
    "no foreign file is touched",
    "a folder that is away is not made anew",
    "ready is true to the place",
    "no time is negative",
    "memory and descriptors stay flat",
    "the log has no traceback",
)
SETTLE_S = 30.0  # in which a fault of the place, or its end, has to be known: seconds, were the machine not so busy
DEATHS_A_KILL = 2  # tasks that a worker may have in hand: one is saved while the next one runs
MOST_TOLD = 10  # faults of each kind
REAL = 0.2  # of the lives have the embedded model, the others a worker without one
SMALL = {"video_length": 5, "resolution": "64x64"}
PICTURE = base64.b64encode(hostile.drawn("PNG")).decode()
CONFIG = {
    "min_free_mb": 8,
    "max_body_mb": 2,
    "max_connections": 60,
    "body_timeout_s": 3.0,
    "max_attempts": 100,  # the storm kills more often than a user would
    "history_count": 1_000_000,
    "keep_outputs_days": 30.0,
    "step_timeout_s": 60.0,
}
NO_SAVE_ROOM = Readiness("save_path is full", r"save_path|output")
NO_SAVE_WRITING = Readiness("save_path can't be written to", r"save_path|output")
NO_SAVE_FOLDER = Readiness("save_path is away", r"save_path|output")
NO_SAVE_DISK = Readiness("the disk of save_path is not mounted", r"save_path|output")
NO_STATE = Readiness("state_path can't be written to", r"journal|state")
JUMPS_S = {"clock_years": 2 * 365 * 86400.0, "clock_day": -86400.0, "clock_hour": 3600.0}


class SoakDaemon(Daemon):
    """A daemon on disks that can fill up, and with a clock that can be set."""

    def __init__(self, folder: Path, *, mounted: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.save_disk, self.state_disk = (Disk(folder, name, mounted=mounted) for name in ("save", "state"))
        super().__init__(folder, save_path=str(self.save_disk.folder), state_path=str(self.state_disk.folder), **CONFIG)
        self.outputs, self.state = self.save_disk.folder, self.state_disk.folder
        self.clock, self.runs = folder / "clock", folder / "runs"
        self.runs.touch()
        self.set_clock(0.0)
        self.environment |= {
            WORKER: f"{soak_worker.__name__}:{soak_worker.generate.__name__}",
            soak_worker.RUNS: str(self.runs),
            "WANGPD_TEST_CLOCK": str(self.clock),
            "PYTHONPATH": f"{ROOT / 'tests' / 'clock'}:{ROOT}",
        }

    def set_clock(self, offset_s: float) -> None:
        """Let the daemon's wall clock be ahead of the machine's by this."""
        with self.clock.open("r+b" if self.clock.exists() else "wb") as file:
            file.write(struct.pack("d", offset_s))

    def choose_worker(self, *, real: bool) -> None:
        """The worker of the next life: the product's own, or one without a model."""
        self.program = [str(ROOT / "wangpd.py")] if real else ["-m", "tests.stub_daemon"]


class Soak(crash.Storm):
    """One daemon in all weathers."""

    promises = PROMISES
    daemon: SoakDaemon

    def __init__(self, daemon: SoakDaemon, seed: int) -> None:
        super().__init__(daemon, seed)
        self.fate = random.Random(seed)  # of the phases alone: how much clients do in one is a matter of time
        self.foreigners = Foreigners(daemon.outputs)
        self.phases: Counter[str] = Counter()
        self.phase = "the start"
        self.diary: list[str] = []
        self.sentry = Sentry(daemon, lambda fault: self.blame("ready is true to the place", fault))
        self.gate = threading.RLock()  # whoever changes what is known while it is compared holds it
        self.raiders = Raiders(daemon, seed, self.judge_raid, self.gate)
        self.worker_kills = 0
        self._ended_ns: dict[int, int] = {}  # id → when it was known to have ended
        self._failed: set[int] = set()  # which has been blamed
        self._answered: dict[str, str] = {}  # prompt → the key under which it was answered
        self._began = time.monotonic()
        self._over = threading.Event()

    def moment(self) -> str:
        return f"at {time.monotonic() - self._began:.1f} s, in {self.phase}"

    # -- the whole of it

    def soak(self, seconds: float, phases: Sequence[str] = ()) -> "Soak":
        """All phases that there are, or these, and again at random until the time is over; returns this storm."""
        chosen = [name for name in PHASES if not phases or name in phases]
        lasting = [name for name in chosen if name not in RESTARTS]
        self.fate.shuffle(lasting)
        half = len(lasting) // 2
        first = [name for name in chosen if name not in lasting] + lasting[:half]
        self.fate.shuffle(first)
        with ExitStack() as stack:
            stack.callback(self.daemon.stop, signal.SIGKILL)
            self.begin_life(real=True)
            self.sentry.expect(READY)
            stack.enter_context(self.sentry)
            stack.enter_context(self.raiders)
            stack.enter_context(self.second_client())
            self.play(first, chosen, until=self._began + 0.5 * seconds)
            self.long_life(lasting[half:], lasting, until=self._began + seconds)
            self._over.set()
            self.drain()
        return self

    def play(self, first: Sequence[str], further: Sequence[str], until: float) -> None:
        """These phases, then further ones until the time is over, with quiet moments between them."""
        left = list(first)
        while left or (further and time.monotonic() < until):
            name = left.pop() if left else self.fate.choice(further)
            self.phases[name] += 1
            self.enter(name)
            PHASES[name](self)
            self.enter("a quiet moment")
            self.work(self.fate.uniform(0.2, 1))

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.diary.append(f"{time.monotonic() - self._began:6.1f} s: {phase}")

    def long_life(self, first: Sequence[str], further: Sequence[str], until: float) -> None:
        """A life of the daemon in which it holds in the end what it held when it was warm."""
        self.enter("a warm-up")
        self.warm_up()
        before = self.footprint()
        self.play(first, further, until)
        self.enter("a last look")
        self.warm_up()
        for fault in before.grown(self.footprint()):
            self.blame("memory and descriptors stay flat", fault)

    def warm_up(self) -> None:
        """Have everything happen once that takes memory when it happens first."""
        with self.gate:
            for name in RAIDS:
                self.raiders.raid(name)
        self.work(1)
        self.check()

    def footprint(self) -> Footprint:
        """What the daemon holds once nothing waits and no client is there."""
        with self.gate:
            self.finish_all()
            self._session.close()
            if not workers(self.daemon):  # its last one was killed, and no task has come since
                self.post(*self.request_body(), "")
                self.finish_all()
            time.sleep(1)  # connections end, a writer of files closes them
            return Footprint.of(self.daemon.process.pid)

    def drain(self) -> None:
        self.enter("the end")
        self.sentry.expect(None)
        with self.gate:
            self.finish_all()
            self._parts, self._started_ns = {(path.name, path.stat().st_ino) for path in self.parts()}, time.time_ns()
            self.check()
            self.check_results()
            self.end_life(signal.SIGTERM)
        self.check_log()

    def finish_all(self) -> None:
        """Let all tasks come to their end."""
        self.known.paused = self.call("POST", "/queue/resume")["paused"]
        deadline = time.monotonic() + 120
        while self.call("GET", "/queue")["total_tasks"]:
            assert time.monotonic() < deadline, "the queue does not come to its end"
            time.sleep(0.05)
        self.look()

    # -- lives

    def begin_life(self, *, real: bool | None = None) -> None:
        """Start the daemon, with a worker that is drawn."""
        self.daemon.choose_worker(real=self.fate.random() < REAL if real is None else real)
        self._started_ns = time.time_ns()
        self.daemon.start()

    def end_life(self, number: int) -> None:
        """Stop the daemon by a signal, which has to end it in order."""
        self.sentry.expect(None)
        code = self.daemon.stop(number)
        if code:
            self.blame("a stop costs no attempt and ends in order", f"{signal.Signals(number).name}: exit code {code}")

    def again(self, readiness: Readiness = READY) -> None:
        """Start it once more, and compare what it says with what is known."""
        self.begin_life()
        with self.gate:
            self.check()
        self.settled(readiness)

    def die(self, readiness: Readiness = READY) -> None:
        """Kill it at any moment, and start it again."""
        self.kills["kill_daemon"] += 1
        self.sentry.expect(None)
        timer = threading.Timer(self.fate.uniform(0, 2), self.kill)
        timer.start()
        with contextlib.suppress(requests.RequestException):
            while timer.is_alive():
                self.act()
        timer.join()
        self.bury()
        self.again(readiness)

    def die_in_a_full_place(self) -> None:
        """Kill it while it can't save anything; it has to start all the same."""
        self.sentry.expect(None)
        with self.daemon.save_disk.filled():
            self.settled(NO_SAVE_ROOM)
            self.die(NO_SAVE_ROOM)
            self.sentry.expect(None)
        self.settled(READY)

    def die_before_a_jump(self) -> None:
        """Kill it, and start it with a clock that is two years ahead, as a machine with a dead battery may."""
        self.sentry.expect(None)
        self.kill()
        self.bury()
        self.daemon.set_clock(JUMPS_S["clock_years"])
        self.again()
        self.work(1)
        self.daemon.set_clock(0.0)

    def die_beside_a_frozen_worker(self) -> None:
        """Kill it while its worker is frozen, which goes on when the next daemon works already."""
        with contextlib.suppress(requests.RequestException):
            self.work(self.fate.uniform(0.1, 1))
        pids = workers(self.daemon)
        for pid in pids:
            send(pid, signal.SIGSTOP)
        self.sentry.expect(None)
        self.kill()
        self.bury()
        self.begin_life()
        self.work(self.fate.uniform(0, 1))
        for pid in pids:
            send(pid, signal.SIGCONT)
        self.settled(READY)

    def die_while_starting(self) -> None:
        """Kill it, and then what is started after it, before it listens."""
        self.sentry.expect(None)
        self.kill()
        self.bury()
        self.kill_while_starting()
        self.again()

    def stop(self, number: int) -> None:
        """Stop it, while somebody waits for a task, and start it again."""
        with contextlib.suppress(requests.RequestException):
            for _ in range(self.random.randint(0, 30)):
                self.act()
        self.sentry.expect(None)
        with self.gate:
            counted = {
                task["task_id"]: task["attempts"] - (task["status"] != "queued")
                for task in self.history()
                if task["status"] not in ENDED
            }
            with self.waiting() as channel:
                self.end_life(number)
                if answered(channel) is None:
                    self.blame("a stop costs no attempt and ends in order", "who waited for a task got no answer")
            self._session.close()
            self.begin_life()
            for task in self.history():  # one that runs again has one more
                if task["status"] == "queued" and task["attempts"] > counted.get(task["task_id"], 0):
                    fault = f"{task['task_id']} has {task['attempts']} attempts, and had {counted}"
                    self.blame("a stop costs no attempt and ends in order", fault)
            self.check()
        self.settled(READY)

    @contextmanager
    def waiting(self) -> Iterator[socket.socket]:
        """A connection on which a client waits for a task."""
        self.look()
        with connected(self.daemon.url) as channel:
            task_id = (self.known.order or list(self.known.accepted))[-1]
            channel.sendall(head(f"/api/v1/status/{task_id}?wait=60"))
            for _ in range(3):  # by then it has been read
                self.look()
            yield channel

    def kill_worker(self) -> None:
        """Kill the worker: it costs what it had in hand, and nothing else."""
        for _ in range(200):
            self.act()
            if pids := workers(self.daemon):
                break
            self.known.paused = self.call("POST", "/queue/resume")["paused"]
            self.submit()
            time.sleep(0.05)
        self.sentry.expect(None)  # killed at its start, it's a process that can't be started, and tried again
        for pid in pids:
            self.worker_kills += 1
            send(pid, signal.SIGKILL)
        self.work(0.5)
        self.settled(READY)

    def freeze(self, daemon: bool, worker: bool) -> None:
        """Stop processes for a while, as a suspend or `docker pause` does."""
        pids = {self.daemon.process.pid} if daemon else set()
        pids |= workers(self.daemon) if worker else set()
        if daemon:
            self.sentry.expect(None)
        for pid in pids:
            send(pid, signal.SIGSTOP)
        timer = threading.Timer(self.fate.uniform(0.5, 2.5), lambda: [send(pid, signal.SIGCONT) for pid in pids])
        timer.start()
        self.work(1)
        timer.join()
        if daemon:
            self.settled(READY)

    # -- faults of the place

    def fault(self, within: AbstractContextManager[None], readiness: Readiness) -> None:
        """Go on within a fault that the daemon has to know of, and after it."""
        self.sentry.expect(None)
        with within:
            self.settled(readiness)
            self.work(self.fate.uniform(0.5, 2.5))
            self.sentry.expect(None)
        self.check_strays()
        self.settled(READY)

    def fault_of_state(self, within: AbstractContextManager[None]) -> None:
        """Likewise; but while the queue's journal goes on in the room that it has, nothing is wrong yet."""
        self.sentry.expect(None)
        with within:
            deadline, refusals = time.monotonic() + SETTLE_S, 0
            while time.monotonic() < deadline and not (known := NO_STATE.fits(self.sentry.ask())):
                refusals += not self.submit_picture()
                self.work(0.1)
                if not refusals and time.monotonic() > deadline - SETTLE_S + 3:
                    break
            if known:
                self.sentry.expect(NO_STATE)
                self.work(self.fate.uniform(0.5, 2))
                self.sentry.expect(None)
            elif refusals:
                self.blame("ready is true to the place", f"while {NO_STATE.label}: refused {refusals} times, yet ready")
        self.check_strays()
        self.settled(READY)

    def submit_picture(self) -> bool:
        """Queue a task with a picture, which has to be stored; False if it was refused for the place's sake."""
        prompt, body = self.request_body()
        before = len(self.known.accepted)
        self.post(prompt, body | {"image_start": PICTURE}, "")
        return len(self.known.accepted) > before

    def settled(self, readiness: Readiness) -> None:
        """Go on until the daemon says this, and let it say so from then on."""
        deadline, answer = time.monotonic() + SETTLE_S, None
        while not readiness.fits(answer := self.sentry.ask()):
            if time.monotonic() > deadline:
                said = "nothing" if answer is None else f"{answer.status_code} {answer.text}"
                self.blame("ready is true to the place", f"while {readiness.label}, for {SETTLE_S:.0f} s: {said}")
                return
            self.work(0.1)
        self.sentry.expect(readiness)

    def jump(self, name: str) -> None:
        """Let the clock jump, and back."""
        self.daemon.set_clock(JUMPS_S[name])
        self.work(self.fate.uniform(0.5, 2))
        self.replay()
        self.daemon.set_clock(0.0)

    # -- clients

    def work(self, seconds: float) -> None:
        """Clients at work, so long, without wanting all of the processor, and patient with a daemon that is down."""
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(requests.RequestException):
                self.act()
            if time.monotonic() > until:
                return
            time.sleep(0.02)

    def acts(self) -> dict[Callable[[], None], int]:
        return {**super().acts(), self.ask: 6, self.browse: 2, self.replay: 2}

    def request_body(self) -> tuple[str, dict[str, Any]]:
        prompt, body = super().request_body()
        return prompt, body | SMALL

    def post(self, prompt: str, body: dict[str, Any], key: str, session: requests.Session | None = None) -> None:
        super().post(prompt, body, key, session)
        if key and prompt not in self.known.refused:
            self._answered[prompt] = key

    def ask(self) -> None:
        """Look at a task: what has ended is known to have ended."""
        if not self.known.accepted:
            return
        task_id = self.random.choice(list(self.known.accepted)[-20:])
        if (task := self.call("GET", f"/status/{task_id}")) and task["status"] in ENDED:
            self.known.ended.setdefault(task_id, task)
            self._ended_ns.setdefault(task_id, time.monotonic_ns())
        if task and (task["eta_seconds"] or 0) < 0:
            self.blame("no time is negative", f"{task_id}: eta_seconds is {task['eta_seconds']}")

    def browse(self) -> None:
        """Take one of the files that are listed: it has to be whole."""
        page = self.call("GET", "/outputs?limit=20")
        names = {file["filename"] for file in (page["files"] if page else ())} - self.foreigners.names
        if names:
            name = self.random.choice(sorted(names))
            answer = requests.get(f"{self.daemon.url}/api/v1/download/{name}", timeout=30)
            self.judge(f"GET /download/{name}", answer)
            if answer.ok:
                self.check_bytes(name, answer.content)

    def replay(self) -> None:
        """Send once more what was answered under a key."""
        if self._answered:
            prompt = self.random.choice(list(self._answered)[-50:])
            task_id = self.replayed(prompt, self._answered[prompt])
            if task_id is not None and self.known.accepted.get(task_id) != prompt:
                self.blame("a key makes a retry safe", f"{prompt} became {task_id}")

    @contextmanager
    def second_client(self) -> Iterator[None]:
        """Within, another one submits too, whatever becomes of the daemon."""

        def submit_on_and_on() -> None:
            with requests.Session() as session:
                for number in itertools.count():
                    if self._over.wait(0.3):
                        return
                    with self.gate, contextlib.suppress(requests.RequestException):
                        if len(self.known.order) < crash.CROWD:
                            prompt = f"other {number}"
                            self.post(prompt, {"prompt": prompt, "num_inference_steps": 2} | SMALL, "", session)

        thread = threading.Thread(target=submit_on_and_on, name="the other")
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    # -- what must be true

    def judge(self, request: str, answer: requests.Response) -> None:
        self.judge_answer(request, answer.status_code, answer.headers, answer.content)

    def judge_raid(self, label: str, answer: Answer) -> None:
        """Look at what a hostile client was told."""
        self.judge_answer(label, answer.status, answer.headers, answer.body)

    def judge_answer(self, request: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
        if status < 500:
            return
        if status != 503:
            self.blame("no answer is a 5xx but 503", f"{request}: {status} {body[:300]!r}")
            return
        with contextlib.suppress(ValueError, KeyError, TypeError):
            told = request.startswith("HEAD ") or len(json.loads(body)["detail"]) > 10
            if told and int(headers["Retry-After"]) > 0:
                return
        self.blame("a 503 says why, and when to come again", f"{request}: {dict(headers)} {body[:300]!r}")

    def check(self) -> None:
        with self.gate:
            super().check()
            for fault in self.foreigners.touched():
                self.blame("no foreign file is touched", fault)
            self.check_runs()

    def visible(self) -> set[str]:
        return super().visible() - self.foreigners.names

    def parts(self) -> Iterator[Path]:
        return (path for path in super().parts() if path.name not in self.foreigners.names)

    def learn(self, tasks: list[dict[str, Any]], paused: bool) -> None:
        super().learn(tasks, paused)
        for task in tasks:
            if task["status"] in ENDED:
                self._ended_ns.setdefault(task["task_id"], time.monotonic_ns())

    def check_presence(self, tasks: list[dict[str, Any]]) -> None:
        for task in tasks:
            if task["prompt"] not in self.known.bodies:
                self.known.copies[task["prompt"]] = len(tasks)  # a hostile client's, who may repeat itself
        super().check_presence(tasks)

    def check_states(self, tasks: list[dict[str, Any]], listed: set[int]) -> None:
        """Without a restart, a task that is being stopped may be so still."""
        stopping = {task["task_id"] for task in tasks if task["status"] == "cancelling"}
        self.known.cancelled -= stopping
        super().check_states(tasks, listed)
        self.known.cancelled |= stopping

    def check_failure(self, task: dict[str, Any]) -> None:
        """Only a worker that was killed fails a task; how many it may, is looked at in the end."""
        hostile_one = task["prompt"] not in self.known.bodies
        if task["error"]["code"] != "worker_died" and not hostile_one and task["task_id"] not in self._failed:
            self._failed.add(task["task_id"])
            self.blame("no task is failed by its place", f"{task['task_id']} failed: {task['error']}")

    def check_runs(self) -> None:
        """No task was begun that was known to have ended."""
        for line in self.daemon.runs.read_text().splitlines():
            task_id, begun_ns = map(int, line.split())
            if begun_ns > self._ended_ns.get(task_id, begun_ns):
                self.blame("no task runs again after its end", f"{task_id} was begun again")
        self.daemon.runs.write_text("")

    def check_whole(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.check_bytes(path.name, path.read_bytes())
            self._whole.add(path.name)

    def check_bytes(self, name: str, content: bytes) -> None:
        """A film has to be read to its end."""
        if not name.endswith(".mp4"):
            return
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            file.write(content)
            file.flush()
            try:
                with av.open(file.name) as container:
                    assert list(container.decode(video=0))
            except (av.FFmpegError, AssertionError) as error:
                self.blame("every visible file is whole", f"{name}: {error!r}")

    def check_strays(self) -> None:
        """While a folder was away, nothing was put where it had been."""
        for disk in (self.daemon.save_disk, self.daemon.state_disk):
            for name in disk.strays:
                self.blame("a folder that is away is not made anew", name)
            disk.strays.clear()

    def check_results(self) -> None:
        """In the end, every file is told of by its task and listed, and there are no others."""
        tasks = self.history()
        told = {file["filename"] for task in tasks for file in task["files"]}
        listed: set[str] = set()
        while page := self.call("GET", f"/outputs?limit=200&offset={len(listed)}")["files"]:
            listed |= {file["filename"] for file in page}
        promise = "whole files are told of, whatever became of their task"
        for name in sorted(self.visible() ^ told):
            self.blame(promise, f"{name} is {'told of, and gone' if name in told else 'there, and nobody tells of it'}")
        for name in sorted(told - listed):
            self.blame(promise, f"{name} is not listed")
        for path in self.parts():
            self.blame("a broken attempt leaves no file", path.name)
        died = [task["task_id"] for task in tasks if (task["error"] or {}).get("code") == "worker_died"]
        if len(died) > DEATHS_A_KILL * self.worker_kills:
            self.blame("no task is failed by its place", f"{self.worker_kills} workers were killed, and {died} failed")

    def check_log(self) -> None:
        """What went wrong inside is in the log."""
        found = re.findall(r"Traceback \(most recent call last\):\n(?: .*\n)*(.*)", self.daemon.log.read_text())
        for sentence, times in Counter(found).items():
            self.blame("the log has no traceback", f"{times} times: {sentence}")

    def story(self) -> str:
        kinds = f"phases: {dict(self.phases)}\nraids: {dict(self.raiders.raids)}\nready: {dict(self.sentry.samples)}"
        return f"{kinds}\n{super().story()}"


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    if alive(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


Phase = Callable[[Soak], None]
RESTARTS: Mapping[str, Phase] = {
    "kill_daemon": Soak.die,
    "kill_while_starting": Soak.die_while_starting,
    "kill_in_full": Soak.die_in_a_full_place,
    "kill_before_jump": Soak.die_before_a_jump,
    "kill_beside_frozen": Soak.die_beside_a_frozen_worker,
    "stop_term": lambda storm: storm.stop(signal.SIGTERM),
    "stop_hup": lambda storm: storm.stop(signal.SIGHUP),
    "stop_int": lambda storm: storm.stop(signal.SIGINT),
}
PHASES: Mapping[str, Phase] = {
    **RESTARTS,
    "kill_worker": Soak.kill_worker,
    "freeze_daemon": lambda storm: storm.freeze(daemon=True, worker=False),
    "freeze_worker": lambda storm: storm.freeze(daemon=False, worker=True),
    "freeze_both": lambda storm: storm.freeze(daemon=True, worker=True),
    "save_low": lambda storm: storm.fault(storm.daemon.save_disk.filled(2**22), NO_SAVE_ROOM),
    "save_full": lambda storm: storm.fault(storm.daemon.save_disk.filled(), NO_SAVE_ROOM),
    "save_read_only": lambda storm: storm.fault(storm.daemon.save_disk.read_only(), NO_SAVE_WRITING),
    "save_forbidden": lambda storm: storm.fault(storm.daemon.save_disk.forbidden(), NO_SAVE_WRITING),
    "save_unmounted": lambda storm: storm.fault(storm.daemon.save_disk.unmounted(), NO_SAVE_DISK),
    "save_away": lambda storm: storm.fault(storm.daemon.save_disk.away(), NO_SAVE_FOLDER),
    "state_full": lambda storm: storm.fault_of_state(storm.daemon.state_disk.filled()),
    "state_read_only": lambda storm: storm.fault_of_state(storm.daemon.state_disk.read_only()),
    "state_forbidden": lambda storm: storm.fault_of_state(storm.daemon.state_disk.forbidden()),
    "state_away": lambda storm: storm.fault_of_state(storm.daemon.state_disk.away()),
    **{name: lambda storm, name=name: storm.jump(name) for name in JUMPS_S},  # type: ignore[misc]
}
# Where nothing can be mounted, no disk can be filled.
NEED_DISKS = ("kill_in_full", "save_low", "save_full", "save_unmounted", "state_full")


def possible(names: Sequence[str] = ()) -> list[str]:
    """Those of the phases, or of all, that this machine lets us play."""
    return [name for name in names or PHASES if namespace() or name not in NEED_DISKS]


def launched(folder: Path, seconds: float, seed: int, phases: Sequence[str] = ()) -> dict[str, Any]:
    """Play a soak in a process of its own, with disks of its own where those can be had; returns its report."""
    report = folder / "report.json"
    command = [*namespace(), sys.executable, "-m", "tests.soak", "--folder", str(folder), "--seconds", str(seconds)]
    command += ["--seed", str(seed), "--phases", ",".join(possible(phases)), "--tied"]
    command += ["--disks"] if namespace() else []
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as run:
        run.wait()
    assert report.exists(), f"the soak ended with exit code {run.returncode} and no report"
    told: dict[str, Any] = json.loads(report.read_text())
    return told


def play(folder: Path, seconds: float, seed: int, phases: Sequence[str], *, mounted: bool) -> dict[str, Any]:
    """Play a soak in this process; returns a report, also if it could not be played to its end."""
    obey_permissions()
    daemon = SoakDaemon(folder / "own", mounted=mounted)
    threading.Thread(target=end_with_starter, args=(daemon,), daemon=True).start()
    storm = Soak(daemon, seed)
    crashed = ""
    try:
        storm.soak(seconds, phases)
    except BaseException:
        crashed = f"{storm.moment()}: {traceback.format_exc()}\n{daemon.log.read_text()[-5000:]}"
    finally:
        for disk in (daemon.save_disk, daemon.state_disk):
            disk.unmount()
    ends = Counter(task["status"] for task in storm.known.ended.values())
    faults = {
        promise: found[:MOST_TOLD] + [f"{len(found)} in all"] * (len(found) > MOST_TOLD)
        for promise, found in storm.faults.items()
    }
    storm.faults = faults
    return {
        "faults": storm.faults,
        "crashed": crashed,
        "phases": storm.phases,
        "raids": storm.raiders.raids,
        "ready": storm.sentry.samples,
        "ends": ends,
        "story": storm.story(),
        "diary": storm.diary,
    }


def end_with_starter(daemon: Daemon) -> None:
    """End at once, with all that was started, when whoever holds the other end of the standard input is gone."""
    sys.stdin.read()
    with contextlib.suppress(AssertionError, OSError):  # there may be no daemon now
        for pid in (*workers(daemon), daemon.process.pid):
            send(pid, signal.SIGKILL)
    os._exit(1)


def main() -> int:
    """Play a soak and tell its story; returns 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="a folder to keep; else one that is removed in the end")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--phases", type=lambda text: [name for name in text.split(",") if name], default=[])
    parser.add_argument("--disks", action="store_true", help="mount disks")
    parser.add_argument(
        "--tied", action="store_true", help="in a namespace already; write a report, and end with stdin"
    )
    options = parser.parse_args()
    if options.tied:
        report = play(options.folder, options.seconds, options.seed, options.phases, mounted=options.disks)
        (options.folder / "report.json").write_text(json.dumps(report))
        return 0
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = launched(options.folder or Path(folder), options.seconds, options.seed, options.phases)
    print(*report["diary"], report["story"], report["crashed"], sep="\n")
    return 1 if report["crashed"] or any(report["faults"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
