"""`make demo`: start wangpd, send it a prompt over HTTP, show the progress, leave a playable file in outputs/.

A client like any other: standard library only, and nothing of the daemon is imported.
"""

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ROOT / "outputs"
START_TIMEOUT_S = 60
TASK_TIMEOUT_S = 900
STOP_TIMEOUT_S = 30
POLL_S = 0.1
LOG_LINES = 25
BAR_WIDTH = 24
ENDED = ("completed", "failed", "cancelled")

# The daemon is on this machine: a proxy named by the environment must not be asked for it.
HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class DemoError(Exception):
    """Why the demo can't go on: one sentence for the person who watches."""


class Progress:
    """One live line on a terminal; elsewhere (a log, a pipe) a line for each phase and each tenth of the way."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._shown: tuple[str, int] | None = None

    def show(self, status: dict[str, Any]) -> None:
        phase = status.get("phase") or status["status"]
        percent = status["progress"] or 0
        line = f"{phase:<10} step {status['current_step'] or 0}/{status['total_steps']}  {percent:5.1f} %"
        if self._live:
            bar = ("#" * round(percent / 100 * BAR_WIDTH)).ljust(BAR_WIDTH, ".")
            print(f"\r\x1b[K  working   [{bar}] {line}", end="", flush=True)
        elif self._shown != (phase, int(percent // 10)):
            say("working", line)
        self._shown = (phase, int(percent // 10))

    def close(self) -> None:
        """Leave the live line where it is; what is printed next starts on its own line."""
        if self._live and self._shown:
            print()


def say(what: str, text: str) -> None:
    print(f"  {what:<9} {text}", flush=True)


def call(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET, or POST where there is a body; the decoded answer. Raises DemoError with the daemon's own sentence."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with HTTP.open(request, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise DemoError(f"{url} answered {error.code}: {error.read().decode(errors='replace')}") from None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def daemon(folder: Path) -> Iterator[str]:
    """A wangpd of its own on a free port, with its state in `folder`; gives its base URL, and ends it in any case."""
    port = free_port()
    command = [sys.executable, "-m", "wangpd", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--save-path", str(OUTPUTS), "--state-path", str(folder / "state")]
    with (folder / "wangpd.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_healthy(process, url)
            yield url
        finally:
            stop(process)


def wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    """Return once the daemon answers. Raises DemoError when it has ended or stays silent."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"wangpd ended at the start with exit code {process.returncode}")
        with suppress(OSError):  # nobody listens yet
            call(f"{url}/api/v1/health")
            return
        time.sleep(POLL_S)
    raise DemoError(f"wangpd did not answer within {START_TIMEOUT_S} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the daemon as systemd would: SIGTERM, and SIGKILL when that takes too long."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def follow(url: str, task_id: int) -> dict[str, Any]:
    """Show the task's progress until it has ended; its last status. Raises DemoError unless it completed."""
    progress = Progress()
    deadline = time.monotonic() + TASK_TIMEOUT_S
    try:
        while time.monotonic() < deadline:
            status = call(f"{url}/api/v1/status/{task_id}")["data"]
            progress.show(status)
            if status["status"] in ENDED:
                break
            time.sleep(POLL_S)
        else:
            raise DemoError(f"task {task_id} has not ended within {TASK_TIMEOUT_S} s")
    finally:
        progress.close()
    if status["status"] != "completed":
        raise DemoError(
            f"task {task_id} {status['status']}: {(status['error'] or {}).get('message', 'no reason given')}"
        )
    return status


def download(url: str) -> int:
    """The bytes that came over HTTP. Raises DemoError when there are none."""
    with HTTP.open(url, timeout=30) as answer:
        size_bytes = len(answer.read())
    if not size_bytes:
        raise DemoError(f"{url} is empty")
    return size_bytes


def show_file(url: str, file: dict[str, Any]) -> None:
    """Where the file is, what it is, and that it can be fetched."""
    link = f"{url}/api/v1/download/{file['filename']}"
    pace = f", {file['frames']} frames at {file['fps']} a second" if file["fps"] else ""
    say("file", str(OUTPUTS / file["filename"]))
    say("", f"{file['width']}x{file['height']}{pace}, {file['size_bytes']} bytes, seed {file['seed']}")
    say("fetched", f"{link} ({download(link)} bytes)")


def generate(url: str, prompt: str) -> dict[str, Any]:
    """Send the prompt to the default model and follow it to its end; the last status."""
    say("sending", f'POST /api/v1/generate {{"prompt": "{prompt}"}}')
    task = call(f"{url}/api/v1/generate", {"prompt": prompt})["data"]
    say("accepted", f"as task {task['task_id']}; now asking GET /api/v1/status/{task['task_id']} until it ends")
    return follow(url, task["task_id"])


def demonstrate(folder: Path, prompt: str) -> dict[str, Any]:
    """The whole demo with one daemon; the finished task's status. Raises DemoError."""
    say("starting", "wangpd on a free port")
    began = time.monotonic()
    with daemon(folder) as url:
        say("ready", f"{url} after {time.monotonic() - began:.1f} s")
        began = time.monotonic()
        status = generate(url, prompt)
        say("done", f"by {status['model_type']} in {time.monotonic() - began:.1f} s, loading the model included")
        for file in status["files"]:
            show_file(url, file)
        say("stopping", "wangpd")
    return status


def show_next_steps(filename: str) -> None:
    print(f"""
To go on, start the daemon with `make run`, and in another shell:
  curl http://localhost:7860/api/v1/models
  curl -X POST http://localhost:7860/api/v1/generate -H 'Content-Type: application/json' \\
       -d '{{"prompt": "a blue square moving up"}}'
  curl http://localhost:7860/api/v1/outputs
  curl -O http://localhost:7860/api/v1/download/{filename}
Every call, to be tried in the browser: http://localhost:7860/api/docs""")


def show_failure(reason: Exception, log: Path) -> None:
    """The reason, and the daemon's last words if there are any."""
    print(f"\nThe demo failed: {reason}", file=sys.stderr)
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
    if lines:
        print("The daemon's last log lines:", *lines, sep="\n  | ", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description="Start wangpd, send it a prompt, leave a playable file in outputs/.")
    parser.add_argument("prompt", nargs="?", default="a red circle moving right")
    prompt = parser.parse_args().prompt
    with tempfile.TemporaryDirectory(prefix="wangpd-demo-") as name:
        try:
            status = demonstrate(Path(name), prompt)
        except (DemoError, OSError) as reason:
            show_failure(reason, Path(name) / "wangpd.log")
            return 1
        except KeyboardInterrupt:
            print("\nStopped.", file=sys.stderr)
            return 128 + signal.SIGINT
    show_next_steps(status["files"][0]["filename"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
