"""What pooling in oneDNN's layout saves in training and prediction of the small image models.

`python benchmarks/cnn_step.py` prints one JSON line for each model: milliseconds of processor time
of a training step (100 rows) and of predicting 1,000 rows, with `max_pool2d` and with
`fedistill.pooling`, the ratios, and whether values and gradients are the same to the bit. The two
take turns on one thread; each figure is the best of seven. Half a minute.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedistill.models import CNN, LeNet, threads
from fedistill.pooling import MaxPool

TURNS, STEPS = 7, 8
PREDICTED, CHUNK = 1000, 250


class PlainLeNet(LeNet):
    """LeNet on PyTorch's own pool."""

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        hidden = F.relu(F.max_pool2d(self.conv1(inputs), 2))
        hidden = F.relu(F.max_pool2d(self.conv2(hidden), 2)).flatten(1)
        logits: Tensor = self.head(F.relu(self.fc2(F.relu(self.fc1(hidden)))))
        return logits


def plain_cnn(channels: int, classes: int) -> CNN:
    """The CNN on PyTorch's own pool, after ReLU."""
    made = CNN(channels, classes)
    layers = list(made.trunk)
    for index, layer in enumerate(layers):
        if isinstance(layer, MaxPool):
            layers[index : index + 2] = [nn.ReLU(), nn.MaxPool2d(2)]
    made.trunk = nn.Sequential(*layers)
    return made


def learn(model: nn.Module, rows: Tensor, targets: Tensor) -> list[Tensor]:
    """Gradients of one step."""
    for weight in model.parameters():
        weight.grad = None
    (-(targets * model(rows).log_softmax(1)).sum(1).mean()).backward()
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


def predict(model: nn.Module, rows: Tensor) -> Tensor:
    """Logits of many rows, some at a time."""
    with torch.inference_mode():
        return torch.cat([model(part) for part in torch.split(rows, CHUNK)])


def milliseconds(work: Callable[[], object], times: int) -> float:
    """Processor time of one call."""
    began = time.process_time()
    for _ in range(times):
        work()
    return 1000 * (time.process_time() - began) / times


def compare(name: str, builds: Mapping[str, Callable[[], nn.Module]], *shape: int) -> None:
    """One line on one model."""
    models = {}
    for kind, build in builds.items():
        torch.manual_seed(0)
        models[kind] = build()
    rows = torch.rand(PREDICTED, *shape)
    rows[..., : shape[-1] // 4] = 0.0  # a background: windows full of ties
    targets = torch.randn(100, 10).softmax(1)
    works: dict[str, tuple[Callable[[nn.Module], object], int]] = {
        "step": (lambda model: learn(model, rows[:100], targets), STEPS),
        "predict": (lambda model: predict(model, rows), 1),
    }
    best: dict[str, float] = {}
    for _ in range(TURNS):
        for task, (work, times) in works.items():
            for kind, model in models.items():
                took = milliseconds(partial(work, model), times)
                best[f"{task}_{kind}_ms"] = min(took, best.get(f"{task}_{kind}_ms", took))
    plain, ours = models.values()
    pairs = zip(learn(plain, rows[:100], targets), learn(ours, rows[:100], targets), strict=True)
    line = {
        "model": name,
        "rows": "x".join(map(str, shape)),
        **{key: round(value, 2) for key, value in best.items()},
        **{
            f"{task}_ratio": round(best[f"{task}_plain_ms"] / best[f"{task}_ours_ms"], 2)
            for task in works
        },
        "same_gradients": all(torch.equal(one, other) for one, other in pairs),
        "same_logits": torch.equal(predict(plain, rows), predict(ours, rows)),
        "torch": torch.__version__,
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    """Print a line for each model."""
    with threads(1):
        compare("lenet", {"plain": PlainLeNet, "ours": LeNet}, 1, 28, 28)
        for shape in ((1, 28, 28), (3, 32, 32)):
            builds = {"plain": partial(plain_cnn, shape[0], 10), "ours": partial(CNN, shape[0], 10)}
            compare("cnn", builds, *shape)


if __name__ == "__main__":
    main()
