"""`make fuzz`: mutate the inputs of each target by atheris, guided by coverage, for FUZZ_S seconds in all.

`python -m tests.fuzz.run [TARGET SECONDS]`. Each target runs in a process of its own, from its seeds and its corpus.
An input that breaks a promise, takes more than a second of its process or crashes it is left in tests/fuzz/corpus/NAME,
from where `make test` replays it. Ends with 1 if there was one.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import atheris

MOST_S = 1.0  # of a process's own time, for one input
MOST_MIB = 2048
SLOWER = 10  # instrumented code takes longer by up to this

with atheris.instrument_imports(include=["wangpd", "engine", "aiohttp.multipart", "aiohttp.web_request", "json"]):
    from tests.fuzz.targets import CORPUS, SEEDS, TARGETS


def fuzz(name: str, seconds: int) -> None:
    """Run one target for so long, in this process, which ends with it."""
    target, found = TARGETS[name], CORPUS / name
    found.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    for number, data in enumerate([*SEEDS[name](), *(path.read_bytes() for path in found.glob("*"))]):
        (folder / f"seed-{number}").write_bytes(data)

    def one(data: bytes) -> None:
        began = time.process_time()
        target(data)
        if (spent := time.process_time() - began) > MOST_S:
            raise TimeoutError(f"{spent:.1f} s for one input")

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    options = [f"-max_total_time={seconds}", f"-timeout={SLOWER}", f"-rss_limit_mb={MOST_MIB}", "-max_len=20000"]
    options += [f"-artifact_prefix={found}/", "-print_final_stats=1", "-verbosity=1", "-close_fd_mask=0"]
    atheris.Setup([sys.argv[0], *options, str(folder)], one)
    atheris.Fuzz()


def main() -> int:
    """Run all targets, or those in FUZZ_ONLY, one after the other."""
    names = [name for name in os.environ.get("FUZZ_ONLY", "").split(",") if name] or list(TARGETS)
    seconds = max(1, int(os.environ.get("FUZZ_S", "3600")) // len(names))
    broken = []
    for name in names:
        command = [sys.executable, "-m", "tests.fuzz.run", name, str(seconds)]
        ran = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        lines = ran.stdout.decode(errors="replace").splitlines()
        inputs = next((line.split()[-1] for line in lines if "number_of_executed_units" in line), "?")
        print(f"{name}: {inputs} inputs in {seconds} s, exit code {ran.returncode}", flush=True)
        if ran.returncode:
            broken.append(name)
            print("\n".join(lines[-40:]), flush=True)
    print(f"broken: {', '.join(broken) or 'none'}; what was found is in {CORPUS}")
    return 1 if broken else 0


if __name__ == "__main__":
    if len(sys.argv) > 2:
        fuzz(sys.argv[1], int(sys.argv[2]))
    else:
        sys.exit(main())
