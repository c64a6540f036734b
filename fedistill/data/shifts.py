"""What makes the experiences of a stream differ: rows in, a part for each experience out.

A shift is a pure function ``(rows, how, seed) -> [rows of each experience]``. Its domains (angles,
permutations, the order of classes, directions) come from the seed alone, so a client's rows and the
common test rows meet the same ones. Where domains are made of what rows there are (which classes,
which sites, which times), ``like`` says among which; without it, among the rows themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.errors import DataError
from fedistill.seeding import generator
from fedistill.settings import StreamSettings
from fedistill.types import FloatArray, IntArray, Rows

CHUNK = 1024
"""Images rotated at once, so that what is gathered stays in the processor's cache."""
RAREST = 1e-6
"""Smallest share of a class before scaling: none is ever quite impossible."""
SCALINGS = 500


def rotation(
    rows: Rows, how: StreamSettings, seed: int, *, like: Rows | None = None, whole: bool = False
) -> list[Rows]:
    """Images turned by an angle of each experience, drawn up to `degrees`.

    Counter-clockwise, by bilinear interpolation; corners are filled with the smallest value of the
    image, which is the background whether or not the rows were scaled.

    Args:
        rows: inputs ``[n, channels, h, w]``.
        how: ``experiences`` and ``degrees``.
        seed: of the angles.
        like: the rows among which there must be enough.
        whole: every experience has all rows; else each row goes to one of them, at random.

    Raises:
        DataError: no images, or fewer rows than experiences.
    """
    _images(rows)
    parts = _dealt(rows, how, seed, "rotation", like, whole)
    return [
        replace(part, inputs=rotate(part.inputs, angle))
        for part, angle in zip(parts, angles(how, seed), strict=True)
    ]


def permutation(
    rows: Rows, how: StreamSettings, seed: int, *, like: Rows | None = None, whole: bool = False
) -> list[Rows]:
    """The inputs of a row in another order, drawn for each experience.

    Arguments as of :func:`rotation`; inputs of any shape, all numbers of a row are mixed.
    """
    parts = _dealt(rows, how, seed, "permutation", like, whole)
    size = math.prod(rows.inputs.shape[1:])
    orders = [
        generator(seed, "shift", "permutation", at).permutation(size) for at in range(len(parts))
    ]
    return [
        replace(part, inputs=part.inputs.reshape(len(part), size)[:, order].reshape(shape))
        for part, order in zip(parts, orders, strict=True)
        for shape in [part.inputs.shape]
    ]


def class_incremental(
    rows: Rows, how: StreamSettings, seed: int, *, like: Rows | None = None, shuffle: bool = True
) -> list[Rows]:
    """New classes come with each experience; those before do not come back.

    Args:
        rows: with known labels.
        how: ``experiences``.
        seed: of the order of the classes.
        like: the rows whose classes are divided.
        shuffle: False keeps the classes in the order of their numbers.

    Raises:
        DataError: fewer classes than experiences, a class that ``like`` does not have, or rows
            whose class is not known.
    """
    groups = class_groups(_among(rows, like), how, seed, shuffle=shuffle)
    return _by_group(rows, _number(rows.labels, groups, "class-incremental", "class"), how)


def domain_incremental(
    rows: Rows, how: StreamSettings, seed: int, *, like: Rows | None = None
) -> list[Rows]:
    """One site after another, in the order of their names.

    Args:
        rows: with sites.
        how: ``experiences``; with more sites than that, neighbours share one.
        seed: not used, as nothing is drawn.
        like: the rows whose sites are divided.

    Raises:
        DataError: rows without sites, fewer sites than experiences, or one that ``like`` has not.
    """
    groups = site_groups(_among(rows, like), how)
    if rows.site is None:
        raise _no_sites()
    return _by_group(rows, _number(rows.site, groups, "domain-incremental", "site"), how)


def label_prior(
    rows: Rows, how: StreamSettings, seed: int, *, like: Rows | None = None
) -> list[Rows]:
    """Class shares drawn for each experience by Dirichlet(`alpha`); each row is used once.

    The drawn shares are scaled, experiences to one size and classes to the rows there are (Sinkhorn
    1964), which keeps the odds between experiences; where the two cannot be met together, the
    classes are.

    Args:
        rows: with known labels.
        how: ``experiences`` and ``alpha``.
        seed: of the shares, and of which rows are taken.
        like: the rows among which there must be enough.

    Raises:
        DataError: fewer rows than experiences, or rows whose class is not known.
    """
    _enough(_among(rows, like), how, "label-prior")
    _labelled(rows.labels, "label-prior")
    classes, sizes = np.unique(rows.labels, return_counts=True)
    if not len(classes):
        return [rows] * how.experiences
    drawn = np.stack([_shares(how, seed, int(label)) for label in classes], axis=1)
    cuts = np.round(np.cumsum(scaled(drawn, sizes), axis=0)).astype(np.int64)
    chosen: list[list[IntArray]] = [[] for _ in range(how.experiences)]
    for number, label in enumerate(classes):
        mixed = generator(seed, "shift", "label-prior", "rows", int(label)).permutation(
            sizes[number]
        )
        members = np.flatnonzero(rows.labels == label)[mixed]
        for part, piece in zip(chosen, np.split(members, cuts[:-1, number]), strict=True):
            part.append(piece)
    return [
        rows.take(
            generator(seed, "shift", "label-prior", "order", at).permutation(np.concatenate(part))
        )
        for at, part in enumerate(chosen)
    ]


def covariate(
    rows: Rows, how: StreamSettings, seed: int, *, like: Rows | None = None
) -> list[Rows]:
    """Rows dealt so that inputs move by `strength` deviations along a drawn direction.

    Rows are sorted by where they lie along the direction, blurred by noise, and cut evenly. The
    noise is such that for bell-shaped inputs the means of the first and the last experience are
    ``strength`` deviations apart, at most what sorting alone gives. What a label means stays.

    Args:
        rows: any inputs, scaled; where an owner's lie is measured in its own deviations.
        how: ``experiences`` and ``strength``.
        seed: of the direction and the noise.
        like: the rows among which there must be enough.

    Raises:
        DataError: fewer rows than experiences, or inputs that are not finite.
    """
    _enough(_among(rows, like), how, "covariate")
    flat = rows.inputs.reshape(len(rows), math.prod(rows.inputs.shape[1:]))
    direction = generator(seed, "shift", "covariate", "direction").standard_normal(flat.shape[1])
    place = (flat @ direction.astype(np.float32)).astype(np.float64)
    if not np.isfinite(place).all():
        raise DataError(
            "covariate: expected finite inputs, found others in row "
            f"{int(np.argmin(np.isfinite(place)))}: fill missing values first"
        )
    place = (place - place.mean()) / (place.std() or 1.0) if len(rows) else place
    share = min(1.0, how.strength / _widest(how.experiences))
    noise = generator(seed, "shift", "covariate", "noise").standard_normal(len(rows))
    score = share * place + math.sqrt(1 - share**2) * noise
    pieces = np.array_split(np.argsort(score, kind="stable"), how.experiences)
    mixed = [
        generator(seed, "shift", "covariate", "order", at).permutation(piece)
        for at, piece in enumerate(pieces)
    ]
    return [rows.take(piece) for piece in mixed]


def time(rows: Rows, how: StreamSettings, seed: int, *, like: Rows | None = None) -> list[Rows]:
    """The rows as time brought them, cut into blocks.

    Time is the row number in the source (``ids``), of each site its own, as the rows of several
    files stand one file below the other. Rows without ids are in order already.

    Args:
        rows: what is cut.
        how: ``experiences``, and ``first``, the share of the rows in the first block.
        seed: not used, as nothing is drawn.
        like: the rows whose times divide the blocks, so that no owner is ahead of another.

    Raises:
        DataError: fewer rows than experiences, or a first block that takes all.
    """
    among = _among(rows, like)
    _enough(among, how, "time")
    if how.first >= 1 and how.experiences > 1:
        raise DataError(
            f"stream.first: expected less than 1 for {how.experiences} experiences, found "
            f"{how.first}: 0.5 leaves half of the rows for the others"
        )
    if like is None or like.ids is None or rows.ids is None:
        among = rows
    numbers = np.zeros(len(rows), dtype=np.int64)
    for site in np.unique(_sites(rows)):
        mine = np.flatnonzero(_sites(rows) == site)
        times = np.sort(_times(among)[_sites(among) == site])
        starts = np.cumsum(_block_sizes(len(times), how))[:-1]
        # A block starts at the first time in it; one beyond the last time is empty.
        limits = np.append(times, np.iinfo(np.int64).max)[starts]
        numbers[mine] = np.searchsorted(limits, _times(rows)[mine], side="right")
    order = np.argsort(_times(rows), kind="stable")
    return [rows.take(order[numbers[order] == at]) for at in range(how.experiences)]


@dataclass(frozen=True)
class Shift:
    """A shift, as named in settings; called with ``(rows, how, seed)``.

    Attributes:
        function: the public function; its docstring's first line is the summary.
        names: what its experiences are called, of ``(like, how, seed)``.
        options: its keywords beside ``like``.
    """

    function: Callable[..., list[Rows]]
    names: Callable[..., list[str]]
    options: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line for ``fedistill list shifts``."""
        return (self.function.__doc__ or "").strip().split("\n", 1)[0].rstrip(".")

    def __call__(
        self,
        rows: Rows,
        how: StreamSettings,
        seed: int,
        *,
        like: Rows | None = None,
        **options: bool,
    ) -> list[Rows]:
        """A part of the rows for each experience."""
        return self.function(rows, how, seed, like=like, **options)


def angles(how: StreamSettings, seed: int) -> list[float]:
    """The angle of each experience, uniform from 0 to ``degrees``."""
    drawn: list[float] = (
        generator(seed, "shift", "rotation").uniform(0, how.degrees, how.experiences).tolist()
    )
    return drawn


def rotate(images: FloatArray, degrees: float) -> FloatArray:
    """Images ``[n, channels, h, w]`` turned counter-clockwise about their centre, same shape."""
    n, channels, h, w = images.shape
    index, weights = _neighbours(h, w, math.radians(degrees))
    flat = np.ascontiguousarray(images).reshape(n * channels, h * w)
    outside = (1 - weights.sum(axis=0)).astype(np.float32)[:, None]
    turned = np.empty_like(flat)
    for start in range(0, len(flat), CHUNK):
        # Pixels first: whole rows are then gathered, which is four times as fast.
        block = np.ascontiguousarray(flat[start : start + CHUNK].T)
        found = block.min(axis=0) * outside
        for corner, weight in zip(index, weights.astype(np.float32)[:, :, None], strict=True):
            found += block[corner] * weight
        turned[start : start + CHUNK] = found.T
    return turned.reshape(images.shape)


def class_groups(
    rows: Rows, how: StreamSettings, seed: int, *, shuffle: bool = True
) -> list[IntArray]:
    """The classes that come with each experience, each group sorted."""
    _labelled(rows.labels, "class-incremental")
    classes = np.unique(rows.labels)
    _as_many(len(classes), "classes", how, "class-incremental")
    if shuffle:
        classes = generator(seed, "shift", "class-incremental").permutation(classes)
    return [np.sort(group) for group in np.array_split(classes, how.experiences)]


def site_groups(rows: Rows, how: StreamSettings) -> list[npt.NDArray[np.str_]]:
    """The sites of each experience."""
    if rows.site is None:
        raise _no_sites()
    sites = np.unique(rows.site)
    _as_many(len(sites), "sites", how, "domain-incremental")
    return np.array_split(sites, how.experiences)


def scaled(shares: FloatArray, sizes: IntArray) -> FloatArray:
    """Positive ``[experiences, classes]`` scaled to equal rows and to columns of ``sizes``."""
    table = np.asarray(shares, dtype=np.float64)
    each = sizes.sum() / len(table)
    for _ in range(SCALINGS):
        table = table * (each / table.sum(axis=1, keepdims=True))
        table = table * (sizes / table.sum(axis=0))
    return table


def _shares(how: StreamSettings, seed: int, label: int) -> FloatArray:
    """``[experiences]`` gamma draws, which are Dirichlet ones before they are divided by their sum.

    A stream of its own for each class, so that an owner without some class draws the others alike.
    """
    drawn = generator(seed, "shift", "label-prior", label).standard_gamma(
        how.alpha, how.experiences
    )
    largest = drawn.max()
    return np.maximum(drawn / largest, RAREST) if largest else np.ones_like(drawn)


def _widest(experiences: int) -> float:
    """How many deviations apart the first and the last part of a sorted normal sample are."""
    if experiences < 2:
        return math.inf
    bell = NormalDist()
    return 2 * experiences * bell.pdf(bell.inv_cdf(1 - 1 / experiences))


def _neighbours(h: int, w: int, angle: float) -> tuple[IntArray, FloatArray]:
    """For each pixel of the turned image the four around where it was, ``[4, h * w]`` each."""
    down, right = np.mgrid[:h, :w].reshape(2, -1) - np.array([[(h - 1) / 2], [(w - 1) / 2]])
    # Rounded, so that quarter turns fall on pixels exactly.
    y = np.round(math.cos(angle) * down + math.sin(angle) * right + (h - 1) / 2, 9)
    x = np.round(math.cos(angle) * right - math.sin(angle) * down + (w - 1) / 2, 9)
    top, left = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    below, beside = y - top, x - left
    index, weights = [], []
    for row, high in ((top, 1 - below), (top + 1, below)):
        for column, wide in ((left, 1 - beside), (left + 1, beside)):
            inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
            index.append(np.where(inside, row * w + column, 0))
            weights.append(np.where(inside, high * wide, 0.0))
    return np.stack(index), np.stack(weights)


def _dealt(
    rows: Rows, how: StreamSettings, seed: int, name: str, like: Rows | None, whole: bool
) -> list[Rows]:
    """All rows for each experience, or each row for one, at random and evenly."""
    if whole:
        _enough(rows, replace(how, experiences=min(how.experiences, 1)), name)
        return [rows] * how.experiences
    _enough(_among(rows, like), how, name)
    order = generator(seed, "shift", name, "rows").permutation(len(rows))
    return [rows.take(piece) for piece in np.array_split(order, how.experiences)]


def _by_group(rows: Rows, numbers: IntArray, how: StreamSettings) -> list[Rows]:
    return [rows.take(np.flatnonzero(numbers == at)) for at in range(how.experiences)]


def _number(
    values: npt.NDArray[Any],
    groups: list[npt.NDArray[Any]],
    name: str,
    what: str,
) -> IntArray:
    """The group that each value is in."""
    owner = {value: number for number, group in enumerate(groups) for value in group.tolist()}
    strange = sorted(set(values.tolist()) - set(owner))
    if strange:
        raise DataError(
            f"{name}: expected each {what} of the rows in a group, found none for {strange[0]}: "
            f"give rows with all {'classes' if what == 'class' else 'sites'} as like"
        )
    return np.array([owner[value] for value in values.tolist()], dtype=np.int64)


def _images(rows: Rows) -> None:
    if rows.inputs.ndim != 4:
        raise DataError(
            f"rotation: expected images [rows, channels, h, w], found "
            f"{list(rows.inputs.shape)}: choose a source of images such as idx:, reshape the "
            "inputs, or use the shift permutation"
        )


def _labelled(labels: IntArray, name: str) -> None:
    unknown = int((labels < 0).sum())
    if unknown:
        raise DataError(
            f"{name}: expected known labels, found {unknown} that are not: leave those rows out"
        )


def _among(rows: Rows, like: Rows | None) -> Rows:
    return rows if like is None else like


def _enough(rows: Rows, how: StreamSettings, name: str) -> None:
    _as_many(len(rows), "rows", how, name)


def _as_many(count: int, what: str, how: StreamSettings, name: str) -> None:
    if how.experiences < 1:
        raise DataError(
            f"{name}: expected at least one experience, found {how.experiences}: set "
            "stream.experiences"
        )
    if count < how.experiences:
        raise DataError(
            f"{name}: expected at least as many {what} as the {how.experiences} experiences, found "
            f"{count}: lower stream.experiences"
        )


def _no_sites() -> DataError:
    return DataError(
        "domain-incremental: expected rows with sites, found none: deal them by-column and name "
        "the column, or use the shift class-incremental"
    )


def _sites(rows: Rows) -> npt.NDArray[np.str_]:
    return np.zeros(len(rows), dtype=np.str_) if rows.site is None else rows.site


def _times(rows: Rows) -> IntArray:
    return np.arange(len(rows), dtype=np.int64) if rows.ids is None else rows.ids


def _block_sizes(total: int, how: StreamSettings) -> IntArray:
    """Rows of each block: the first by ``first``, the others alike."""
    if how.experiences == 1:
        return np.array([total])
    first = round(how.first * total) if how.first else -(-total // how.experiences)
    others = [len(piece) for piece in np.array_split(np.empty(total - first), how.experiences - 1)]
    return np.array([first, *others])


def _counted(name: str) -> Callable[..., list[str]]:
    def names(like: Rows, how: StreamSettings, seed: int) -> list[str]:
        return [f"{name} {at}" for at in range(1, how.experiences + 1)]

    return names


def _angle_names(like: Rows, how: StreamSettings, seed: int) -> list[str]:
    return [f"rotation {angle:.0f}°" for angle in angles(how, seed)]


def _class_names(like: Rows, how: StreamSettings, seed: int, *, shuffle: bool = True) -> list[str]:
    groups = class_groups(like, how, seed, shuffle=shuffle)
    return [_listed("class", "classes", group.tolist()) for group in groups]


def _site_names(like: Rows, how: StreamSettings, seed: int) -> list[str]:
    return [_listed("site", "sites", group.tolist()) for group in site_groups(like, how)]


def _listed(one: str, several: str, names: list[object]) -> str:
    return f"{one if len(names) == 1 else several} {' '.join(map(str, names))}"


SHIFTS: Mapping[str, Shift] = {
    "rotation": Shift(rotation, _angle_names, ("whole",)),
    "permutation": Shift(permutation, _counted("permutation"), ("whole",)),
    "class-incremental": Shift(class_incremental, _class_names, ("shuffle",)),
    "domain-incremental": Shift(domain_incremental, _site_names),
    "label-prior": Shift(label_prior, _counted("label prior")),
    "covariate": Shift(covariate, _counted("covariate")),
    "time": Shift(time, _counted("time block")),
}
