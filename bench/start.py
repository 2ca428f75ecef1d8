"""How long wangpd takes from its start to its first answer, and how much memory it then holds.

Side by side, in turns, with an aiohttp application that does nothing but answer: what is above that is wangpd's own.
Usage: python bench/start.py [RUNS]
"""

import contextlib
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEALTH = "/api/v1/health"
POLL_S = 0.002
TIMEOUT_S = 60
BARE = f"""
import sys
from aiohttp import web

async def health(request):
    return web.json_response({{"status": "healthy"}})

app = web.Application()
app.router.add_get("{HEALTH}", health)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
"""


@dataclass(frozen=True)
class Start:
    """One start: seconds to the first answer, those of them on a CPU, and MiB resident after it."""

    first_answer_s: float
    cpu_s: float
    resident_mib: float


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], folder: str) -> Iterator[int]:
    """The process of `command`, which ends with the block; gives its pid."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def wait_for_answer(port: int) -> None:
    """Return when the server has answered with 200. Raises TimeoutError."""
    deadline = time.perf_counter() + TIMEOUT_S
    while time.perf_counter() < deadline:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(f"GET {HEALTH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            if client.recv(64).startswith(b"HTTP/1.1 200"):
                return
        time.sleep(POLL_S)
    raise TimeoutError(f"no answer within {TIMEOUT_S} s")


def cpu_s(pid: int) -> float:
    """Seconds that the process has computed: unlike the wall's, they hardly depend on what else the machine does."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def measure(command: list[str], port: int) -> Start:
    """Start `command`, which listens on `port`, in an empty folder; and end it."""
    with tempfile.TemporaryDirectory(prefix="wangpd-bench-") as folder:
        began = time.perf_counter()
        with running([sys.executable, *command, str(port)], folder) as pid:
            wait_for_answer(port)
            return Start(time.perf_counter() - began, cpu_s(pid), resident_mib(pid))


def row(name: str, starts: list[Start]) -> str:
    """A line of the table: medians, and in brackets from least to most."""
    columns = zip(*map(astuple, starts), strict=True)
    cells = [f"{statistics.median(column):.2f} ({min(column):.2f} to {max(column):.2f})" for column in columns]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    commands = {"bare aiohttp": ["-c", BARE], "wangpd": [str(ROOT / "wangpd.py"), "--port"]}
    starts: dict[str, list[Start]] = {name: [] for name in commands}
    for command in commands.values():  # once for nothing: the first start compiles and fills the page cache
        measure(command, free_port())
    for _ in range(runs):
        for name, command in commands.items():
            starts[name].append(measure(command, free_port()))
    print(f"Median of {runs} starts (least to most), Python {sys.version.split()[0]}\n")
    print("| server | s to the first answer | s of them on a CPU | MiB resident, idle |\n|---|---|---|---|")
    for name, found in starts.items():
        print(row(name, found))


if __name__ == "__main__":
    main()
