"""DP-SGD of linear layers with ReLU between them, by hand, for many clients at once.

As in :mod:`fedistill.privacy.gram`, with tensors ``[c, ...]`` of ``c`` clients with equal shapes.
A step has another number of rows at every client, for each row is drawn by a coin of its own: those
that have fewer than the most are filled up with rows that are absent and add nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedistill.errors import RunError
from fedistill.privacy.gram import squared_lengths
from fedistill.privacy.rowwise import BROKEN_WEIGHTS, factors_of, is_finite

# --- one pass ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """What one pass left of each layer.

    Attributes:
        given: what it was given, ``[c, rows, in]``.
        deltas: gradients of the rows' losses by what it gave, ``[c, rows, out]``.
    """

    given: Sequence[Tensor]
    deltas: Sequence[Tensor]

    def norms(self) -> Tensor:
        """Of the gradients of single rows, ``[c, rows]``."""
        squares = [
            squared_lengths(seen, delta, bias=True)
            for seen, delta in zip(self.given, self.deltas, strict=True)
        ]
        return torch.stack(squares).sum(0).sqrt()

    def add_to(self, sums: Sequence[Tensor], factors: Tensor) -> None:
        """Add the gradients of single rows times their factors ``[c, rows]``.

        The factors go into the deltas: a pass gives its sums once.

        Args:
            sums: ``[c, out, in]`` and ``[c, out]`` for weight and bias of each layer.
            factors: of the rows.
        """
        for place, (seen, delta) in enumerate(zip(self.given, self.deltas, strict=True)):
            delta.mul_(factors[..., None])
            sums[2 * place].baddbmm_(delta.transpose(1, 2), seen)
            sums[2 * place + 1].add_(delta.sum(1))


def through(
    weights: Sequence[Tensor], biases: Sequence[Tensor], rows: Tensor, labels: Tensor
) -> Pass:
    """One pass to the cross-entropy of each row and back.

    Args:
        weights: ``[c, out, in]`` of each layer.
        biases: ``[c, out]`` of each layer.
        rows: ``[c, rows, in]``.
        labels: ``[c, rows]``.
    """
    given = [rows]
    outputs = torch.baddbmm(biases[0][:, None], rows, weights[0].transpose(1, 2))
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        given.append(outputs.relu_())
        outputs = torch.baddbmm(bias[:, None], outputs, weight.transpose(1, 2))
    delta = outputs.softmax(2)
    own = labels[..., None]
    delta.scatter_add_(2, own, torch.full_like(own, -1, dtype=delta.dtype))
    deltas = [delta]
    for weight, seen in zip(reversed(weights[1:]), reversed(given[1:]), strict=True):
        delta = torch.bmm(delta, weight).mul_(seen > 0)
        deltas.append(delta)
    return Pass(given, deltas[::-1])


# --- many clients --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """The rows of one step of every client side by side.

    Attributes:
        inputs: ``[c, rows, in]``.
        labels: ``[c, rows]``.
        present: ``[c, rows]``, 1 or 0.
    """

    inputs: Tensor
    labels: Tensor
    present: Tensor

    @classmethod
    def of(cls, inputs: Sequence[Tensor], labels: Sequence[Tensor]) -> Drawn:
        """From each client's rows ``[rows, in]`` and labels ``[rows]``; there may be none."""
        counts = torch.tensor([len(part) for part in labels])
        most = torch.arange(int(counts.max()))
        return cls(
            nn.utils.rnn.pad_sequence(list(inputs), batch_first=True),
            nn.utils.rnn.pad_sequence(list(labels), batch_first=True),
            (most < counts[:, None]).to(inputs[0].dtype),
        )

    def only(self, usable: Tensor) -> Drawn:
        """The same without some rows, ``[c, rows]``."""
        inputs = self.inputs.masked_fill(~usable[..., None], 0.0)
        return Drawn(inputs, self.labels, self.present * usable)


def noisy_gradients(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    drawn: Drawn,
    into: Sequence[Tensor],
    *,
    clip: float,
    sigma: Sequence[float],
    expected: Tensor,
    generators: Sequence[torch.Generator],
    keep: float = 0.0,
) -> None:
    """The noisy mean gradient of every client, folded into its momentum.

    Args:
        weights: ``[c, out, in]`` of each layer.
        biases: ``[c, out]`` of each layer.
        drawn: rows of the step.
        into: weight and bias of each layer; ``keep`` of what is there stays.
        clip: largest norm of a row's gradient.
        sigma: noise of each client, in clipping norms.
        expected: ``[c]``, expected number of rows in a step, by which sums are divided.
        generators: of the noise, one a client: what one knows of its own tells nothing of others'.
        keep: momentum.

    Raises:
        RunError: weights are not finite.
    """
    found = through(weights, biases, drawn.inputs, drawn.labels)
    norms = found.norms()
    usable = norms.isfinite()
    if not bool(usable.all()):  # such a row adds nothing, as in the clipping of a single client
        if not is_finite([*weights, *biases]):
            raise RunError(BROKEN_WEIGHTS)
        drawn = drawn.only(usable)
        found = through(weights, biases, drawn.inputs, drawn.labels)
        norms = found.norms()
    for place, (random, share) in enumerate(zip(generators, sigma, strict=True)):
        spread = share * clip / float(expected[place])
        for tensor in into:  # client by client: noise is added while it is in the cache
            own = _lying(tensor[place])
            if keep:
                own.mul_(keep).add_(torch.empty_like(own).normal_(0.0, spread, generator=random))
            else:
                own.normal_(0.0, spread, generator=random)
    found.add_to(into, factors_of(norms, clip) * drawn.present / expected[:, None])


def _lying(values: Tensor) -> Tensor:
    """A matrix as it lies in memory, or its transpose: variates are drawn faster in order."""
    return values if values.is_contiguous() else values.mT
