"""Watches a daemon from outside: what it says of its readiness all the time, and what it holds of the machine."""

import re
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import requests

from tests.daemon import Daemon
from tests.processes import maps

EVERY_S = 0.05
PATIENCE_S = 20  # for one answer; far above any, so that it only ends a hang
SEMAPHORE = re.compile(r"/dev/shm/sem\.\S+")


@dataclass(frozen=True)
class Readiness:
    """What is to be said: that the daemon is ready, or is not, with a reason in which `reason` is found."""

    label: str
    reason: str = ""

    def fits(self, answer: requests.Response | None) -> bool:
        """True for an answer that says so."""
        if answer is None:
            return False
        if not self.reason:
            return answer.status_code == 200
        return answer.status_code == 503 and bool(re.search(self.reason, answer.json()["detail"], re.IGNORECASE))


READY = Readiness("all is well")


class Sentry:
    """Asks for /health/ready all the time; `blame` is called for each answer that is not `expected` all the while."""

    def __init__(self, daemon: Daemon, blame: Callable[[str], None]) -> None:
        self._daemon, self._blame = daemon, blame
        self._expected: Readiness | None = None  # None: any answer is right, or none
        self._lock, self._over = threading.Lock(), threading.Event()
        self._session = requests.Session()
        self._thread = threading.Thread(target=self._watch, name="sentry")
        self.samples: Counter[str] = Counter()  # that were judged

    def __enter__(self) -> "Sentry":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def expect(self, readiness: Readiness | None) -> None:
        """Judge by this from now on."""
        with self._lock:
            self._expected = readiness

    def ask(self, session: requests.Session | None = None) -> requests.Response | None:
        """One answer; None if there is none."""
        with suppress(requests.RequestException):
            return (session or requests).get(f"{self._daemon.url}/api/v1/health/ready", timeout=PATIENCE_S)
        return None

    def _watch(self) -> None:
        while not self._over.wait(EVERY_S):
            expected, answer = self._expected, self.ask(self._session)
            with self._lock:
                if expected is None or expected is not self._expected:
                    continue
            if answer is not None and "max_connections" in answer.text:
                continue  # it was connected anew during a flood
            self.samples[expected.label] += 1
            if not expected.fits(answer):
                said = "nothing" if answer is None else f"{answer.status_code} {answer.text}"
                self._blame(f"while {expected.label}: {said}")


@dataclass(frozen=True)
class Footprint:
    """What a process holds of the machine."""

    resident_bytes: int
    descriptors: int
    semaphores: int
    children: int
    zombies: int

    @classmethod
    def of(cls, pid: int) -> "Footprint":
        """As it is now."""
        about = Path(f"/proc/{pid}/status").read_text()
        resident_kb = int(re.findall(r"^VmRSS:\s+(\d+) kB$", about, re.MULTILINE)[0])
        tasks = Path(f"/proc/{pid}/task").iterdir()
        born = {child for task in tasks for child in (task / "children").read_text().split()}
        dead = [child for child in born if "\nState:\tZ" in Path(f"/proc/{child}/status").read_text()]
        return cls(
            resident_bytes=resident_kb * 1024,
            descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
            semaphores=len(set(SEMAPHORE.findall(maps(pid)))),
            children=len(born),
            zombies=len(dead),
        )

    def grown(self, later: "Footprint") -> list[str]:
        """What `later` holds too much, a sentence each."""
        most_bytes = 1.15 * self.resident_bytes + 8 * 2**20
        faults = {
            f"memory: {self.resident_bytes >> 20} MiB became {later.resident_bytes >> 20}": (
                later.resident_bytes > most_bytes
            ),
            f"descriptors: {self.descriptors} became {later.descriptors}": later.descriptors > self.descriptors + 2,
            f"semaphores: {self.semaphores} became {later.semaphores}": later.semaphores > self.semaphores,
            f"children: {self.children} became {later.children}": later.children > self.children,
            f"zombies: {later.zombies}": later.zombies > 0,
        }
        return [sentence for sentence, fault in faults.items() if fault]
