"""The process that decodes files from clients, which may be made to take very long or much memory.

Its arguments are the seconds of CPU time after which SIGPROF ends it, the most pixels of a picture or frame, then the
kind and path of each file. For each file it prints a line of JSON: the length in seconds, or, as the last one, a
sentence without its subject that says why the file can't be used.
"""

import json
import os
import resource
import signal
import sys

from engine.files import footage, media

WALL_S = 60  # the daemon's own limit is lower, but the daemon may end
BASE_BYTES = 2**30  # of address space: Python and FFmpeg's libraries take a quarter of it
PIXEL_BYTES = 16  # four copies of four channels
TOO_LARGE = "needs too much memory to decode; send a smaller one"


def main(cpu_s: float, max_pixels: int, *files: str) -> None:
    """Examine the files in turn, up to the first that can't be used."""
    os.nice(10)  # after the daemon, and a task that is generated on this CPU
    signal.alarm(WALL_S)
    memory_bytes = BASE_BYTES + PIXEL_BYTES * max_pixels
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for kind, path in zip(files[::2], files[1::2], strict=True):
        found: float | str = 0.0
        try:
            with open(path, "rb") as file:  # noqa: PTH123 - pathlib would be imported for nothing else
                if kind == "image":
                    media.check_image(file, max_pixels)
                else:
                    found = footage.check(file, kind, max_pixels)
        except MemoryError:
            found = TOO_LARGE
        except (media.BadImage, footage.BadFootage) as error:
            found = str(error)
        print(json.dumps(found), flush=True)
        if isinstance(found, str):
            break


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
