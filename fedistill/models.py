"""Small students. A model is handed over as a factory, so that building it can be seeded too.

``partial(fd.models.MLP, 64, 10, width=32)`` is a factory; any callable that returns a
``torch.nn.Module`` (inputs ``[batch, ...]`` to logits ``[batch, classes]``) or a scikit-learn
classifier will do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedistill.altered import altered
from fedistill.errors import FedistillError, Problem, SettingsError
from fedistill.pooling import MaxPool, convolve_and_pool


class Linear(nn.Module):
    """Softmax regression on flattened inputs.

    Args:
        inputs: number of input values.
        classes: number of classes.
    """

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, classes)

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        logits: Tensor = self.head(inputs.flatten(1))
        return logits


class MLP(nn.Module):
    """Hidden ReLU layers of equal width on flattened inputs.

    Args:
        inputs: number of input values.
        classes: number of classes.
        width: units of a hidden layer.
        depth: hidden layers.
    """

    def __init__(self, inputs: int, classes: int, width: int = 64, depth: int = 1) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth]
        layers = [
            layer
            for before, after in itertools.pairwise(sizes)
            for layer in (nn.Linear(before, after), nn.ReLU())
        ]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        logits: Tensor = self.head(self.trunk(inputs.flatten(1)))
        return logits


class LeNet(nn.Module):
    """LeNet for one-channel 28x28 images (61,706 parameters with ten classes).

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, classes)

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        # ReLU after the pool gives the same values for a quarter of the work.
        hidden = F.relu(convolve_and_pool(self.conv1, inputs))
        hidden = F.relu(convolve_and_pool(self.conv2, hidden)).flatten(1)
        logits: Tensor = self.head(F.relu(self.fc2(F.relu(self.fc1(hidden)))))
        return logits

    def in_order(self) -> Sequence[nn.Module]:
        """The same as layers one after another, for :mod:`fedistill.byhand`."""
        relu = nn.ReLU()
        convolutions = [self.conv1, MaxPool(), relu, self.conv2, MaxPool(), relu, nn.Flatten()]
        return [*convolutions, self.fc1, relu, self.fc2, relu, self.head]


class CNN(nn.Module):
    """Three 3x3 convolutions with GroupNorm, then the mean over places.

    GroupNorm and not BatchNorm: a batch of one row trains, and nothing is shared between the
    rows of a batch, which differential privacy asks for.

    Args:
        channels: channels of the image.
        classes: number of classes.
        width: channels of the first layer, a multiple of 4; doubled by each further one.
    """

    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        if width % 4:
            raise FedistillError(f"a cnn needs a width that is a multiple of 4, found {width}")
        sizes = [channels, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after)]
            layers += [MaxPool(), nn.ReLU()] if after < sizes[-1] else [nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        logits: Tensor = self.head(self.trunk(inputs).mean(dim=(2, 3)))
        return logits


def gradient_boosting(seed: int = 0) -> Any:
    """scikit-learn's gradient-boosted trees: small, slow to learn and random, for few rows."""
    from sklearn.ensemble import GradientBoostingClassifier

    return GradientBoostingClassifier(
        n_estimators=60,
        max_depth=2,
        learning_rate=0.05,
        min_samples_leaf=2,
        subsample=0.5,
        max_features="sqrt",
        random_state=seed,
    )


def hist_gradient_boosting(seed: int = 0) -> Any:
    """scikit-learn's histogram gradient-boosted trees, for thousands of rows and more."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(early_stopping=False, random_state=seed)


def logistic_regression(seed: int = 0) -> Any:
    """scikit-learn's logistic regression with its default penalty."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000, random_state=seed)


def random_forest(seed: int = 0) -> Any:
    """scikit-learn's random forest of 200 trees."""
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(n_estimators=200, min_samples_leaf=2, random_state=seed, n_jobs=1)


def factory(
    name: str, shape: Sequence[int], classes: int, *, width: int = 64, depth: int = 1
) -> Callable[[], Any]:
    """The factory of a model that settings name.

    Args:
        name: one of ``fedistill list models``.
        shape: shape of one input row.
        classes: number of classes.
        width: hidden units or channels, where the model has them.
        depth: hidden layers, where the model has them.

    Raises:
        FedistillError: unknown name, or a model that cannot take such rows.
    """
    inputs = math.prod(shape)
    if name == "linear":
        return partial(Linear, inputs, classes)
    if name == "mlp":
        return partial(MLP, inputs, classes, width=width, depth=depth)
    if name == "lenet":
        if tuple(shape) != (1, 28, 28):
            raise _unfit(
                f"lenet takes images of 1x28x28, the rows are {'x'.join(map(str, shape))}: "
                "use cnn or mlp"
            )
        return partial(LeNet, classes)
    if name == "cnn":
        if len(shape) != 3:
            raise _unfit(
                f"cnn takes images (channels, height, width), the rows are "
                f"{'x'.join(map(str, shape))}: use mlp or linear"
            )
        return partial(CNN, shape[0], classes, width=width)
    if name == "sequential":
        if len(shape) != 1:
            raise _unfit(
                f"sequential takes the last clicks of a session, the rows are "
                f"{'x'.join(map(str, shape))}: use a sessions: source"
            )
        # Imported late: recommenders stand on the optimizer, which stands beside this module.
        from fedistill.recommend.models import SequentialRecommender

        return partial(SequentialRecommender, classes, width=width)
    classic = {
        "gradient-boosting": gradient_boosting,
        "hist-gradient-boosting": hist_gradient_boosting,
        "logistic-regression": logistic_regression,
        "random-forest": random_forest,
    }
    if name in classic:
        return classic[name]
    raise FedistillError(f'unknown model "{name}"')


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with this many torch threads: on small models more than one only get in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _unfit(text: str) -> SettingsError:
    return SettingsError([Problem("model", text)])


def layers_of(module: nn.Module, heard: object = None) -> list[nn.Linear] | None:
    """The layers of a Linear or MLP, if it is just that and learns as a whole; else None.

    Its function is then known: linear layers with biases on flattened rows, ReLU between them.

    Args:
        module: any.
        heard: whose hooks do not count.
    """
    if type(module) is Linear:
        layers: list[nn.Module] = [module.head]
    elif type(module) is MLP and type(module.trunk) is nn.Sequential:
        trunk = list(module.trunk)
        layers = [*trunk[::2], module.head]
        if not all(type(layer) is nn.ReLU for layer in trunk[1::2]):
            return None
    else:
        return None
    linear = [layer for layer in layers if type(layer) is nn.Linear and layer.bias is not None]
    held = [weight for layer in linear for weight in (layer.weight, layer.bias)]
    # A module names a weight of two layers but once.
    if len(linear) < len(layers) or list(map(id, held)) != list(map(id, module.parameters())):
        return None
    plain = all(weight.requires_grad and weight.dtype == torch.float32 for weight in held)
    return linear if plain and not any(altered(one, heard) for one in module.modules()) else None


def parameter_count(module: nn.Module) -> int:
    """Number of trainable values; four bytes each is what FedAvg sends."""
    return sum(parameter.numel() for parameter in module.parameters())


def pick_device(name: str) -> torch.device:
    """``cpu``, ``cuda``, or for ``auto`` CUDA where there is one.

    Raises:
        FedistillError: CUDA is asked for and absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    number = int(name.partition(":")[2] or 0)
    if name.startswith("cuda") and number >= torch.cuda.device_count():
        text = f'"{name}" is asked for, this machine has {torch.cuda.device_count()} such: use cpu'
        raise SettingsError([Problem("backend.device", text)])
    return torch.device(name)
