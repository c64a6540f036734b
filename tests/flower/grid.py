"""A Flower grid inside this process: the real apps over it, and every fault on its way.

Messages are turned into bytes and back, as on the wire. What befalls one of them is its fate,
which a test decides from the node, the group (our round) and how often that pair was sent to.
"""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when flwr is imported

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto  # private
from flwr.proto.node_pb2 import NodeInfo  # private
from flwr.serverapp import Grid
from flwr.supercore.run import Run  # private
from flwr.supercore.task_identity import TaskIdentity  # private

from fedistill.flower.backend import FlowerBackend
from fedistill.flower.roster import by_asking

SUPERLINK = 1
"""Node that the SuperLink's own error replies come from."""
FIRST = 1000
DELIVER = "deliver"
DROP = "drop"
"""The instruction never arrives, and nothing ever comes back."""
LOST = "lost"
"""The node works, its answer is thrown away: code 5."""
TWICE = "twice"
"""One answer comes twice."""
STALL = "stall"
"""Fetching the answer never ends (until :meth:`InProcessGrid.close`)."""
STRANGER = "stranger"
"""A message that nobody asked for comes along."""
FALL = "fall"
"""The first fetch of the answer raises."""

Fate = str | int
"""One of the words above, or a number: the answer is there at that many-th look for it."""
Fates = Callable[[int, str, int], Fate]


@dataclass
class Letter:
    """An answer that waits to be fetched."""

    answer: Message
    fate: Fate
    looks: int = 0


@dataclass
class InProcessGrid(Grid):
    """Flower's grid, over one client app in this process.

    Args:
        app: what every node runs.
        nodes: the configuration of each.
        run_config: of the run.
        keys: public keys of the nodes, in their order.
        fate: what befalls a message, from node, group and how often it was sent.
        shuffle: seed of the order in which answers are handed out; None: as asked for.
    """

    app: ClientApp
    nodes: Sequence[Mapping[str, Any]]
    run_config: Mapping[str, Any] = field(default_factory=dict)
    keys: Sequence[bytes] = ()
    fate: Fates = lambda node, group, attempt: DELIVER
    shuffle: int | None = None

    def __post_init__(self) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = SUPERLINK
        self.contexts = {
            FIRST + number: Context(
                1, FIRST + number, dict(config), RecordDict(), dict(self.run_config)
            )
            for number, config in enumerate(self.nodes)
        }
        self.online = set(self.contexts)
        self.letters: dict[str, Letter] = {}
        self.sent: list[tuple[int, str, str]] = []
        self.replies: list[bytes] = []
        self.strangers: list[Message] = []
        self.refuse_pushes = 0
        self.empty_pushes = 0
        self.refused: set[str] = set()
        self.fetches_fail = 0
        self.number = 0
        self.attempts: Counter[tuple[int, str]] = Counter()
        self.lock = threading.Lock()
        self.closed = threading.Event()
        self.random = random.Random(self.shuffle)

    def close(self) -> None:
        """Let go of whoever is stuck in a fetch."""
        self.closed.set()

    def on_its_way(self) -> bool:
        """Whether an answer can still be fetched."""
        with self.lock:
            return any(letter.fate != STALL for letter in self.letters.values())

    # --- what Flower asks of a grid --------------------------------------------------------------

    run = property(lambda self: Run.create_empty(1))

    def set_run(self, run: Run) -> None:
        del run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return sorted(self.online)

    def get_nodes(self) -> list[NodeInfo]:
        keys = dict(zip(self.contexts, self.keys, strict=False))
        return [NodeInfo(node_id=node, public_key=keys.get(node, b"")) for node in self.online]

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        """Flower names a message before it tries to send it: also one that is then refused."""
        messages = list(messages)
        for message in messages:
            self.number += 1
            # The only way to set it.
            message.metadata.__dict__["_message_id"] = f"m{self.number}"
        if self.empty_pushes:  # HTTP 413
            self.empty_pushes -= 1
            self.refused.update(message.metadata.message_id for message in messages)
            return []
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found: list[Message] = []
        for message in list(message_ids):
            found += self._pull(message)
        with self.lock:
            found += self.strangers
            self.strangers = []
            if self.shuffle is not None:
                self.random.shuffle(found)
        return found

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        raise NotImplementedError("it knows no quorum: our loop must not use it")

    # --- what happens on the way -----------------------------------------------------------------

    def _push(self, message: Message) -> str | None:
        name = message.metadata.message_id
        if self.refuse_pushes:
            self.refuse_pushes -= 1
            self.refused.add(name)
            return None
        node, group = message.metadata.dst_node_id, message.metadata.group_id
        self.attempts[node, group] += 1
        self.sent.append((node, message.metadata.message_type, group))
        fate = self.fate(node, group, self.attempts[node, group])
        if node not in self.online:
            self._put(name, made_up(5, message), DELIVER)
        elif fate != DROP:
            answer = self._answer(copied(message))
            self._put(name, made_up(5, message) if fate == LOST else answer, fate)
        return name

    def _answer(self, message: Message) -> Message:
        """What the node says, in the way in which ``flwr-clientapp`` says it."""
        try:
            answer = self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            reason = f"{type(error)}:<'{error}'>"
            answer = Message(Error(code=2, reason=reason), reply_to=message)
        self.replies.append(message_to_proto(answer).SerializeToString())
        return copied(answer)

    def _put(self, name: str, answer: Message, fate: Fate) -> None:
        with self.lock:
            self.letters[name] = Letter(answer, fate)
            if fate == STRANGER:
                stranger = copied(answer)
                stranger.metadata.__dict__["_reply_to_message_id"] = "nobody-asked"
                self.strangers.append(stranger)

    def _pull(self, name: str) -> list[Message]:
        with self.lock:
            if self.fetches_fail:
                self.fetches_fail -= 1
                raise ConnectionError("the SuperLink is away")
            letter = self.letters.get(name)
            if letter is None:
                return [unknown(name)] if name in self.refused else []
            letter.looks += 1
            if letter.fate == FALL and letter.looks == 1:
                raise ConnectionError("an interrupted download")
            if isinstance(letter.fate, int) and letter.looks < letter.fate:
                return []
            if letter.fate != STALL:
                del self.letters[name]
        if letter.fate == STALL:
            self.closed.wait()
            return []
        node = letter.answer.metadata.src_node_id
        if node != SUPERLINK and node not in self.online:  # a stored answer is thrown away
            return [made_up(5, letter.answer, answer=True)]
        return [letter.answer] * (2 if letter.fate == TWICE else 1)


def copied(message: Message) -> Message:
    """The message after its way over the wire: nothing is shared with the sender."""
    proto = message_to_proto(message)
    return message_from_proto(type(proto).FromString(proto.SerializeToString()))


def made_up(code: int, about: Message, *, answer: bool = False) -> Message:
    """An error that the SuperLink answers in a node's place: it comes from node 1."""
    reply = Message(Error(code=code, reason="node unavailable"), reply_to=about)
    reply.metadata.__dict__["_src_node_id"] = SUPERLINK
    if answer:
        reply.metadata.__dict__["_reply_to_message_id"] = about.metadata.reply_to_message_id
    return reply


def unknown(name: str) -> Message:
    """What the SuperLink says of a message that it does not have: code 3."""
    blank = Message(RecordDict(), SUPERLINK, "train.round")
    blank.metadata.__dict__["_message_id"] = name
    return made_up(3, blank)


def fates(told: Mapping[tuple[int, str, int], Fate]) -> Fates:
    """Fates from a table of (number of the node from 0, group, attempt); the rest is delivered."""
    return lambda node, group, attempt: told.get((node - FIRST, group, attempt), DELIVER)


def over(grid: InProcessGrid, names: Iterable[str], **options: Any) -> Callable[[Any], Any]:
    """What :meth:`Federation.run` takes as its backend: these sites, over the grid."""
    given: dict[str, Any] = {"deadline": 120.0, "grace": 60.0, "pause": 0.002}
    backend = FlowerBackend(grid, by_asking(tuple(names), pause=0.002), **(given | options))
    return lambda sites: backend


@dataclass
class Clock:
    """Stands still while an answer is on its way; then a second passes with every look."""

    grid: InProcessGrid
    now: float = 0.0

    def monotonic(self) -> float:
        self.now += 0 if self.grid.on_its_way() else 1
        return self.now
