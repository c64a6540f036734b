"""The standard round: its rows, its models, the orders in which rows are seen.

Ten Gaussian classes in 784 dimensions; each client has 200 rows, 2,000 are public. A client trains
one epoch on its rows (batches of 20, SGD, rate 0.05, momentum 0.9), predicts the public rows, and
distils one epoch on the mean of all predictions (batches of 100, one order for all). Momentum
begins at zero in each phase. All orders are drawn before. Images are the same vectors as 1x28x28.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedistill.models import MLP, LeNet, Linear
from fedistill.pooling import MaxPool

INPUTS, CLASSES, OWN, PUBLIC, WIDTH = 784, 10, 200, 2000, 128
BATCH, RATE, MOMENTUM = 20, 0.05, 0.9
IMAGE = (1, 28, 28)


class PlainLeNet(LeNet):
    """LeNet as tutorials have it."""

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        hidden = F.max_pool2d(F.relu(self.conv1(inputs)), 2)
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2).flatten(1)
        logits: Tensor = self.head(F.relu(self.fc2(F.relu(self.fc1(hidden)))))
        return logits


def plain_cnn() -> nn.Module:
    """Two convolutions with GroupNorm and one linear layer, as tutorials have them."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(INPUTS, CLASSES)),
    )


def cnn() -> nn.Module:
    """The same on this package's pool, with ReLU after it: the same values for less."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), MaxPool(), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), MaxPool(), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(INPUTS, CLASSES)),
    )


Build = Callable[[], nn.Module]
MODELS: dict[str, tuple[tuple[int, ...], Build, Build]] = {
    "mlp": ((INPUTS,), *[partial(MLP, INPUTS, CLASSES, width=WIDTH)] * 2),
    "linear": ((INPUTS,), *[partial(Linear, INPUTS, CLASSES)] * 2),
    "lenet": (IMAGE, PlainLeNet, LeNet),
    "cnn": (IMAGE, plain_cnn, cnn),
}
"""Shape of a row; the model as a tutorial has it; the same, with the same weights, as ours."""


@dataclass
class Task:
    """The rows, the orders in which they are seen, and the weights to start from."""

    plain: Build
    build: Build
    """The same model for engines of this package."""
    inputs: Tensor
    """Own rows ``[clients, rows, ...]``."""
    labels: Tensor
    proxy: Tensor
    orders: Tensor
    """Of own rows, ``[clients, rows]``."""
    order: Tensor
    """Of public rows, one for all."""
    batch: int
    """Public rows of a step."""
    starts: list[list[Tensor]]

    def __len__(self) -> int:
        return len(self.inputs)

    def mean(self, sums: Tensor) -> Tensor:
        """The mean prediction, of the sum over these clients ``[rows, classes]``.

        Where several processes share the clients, this is where they wait for one another.
        """
        return sums / len(self)


Outcome = tuple[Tensor, Tensor]
"""Mean prediction ``[rows, classes]`` and all weights ``[clients, weights]``."""
Round = Callable[[], Outcome]
Engine = Callable[[Task], AbstractContextManager[Round]]
"""From a task to what runs its round, again and again; leaving the context ends what it started."""


def task(model: str, clients: int, batch: int = 100) -> Task:
    """The standard round; the same rows, orders and weights whenever it is made."""
    shape, plain, build = MODELS[model]
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, INPUTS, generator=random)
    draw = partial(torch.randn, generator=random)
    labels = torch.randint(CLASSES, (clients, OWN), generator=random)
    hidden = torch.randint(CLASSES, (PUBLIC,), generator=random)
    inputs = draw(clients, OWN, INPUTS).mul_(2)
    for rows, of in zip(inputs, labels, strict=True):
        rows += centres[of]
    proxy = draw(PUBLIC, INPUTS).mul_(2).add_(centres[hidden])
    torch.manual_seed(1)
    return Task(
        plain,
        build,
        inputs.view(clients, OWN, *shape),
        labels,
        proxy.view(PUBLIC, *shape),
        torch.stack([torch.randperm(OWN, generator=random) for _ in range(clients)]),
        torch.randperm(PUBLIC, generator=random),
        batch,
        [[w.detach().clone() for w in plain().parameters()] for _ in range(clients)],
    )


def begin(build: Build, weights: list[Tensor]) -> nn.Module:
    """A model with these weights."""
    model = build()
    with torch.no_grad():
        for weight, value in zip(model.parameters(), weights, strict=True):
            weight.copy_(value)
    return model


def flat(weights: list[Tensor]) -> Tensor:
    """Weights of a model in one row."""
    return torch.cat([weight.detach().flatten() for weight in weights])
