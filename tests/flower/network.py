"""Networks for trials: a forwarder that counts bytes, and hosts with addresses of their own.

`Hosts` needs Linux, root and `/dev/net/tun`. Each host is a network namespace whose only way out
is a tunnel device held by this process, and one thread here passes the packets on. So delay,
loss and partition need no kernel module, and every packet that a host sent has been seen.
"""

import fcntl
import heapq
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

Address = tuple[str, int]

_TUNSETIFF = 0x400454CA
_TUN_WITHOUT_HEADER = 0x0001 | 0x1000  # IFF_TUN, IFF_NO_PI
_NAMES = iter(range(1_000_000))


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one connection, or all of them, carried."""

    up: int = 0  # from the client to the target
    down: int = 0  # from the target to the client

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(up=self.up + other.up, down=self.down + other.down)

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(up=self.up - other.up, down=self.down - other.down)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a proxy has carried so far: in all, and per connection in order of arrival."""

    total: Traffic
    connections: tuple[Traffic, ...]


class CountingProxy:
    """Forwards TCP connections to `target` and counts the payload bytes of each, both ways.

    The count is what TLS and HTTP made of a message, without TCP and IP headers. Port 0 in
    `listen` takes a free one; `address` says which. After `cut` connections are refused until
    `mend`, on the same port.
    """

    def __init__(self, listen: Address, target: Address) -> None:
        self._target = target
        self._delay = 0.0
        self._lock = threading.Lock()
        self._counts: list[Traffic] = []
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self.address = listen
        self.mend()

    def snapshot(self) -> Snapshot:
        """What has been carried so far."""
        with self._lock:
            return Snapshot(total=sum(self._counts, Traffic()), connections=tuple(self._counts))

    def delay(self, seconds: float) -> None:
        """Hold every chunk back for so long, each way, from now on."""
        self._delay = seconds

    def cut(self) -> None:
        """Drop all connections and refuse new ones."""
        with self._lock:
            listener, self._listener = self._listener, None
            dropped = list(self._open)
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
            listener.close()
        for connection in dropped:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Accept connections, again after a cut."""
        if self._listener is not None:
            return
        listener = socket.create_server(self.address, backlog=128)
        self.address = listener.getsockname()[:2]
        self._listener = listener
        self._start(self._accept, listener)

    def close(self) -> None:
        """Drop everything and wait until no thread is left."""
        self.cut()
        for thread in self._threads:
            thread.join(timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self._start(self._serve, listener, client)

    def _serve(self, listener: socket.socket, client: socket.socket) -> None:
        with client:
            try:
                server = socket.create_connection(self._target, timeout=10)
            except OSError:
                return
            with server:
                server.settimeout(None)
                with self._lock:
                    if self._listener is not listener:  # cut meanwhile
                        return
                    self._open |= {client, server}
                    number = len(self._counts)
                    self._counts.append(Traffic())
                back = threading.Thread(
                    target=self._pump, args=(server, client, number, "down"), daemon=True
                )
                back.start()
                self._pump(client, server, number, "up")
                back.join()
                with self._lock:
                    self._open -= {client, server}

    def _pump(self, source: socket.socket, sink: socket.socket, number: int, way: str) -> None:
        with suppress(OSError):
            while chunk := source.recv(65536):
                if self._delay:
                    time.sleep(self._delay)
                sink.sendall(chunk)
                with self._lock:
                    count = self._counts[number]
                    self._counts[number] = replace(count, **{way: getattr(count, way) + len(chunk)})
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def available() -> str | None:
    """Why hosts cannot be made here, or None."""
    if sys.platform != "linux":
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command `ip` (iproute2) is missing"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun is missing"
    name = f"fd{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return None


@dataclass(frozen=True, kw_only=True)
class _Link:
    delay: float = 0.0
    loss: float = 0.0
    up: bool = True


class Hosts:
    """So many hosts on a network of their own, in a star around this process.

    No packet gets out of the star: hosts have no route but to one another. With `trap` they
    have a default route into the star, where such packets end: then `packets_elsewhere` also
    shows what a host only tried to send, to a name server or a telemetry address.
    """

    def __init__(self, count: int, *, trap: bool = False, seed: int = 0) -> None:
        unique = f"{os.getpid()}-{next(_NAMES)}"
        net = random.randrange(1, 255)
        self.addresses = [f"10.77.{net}.{host + 1}" for host in range(count)]
        self._names = [f"fd{unique}-{host}" for host in range(count)]
        self._trap = trap
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._links = [_Link()] * count
        self._sent: list[Counter[str]] = [Counter() for _ in range(count)]
        self._bytes: list[Counter[str]] = [Counter() for _ in range(count)]
        self._devices: list[int] = []
        self._processes: list[subprocess.Popen[Any]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:  # undone if anything below fails
            for host in range(len(self._names)):
                self._make(host, stack)
            quit_reading, quit_writing = os.pipe()
            switch = threading.Thread(target=self._switch, args=(quit_reading,), daemon=True)
            stack.callback(os.close, quit_reading)
            stack.callback(switch.join)
            stack.callback(os.close, quit_writing)
            stack.callback(self._kill)
            switch.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def run(self, host: int, argv: Sequence[str], **popen: Any) -> subprocess.Popen[Any]:
        """Start a command on a host. What still runs at the end is killed."""
        command = [
            "ip",
            "netns",
            "exec",
            self._names[host],
            *argv,
        ]  # execs: the pid is the command's
        process = subprocess.Popen(command, **popen)
        self._processes.append(process)
        return process

    def netem(self, host: int, delay: float = 0.0, loss: float = 0.0) -> None:
        """Hold packets from and to a host back for `delay` seconds, and lose a share of them."""
        with self._lock:
            self._links[host] = replace(self._links[host], delay=delay, loss=loss)

    def partition(self, host: int) -> None:
        """Lose all packets from and to a host, without telling either end."""
        with self._lock:
            self._links[host] = replace(self._links[host], up=False)

    def heal(self, host: int) -> None:
        """End a partition."""
        with self._lock:
            self._links[host] = replace(self._links[host], up=True)

    def bytes_sent(self, host: int) -> dict[str, int]:
        """Bytes with IP and TCP headers that a host sent, by address, lost ones included."""
        with self._lock:
            return dict(self._bytes[host])

    def packets_elsewhere(self, host: int, allowed: Iterable[str]) -> dict[str, int]:
        """Packets that a host sent to other addresses than those allowed, by address."""
        with self._lock:
            return {to: n for to, n in self._sent[host].items() if to not in set(allowed)}

    def _make(self, host: int, stack: ExitStack) -> None:
        name, device = self._names[host], f"fd{os.getpid() % 100_000}t{host}"
        _ip("netns", "add", name)
        stack.callback(_ip, "netns", "del", name)
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        fcntl.ioctl(
            descriptor, _TUNSETIFF, struct.pack("16sH", device.encode(), _TUN_WITHOUT_HEADER)
        )
        self._devices.append(descriptor)
        _ip("link", "set", device, "netns", name)
        quiet = "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 > $f; done"
        _ip("netns", "exec", name, "sh", "-c", quiet)
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", f"{self.addresses[host]}/24", "dev", device)
        _ip("-n", name, "link", "set", device, "up", "txqueuelen", "1000")
        if self._trap:
            _ip("-n", name, "route", "add", "default", "dev", device)

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()

    def _switch(self, quit_reading: int) -> None:
        """Pass packets on, each at its time, until the other end of the pipe is closed."""
        waiting: list[tuple[float, int, int, bytes]] = []
        order = 0
        while True:
            pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            ready, _, _ = select.select([*self._devices, quit_reading], [], [], pause)
            if quit_reading in ready:
                return
            for device in ready:
                with suppress(BlockingIOError):
                    for _ in range(64):
                        packet = os.read(device, 65536)
                        route = self._route(self._devices.index(device), packet)
                        if route is not None:
                            order += 1
                            due = time.monotonic() + route[1]
                            heapq.heappush(waiting, (due, order, route[0], packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(waiting)
                with suppress(OSError):  # a full queue loses the packet, as a wire would
                    os.write(self._devices[target], packet)

    def _route(self, source: int, packet: bytes) -> tuple[int, float] | None:
        """The host a packet goes to and after how long, or None where it is lost."""
        version = packet[0] >> 4
        if version == 4:
            to = socket.inet_ntop(socket.AF_INET, packet[16:20])
        else:
            to = socket.inet_ntop(socket.AF_INET6, packet[24:40])
        with self._lock:
            self._sent[source][to] += 1
            self._bytes[source][to] += len(packet)
            if to not in self.addresses:
                return None
            target = self.addresses.index(to)
            ends = self._links[source], self._links[target]
        if not all(end.up and self._random.random() >= end.loss for end in ends):
            return None
        return target, sum(end.delay for end in ends)


def _ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"`ip {' '.join(args)}` failed: {done.stderr.strip()}")
