r"""BlazeFL on the standard round: https://github.com/kitsuyaazuma/BlazeFL, version 3.0.0.

Written after its example of DS-FL: a server handler, a client trainer on a pool of threads, model,
optimizer and loaders built for each client and round, state kept in between. State stays in memory
where the example writes files, and nothing is evaluated; both are to its advantage.

From Python 3.14 on `pip install blazefl`. It asks for that because of three lines; before, put an
altered copy on the path::

    pip download --no-deps --ignore-requires-python blazefl==3.0.0
    unzip blazefl-3.0.0-py3-none-any.whl -d blazefl-3.0.0
    sed -i -e 's/^\(def [a-z_]*\)\[T\](/\1(/' -e '0,/^import torch$/s//&\nT = Any/' \
        blazefl-3.0.0/blazefl/core/utils.py
    PYTHONPATH=$PWD:blazefl-3.0.0 python benchmarks/fd_round.py --engines naive,vectorized,blazefl
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from blazefl.core import BaseServerHandler, ModelSelector, ThreadPoolClientTrainer
from task import BATCH, MOMENTUM, RATE, Outcome, Round, Task, begin, flat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class Down:
    """What a client is sent: soft targets of the last round, and whether to show its weights."""

    soft_labels: Tensor | None
    show: bool


@dataclass
class Up:
    """What it sends back."""

    cid: int
    soft_labels: Tensor
    weights: Tensor | None


class Selector(ModelSelector):
    """Builds the one model."""

    def __init__(self, given: Task) -> None:
        self.given = given

    def select_model(self, model_name: str) -> nn.Module:
        """A new one."""
        del model_name
        return self.given.plain()


class Handler(BaseServerHandler[Up, Down]):
    """The server: the mean of all soft labels, once they are there."""

    def __init__(self, given: Task) -> None:
        self.clients = len(given)
        self.cache: list[Up] = []
        self.soft_labels: Tensor | None = None
        self.show = False

    def sample_clients(self) -> list[int]:
        """All."""
        return list(range(self.clients))

    def load(self, payload: Up) -> bool:
        """One more."""
        self.cache.append(payload)
        if len(self.cache) < self.clients:
            return False
        self.global_update(self.cache)
        self.cache = []
        return True

    def global_update(self, buffer: list[Up]) -> None:
        """All are there."""
        self.soft_labels = torch.stack([one.soft_labels for one in buffer]).mean(0)

    def downlink_package(self) -> Down:
        """For the next round."""
        return Down(self.soft_labels, self.show)

    def is_stopped(self) -> bool:
        """Whoever runs this knows."""
        return False


class Trainer(ThreadPoolClientTrainer[Up, Down]):
    """The clients, on threads."""

    def __init__(self, given: Task, num_parallels: int) -> None:
        self.given, self.num_parallels = given, num_parallels
        self.device, self.device_count = "cpu", 0
        self.cache: list[Up] = []
        self.stop_event = threading.Event()
        self.selector = Selector(given)
        self.states: dict[int, dict[str, Tensor]] = {}

    def worker(self, cid: int, device: str, payload: Down, stop_event: threading.Event) -> Up:
        """A client's round: distil, train, predict."""
        given = self.given
        if cid in self.states:
            model = self.selector.select_model("client").to(device)
            model.load_state_dict(self.states[cid])
        else:
            model = begin(given.plain, given.starts[cid])
        weights = None
        if payload.soft_labels is not None:
            self.epoch(model, given.proxy, payload.soft_labels, given.order, given.batch)
            weights = flat(list(model.parameters())) if payload.show else None
        own, labels = given.inputs[cid], given.labels[cid]
        self.epoch(model, own, labels, given.orders[cid], BATCH)
        model.eval()
        with torch.no_grad():
            soft_labels = F.softmax(model(given.proxy), dim=1)
        self.states[cid] = model.state_dict()
        return Up(cid, soft_labels, weights)

    def epoch(
        self, model: nn.Module, inputs: Tensor, wanted: Tensor, order: Tensor, size: int
    ) -> None:
        """One pass over rows."""
        loader = DataLoader(TensorDataset(inputs, wanted), batch_size=size, sampler=order.tolist())
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
        model.train()
        for data, target in loader:
            loss = F.cross_entropy(model(data), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def uplink_package(self) -> list[Up]:
        """What all sent."""
        package, self.cache = self.cache, []
        return package


@contextmanager
def blazefl(workers: int, given: Task) -> Iterator[Round]:
    """The engine; the second round, which begins with the end of the first, shows its weights."""
    handler, trainer = Handler(given), Trainer(given, workers)
    rounds = itertools.count(1)

    def run() -> Outcome:
        handler.show = next(rounds) == 2
        trainer.local_process(handler.downlink_package(), handler.sample_clients())
        uploads = trainer.uplink_package()
        for upload in uploads:
            handler.load(upload)
        weights = [upload.weights for upload in uploads if upload.weights is not None]
        return handler.soft_labels, torch.stack(weights) if weights else torch.empty(0)

    yield run
