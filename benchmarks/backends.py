"""A round of a whole federation by the backends of one process: processor time against `serial`.

`python benchmarks/backends.py --model mlp --method fedistill` prints a JSON line for each backend:
how often its time goes into that of `serial`, and how far its soft targets and weights are from
those after the first round (later ones drift apart, as `serial` does from itself when its weights
begin 1e-7 apart). All of a round counts: messages, codecs, combining, the steps of all clients.
The backends take turns on one thread; each figure is of the fastest turn. The rows are those of
`fd_round.py`. With `--private 20` clients are private by DP-SGD, 20 noisy steps a round, each row
in one by a coin of 1/4. All have coins and noise of their own: no distances are printed then.

`beyond` counts clients whose weights are more than 5e-5 away. About one in ten million inputs of
ReLU units is 0 to rounding: the unit is on in one order of adding up and off in another, and the
gradient of that row comes or goes. `serial` differs from itself by as much when the weights of such
a unit begin one ulp away.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial

import numpy as np
import torch

from fedistill.backends.serial import Serial
from fedistill.backends.vectorized import Vectorized
from fedistill.client import Client
from fedistill.distill.recipe import Recipe
from fedistill.federation import Federation
from fedistill.models import MLP, Linear
from fedistill.presets import METHODS
from fedistill.settings import PrivacySettings
from fedistill.types import ProxySet, Rows

INPUTS, CLASSES, OWN, PUBLIC = 784, 10, 200, 2000
BUILDS = {
    "mlp": partial(MLP, INPUTS, CLASSES, width=128),
    "linear": partial(Linear, INPUTS, CLASSES),
}
GATE = 5e-5
"""Weights after a round may differ by this much."""
BACKENDS = {"serial": Serial, "vectorized": Vectorized}


def federation(model: str, clients: int, method: str, steps: int) -> Federation:
    """Clients of one model, without a student at the server; 0 noisy steps: not private."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(CLASSES, INPUTS))

    def rows(count: int) -> Rows:
        labels = random.integers(0, CLASSES, count)
        return Rows((centres[labels] + 2 * random.normal(size=(count, INPUTS))), labels)

    recipe = Recipe(epochs=1, batch_size=20, lr=0.05, momentum=0.9)
    people = [Client(f"c{k}", BUILDS[model], rows(OWN), training=recipe) for k in range(clients)]
    names = [str(label) for label in range(CLASSES)]
    how = PrivacySettings(mechanism="dpsgd", sample_rate=0.25, steps=steps) if steps else None
    return Federation(
        people,
        ProxySet(rows(PUBLIC).inputs),
        None,
        method,
        classes=names,
        seed=1,
        device="cpu",
        privacy=how,
    )


Weights = dict[str, np.ndarray]


def second_round(
    backend: str, model: str, clients: int, method: str, steps: int
) -> tuple[float, Federation, Weights]:
    """Processor time of the first round with soft targets to learn from; weights before it."""
    fed = federation(model, clients, method, steps)
    rounds = fed.run(3, backend=BACKENDS[backend], measure_every=99)
    next(rounds)
    weights = {
        f"{name}.{key}": value
        for name, site in fed.sites.items()
        for key, value in site.learner.state_dict().items()
        if key.startswith("net.")
    }
    began = time.process_time()
    next(rounds)
    return time.process_time() - began, fed, weights


def apart(one: Federation, other: Federation) -> float:
    """Largest difference of the soft targets of the first round, as clients were told them."""
    pairs = [(site.targets, other.sites[name].targets) for name, site in one.sites.items()]
    return max(float(np.abs(here - there).max()) for here, there in pairs)


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=list(BUILDS), default="mlp")
    parser.add_argument("--method", choices=list(METHODS), default="fedistill")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--private", type=int, default=0, metavar="STEPS")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    best: dict[str, float] = {}
    found: dict[str, Federation] = {}
    held: dict[str, Weights] = {}
    for _ in range(asked.turns):
        for name in BACKENDS:
            took, found[name], held[name] = second_round(
                name, asked.model, asked.clients, asked.method, asked.private
            )
            best[name] = min(took, best.get(name, took))
    for name in BACKENDS:
        gaps: dict[str, float] = {}
        for key, value in held[name].items():
            gap = float(np.abs(value - held["serial"][key]).max())
            client = key.partition(".")[0]
            gaps[client] = max(gap, gaps.get(client, 0.0))
        line = {
            "backend": name,
            "model": asked.model,
            "method": asked.method,
            "clients": asked.clients,
            "private": asked.private,
            "times_serial": round(best["serial"] / best[name], 2),
            "load": round(os.getloadavg()[0], 1),
        }
        if not asked.private:
            line["dq"] = apart(found[name], found["serial"])
            line["dw"] = max(gaps.values())
            line["beyond"] = sum(gap > GATE for gap in gaps.values())
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
