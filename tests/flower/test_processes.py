"""Programs that were started here end here, with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fedistill.errors import RunError
from fedistill.flower import processes
from fedistill.flower.processes import Child

FOREVER = "import time; time.sleep(600)"


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Start Python code as a child; whatever a test leaves over is killed."""
    children: list[Child] = []

    def start(code: str, name: str = "a program") -> Child:
        log = tmp_path / "logs" / f"{len(children)}.log"
        command = [sys.executable, "-c", textwrap.dedent(code)]
        children.append(processes.start(name, command, log, env=os.environ))
        return children[-1]

    yield start
    for child in children:
        child.kill()


def soon(is_so: Callable[[], bool], patience: float = 60.0) -> bool:
    end = time.monotonic() + patience
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)
    return is_so()


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def said(child: Child, words: str) -> bool:
    return soon(lambda: words in child.tail())


# --- start and stop ------------------------------------------------------------------------------


def test_a_child_is_stopped_with_all_that_it_started(begin: Callable[..., Child]) -> None:
    child = begin(
        f"""
        import subprocess, sys
        inner = subprocess.Popen([sys.executable, "-c", {FOREVER!r}])
        print("inner", inner.pid, flush=True)
        inner.wait()
        """
    )
    assert said(child, "inner")
    inner = int(child.tail().split()[1])
    assert not gone(inner)
    child.stop()
    assert not child.running
    assert soon(lambda: gone(inner))


def test_a_child_that_does_not_listen_is_killed(begin: Callable[..., Child]) -> None:
    child = begin(
        f"""
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("deaf", flush=True)
        {FOREVER}
        """
    )
    assert said(child, "deaf")
    child.stop(patience=0.1)
    assert child.process.returncode == -signal.SIGKILL


def test_a_child_that_listens_ends_in_its_own_way(begin: Callable[..., Child]) -> None:
    child = begin(
        f"""
        import signal, sys
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        print("listening", flush=True)
        {FOREVER}
        """
    )
    assert said(child, "listening")
    child.stop()
    assert child.process.returncode == 7


def test_a_child_that_has_ended_is_stopped_again_without_harm(begin: Callable[..., Child]) -> None:
    child = begin("print('done')")
    assert soon(lambda: not child.running)
    child.stop()
    child.kill()
    child.ask_to_stop()
    assert child.process.returncode == 0


def test_children_are_stopped_last_first_also_after_an_error(begin: Callable[..., Child]) -> None:
    first, second = begin(FOREVER), begin(FOREVER)

    def fall(children: list[Child]) -> None:
        children += [first, second]
        raise KeyError

    with pytest.raises(KeyError), processes.stopped_at_the_end() as children:
        fall(children)
    assert not first.running
    assert not second.running


def test_a_program_that_is_not_there_is_said_with_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the SuperLink cannot be started .*install flwr"):
        processes.start("the SuperLink", ["/no/such/program"], tmp_path / "x.log", env={})
    with pytest.raises(RunError, match=r"/no/such/program cannot be started"):
        processes.output_of(["/no/such/program"], env={})


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_child_ends_when_its_parent_was_killed(tmp_path: Path) -> None:
    code = f"""
        import os, pathlib, sys, time
        from fedistill.flower import processes
        child = processes.start(
            "x", [sys.executable, "-c", {FOREVER!r}], pathlib.Path("x.log"), env=os.environ
        )
        print(child.process.pid, flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    assert soon(lambda: gone(pid))


# --- what it says --------------------------------------------------------------------------------


def test_the_tail_of_a_log_is_its_last_lines_whatever_bytes_they_are(tmp_path: Path) -> None:
    child = Child("x", None, tmp_path / "x.log")  # type: ignore[arg-type]
    assert child.tail() == ""
    child.log.write_bytes(b"".join(b"line %d\n" % k for k in range(20)) + b"\xff\xfe end\n")
    assert child.tail(2).splitlines()[0] == "line 19"
    assert child.tail(2).endswith(" end")
    assert len(child.tail().splitlines()) == 5


def test_the_output_of_a_program_is_both_its_streams_and_its_code() -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert processes.output_of([sys.executable, "-c", code], env=os.environ) == (3, "out\nerr\n")


def test_a_program_that_does_not_end_is_ended(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"did not end within 0\.2 seconds"):
        processes.output_of([sys.executable, "-c", FOREVER], env=os.environ, limit=0.2)


def test_the_environment_is_quiet_and_finds_this_python_first(tmp_path: Path) -> None:
    env = processes.environment(tmp_path, MORE="x")
    assert env | processes.QUIET == env
    assert (env["FLWR_HOME"], env["MORE"]) == (str(tmp_path), "x")
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert processes.binary("flwr").parent == Path(sys.executable).parent


# --- health --------------------------------------------------------------------------------------


class Answers(BaseHTTPRequestHandler):
    codes: list[int] = []

    def do_GET(self) -> None:
        code = self.codes.pop(0) if self.codes else 200
        self.send_response(code if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def health() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_program_is_waited_for_until_it_is_healthy(
    begin: Callable[..., Child], health: str
) -> None:
    Answers.codes = [503, 500]
    child = begin(FOREVER)
    processes.wait_until_healthy(child, health)
    assert Answers.codes == []


def test_a_program_that_ended_is_said_with_its_code_and_last_words(
    begin: Callable[..., Child],
) -> None:
    child = begin("print('port in use'); raise SystemExit(4)", "the SuperLink")
    url = f"http://127.0.0.1:{processes.free_port()}"
    with pytest.raises(RunError, match=r"the SuperLink ended \(4\), see .*\nport in use"):
        processes.wait_until_healthy(child, url)


def test_a_program_that_stays_silent_is_given_up(
    begin: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STARTUP", 0.3)
    child = begin(FOREVER, "the SuperLink")
    with pytest.raises(RunError, match="the SuperLink does not answer, see"):
        processes.wait_until_healthy(child, f"http://127.0.0.1:{processes.free_port()}")


def test_free_ports_are_free() -> None:
    with HTTPServer(("127.0.0.1", processes.free_port()), Answers) as server:
        assert server.server_port > 1023
