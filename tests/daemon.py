"""A real wangpd in a process of its own, and the few words that tests say to it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).parent.parent
START_S = 30  # far above any start, so that it only ends a hang
ENDED = {"completed", "failed", "cancelled"}


class Daemon:
    """`wangpd.py` on a free port with a folder of its own: `outputs/`, `state/`, `models/`, `wangpd.toml`, `log`.

    `config` are keys of wangpd.toml. A context manager; `start` and `stop` may be called again and again.
    """

    def __init__(self, folder: Path, **config: Any) -> None:
        self.folder = folder
        self.outputs, self.state, self.models = (folder / name for name in ("outputs", "state", "models"))
        self.log = folder / "log"
        self.url = ""
        self.program = [str(ROOT / "wangpd.py")]
        self.launcher: list[str] = []  # a command that runs the one after it
        # One thread: the models are tiny, and threads that spin for each other on a busy machine cost more.
        # Offline: a request that starts a download must not fill the disk of who runs the tests.
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{key} = {json.dumps(value)}" for key, value in {"port": 0, **config}.items()]
        (folder / "wangpd.toml").write_text("\n".join(lines) + "\n")

    def __enter__(self) -> "Daemon":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The daemon's process."""
        assert self._process is not None
        return self._process

    def start(self) -> None:
        """Start it and wait until it listens."""
        offset = self.launch()
        deadline = time.monotonic() + START_S
        while not (found := re.search(rb"listens on (http://[^/]+)/", self.log.read_bytes()[offset:])):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        self.url = found[1].decode()

    def launch(self) -> int:
        """Start it and wait for nothing; returns where its part of the log begins."""
        with self.log.open("ab") as log:
            offset = log.tell()
            self._process = subprocess.Popen(
                [*self.launcher, sys.executable, *self.program, "--config", str(self.folder / "wangpd.toml")],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        return offset

    def stop(self, signal_number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """End it by a signal and return its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.poll() is None:
            process.send_signal(signal_number)
        try:
            return process.wait(timeout)
        finally:
            if process.poll() is None:
                process.kill()

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        """One request; `path` is relative to /api/v1."""
        options.setdefault("timeout", 60)
        return requests.request(method, f"{self.url}/api/v1{path}", **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        """GET."""
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        """POST of a JSON body."""
        return self.request("POST", path, json=body, **options)

    def delete(self, path: str, **options: Any) -> requests.Response:
        """DELETE."""
        return self.request("DELETE", path, **options)

    def submit(self, **fields: Any) -> dict[str, Any]:
        """Queue a task; returns the answer's data."""
        answer = self.post("/generate", {"prompt": "a red circle moving right", **fields})
        assert answer.status_code == 200, answer.text
        data: dict[str, Any] = answer.json()["data"]
        return data

    def status(self, task_id: int) -> dict[str, Any]:
        """The data of the task's status."""
        data: dict[str, Any] = self.get(f"/status/{task_id}").json()["data"]
        return data

    def until(self, task_id: int, test: Any, timeout: float = 120) -> dict[str, Any]:
        """The status as soon as `test(status)` is true."""
        deadline = time.monotonic() + timeout
        while not test(state := self.status(task_id)):
            assert time.monotonic() < deadline, (state, self.log.read_text()[-3000:])
            time.sleep(0.02)
        return state

    def finish(self, task_id: int, timeout: float = 120) -> dict[str, Any]:
        """The status once the task has ended."""
        return self.until(task_id, lambda state: state["status"] in ENDED, timeout)

    def run(self, **fields: Any) -> dict[str, Any]:
        """Queue a task and wait for its end."""
        return self.finish(self.submit(**fields)["task_id"])

    def made(self, state: dict[str, Any], number: int = 0) -> Path:
        """The path of a file that a completed task made."""
        assert state["status"] == "completed", state
        return self.outputs / state["files"][number]["filename"]
