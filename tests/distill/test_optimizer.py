"""Our steps are PyTorch's, to the bit, and import no compiler."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from fedistill.distill.optimizer import Optimizer
from fedistill.distill.recipe import Recipe


def weights():
    drawn = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=drawn)) for shape in ((4, 3), (4,), (2, 4))]


def grads(step, number):
    drawn = torch.Generator().manual_seed(100 * step + number)
    return [torch.randn(shape, generator=drawn) for shape in ((4, 3), (4,), (2, 4))][number]


def theirs(recipe, taught):
    groups = [
        {"params": [w for w in taught if w.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [w for w in taught if w.dim() <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, recipe.lr, momentum=recipe.momentum or 0.0, foreach=True)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, recipe.lr, foreach=True)


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize(
    ("kind", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("adam", None), ("adamw", None)]
)
def test_a_step_is_pytorchs_to_the_bit(kind, momentum, decay):
    recipe = Recipe(optimizer=kind, momentum=momentum, lr=0.05, weight_decay=decay)
    mine, other = weights(), weights()
    ours, reference = Optimizer(recipe, mine), theirs(recipe, other)
    for step in range(6):
        ours.zero_grad()
        reference.zero_grad()
        for number in range(3):
            if step != 2 or number != 1:  # a weight that has no gradient for once
                mine[number].grad = grads(step, number)
                other[number].grad = grads(step, number)
        for group in reference.param_groups:
            group["lr"] = 0.05 / (step + 1)
        reference.step()
        ours.step(0.05 / (step + 1))
        for one, two in zip(mine, other, strict=True):
            assert torch.equal(one, two)
    for one, two in zip(mine, other, strict=True):
        kept = {k: v for k, v in reference.state[two].items() if v is not None}
        assert set(ours.state.get(one, {})) == set(kept)
        assert all(torch.equal(ours.state[one][name], value) for name, value in kept.items())


def test_a_student_is_taught_without_importing_a_compiler():
    text = (
        "import sys; from functools import partial; import numpy as np, fedistill as fd;"
        "from fedistill.distill.build import build_learner;"
        "rows = fd.Rows(np.ones((20, 4), np.float32), np.arange(20) % 2);"
        "recipe = fd.Recipe(familiarity=True, average=0.9);"
        "student = build_learner(partial(fd.models.MLP, 4, 2), recipe, classes=2, seed=1,"
        " background=rows.inputs);"
        "student.fit(rows, seed=1); student.predict(rows.inputs);"
        "sys.exit(bool({'torch._dynamo', 'sympy', 'torch._inductor'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0
