"""The networks that trials of deployments run on."""

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from .network import CountingProxy, Hosts, Traffic, available

LOOPBACK = ("127.0.0.1", 0)


@pytest.fixture
def echo():
    """A server that answers every chunk with the same chunk twice."""
    with socket.create_server(LOOPBACK) as server:

        def serve(connection):
            with connection:
                while chunk := connection.recv(65536):
                    connection.sendall(chunk * 2)

        def accept():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()
        server.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=10)


def exchange(connection, request):
    connection.sendall(request)
    reply = b""
    while len(reply) < 2 * len(request):
        chunk = connection.recv(65536)
        if not chunk:
            raise ConnectionError("closed")
        reply += chunk
    return reply


def settled(proxy, total):
    """The snapshot, once the count has caught up with what was read."""
    until = time.monotonic() + 5
    while proxy.snapshot().total != total and time.monotonic() < until:
        time.sleep(0.01)
    return proxy.snapshot()


def test_the_proxy_counts_each_way_and_per_connection(echo):
    with CountingProxy(LOOPBACK, echo) as proxy:
        with closing(socket.create_connection(proxy.address)) as first:
            assert exchange(first, b"abc") == b"abcabc"
            with closing(socket.create_connection(proxy.address)) as second:
                exchange(second, b"x" * 100_000)
        seen = settled(proxy, Traffic(up=100_003, down=200_006))
    assert seen.total == Traffic(up=100_003, down=200_006)
    assert seen.connections == (Traffic(up=3, down=6), Traffic(up=100_000, down=200_000))


def test_a_cut_proxy_drops_and_refuses_until_it_is_mended(echo):
    with CountingProxy(LOOPBACK, echo) as proxy:
        with closing(socket.create_connection(proxy.address)) as connection:
            exchange(connection, b"a")
            proxy.cut()
            with pytest.raises(ConnectionError):
                exchange(connection, b"b")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(proxy.address)
        proxy.mend()
        with closing(socket.create_connection(proxy.address)) as connection:
            assert exchange(connection, b"c") == b"cc"


def test_the_proxy_holds_chunks_back(echo):
    with CountingProxy(LOOPBACK, echo) as proxy:
        proxy.delay(0.1)
        with closing(socket.create_connection(proxy.address)) as connection:
            start = time.monotonic()
            exchange(connection, b"a")
    assert time.monotonic() - start >= 0.2


def test_a_target_that_is_down_closes_the_connection(echo):
    with socket.create_server(LOOPBACK) as gone:
        address = gone.getsockname()
    with CountingProxy(LOOPBACK, address) as proxy:
        with closing(socket.create_connection(proxy.address)) as connection:
            assert connection.recv(1) == b""
        assert proxy.snapshot().connections == ()


def test_a_closed_proxy_leaves_no_thread(echo):
    before = threading.active_count()
    with (
        CountingProxy(LOOPBACK, echo) as proxy,
        closing(socket.create_connection(proxy.address)) as connection,
    ):
        exchange(connection, b"a")
        proxy.close()
        until = time.monotonic() + 5
        while threading.active_count() > before and time.monotonic() < until:
            time.sleep(0.01)  # the echo server's own thread
        assert threading.active_count() <= before


SERVE = """
import socket
with socket.create_server(("", 9000)) as server:
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        with connection:
            while chunk := connection.recv(65536):
                connection.sendall(chunk)
"""

ASK = """
import json, socket, sys, time
start = time.monotonic()
try:
    with socket.create_connection((sys.argv[1], 9000), timeout=float(sys.argv[2])) as connection:
        connection.sendall(b"x" * 1000)
        left = 1000
        while left:
            chunk = connection.recv(65536)
            left -= len(chunk)
    answer = "answered"
except OSError as error:
    answer = type(error).__name__
print(json.dumps([answer, time.monotonic() - start]))
"""


@pytest.fixture
def three():
    reason = available()
    if reason:
        pytest.skip(reason)
    with Hosts(3, trap=True) as hosts:
        server = hosts.run(0, [sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True)
        assert server.stdout.readline() == "ready\n"
        yield hosts


def ask(hosts, host, *, to=None, patience=10.0):
    argv = [sys.executable, "-c", ASK, to or hosts.addresses[0], str(patience)]
    process = hosts.run(host, argv, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=60)
    return json.loads(out)


def namespaces():
    return subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_hosts_reach_one_another_and_every_packet_is_seen(three):
    assert ask(three, 1)[0] == "answered"
    assert three.packets_elsewhere(1, [three.addresses[0]]) == {}
    assert three.bytes_sent(1)[three.addresses[0]] > 1000
    assert three.bytes_sent(0)[three.addresses[1]] > 1000
    assert three.bytes_sent(2) == {}


@pytest.mark.slow
def test_a_packet_to_anywhere_else_ends_in_the_star_and_is_counted(three):
    assert ask(three, 1, to="192.0.2.1", patience=0.5)[0] == "TimeoutError"
    assert list(three.packets_elsewhere(1, [three.addresses[0]])) == ["192.0.2.1"]


@pytest.mark.slow
def test_delay_and_loss_slow_a_host_down_but_tcp_gets_through(three):
    three.netem(1, delay=0.1)
    answer, seconds = ask(three, 1)
    assert answer == "answered"
    assert seconds >= 0.4  # two round trips: to connect, and to ask
    three.netem(1, delay=0.01, loss=0.2)
    assert ask(three, 1, patience=60)[0] == "answered"


@pytest.mark.slow
def test_a_partition_is_silent_and_heals(three):
    three.partition(1)
    assert ask(three, 1, patience=0.5)[0] == "TimeoutError"
    assert ask(three, 2)[0] == "answered"
    three.heal(1)
    assert ask(three, 1)[0] == "answered"


@pytest.mark.slow
def test_without_a_trap_there_is_no_route_out_and_nothing_is_left_after_a_failure():
    reason = available()
    if reason:
        pytest.skip(reason)
    before = namespaces()
    sleepers = []

    def fail():
        with Hosts(2) as hosts:
            assert ask(hosts, 0, to="192.0.2.1")[0] == "OSError"  # no route to it
            sleepers.append(hosts.run(1, ["sleep", "600"]))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert sleepers[0].poll() is not None
    assert namespaces() == before
