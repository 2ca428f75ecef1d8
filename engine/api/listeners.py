"""The sockets that the daemon listens on: internet addresses, Unix sockets, or those that systemd passes."""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.api.config import UNIX, CantStart

FIRST_PASSED_FD = 3  # by systemd's protocol
UNIX_MODE = 0o660  # the daemon's user and group; the user of a proxy joins the group
BACKLOG = 1024  # connections that wait to be taken; of one too many the client tries again after a second
PORT_TRIES = 20  # a port that is free on one address may be taken on another
WILDCARDS = ("0.0.0.0", "::")
NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
LISTEN_FAULTS: Mapping[int, str] = {
    errno.EADDRINUSE: "port: {port} on {host} is taken; end the program that has it, or choose another with --port",
    errno.EADDRNOTAVAIL: "host: '{host}' is no address of this machine; 127.0.0.1 and 0.0.0.0 always are",
    errno.EAFNOSUPPORT: "host: '{host}' needs IPv6, which is off on this machine; 0.0.0.0 is every IPv4 address",
    errno.EACCES: "port: {port} is for root; choose one above 1023 with --port",
    socket.EAI_NONAME: "host: '{host}' is neither an address nor a known name; 127.0.0.1 and 0.0.0.0 always work",
    socket.EAI_AGAIN: "host: '{host}' can't be looked up now; an address needs no looking up",
}
Address = tuple[int, Any]  # family, and what `bind` takes


class Listeners:
    """Sockets that are taken, and served from `start_serving` on. `close` removes the Unix sockets that were made."""

    def __init__(self, protocol: Callable[[], asyncio.BaseProtocol]) -> None:
        self._protocol = protocol
        self.sockets: list[socket.socket] = []
        self._servers: list[asyncio.Server] = []
        self._made: dict[Path, int] = {}  # Unix socket → its inode

    def take(self, hosts: Sequence[str], port: int) -> None:
        """Take the sockets that systemd passes, else the addresses of `hosts`. Blocks. Raises CantStart.

        With port 0, all have the free port that the first one gets; if another one lacks it, a second is tried.
        """
        self.sockets = passed_sockets()
        for _ in range(0 if port or self.sockets else PORT_TRIES):
            try:
                self._take(hosts, port)
            except CantStart:
                self.close()
            else:
                return
        self._take(() if self.sockets else hosts, port)

    def _take(self, hosts: Sequence[str], port: int) -> None:
        places: dict[Address, str] = {}
        for host in hosts:
            for address in _addresses(host, port):
                places.setdefault(address, host)
        both = all(family != socket.AF_INET for family, _ in places)
        wild = {family for family, address in places if address[0] in WILDCARDS}
        bound, faults = set(), {}
        for (family, address), host in places.items():
            try:
                if address[0] in WILDCARDS or family not in wild:  # else a wildcard has it already
                    port = self._bind(family, address, port, both=both)
                bound.add(host)
            except OSError as error:
                faults[host] = error
                if error.errno not in NOT_HERE:
                    raise _fault(error, host, port) from None
        for host in faults.keys() - bound:  # one address of a name is enough: localhost is ::1 too where IPv6 is off
            raise _fault(faults[host], host, port)

    async def start_serving(self) -> None:
        """Give each connection a protocol."""
        loop = asyncio.get_running_loop()
        self._servers = [
            await loop.create_server(self._protocol, sock=channel, backlog=BACKLOG) for channel in self.sockets
        ]

    def close(self) -> None:
        """Take no more connections; those that are open stay."""
        for server in self._servers:
            server.close()
        for channel in self.sockets:
            channel.close()
        for path, inode in self._made.items():
            with suppress(OSError):
                if path.lstat().st_ino == inode:  # else it is another daemon's by now
                    path.unlink()
        self.sockets, self._servers, self._made = [], [], {}

    def _bind(self, family: int, address: Any, port: int, *, both: bool) -> int:
        """Listen on one address, `::` for `both` families; returns the port for the others. Raises OSError."""
        if family == socket.AF_UNIX:
            self._bind_unix(Path(address))
            return port
        dual = both and address[0] == "::" and socket.has_dualstack_ipv6()
        channel = socket.create_server((address[0], port, *address[2:]), family=family, dualstack_ipv6=dual)
        self.sockets.append(channel)
        return int(channel.getsockname()[1])

    def _bind_unix(self, path: Path) -> None:
        _make_way(path)
        channel = socket.socket(socket.AF_UNIX)
        self.sockets.append(channel)
        channel.bind(str(path))
        self._made[path] = path.stat().st_ino
        path.chmod(UNIX_MODE)
        channel.listen()


def passed_sockets() -> list[socket.socket]:
    """Return the sockets that systemd has passed to this process; no worker inherits them. Raises CantStart."""
    count, pid = os.environ.pop("LISTEN_FDS", "0"), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    return [_passed(number) for number in range(FIRST_PASSED_FD, FIRST_PASSED_FD + int(count))]


def _passed(number: int) -> socket.socket:
    with suppress(OSError):
        os.set_inheritable(number, False)
        channel = socket.socket(fileno=number)
        accepts = channel.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if accepts and channel.type == socket.SOCK_STREAM:
            return channel
    raise CantStart(f"systemd: file descriptor {number} is no listening stream socket; use ListenStream=, Accept=no")


def _addresses(host: str, port: int) -> list[Address]:
    """The addresses of one host. Raises CantStart."""
    if host.startswith(UNIX):
        return [(socket.AF_UNIX, host.removeprefix(UNIX))]
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError:  # no name at all: a part of it is empty, or too long
        raise _fault(OSError(socket.EAI_NONAME, ""), host, port) from None
    except OSError as error:
        raise _fault(error, host, port) from None
    return [(family, address) for family, _, _, _, address in found]


def _make_way(path: Path) -> None:
    """Remove the socket that a dead daemon has left. Raises CantStart for one in use, and for what is no socket."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise CantStart(f"host: {UNIX}{path} is there and is no socket; choose another path, or move the file away")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            if probe.connect_ex(str(path)) == errno.ECONNREFUSED:  # else somebody may have it, who is only slow
                return path.unlink()
        raise CantStart(f"host: {UNIX}{path} is in use; end the program that has it, or choose another path")


def _fault(error: OSError, host: str, port: int) -> CantStart:
    reason = error.strerror or str(error)
    if host.startswith(UNIX):
        return CantStart(f"host: {host} can't be made: {reason}; name a path that the daemon's user can write to")
    sentence = LISTEN_FAULTS.get(error.errno or 0, f"can't listen on {{host}}, port {{port}}: {reason}")
    return CantStart(sentence.format(host=host, port=port))


def url_of(channel: socket.socket) -> str:
    """Return the address for people: one that can be opened, also for a wildcard; of a Unix socket its path."""
    if channel.family == socket.AF_UNIX:
        return UNIX + os.fsdecode(channel.getsockname()).replace("\0", "@")
    host, port = socket.getnameinfo(channel.getsockname(), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
    if host in WILDCARDS:
        only_6 = channel.family == socket.AF_INET6 and channel.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        host = "::1" if only_6 else _lan_address()
    return f"http://[{host.replace('%', '%25')}]:{port}" if ":" in host else f"http://{host}:{port}"


def _lan_address() -> str:
    """The address that this machine has in its network, else a name of its own."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only asks which way packets would go
        return str(probe.getsockname()[0])
    return "localhost"
