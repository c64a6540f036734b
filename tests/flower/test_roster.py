"""Which node is which site: by its key where there are keys, by asking where nobody pretends."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedistill.client import Member
from fedistill.errors import RunError
from fedistill.flower import client_app, convert
from fedistill.flower.kit import keys
from fedistill.flower.roster import by_asking, by_key, read_key

from .grid import DROP, FIRST, LOST, InProcessGrid

SITES = ("a", "b", "c")


def as_flower(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public key as a SuperLink reports that of a node."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def as_file(key: Any) -> bytes:
    told: bytes = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return told


@pytest.fixture
def pairs(tmp_path: Path) -> Mapping[str, ec.EllipticCurvePrivateKey]:
    """A key for every site, the public half in the coordinator's folder."""
    made = {name: ec.generate_private_key(ec.SECP384R1()) for name in SITES}
    for name, key in made.items():
        (tmp_path / f"{name}.pub").write_bytes(as_file(key))
    return made


def grid_of(node_keys: list[bytes]) -> InProcessGrid:
    return InProcessGrid(ClientApp(), [{} for _ in node_keys], keys=node_keys)


# --- by key --------------------------------------------------------------------------------------


def test_a_site_is_whoever_holds_its_key_whatever_its_number(
    tmp_path: Path, pairs: Mapping[str, ec.EllipticCurvePrivateKey]
) -> None:
    roster = by_key(tmp_path, SITES)
    known = {name: as_flower(key) for name, key in pairs.items()}
    grid = grid_of([known["c"], known["a"], known["b"]])
    assert roster(grid) == {"c": FIRST, "a": FIRST + 1, "b": FIRST + 2}
    grid.online.discard(FIRST + 1)
    assert roster(grid) == {"c": FIRST, "b": FIRST + 2}
    again = grid_of([b"", b"", b"", known["a"]])  # it came back under another number
    assert roster(again) == {"a": FIRST + 3}


def test_a_node_without_a_key_or_with_another_is_nobody(
    tmp_path: Path, pairs: Mapping[str, ec.EllipticCurvePrivateKey]
) -> None:
    stranger = as_flower(ec.generate_private_key(ec.SECP384R1()))
    roster = by_key(tmp_path, SITES)
    assert roster(grid_of([b"", stranger, as_flower(pairs["a"])])) == {"a": FIRST + 2}
    assert roster(grid_of([])) == {}


def test_a_site_that_left_the_federation_is_nobody_although_its_key_lies_there(
    tmp_path: Path, pairs: Mapping[str, ec.EllipticCurvePrivateKey]
) -> None:
    roster = by_key(tmp_path, ("a", "b"))
    assert roster(grid_of([as_flower(pairs["c"])])) == {}


def test_the_keys_that_deploy_init_makes_are_read(tmp_path: Path) -> None:
    _, public = keys.node_key()
    (tmp_path / "a.pub").write_bytes(public)
    assert read_key(tmp_path / "a.pub").startswith(b"-----BEGIN PUBLIC KEY-----")


def test_the_keys_that_ssh_keygen_makes_are_read(tmp_path: Path) -> None:
    try:
        command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", "node.key"]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("ssh-keygen is not installed on this machine")
    assert read_key(tmp_path / "node.key.pub").startswith(b"-----BEGIN PUBLIC KEY-----")


def test_two_sites_with_one_key_are_refused(
    tmp_path: Path, pairs: Mapping[str, ec.EllipticCurvePrivateKey]
) -> None:
    (tmp_path / "c.pub").write_bytes(as_file(pairs["a"]) + b" a comment")
    with pytest.raises(RunError, match=r"sites a and c have the same key.*ssh-keygen"):
        by_key(tmp_path, SITES)


NO_KEY: dict[str, bytes | None] = {
    "absent": None,
    "empty": b"",
    "text": b"ssh-rsa is what I wanted",
    "binary": bytes(range(256)),
    "an rsa key": as_file(rsa.generate_private_key(65537, 2048)),
    "an ed25519 key": as_file(ed25519.Ed25519PrivateKey.generate()),
    "cut short": as_file(ec.generate_private_key(ec.SECP384R1()))[:60],
    "a private key": keys.node_key()[0],
}


@pytest.mark.parametrize("content", NO_KEY.values(), ids=NO_KEY)
def test_a_key_that_cannot_be_read_is_said_with_the_file_and_what_to_ask_for(
    content: bytes | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "a.pub").write_bytes(content)
    with pytest.raises(RunError, match=r"a\.pub: expected a site's public key .* node\.key\.pub"):
        by_key(tmp_path, ("a",))


# --- by asking -----------------------------------------------------------------------------------


def saying(names: list[str], **options: Any) -> InProcessGrid:
    """Nodes that each say they are a site."""

    class Named:
        def __init__(self, name: str) -> None:
            self.client = Member(name)

    app = client_app(lambda node, run: Named(node["name"]))  # type: ignore[arg-type,return-value]
    return InProcessGrid(app, [{"name": name} for name in names], **options)


def test_a_second_node_of_one_name_waits_until_the_first_is_gone() -> None:
    grid = saying(["a", "b", "a"])
    roster = by_asking(SITES, pause=0.001)
    assert roster(grid) == {"a": FIRST, "b": FIRST + 1}
    grid.online.discard(FIRST)
    assert roster(grid) == {"a": FIRST + 2, "b": FIRST + 1}
    grid.online.add(FIRST)  # back again: now the other has the name
    assert roster(grid) == {"a": FIRST + 2, "b": FIRST + 1}


def test_a_node_is_asked_once_for_as_long_as_it_is_there() -> None:
    grid = saying(["a", "b"])
    roster = by_asking(SITES, pause=0.001)
    for _ in range(3):
        assert roster(grid) == {"a": FIRST, "b": FIRST + 1}
    assert len(grid.sent) == 2
    grid.online.discard(FIRST)
    roster(grid)
    grid.online.add(FIRST)
    roster(grid)
    assert len(grid.sent) == 3


def test_a_node_with_an_unknown_name_or_none_is_left_out() -> None:
    grid = saying(["z", "a"])
    grid.nodes = []
    assert by_asking(SITES, pause=0.001)(grid) == {"a": FIRST + 1}
    assert by_asking(("b",), pause=0.001)(grid) == {}


def test_a_node_that_never_answers_costs_the_patience_and_not_the_others() -> None:
    grid = saying(["a", "b"], fate=lambda node, group, n: DROP if node == FIRST else 0)
    roster = by_asking(SITES, patience=0.05, pause=0.001)
    assert roster(grid) == {"b": FIRST + 1}
    grid.fate = lambda node, group, n: 0
    assert roster(grid) == {"a": FIRST, "b": FIRST + 1}


def test_a_node_whose_answer_got_lost_is_asked_again_at_the_next_look() -> None:
    grid = saying(["a"], fate=lambda node, group, n: LOST if n == 1 else 0)
    roster = by_asking(SITES, pause=0.001)
    assert roster(grid) == {}
    assert roster(grid) == {"a": FIRST}


def test_an_answer_that_is_none_of_ours_makes_a_node_nobody() -> None:
    def odd(message: Message, context: Context) -> Message:
        return Message(RecordDict({"x": ConfigRecord({"site": "a"})}), reply_to=message)

    grid = saying(["a", "b"])
    honest = grid.app
    grid.app = lambda m, c: (odd if c.node_id == FIRST else honest)(m, c)  # type: ignore[assignment]
    assert by_asking(SITES, pause=0.001)(grid) == {"b": FIRST + 1}


def test_the_question_carries_what_client_apps_need() -> None:
    asked: list[str] = []

    def listening(message: Message, context: Context) -> Message:
        asked.append(convert.text_of(message, "home"))
        return convert.response(message, {"site": "a"})

    grid = saying(["a"])
    grid.app = listening  # type: ignore[assignment]
    assert by_asking(SITES, pause=0.001, extra={"home": "/runs/x"})(grid) == {"a": FIRST}
    assert asked == ["/runs/x"]
