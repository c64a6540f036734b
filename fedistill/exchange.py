"""Methods whose clients exchange a table each, and not predictions on drawn rows, as data.

A client *describes* what it learned as a table ``[items, width]``, the server *combines* the
tables, and every client *applies* what came of it before it trains again. NaN rows stand for
items that a client has nothing for.

All of these tell more than predictions on public rows do: ``tells`` says what, for the report and
for the policy of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedistill.distill.guide import Guide
from fedistill.distill.learner import Guided, Learner
from fedistill.distill.torch_student import TorchStudent
from fedistill.errors import FedistillError, Rejected
from fedistill.losses.kernels import gram
from fedistill.types import FloatArray, IntArray, Rows

MOST_PUBLIC = 256
"""Rows of a kernel: its bytes grow with their square, 262 kB at this many."""

# --- combining -----------------------------------------------------------------------------------


def plain_mean(tables: FloatArray, sizes: FloatArray) -> FloatArray:
    """Mean of each item over the clients that have it, ``[items, width]``; NaN if none has.

    Args:
        tables: ``[clients, items, width]``, NaN rows where a client has nothing.
        sizes: ``[clients]``; all count alike.
    """
    return _mean(tables, np.ones_like(sizes, dtype=np.float64))


def mean_by_size(tables: FloatArray, sizes: FloatArray) -> FloatArray:
    """As :func:`plain_mean`, every client weighing as many rows as it has (FedAvg)."""
    return _mean(tables, np.asarray(sizes, dtype=np.float64))


def _mean(tables: FloatArray, weights: FloatArray) -> FloatArray:
    values, held = _split(tables)
    shares = held * weights[:, None]
    total = shares.sum(axis=0)
    shares = shares / np.where(total > 0, total, 1.0)
    mean: FloatArray = np.einsum("kiw,ki->iw", values, shares)
    mean[total <= 0] = np.nan
    return mean


def means_of_others(tables: FloatArray) -> FloatArray:
    """For each client the plain mean of all others that have an item: what FD sends it.

    From the sums, as in Jeong et al., arXiv 1811.11479: (sum - own) / (number - 1).

    Args:
        tables: ``[clients, items, width]``, NaN rows where a client has nothing.

    Returns:
        ``[clients, items, width]``, NaN rows where nobody else has anything.
    """
    values, held = _split(tables)
    others = held.sum(axis=0) - held
    rest = (values.sum(axis=0) - values) / np.maximum(others, 1)[:, :, None]
    return np.where(others[:, :, None] > 0, rest, np.nan)


def _split(tables: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Values with zeros for what is absent, and 1 for every item that is there ``[k, items]``."""
    held = np.asarray(~np.isnan(tables).any(axis=2))
    values = np.where(held[:, :, None], tables, 0.0)
    return values.astype(np.float64), held.astype(np.float64)


# --- describing ----------------------------------------------------------------------------------


def class_means(values: FloatArray, labels: IntArray, classes: int) -> FloatArray:
    """Mean of the values of each class, ``[classes, width]``; NaN for a class without rows.

    Args:
        values: ``[rows, width]``.
        labels: ``[rows]``.
        classes: number of classes.
    """
    means = np.full((classes, values.shape[1]), np.nan)
    for label in np.unique(labels):
        means[label] = values[labels == label].mean(axis=0, dtype=np.float64)
    return means


def unit_kernel(features: FloatArray) -> FloatArray:
    """Gram matrix ``[rows, rows]`` of the centred features, of Frobenius norm 1.

    All zeros where the features of all rows are equal.
    """
    kernel: FloatArray = gram(torch.from_numpy(features.astype(np.float64))).numpy()
    norm = np.linalg.norm(kernel)
    return kernel / norm if norm > 0 else kernel


def flat_weights(student: TorchStudent) -> FloatArray:
    """All parameters and float buffers as one float32 vector."""
    return np.concatenate(
        [
            tensor.detach().cpu().numpy().ravel().astype("<f4")
            for tensor in student.module.state_dict().values()
            if tensor.is_floating_point()
        ]
    )


def set_weights(student: TorchStudent, vector: FloatArray) -> None:
    """The inverse of :func:`flat_weights`.

    Raises:
        FedistillError: a vector of another model.
    """
    tensors = [t for t in student.module.state_dict().values() if t.is_floating_point()]
    wanted = sum(tensor.numel() for tensor in tensors)
    if vector.shape != (wanted,):
        raise FedistillError(
            f"expected {wanted} weights, found {vector.size}: weights can be exchanged between "
            "models of one architecture only"
        )
    start = 0
    for tensor in tensors:
        part = np.array(vector[start : start + tensor.numel()], dtype=np.float32)
        tensor.copy_(torch.from_numpy(part).reshape(tensor.shape))
        start += tensor.numel()


def _finite(values: FloatArray, what: str) -> FloatArray:
    """The values; NaN would pass for an item that is absent.

    Raises:
        Rejected: ``nonfinite``.
    """
    if not np.isfinite(values).all():
        raise Rejected("nonfinite", f"{what} are NaN or infinite: lower the lr")
    return values


# --- the seam ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What clients tell one another instead of predictions on drawn rows.

    Attributes:
        name: as in settings and in messages.
        summary: one line.
        tells: what it tells beyond predictions on public rows.
        describe: a learner after training, its own rows, the round's public rows and the number
            of classes to its table ``[items, width]``, NaN rows for what it has nothing for.
            Raises :class:`Rejected` where the table would not be finite.
        apply: hand a learner the combined table and the public rows that it is about.
        combine: tables ``[clients, items, width]`` and sizes ``[clients]`` to one table.
        sides: number of classes and of public rows to items and width of a table; a width of 0
            is not known beforehand.
        start: the server's learner to the table of the first round; None: there is none.
        public: public rows that a table is about, at most; 0: it is about none.
        leave_out: a client gets the mean of the others (:func:`means_of_others`).
        needs: what a learner must be to take part.
    """

    name: str
    summary: str
    tells: str
    describe: Callable[[Learner, Rows, FloatArray, int], FloatArray]
    apply: Callable[[Learner, FloatArray, FloatArray], None]
    sides: Callable[[int, int], tuple[int, int]]
    combine: Callable[[FloatArray, FloatArray], FloatArray] = plain_mean
    start: Callable[[Learner], FloatArray] | None = None
    public: int = 0
    leave_out: bool = False
    needs: type[Any] = Guided

    def check(self, learner: Learner) -> None:
        """Refuse a learner that cannot take part.

        Raises:
            FedistillError: with what it would have to be.
        """
        _as(self.needs, learner, self.name)


def _as(kind: type[Any], learner: Learner, name: str) -> Any:
    if isinstance(learner, kind):
        return learner
    wanted = "a torch model" if kind is TorchStudent else "a learner with guide and features"
    raise FedistillError(
        f'the exchange "{name}" needs {wanted}, found {type(learner).__name__}: give this client '
        "a torch model, or choose a method that exchanges predictions"
    )


def _guides(
    kind: str, *, by_rows: bool = False, by_features: bool = False
) -> Callable[[Learner, FloatArray, FloatArray], None]:
    """An ``apply`` that hands the table over as a :class:`Guide`."""

    def apply(learner: Learner, table: FloatArray, public: FloatArray) -> None:
        present = np.asarray(~np.isnan(table).any(axis=1))
        guided = _as(Guided, learner, kind)
        if by_features and guided.features(public[:1]).shape[1] != table.shape[1]:
            guided.guide(None)  # features of another width cannot be compared: it learns alone
            return
        guided.guide(Guide(kind, table, present, public if by_rows else None))

    return apply


def _class_logits(learner: Learner, rows: Rows, public: FloatArray, classes: int) -> FloatArray:
    del public
    if not len(rows):
        return np.full((classes, classes), np.nan)
    logits = _finite(learner.predict(rows.inputs), "the model's logits")
    return class_means(logits, rows.labels, classes)


def _prototypes(learner: Learner, rows: Rows, public: FloatArray, classes: int) -> FloatArray:
    del public
    features = _as(Guided, learner, "prototypes").features(rows.inputs)
    return class_means(_finite(features, "the model's features"), rows.labels, classes)


def _kernel(learner: Learner, rows: Rows, public: FloatArray, classes: int) -> FloatArray:
    del rows, classes
    features = _as(Guided, learner, "kernel").features(public)
    return unit_kernel(_finite(features, "the model's features"))


def _weights(learner: Learner, rows: Rows, public: FloatArray, classes: int) -> FloatArray:
    del rows, public, classes
    vector = flat_weights(_as(TorchStudent, learner, "weights"))
    return _finite(vector, "the weights")[None]


def _take_weights(learner: Learner, table: FloatArray, public: FloatArray) -> None:
    del public
    student = _as(TorchStudent, learner, "weights")
    if not np.isnan(table).any():
        set_weights(student, table[0])
        student.restart()


EXCHANGES: Mapping[str, Exchange] = {
    entry.name: entry
    for entry in (
        Exchange(
            name="weights",
            summary="all weights of one architecture, averaged by number of rows (FedAvg)",
            tells="the weights themselves, from which private rows can be reconstructed",
            describe=_weights,
            apply=_take_weights,
            sides=lambda classes, rows: (1, 0),
            combine=mean_by_size,
            start=lambda learner: flat_weights(_as(TorchStudent, learner, "weights"))[None],
            needs=TorchStudent,
        ),
        # Jeong et al., arXiv 1811.11479. The paper averages over the local steps; ours is the
        # mean after training, which does not depend on the order of the steps.
        Exchange(
            name="class-logits",
            summary="mean logits of the own rows of each class (FD)",
            tells="which classes a client has, and the mean logits of its own rows of each: of a "
            "class that two clients have, each is told the other's",
            describe=_class_logits,
            apply=_guides("class-logits"),
            sides=lambda classes, rows: (classes, classes),
            leave_out=True,
        ),
        # Tan et al., arXiv 2105.00243. The paper weighs by class counts, the authors' code does
        # not; counts would be private, so this is the plain mean.
        Exchange(
            name="prototypes",
            summary="mean features of the own rows of each class (FedProto)",
            tells="which classes a client has, and the mean hidden features of its own rows of "
            "each: of a class that one client alone has, all are told its own",
            describe=_prototypes,
            apply=_guides("prototypes", by_features=True),
            sides=lambda classes, rows: (classes, 0),
        ),
        # Makhija et al., arXiv 2202.07757, as we read it: mean of the clients' kernels, each of
        # norm 1, so that the scale of its features does not decide what a client weighs.
        Exchange(
            name="kernel",
            summary="how like to one another common public rows are to a client (FedHeNN)",
            tells="inner products of hidden features of public rows: more numbers a row than a "
            "prediction has",
            describe=_kernel,
            apply=_guides("kernel", by_rows=True),
            sides=lambda classes, rows: (rows, rows),
            public=MOST_PUBLIC,
        ),
    )
}
"""The exchanges by name."""
