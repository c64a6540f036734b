"""Flower's simulation engine (Ray) on the standard round: https://flower.ai, `flwr[simulation]`.

Written as its documentation writes a custom loop: a `ClientApp` that trains when a message comes
and keeps its model in `context.state`, a `ServerApp` that sends to all nodes and takes the mean of
what comes back. As many actors as workers, with one core each. Every actor makes the rows of the
task once. The simulation runs in a thread, and a round of the `ServerApp` waits until it is asked
for.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from task import BATCH, MOMENTUM, RATE, Outcome, Round, Task, begin, flat, task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

load = functools.lru_cache(maxsize=1)(task)
client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """A client's round: distil, train, predict."""
    config: Any = message.content["config"]
    given = load(config["model"], config["clients"], config["batch"])
    cid = int(context.node_config["partition-id"])
    answer = RecordDict({"who": ConfigRecord({"cid": cid})})
    if "model" in context.state:
        model = given.plain()
        model.load_state_dict(context.state["model"].to_torch_state_dict())
    else:
        model = begin(given.plain, given.starts[cid])
    if "targets" in message.content:
        (targets,) = message.content["targets"].to_numpy_ndarrays()
        epoch(model, given.proxy, torch.from_numpy(targets.copy()), given.order, given.batch)
        if config["show"]:
            answer["weights"] = ArrayRecord([flat(list(model.parameters())).numpy()])
    epoch(model, given.inputs[cid], given.labels[cid], given.orders[cid], BATCH)
    model.eval()
    with torch.no_grad():
        probs = F.softmax(model(given.proxy), dim=1)
    context.state["model"] = ArrayRecord(model.state_dict())
    answer["probs"] = ArrayRecord([probs.numpy()])
    return Message(content=answer, reply_to=message)


def epoch(model: nn.Module, inputs: Tensor, wanted: Tensor, order: Tensor, size: int) -> None:
    """One pass over rows."""
    loader = DataLoader(TensorDataset(inputs, wanted), batch_size=size, sampler=order.tolist())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    model.train()
    for data, target in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), target)
        loss.backward()
        optimizer.step()


@contextmanager
def flower(model: str, clients: int, batch: int, workers: int, given: Task) -> Iterator[Round]:
    """The engine; the second round, which begins with the end of the first, shows its weights."""
    del given  # the actors make their own
    asked: queue.Queue[bool | None] = queue.Queue()
    done: queue.Queue[Outcome] = queue.Queue()
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        while len(nodes := list(grid.get_node_ids())) < clients:
            time.sleep(0.1)
        targets: np.ndarray | None = None
        while (show := asked.get()) is not None:
            config = ConfigRecord(
                {"model": model, "clients": clients, "batch": batch, "show": show}
            )
            content = RecordDict({"config": config})
            if targets is not None:
                content["targets"] = ArrayRecord([targets])
            messages = [
                Message(content=content, message_type="train", dst_node_id=node) for node in nodes
            ]
            answers = [reply.content for reply in grid.send_and_receive(messages)]
            found = [answer["probs"].to_numpy_ndarrays()[0] for answer in answers]
            targets = np.mean(found, axis=0)
            answers.sort(key=lambda answer: answer["who"]["cid"])
            weights = [a["weights"].to_numpy_ndarrays()[0] for a in answers if "weights" in a]
            shown = torch.from_numpy(np.stack(weights)) if weights else torch.empty(0)
            done.put((torch.from_numpy(targets), shown))

    config = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": workers, "num_gpus": 0},
    }
    logging.getLogger("flwr").setLevel(logging.ERROR)
    simulation = threading.Thread(
        target=run_simulation,
        kwargs={
            "server_app": server_app,
            "client_app": client_app,
            "num_supernodes": clients,
            "backend_config": config,
        },
    )
    simulation.start()
    rounds = itertools.count(1)

    def run() -> Outcome:
        asked.put(next(rounds) == 2)
        while True:
            try:
                return done.get(timeout=5)
            except queue.Empty:
                if not simulation.is_alive():
                    raise RuntimeError("Flower's simulation has ended: see above") from None

    try:
        yield run
    finally:
        asked.put(None)
        simulation.join(60)
