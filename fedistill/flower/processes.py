"""Flower's own programs as child processes: started, waited for, and ended with everything below.

Only what was started here is ever ended, and it ends with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedistill.errors import RunError

QUIET: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Keeps Flower and Ray from calling home; read when they are imported."""
STARTUP = 60.0
STOPPING = 10.0
DEATHSIG = 1


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of a Flower program: quiet, with a home of its own, this Python first."""
    binaries = str(Path(sys.executable).parent)
    path = os.pathsep.join([binaries, os.environ.get("PATH", "")])
    return os.environ | QUIET | {"FLWR_HOME": str(home), "PATH": path} | more


def binary(name: str) -> Path:
    """A program of Flower's, from the environment that this Python runs in."""
    return Path(sys.executable).parent / name


@dataclass(frozen=True, eq=False)
class Child:
    """A program that was started here.

    Attributes:
        name: what to call it in messages.
        process: its handle; the process leads a group with all its descendants.
        log: what it prints.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def tail(self, lines: int = 5) -> str:
        """The last lines of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.strip().splitlines()[-lines:])

    def ask_to_stop(self) -> None:
        """Tell it to end, and do not wait."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def stop(self, patience: float = STOPPING) -> None:
        """End it and its descendants: politely first."""
        self.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.kill()

    def kill(self) -> None:
        """End it and its descendants at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOPPING)


def start(
    name: str, command: Sequence[str], log: Path, *, env: Mapping[str, str], cwd: Path | None = None
) -> Child:
    """Start a program in a group of its own, its output in ``log``.

    Raises:
        RunError: there is no such program.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            raise RunError(
                f"{name} cannot be started ({error.strerror}: {command[0]}): install flwr beside "
                "fedistill"
            ) from None
    return Child(name, process, log)


def _die_with_parent() -> None:
    """Linux: the kernel ends this child when its parent is gone, even if that was killed."""
    ctypes.CDLL(None).prctl(DEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def stopped_at_the_end() -> Iterator[list[Child]]:
    """A list for children: who stands in it is stopped when the context ends, the last first."""
    children: list[Child] = []
    try:
        yield children
    finally:
        for child in reversed(children):
            child.stop()


def free_port() -> int:
    """A port on loopback that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def wait_until_healthy(child: Child, url: str, *, ca: Path | None = None) -> None:
    """Wait until a program answers at its ``/health``.

    Raises:
        RunError: it ended, or took too long; with the last lines of its log.
    """
    context = ssl.create_default_context(cafile=str(ca)) if ca else None
    end = time.monotonic() + STARTUP
    while time.monotonic() < end and child.running:
        with (
            contextlib.suppress(OSError, urllib.error.URLError),
            urllib.request.urlopen(f"{url}/health", timeout=2, context=context) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.1)
    state = "does not answer" if child.running else f"ended ({child.process.returncode})"
    raise RunError(f"{child.name} {state}, see {child.log}:\n{child.tail()}")


def output_of(
    command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None = None, limit: float = 120.0
) -> tuple[int, str]:
    """Run a program to its end: its exit code and what it printed.

    Raises:
        RunError: there is no such program, or it does not end.
    """
    try:
        done = subprocess.run(
            list(command),
            env=dict(env),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"{Path(command[0]).name} did not end within {limit:g} seconds") from None
    except OSError as error:
        raise RunError(f"{command[0]} cannot be started ({error.strerror})") from None
    return done.returncode, done.stdout + done.stderr
