"""What systemd does for a socket unit: `activated.py wangpd.py …` listens on the places of LISTEN_PLACES, then runs it.

A place is "ADDRESS:PORT", "unix:PATH", "udp" or "file"; the last two are what no unit should pass.
"""

import json
import os
import socket
import sys


def listening(place: str) -> int:
    """The descriptor of a socket at `place`."""
    if place == "file":
        return os.open(os.devnull, os.O_RDONLY)
    if place == "udp":
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()
    if place.startswith("unix:"):
        channel = socket.socket(socket.AF_UNIX)
        channel.bind(place.removeprefix("unix:"))
        channel.listen()
        return channel.detach()
    host, _, port = place.rpartition(":")
    return socket.create_server((host, int(port))).detach()


if __name__ == "__main__":
    held = [listening(place) for place in json.loads(os.environ.pop("LISTEN_PLACES"))]
    for place, number in enumerate(held):
        held[place] = os.dup2(number, 100 + place, inheritable=False)  # out of the way of 3, 4, …
    for place, number in enumerate(held):
        os.dup2(number, 3 + place, inheritable=True)
    os.environ |= {"LISTEN_FDS": str(len(held)), "LISTEN_FDNAMES": ":".join("a" for _ in held)}
    os.environ.setdefault("LISTEN_PID", str(os.getpid()))
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
