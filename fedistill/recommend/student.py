"""A recommender that is kept current: tested on a block first, then taught it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedistill.continual.buffer import ReplayBuffer
from fedistill.continual.erasure import ErasureReceipt
from fedistill.data.interactions import Block, Interactions
from fedistill.distill.torch_student import seeded
from fedistill.errors import CheckpointError, DataError, FedistillError, did_you_mean
from fedistill.metrics.ranking import NOBODY, ndcg_at, recall_at
from fedistill.recommend.models import MODELS
from fedistill.recommend.neighbours import neighbour_vectors
from fedistill.recommend.ranker import Ranker
from fedistill.recommend.seen import Numbering, Seen, Shelves
from fedistill.recommend.spectral import Sketch, sketched
from fedistill.recommend.strategies import Strategy, find_strategy
from fedistill.recommend.training import Choices, Teacher, Training, by_user, fit, frozen
from fedistill.seeding import derive, generator
from fedistill.types import FloatArray, IntArray, State

DEPTH = 20
"""How far down a ranking is looked at."""


@dataclass(frozen=True, eq=False)
class Tested:
    """What a model did on choices before it learned them; full ranking, what was chosen masked.

    Attributes:
        ndcg: NDCG@20, mean over the users with history; a user that the model has not learned
            counts as zero.
        recall: Recall@20, likewise.
        users: ``[n]`` ids of the users with history.
        values: ``[n]`` NDCG@20 of each.
        unseen: how many of them the model has not learned.
        new_users: users without history, who are recommended what is chosen most.
        new_ndcg: NDCG@20 over these; 0 if there are none.
        new_recall: Recall@20 likewise.
    """

    ndcg: float
    recall: float
    users: IntArray
    values: FloatArray
    unseen: int
    new_users: int
    new_ndcg: float
    new_recall: float


@dataclass(frozen=True, eq=False)
class Learned:
    """What one block was to a recommender.

    Attributes:
        step: number of the block, from 0.
        tested: before it was learned; None if nothing had been learned yet, or not asked for.
        choices: that it was taught, those of erased users left out.
        new_users: users met for the first time.
        new_items: items likewise.
        replayed: stored choices that joined.
        loss: mean over the last tenth of the training; 0 without training.
    """

    step: int
    tested: Tested | None
    choices: int
    new_users: int
    new_items: int
    replayed: int
    loss: float


class Recommender:
    """A student that recommends, and stays current on a stream of blocks.

    What it holds: the model; a sample of choices to replay, if the strategy has one; and what each
    user chose, which serving needs (it is not recommended again, and towers that look back read
    it). Training reads the last only under the strategy ``retrain``, and for the latest items of a
    user under towers that look back.

    Args:
        model: ``mf``, ``two-tower``, ``sequential``, or a factory of
            :class:`fedistill.recommend.models.Towers` without users and items.
        strategy: a name of ``STRATEGIES`` or a :class:`Strategy`.
        width: numbers in a vector, for a model by name.
        training: how it trains.
        catalogue: if given, items are numbers below it, and others an error.
        seed: of all randomness.

    Raises:
        FedistillError: an unknown model or strategy.
    """

    def __init__(
        self,
        model: str | Callable[[], Any] = "mf",
        strategy: str | Strategy = "fedistill",
        *,
        width: int = 32,
        training: Training | None = None,
        catalogue: int | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(model, str) and model not in MODELS:
            raise FedistillError(f'unknown recommender "{model}"{did_you_mean(model, MODELS)}')
        self.strategy = find_strategy(strategy)
        self.training = training or Training()
        self.catalogue, self.seed, self.width = catalogue, seed, width
        self._kind = model
        self.steps = 0
        self._build()
        self._clear()

    def _build(self) -> None:
        with seeded(derive(self.seed, "recommender")):
            if not isinstance(self._kind, str):
                self.model = self._kind()
            elif self._kind == "sequential":
                self.model = MODELS["sequential"](0, self.width)
            else:
                self.model = MODELS[self._kind](0, 0, self.width)

    def _clear(self) -> None:
        none = np.empty(0, dtype=np.int64)
        self._users, self._items = Numbering(), Numbering()
        self._seen = Seen(none, none, none)
        self._counts: FloatArray = np.empty(0)  # faded choices of each item that was learned
        self._weights: FloatArray = np.empty(0)  # and of each user
        self._erased: set[int] = set()
        self._sketch: Sketch | None = None
        self._buffer = ReplayBuffer(0, seed=derive(self.seed, "recommender-replay"))

    # --- the stream ----------------------------------------------------------------------------

    def learn(self, block: Block | Interactions, *, test: bool = True) -> Learned:
        """Be tested on a block, then taught it.

        Args:
            block: of a :class:`Block` everything is tested, and ``train`` is learned.
            test: whether to test; it costs a ranking for every user of the block.

        Raises:
            DataError: an item beyond the catalogue; nothing has changed then.
        """
        if isinstance(block, Interactions):
            block = Block(block, Interactions(*([np.empty(0, dtype=np.int64)] * 3)))
        everything = block.everything()
        self._check_items(everything.items)
        tested = self.test(everything) if test and self.steps else None
        train = block.train
        if self._erased:
            train = train.take(~np.isin(train.users, list(self._erased)))
        step, self.steps = self.steps, self.steps + 1
        if not len(train):
            return Learned(step, tested, 0, 0, 0, 0, 0.0)
        new_users, new_items = self._users.add(train.users), self._items.add(train.items)
        users, items = self._users.rows(train.users), self._items.rows(train.items)
        before = self._seen
        self._seen = before.plus(users, items, step)
        first = not len(before)
        replayed, loss = 0, 0.0
        if first or self.strategy.update == "retrain":
            loss = self._start(step)
        elif self.strategy.update == "train":
            replayed, loss = self._update(step, users, items)
        self._store(train)
        return Learned(step, tested, len(train), new_users, new_items, replayed, loss)

    def _start(self, step: int) -> float:
        """Train from scratch on all that was seen."""
        self._build()
        self._counts = self._weights = np.empty(0)
        self._grow(None)
        seen = self._seen
        ages = self.training.fade ** (step - seen.blocks).astype(np.float64)
        self._counts = _faded(seen.items, ages, len(self._items))
        self._weights = _faded(seen.users, ages, len(self._users))
        if self.sketches:
            self._place(seen.users, seen.items, ages)
            return 0.0
        return fit(
            self.model,
            self._choices(len(seen), None, ages if self.training.fade < 1 else None),
            self.training,
            counts=self._counts,
            random=generator(self.seed, "recommender", step, "fit"),
            steps=self.training.steps,
            lr=self.training.lr,
        )

    def _place(
        self, users: IntArray, items: IntArray, weights: FloatArray, old: Sketch | None = None
    ) -> None:
        """Put a factorisation where the sketch of its choices says."""
        sizes, width = (len(self._users), len(self._items)), self.width
        rank = max(width, self.training.rank)
        with seeded(derive(self.seed, "recommender", "sketch")):
            self._sketch = sketched(
                users,
                items,
                weights,
                sizes,
                rank,
                smooth=self.training.smooth,
                old=old,
                fade=self.training.fade,
            )
        scale = self.training.scale
        self.model.users = nn.Parameter(scale * self._sketch.users[:, :width])
        self.model.items = nn.Parameter(scale * self._sketch.items[:, :width])
        shares = (self._counts + 1) / self._counts.sum()
        self.model.bias = nn.Parameter(torch.from_numpy(np.log(shares)).float())

    def _update(self, step: int, users: IntArray, items: IntArray) -> tuple[int, float]:
        """Go on from the model as it is with a block, and what the strategy sets beside it."""
        plan = self.strategy
        self._counts, self._weights = (
            self.training.fade * held for held in (self._counts, self._weights)
        )
        past = float(self._weights.sum())
        teacher = None
        onward = plan.sketch and self._sketch is not None
        if plan.teacher != "none" and not onward:
            teacher = self._teacher(users, past / len(users))
        if not onward:
            self._grow((users, items) if plan.neighbours else None)
        self._counts = _added(self._counts, items, len(self._items))
        self._weights = _added(self._weights, users, len(self._users))
        if onward:
            self._place(users, items, np.ones(len(users)), self._sketch)
            return 0, 0.0
        old = self._buffer.rows()
        weights = np.ones(len(users) + len(old))
        if len(old):
            share = past / len(old) if plan.replay_weight == "share" else float(plan.replay_weight)
            weights[len(users) :] = share
        loss = fit(
            self.model,
            self._choices(len(users), old.inputs if len(old) else None, weights),
            self.training,
            counts=self._counts,
            random=generator(self.seed, "recommender", step, "fit"),
            steps=self.training.update_steps,
            lr=self.training.update_lr,
            teachers=() if teacher is None else (teacher,),
        )
        return len(old), loss

    def _choices(
        self, latest: int, old: IntArray | None = None, weights: FloatArray | None = None
    ) -> Choices:
        """The latest choices that were seen, with stored ones (ids of user and item) behind."""
        users, items = self._seen.users[-latest:], self._seen.items[-latest:]
        history = None
        if self.looks_back:
            shelves = Shelves(self._seen, len(self._users))
            history = shelves.before(self.training.history)[-latest:]
        if old is not None:
            past = self._users.rows(old[:, 0])
            users = np.concatenate([users, past])
            items = np.concatenate([items, self._items.rows(old[:, 1])])
            if history is not None:
                history = np.concatenate([history, old[:, 2:]])
        if history is None:
            return by_user(users, items, weights)
        return Choices(users, np.arange(len(users)), items, history, weights)

    def _teacher(self, users: IntArray, share: float) -> Teacher | None:
        plan, known = self.strategy, len(self._weights)
        chances = self._weights
        if plan.teacher == "current":
            chances = np.bincount(users[users < known], minlength=known).astype(np.float64)
        asked = np.flatnonzero(chances)
        if not len(asked):
            return None
        history = None
        if self.looks_back:
            history = Shelves(self._seen, len(self._users)).history(asked, self.training.history)
            history = np.where(history > len(self._counts), 0, history)
        weight = share if plan.teacher_weight == "share" else float(plan.teacher_weight)
        return Teacher(
            frozen(self.model),
            asked,
            chances[asked],
            len(self._counts),
            weight,
            known_only=plan.teacher == "current",
            history=history,
            anchor=self._counts / self._counts.sum() if plan.anchor else None,
        )

    def _grow(self, met: tuple[IntArray, IntArray] | None) -> None:
        """Rows for the users and items that have none yet."""
        known = (len(self._weights), len(self._counts))
        users, items = len(self._users) - known[0], len(self._items) - known[1]
        if met is not None:
            self.model.grow(*neighbour_vectors(self.model, *met, known, (users, items)))
            return
        with seeded(derive(self.seed, "recommender", "users", known[0])):
            self.model.grow(users, 0)
        with seeded(derive(self.seed, "recommender", "items", known[1])):
            self.model.grow(0, items)

    def _store(self, train: Interactions) -> None:
        plan = self.strategy
        if not plan.replay or plan.update != "train":
            return
        self._buffer.resize(int(plan.replay * len(self._seen)))
        rows = np.stack([train.users, train.items], axis=1)
        if self.looks_back:
            before = Shelves(self._seen, len(self._users)).before(self.training.history)
            rows = np.concatenate([rows, before[-len(train) :]], axis=1)
        self._buffer.add(rows, subject=train.users.astype(np.str_))

    # --- serving -------------------------------------------------------------------------------

    @property
    def sketches(self) -> bool:
        """Whether the model is learned from scratch as a sketch of the choices."""
        return self.training.solver == "spectral" and self._kind == "mf"

    @property
    def looks_back(self) -> bool:
        """Whether the user tower reads what the user chose."""
        return bool(getattr(self.model, "looks_back", False))

    @property
    def items(self) -> IntArray:
        """``[m]`` ids of the items that were learned, in the order of the scores."""
        return self._items.ids[: len(self._counts)]

    def predict(self, users: npt.ArrayLike, items: npt.ArrayLike | None = None) -> FloatArray:
        """Scores ``[n, m]`` of users ``[n]`` and items ``[m]``, all of :attr:`items` without.

        A user that was not learned has a row of NaN. Ask for a few thousand users at a time: a
        table of users by items is as large as it sounds.

        Raises:
            DataError: an item that was not learned.
        """
        rows = self._rows(users)
        columns = None
        if items is not None:
            columns = self._items.rows(items)
            strange = (columns < 0) | (columns >= len(self._counts))
            if strange.any():
                raise DataError(
                    f"predict: expected items that were learned, found item "
                    f"{np.asarray(items).reshape(-1)[int(np.argmax(strange))]}: see .items"
                )
        scores = np.full((len(rows), len(self.items if columns is None else columns)), np.nan)
        scores = scores.astype(np.float32)
        there = np.flatnonzero(rows >= 0)
        if len(there):
            scores[there] = self._ranker().score(rows[there], columns).numpy()
        return scores

    def recommend(self, users: npt.ArrayLike, k: int = DEPTH) -> IntArray:
        """Ids of the k best items for each user ``[n, k]``, best first, what it chose left out.

        A user that was not learned is given what is chosen most; -1 where no item is left.
        """
        rows, ranker = self._rows(users), self._ranker()
        ranked = ranker.rank(rows, k)
        strangers = rows < 0
        if strangers.any():
            everybody = self._users.rows(users)
            ranked[strangers] = ranker.popular(everybody[strangers], k)
        return self._named(ranked)

    def test(self, choices: Interactions) -> Tested:
        """Rank all items for each user of these choices; see :class:`Tested`."""
        users = np.unique(choices.users)
        relevant = self._relevant(choices, users)
        numbers = self._users.rows(users)
        old = (numbers >= 0) & np.isin(numbers, self._seen.users)
        learned = self._learned(numbers)
        ranker = self._ranker()
        ranked = ranker.rank(np.where(learned, numbers, -1)[old], DEPTH)
        wanted = [items for items, known in zip(relevant, old, strict=True) if known]
        ndcg, recall = ndcg_at(ranked, wanted, DEPTH), recall_at(ranked, wanted, DEPTH)
        popular = ranker.popular(np.full(int((~old).sum()), -1), DEPTH)
        others = [items for items, known in zip(relevant, old, strict=True) if not known]
        counted = ~np.isnan(ndcg.values)
        return Tested(
            ndcg.mean,
            recall.mean,
            users[old][counted],
            ndcg.values[counted],
            ndcg.unseen,
            len(others),
            ndcg_at(popular, others, DEPTH).mean,
            recall_at(popular, others, DEPTH).mean,
        )

    def _relevant(self, choices: Interactions, users: IntArray) -> list[IntArray]:
        """For each user rows of the items that it had not chosen before; unknown ones behind."""
        if not len(users):
            return []
        strange = self._items.rows(choices.items)
        strange = np.where(strange < 0, len(self._items) + choices.items, strange)
        pairs = np.unique(np.stack([np.searchsorted(users, choices.users), strange], 1), axis=0)
        rows = self._users.rows(users)
        there = np.flatnonzero(rows >= 0)
        owner, chosen = self._shelves().of(rows[there])
        span = int(max(pairs[:, 1].max(initial=0), chosen.max(initial=0))) + 1
        again = np.isin(pairs[:, 0] * span + pairs[:, 1], there[owner] * span + chosen)
        pairs = pairs[~again]
        return np.split(pairs[:, 1], np.searchsorted(pairs[:, 0], np.arange(1, len(users))))

    def _ranker(self) -> Ranker:
        history = self.training.history if self.looks_back else 0
        return Ranker(self.model, self._shelves(), self._counts, history)

    def _shelves(self) -> Shelves:
        return Shelves(self._seen, len(self._users))

    def _rows(self, users: npt.ArrayLike) -> IntArray:
        rows = self._users.rows(np.asarray(users, dtype=np.int64).reshape(-1))
        return np.where(self._learned(rows), rows, -1)

    def _learned(self, rows: IntArray) -> npt.NDArray[np.bool_]:
        known = rows < len(self._weights)
        weights = self._weights[np.where(known, rows, 0)] if len(self._weights) else known
        return known & (rows >= 0) & (weights > 0)

    def _named(self, rows: IntArray) -> IntArray:
        if not len(self._items):
            return rows
        return np.where(rows >= 0, self._items.ids[np.maximum(rows, 0)], NOBODY)

    def _check_items(self, items: IntArray) -> None:
        if self.catalogue is not None and len(items) and items.max() >= self.catalogue:
            raise DataError(
                f"learn: expected items below {self.catalogue}, the catalogue, found item "
                f"{int(items.max())}: mend the block or raise catalogue; nothing was learned"
            )

    # --- who leaves, and state -----------------------------------------------------------------

    def erase(self, subject: int) -> ErasureReceipt:
        """Forget a user: vector, choices and stored rows leave, later choices are passed over.

        Vectors of items, and of others, have learned from the user: only training from scratch on
        the rest undoes that. Files written before are not touched: write the state again.
        """
        row = int(self._users.rows([subject])[0])
        if row >= 0:
            self._seen = self._seen.without(row)
            if row < len(self._weights):
                self._weights[row] = 0
                if getattr(self.model, "users", None) is not None:
                    with torch.no_grad():
                        self.model.users[row] = 0
            if self._sketch is not None and row < len(self._sketch.users):
                self._sketch.users[row] = 0
                self._sketch.user_counts[row] = 0
        self._erased.add(int(subject))
        return self._buffer.erase(int(subject))

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """All that it is but its arguments."""
        weights = {f"model.{k}": v.numpy().copy() for k, v in self.model.state_dict().items()}
        return {
            "steps": np.array([self.steps, self.seed], dtype=np.int64),
            "users": self._users.ids.copy(),
            "items": self._items.ids.copy(),
            "seen.users": self._seen.users.copy(),
            "seen.items": self._seen.items.copy(),
            "seen.blocks": self._seen.blocks.copy(),
            "counts": self._counts.copy(),
            "weights": self._weights.copy(),
            "erased": np.array(sorted(self._erased), dtype=np.int64),
            **weights,
            **({} if self._sketch is None else _arrays(self._sketch)),
            **{f"buffer.{k}": v for k, v in self._buffer.state_dict().items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Become what :meth:`state_dict` returned.

        Raises:
            CheckpointError: it is of another model, or damaged; nothing has changed then.
        """
        other = Recommender(
            self._kind,
            self.strategy,
            width=self.width,
            training=self.training,
            catalogue=self.catalogue,
            seed=self.seed,
        )
        try:
            other._read(state)
        except (KeyError, ValueError, IndexError, RuntimeError, TypeError) as problem:
            text = " ".join(str(problem).split())
            raise CheckpointError(
                f"the saved recommender cannot be read ({text}): resume with the model and the "
                "settings it was written with, or put a copy back"
            ) from None
        other._buffer.bury(self._buffer.tombstones)
        for subject in self._erased - other._erased:
            other.erase(subject)
        self.__dict__.update(other.__dict__)

    def _read(self, state: State) -> None:
        self.steps, self.seed = (int(value) for value in state["steps"])
        self._users, self._items = Numbering(state["users"]), Numbering(state["items"])
        self._seen = Seen(*(np.array(state[f"seen.{n}"]) for n in ("users", "items", "blocks")))
        self._counts, self._weights = np.array(state["counts"]), np.array(state["weights"])
        self._erased = set(np.asarray(state["erased"]).tolist())
        tables = {
            name.removeprefix("model."): _tensor(value)
            for name, value in state.items()
            if name.startswith("model.")
        }
        if "sketch.users" in state:
            users, items, *counts = (_tensor(state[f"sketch.{name}"]) for name in SKETCHED)
            self._sketch = Sketch(users, items, counts[0], counts[1], self.training.smooth)
        self._build()
        if len(self._counts):
            self.model.grow(len(self._weights), len(self._counts))
        self.model.load_state_dict(tables)
        self._buffer.load_state_dict(
            {
                name.removeprefix("buffer."): value
                for name, value in state.items()
                if name.startswith("buffer.")
            }
        )


SKETCHED = ("users", "items", "user_counts", "item_counts")


def _arrays(sketch: Sketch) -> dict[str, npt.NDArray[Any]]:
    return {f"sketch.{name}": getattr(sketch, name).numpy().copy() for name in SKETCHED}


def _tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.array(values))


def _faded(rows: IntArray, ages: FloatArray, size: int) -> FloatArray:
    counts: FloatArray = np.zeros(size)
    np.add.at(counts, rows, ages)
    return counts


def _added(counts: FloatArray, more: IntArray, size: int) -> FloatArray:
    total = np.bincount(more, minlength=size).astype(np.float64)
    total[: len(counts)] += counts
    return total


def with_strategy(student: Recommender, strategy: str | Strategy) -> Recommender:
    """A copy that goes on by another strategy, to compare them from one start."""
    other = Recommender(
        student._kind,
        find_strategy(strategy),
        width=student.width,
        training=replace(student.training),
        catalogue=student.catalogue,
        seed=student.seed,
    )
    other.load_state_dict(student.state_dict())
    return other
