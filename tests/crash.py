"""A storm: clients that submit, cancel, move, pause and retry, and SIGKILLs for the daemon at random moments.

After each restart, what the daemon says is compared with what it had promised.

`python -m tests.crash --kills 120 --seed 7` shows what became of it; the seed makes the same choices again, though the
machine's own timing does not repeat.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import requests

from tests.daemon import ENDED, Daemon
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon

PROMISES = (
    "an accepted task is there",
    "no task is there twice",
    "an id is used once, and ids grow",
    "waiting tasks keep their order",
    "an end is an end",
    "what was cancelled stays cancelled",
    "a task is in one state",
    "every visible file is whole",
    "a completed task has its files",
    "a broken attempt leaves no file",
    "a pause is remembered",
    "a key makes a retry safe",
    "no answer is a 5xx",
)
CROWD = 12  # waiting tasks from which on nobody submits
LONGEST_LIFE_S = 2.0
PAGE = 200
TASK_OF = re.compile(r"\.?\d{8}-\d{6}_t(\d+)(?:-[0-9a-z]+)?_")


@dataclass
class Known:
    """What the clients know: they have been told so, or may have to find out."""

    accepted: dict[int, str] = field(default_factory=dict)  # id → prompt, which is another for each submission
    bodies: dict[str, dict[str, Any]] = field(default_factory=dict)  # prompt → the request
    unanswered: dict[str, str] = field(default_factory=dict)  # prompt → idempotency key or ""
    refused: set[str] = field(default_factory=set)  # prompts
    keyed: dict[str, str] = field(default_factory=dict)  # the last that was answered of those with a key
    copies: Counter[str] = field(default_factory=Counter)  # prompt → retries that there may be
    ended: dict[int, dict[str, Any]] = field(default_factory=dict)  # id → its last status
    cancelled: set[int] = field(default_factory=set)  # the answer was "cancelled" or "cancelling"
    order: list[int] = field(default_factory=list)  # the queue, as it was last listed
    moved: tuple[int, str] | None = None  # a task that was moved since, and to where: first, last or any
    paused: bool | None = False  # None: an answer was lost


class Storm:
    """One daemon, its clients, and the faults that were seen, by the promise that each breaks."""

    promises = PROMISES

    def __init__(self, daemon: Daemon, seed: int) -> None:
        self.random = random.Random(seed)
        self.daemon = daemon
        self.known = Known()
        self.faults: dict[str, list[str]] = {promise: [] for promise in self.promises}
        self.kills: Counter[str] = Counter()
        self.requests = 0
        self._number = 0
        self._whole: set[str] = set()
        self._parts: set[tuple[str, int]] = set()
        self._started_ns = 0  # when the daemon was last started, or left alone
        self._session = requests.Session()
        self._dead = threading.Event()

    def rage(self, kills: int) -> "Storm":
        """Kill it so many times, then let it finish what waits; returns this storm."""
        self.daemon.start()
        try:
            while self.kills.total() < kills:
                self.live()
                self.bury()
                if self.random.random() < 0.2:
                    self.kill_while_starting()
                self._started_ns = time.time_ns()
                self.daemon.start()
                self.check()
            self.drain()
        finally:
            self.daemon.stop(signal.SIGKILL)
        return self

    def blame(self, promise: str, fault: str) -> None:
        """Note that the daemon has broken a promise."""
        self.faults[promise].append(f"{self.moment()}: {fault}")

    def moment(self) -> str:
        """When it is, for a story."""
        return f"after kill {self.kills.total()}"

    # -- a life and its end

    def live(self) -> None:
        """Clients at work until the daemon is dead."""
        self._dead.clear()
        other = threading.Thread(target=self.submit_on_and_on, args=(self.random.random(),))
        other.start()
        end = self.random.choice([self.die_at_any_moment, self.die_after_an_answer, self.die_within_a_submission])
        self.kills[end.__name__] += 1
        with contextlib.suppress(requests.RequestException):
            end()
        self.kill()
        self._dead.set()
        other.join()

    def die_at_any_moment(self) -> None:
        timer = threading.Timer(self.random.uniform(0, LONGEST_LIFE_S), self.kill)
        timer.start()
        try:
            while timer.is_alive():
                self.act()
        finally:
            timer.join()

    def die_after_an_answer(self) -> None:
        for _ in range(self.random.randint(1, 60)):
            self.act()
        self.submit()

    def die_within_a_submission(self) -> None:
        for _ in range(self.random.randint(0, 50)):
            self.act()
        prompt, body = self.request_body()
        self.known.bodies[prompt] = body
        prepared = requests.Request("POST", f"{self.daemon.url}/api/v1/generate", json=body).prepare()
        host, port = self.daemon.url.removeprefix("http://").split(":")
        head = "".join(f"{name}: {value}\r\n" for name, value in {**prepared.headers, "Host": host}.items())
        self.known.unanswered[prompt] = ""
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(
                f"POST {prepared.path_url} HTTP/1.1\r\n{head}\r\n".encode() + bytes(prepared.body or b"")
            )
            time.sleep(self.random.uniform(0, 0.02))
            self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.daemon.process.pid, signal.SIGKILL)

    def bury(self) -> None:
        """Wait until it is gone; remember the unfinished files that it leaves."""
        self.daemon.process.wait()
        self.daemon.stop()
        self._session.close()
        self._parts = {(path.name, path.stat().st_ino) for path in self.parts()}

    def parts(self) -> Iterator[Path]:
        return self.daemon.outputs.glob(".*.part")

    def kill_while_starting(self) -> None:
        self.kills["die_while_starting"] += 1
        self.daemon.launch()
        time.sleep(self.random.uniform(0, 1.2))
        self.daemon.stop(signal.SIGKILL)

    # -- what clients do

    def call(self, method: str, path: str, session: requests.Session | None = None, **options: Any) -> Any:
        """The data of an answer; None if it is a refusal. Raises requests.RequestException once the daemon is dead."""
        self.requests += 1
        answer = (session or self._session).request(method, f"{self.daemon.url}/api/v1{path}", timeout=30, **options)
        self.judge(f"{method} {path}", answer)
        return answer.json()["data"] if answer.status_code == 200 else None

    def judge(self, request: str, answer: requests.Response) -> None:
        """Look at an answer as such."""
        if answer.status_code >= 500:
            self.blame("no answer is a 5xx", f"{request}: {answer.status_code} {answer.text}")

    def act(self) -> None:
        """One request of a client, whichever."""
        acts = self.acts()
        self.random.choices(list(acts), list(acts.values()))[0]()
        self.look()

    def acts(self) -> dict[Callable[[], None], int]:
        """What clients do, and how often."""
        return {
            self.submit: 12,
            self.move: 6,
            self.cancel: 2,
            self.retry: 2,
            self.pause: 12 if self.known.paused else 2,
            self.clear: len(self.known.order) > CROWD,
        }

    def look(self) -> None:
        """List the queue: from now on its order is known, and that it is paused or not."""
        data = self.call("GET", "/queue")
        if data is None:
            return
        self.known.order, self.known.moved = [task["id"] for task in data["tasks"]], None
        if len(set(self.known.order)) < len(self.known.order):
            self.blame("a task is in one state", f"listed twice: {self.known.order}")

    def request_body(self) -> tuple[str, dict[str, Any]]:
        self._number += 1
        prompt = f"number {self._number} of {threading.current_thread().name}"
        steps, runs = self.random.randint(1, 8), self.random.choice([1, 1, 2])
        return prompt, {"prompt": prompt, "num_inference_steps": steps, "repeat_generation": runs, "seed": 1}

    def submit(self) -> None:
        if len(self.known.order) < CROWD:
            key = f"key {self._number}" if self.random.random() < 0.5 else ""
            self.post(*self.request_body(), key)

    def post(self, prompt: str, body: dict[str, Any], key: str, session: requests.Session | None = None) -> None:
        self.known.unanswered[prompt], self.known.bodies[prompt] = key, body
        highest = max(self.known.accepted, default=0)
        headers = {"Idempotency-Key": key} if key else {}
        data = self.call("POST", "/generate", session, json=body, headers=headers)
        del self.known.unanswered[prompt]
        if data:
            self.known.keyed = {prompt: key} if key else self.known.keyed
            self.accept(data["task_id"], prompt, highest)
        else:
            self.known.refused.add(prompt)

    def accept(self, task_id: int, prompt: str, highest: int) -> None:
        if task_id <= highest or task_id in self.known.accepted:
            self.blame("an id is used once, and ids grow", f"{task_id} was given after {highest}")
        self.known.accepted[task_id] = prompt

    def submit_on_and_on(self, pause: float) -> None:
        """What a second client does."""
        with requests.Session() as session, contextlib.suppress(requests.RequestException):
            while not self._dead.wait(pause * 0.1):
                if len(self.known.order) < CROWD:
                    prompt = f"other {len(self.known.accepted)} {time.monotonic_ns()}"
                    self.post(prompt, {"prompt": prompt, "num_inference_steps": 2}, "", session)

    def move(self) -> None:
        if not self.known.order:
            return
        task_id, where = self.random.choice(self.known.order), self.random.choice(["first", "last", "any"])
        position = {"first": 1, "last": 1000, "any": self.random.randint(1, 10)}[where]
        self.known.moved = task_id, "any"
        if self.call("PATCH", f"/queue/{task_id}", json={"position": position}):
            self.known.moved = task_id, where

    def cancel(self) -> None:
        if self.known.order:
            task_id = self.random.choice([self.known.order[0], *self.known.order])
            if self.call("DELETE", f"/queue/{task_id}"):
                self.known.cancelled.add(task_id)

    def clear(self) -> None:
        self.call("DELETE", "/queue")

    def pause(self) -> None:
        before, self.known.paused = self.known.paused, None
        paused = self.call("POST", f"/queue/{'resume' if before else 'pause'}")
        self.known.paused = paused["paused"] if paused else before

    def retry(self) -> None:
        if self.known.ended:
            task_id = self.random.choice(list(self.known.ended))
            prompt, highest = self.known.ended[task_id]["prompt"], max(self.known.accepted)
            self.known.copies[prompt] += 1
            if data := self.call("POST", f"/queue/{task_id}/retry"):
                self.accept(data["task_id"], prompt, highest)

    # -- what must be true after a restart

    def check(self) -> None:
        """Compare everything that the daemon says now with what is known, and learn what is new."""
        visible = self.visible()
        queue = self.call("GET", "/queue")
        tasks = self.history()
        self.check_presence(tasks)
        self.check_order([task["id"] for task in queue["tasks"]])
        self.check_states(tasks, {task["id"] for task in queue["tasks"]})
        self.check_files(tasks, visible)
        if self.known.paused not in (None, queue["paused"]):
            self.blame("a pause is remembered", f"{self.known.paused} became {queue['paused']}")
        self.learn(tasks, queue["paused"])
        self.ask_again(tasks)
        self.look()

    def visible(self) -> set[str]:
        """The names of what the daemon has published."""
        return {path.name for path in self.daemon.outputs.iterdir() if not path.name.startswith(".")}

    def history(self) -> list[dict[str, Any]]:
        """All tasks, newest first, page by page."""
        tasks: list[dict[str, Any]] = []
        while True:
            page = self.call("GET", f"/tasks?limit={PAGE}&offset={len(tasks)}")
            tasks += page["tasks"]
            if len(tasks) >= page["total"]:
                return tasks

    def check_presence(self, tasks: list[dict[str, Any]]) -> None:
        there = {task["task_id"]: task["prompt"] for task in tasks}
        for task_id, prompt in self.known.accepted.items():
            if there.get(task_id) is None:
                self.blame("an accepted task is there", f"{task_id} ({prompt}) is lost")
            elif there[task_id] != prompt:
                self.blame("an id is used once, and ids grow", f"{task_id}: {prompt} became {there[task_id]}")
            if prompt in self.known.refused:
                self.blame("no task is there twice", f"{task_id} ({prompt}) was refused, and is there")
        if len(there) < len(tasks):
            self.blame("no task is there twice", f"{len(tasks)} rows of {len(there)} tasks")
        for prompt, count in Counter(there.values()).items():
            if count > 1 + self.known.copies[prompt]:
                self.blame("no task is there twice", f"{prompt} is there {count} times")

    def check_order(self, listed: list[int]) -> None:
        moved, where = self.known.moved or (0, "any")
        old = [task_id for task_id in self.known.order if task_id in listed and task_id != moved]
        new = sorted(task_id for task_id in listed if task_id not in self.known.order)
        if [task_id for task_id in listed if task_id != moved] != old + new:
            story = f"{self.known.order}, {moved} moved to {where}, became {listed}"
            self.blame("waiting tasks keep their order", story)
        elif moved in listed and self.known.order[:1] != [moved]:
            place = listed.index(moved)
            # The one that was running when the other was moved comes back before it.
            if (where == "first" and place > 1) or (where == "last" and set(listed[place:]) & set(old)):
                self.blame("waiting tasks keep their order", f"{moved} was moved to {where} and is in {listed}")

    def check_states(self, tasks: list[dict[str, Any]], listed: set[int]) -> None:
        for task in tasks:
            task_id, status = task["task_id"], task["status"]
            if status not in ENDED and task_id not in listed:
                self.blame("a task is in one state", f"{task_id} is {status}, and not in the queue")
            if (before := self.known.ended.get(task_id)) and before != task:
                self.blame("an end is an end", f"{before} became {task}")
            if task_id in self.known.cancelled and status != "cancelled":
                self.blame("what was cancelled stays cancelled", f"{task_id} is {status}")
            if status == "failed":
                self.check_failure(task)

    def check_failure(self, task: dict[str, Any]) -> None:
        if task["error"]["code"] != "too_many_attempts":
            self.blame("an end is an end", f"{task['task_id']} failed: {task['error']}")

    def check_files(self, tasks: list[dict[str, Any]], visible: set[str]) -> None:
        """`visible` was seen before the states were asked for: what waits now had not begun then."""
        made = {file["filename"] for task in tasks for file in task["files"]}
        for task in tasks:
            names = [file["filename"] for file in task["files"]]
            if task["status"] == "completed" and (
                not names or not all((self.daemon.outputs / n).is_file() for n in names)
            ):
                self.blame("a completed task has its files", f"{task['task_id']}: {names}")
        bare = {task["task_id"] for task in tasks if task["status"] in ("queued", "failed")}
        for name in visible - made:
            if (match := TASK_OF.match(name)) and int(match[1]) in bare:
                self.blame("a broken attempt leaves no file", name)
        for name in visible - self._whole:
            self.check_whole(self.daemon.outputs / name)
        for path in self.parts():
            with contextlib.suppress(FileNotFoundError):
                # The next attempt may have the same name, within a second, and be given the same inode.
                found = path.stat()
                if (path.name, found.st_ino) in self._parts and found.st_mtime_ns < self._started_ns:
                    self.blame("a broken attempt leaves no file", path.name)

    def check_whole(self, path: Path) -> None:
        try:
            with av.open(str(path)) as container:
                frames = sum(1 for _ in container.decode(video=0))
            assert frames == 5
            self._whole.add(path.name)
        except FileNotFoundError:
            pass  # a broken attempt's, removed meanwhile
        except (av.FFmpegError, AssertionError) as error:
            self.blame("every visible file is whole", f"{path.name}: {error!r}")

    def learn(self, tasks: list[dict[str, Any]], paused: bool) -> None:
        self.known.paused = paused
        for task in tasks:
            self.known.accepted.setdefault(task["task_id"], task["prompt"])  # also what nobody was told of
            if task["status"] in ENDED:
                self.known.ended[task["task_id"]] = task

    def ask_again(self, tasks: list[dict[str, Any]]) -> None:
        """Do what a client does whose answer was lost: with a key it sends the same once more."""
        there = {task["prompt"]: task["task_id"] for task in tasks}
        lost, self.known.unanswered = self.known.unanswered | self.known.keyed, {}
        for prompt in [prompt for prompt, key in lost.items() if key]:
            task_id = there.get(prompt)
            if task_id is not None and (again := self.replayed(prompt, lost[prompt])) != task_id:
                self.blame("a key makes a retry safe", f"{prompt} was {task_id} and became {again}")

    def replayed(self, prompt: str, key: str) -> int | None:
        """The id that the same request gets once more."""
        headers = {"Idempotency-Key": key}
        data = self.call("POST", "/generate", json=self.known.bodies[prompt], headers=headers)
        return data and data["task_id"]

    def drain(self) -> None:
        """Let it finish: in the end nothing waits, nothing is left, and all of the above holds once more."""
        self.call("POST", "/queue/resume")
        self.known.paused, deadline = False, time.monotonic() + 120
        while self.call("GET", "/queue")["total_tasks"]:
            assert time.monotonic() < deadline, "the queue does not come to its end"
            time.sleep(0.1)
        self.known.order = []
        self._parts, self._started_ns = {(path.name, path.stat().st_ino) for path in self.parts()}, time.time_ns()
        self.check()

    def story(self) -> str:
        """What happened, in a few lines."""
        ends = Counter(task["status"] for task in self.known.ended.values())
        lines = [
            f"{self.kills.total()} kills: {dict(self.kills)}",
            f"{self.requests} requests, {len(self.known.accepted)} tasks: {dict(ends)}, {len(self._whole)} whole files",
        ]
        return "\n".join(
            [*lines, *(f"BROKEN {promise}: {fault}" for promise in self.promises for fault in self.faults[promise])]
        )


def main() -> int:
    """Run a storm and tell its story; returns 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        storm = Storm(StubDaemon(Path(folder), make_clips), options.seed).rage(options.kills)
    print(storm.story())
    return 1 if any(storm.faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
