"""Memory of a stream: which rows stay, with what was said of them, and who can have them taken out.

One law holds for every policy: rows have keys, the rows with the largest keys stay. Merging,
shrinking, erasing and resuming follow from it (:mod:`fedistill.continual.policies`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedistill.continual import erasure
from fedistill.continual.arrivals import read_rows, read_subjects, read_times
from fedistill.continual.draws import CANDIDATES, Draw, find_draw, most_interfered
from fedistill.continual.erasure import ErasureReceipt, Tombstone
from fedistill.continual.held import Held, check_capacity
from fedistill.continual.means import ClassMeans
from fedistill.continual.policies import Keys, Policy, find_policy
from fedistill.continual.replay import Replay, Stats, replay_of
from fedistill.continual.saved import (
    generator_from_words,
    generator_to_words,
    rows_from_state,
    rows_to_state,
)
from fedistill.continual.storage import Table, rows_of
from fedistill.continual.thresholds import Thresholds
from fedistill.errors import CheckpointError, FedistillError
from fedistill.seeding import derive, generator
from fedistill.types import IntArray, State

REFILLS = ("threshold", "shrink", "free")


class ReplayBuffer(Held):
    """At most ``capacity`` rows of a stream, with logits, soft targets and owners beside them.

    A hole that erasure, expiry, retirement or growth leaves cannot be filled with rows that are
    gone. ``refill`` says what then: ``"threshold"`` keeps refusing what is below the keys that
    left (uniform but for an excess of 1 / capacity for later rows; not full for a while),
    ``"shrink"`` lowers the capacity to the rows left (exact for the reservoir; for good, so not
    beside ``ttl`` or ``max_uses``), ``"free"``
    admits anything (full again at once; later rows are over-represented).

    ``ttl`` and ``max_uses`` take rows out, too: with ``max_uses`` those that have been there
    longest, so that the sample is uniform only among rows not yet retired.

    The proxy memory of a federation is a buffer of public rows with their soft targets and without
    subjects: replaying it costs no privacy. Rows of people do, each time; ``max_uses`` bounds it.

    Args:
        capacity: rows, from 0.
        policy: what stays: a name, a :class:`~fedistill.continual.policies.Policy` or its keys.
        draw: what :meth:`draw` takes if not told: ``uniform``, ``balanced``, ``mir``, a function.
        ttl: how long a row may stay on the clock of ``time``; one as old as this leaves.
        max_uses: a row leaves after that many uses; the first is the pass when it came.
        refill: see above.
        seed: of all randomness; buffers that will be merged must have different ones.

    Raises:
        FedistillError: an argument out of range, or an unknown name.
    """

    def __init__(
        self,
        capacity: int,
        policy: str | Policy | Keys = "reservoir",
        *,
        draw: str | Draw = "uniform",
        ttl: float | None = None,
        max_uses: int | None = None,
        refill: str = "threshold",
        seed: int = 0,
    ) -> None:
        if ttl is not None and not ttl > 0:
            raise FedistillError(f"buffer: expected a ttl above 0, found {ttl}: None keeps rows")
        if max_uses is not None and max_uses < 1:
            raise FedistillError(f"buffer: expected max_uses of at least 1, found {max_uses}")
        if refill not in REFILLS:
            raise FedistillError(
                f'buffer: expected refill of {", ".join(REFILLS)}, found "{refill}"'
            )
        if refill == "shrink" and (ttl is not None or max_uses is not None):
            raise FedistillError(
                'buffer: expected refill other than "shrink" beside ttl or max_uses, found both: '
                "rows that leave again and again would shrink it to nothing"
            )
        find_draw(draw)
        super().__init__(capacity, find_policy(policy))
        self.drawing = draw
        self.ttl, self.max_uses, self.refill, self.seed = ttl, max_uses, refill, seed
        self.seen, self.now = 0, 0.0
        self.tombstones: tuple[Tombstone, ...] = ()
        self._left = {"expired": 0, "retired": 0, "erased": 0, "dropped": 0}
        self._key_random = generator(seed, "replay-keys")
        self._draw_random = generator(seed, "replay-draws")

    # --- rows come -----------------------------------------------------------------------------

    def add(
        self,
        inputs: npt.ArrayLike,
        labels: npt.ArrayLike | None = None,
        *,
        logits: npt.ArrayLike | None = None,
        soft: npt.ArrayLike | None = None,
        subject: npt.ArrayLike | None = None,
        ids: npt.ArrayLike | None = None,
        scores: npt.ArrayLike | None = None,
        features: npt.ArrayLike | None = None,
        time: npt.ArrayLike | None = None,
    ) -> int:
        """Rows came; those that stay are copied.

        How a stream is cut into calls makes no difference but to herding, ``ttl`` and ``max_uses``.

        Rows of erased subjects are passed over, as if they had not come.

        Args:
            inputs: ``[n, ...]`` numbers; float64 is stored as float32, others as they are.
            labels: ``[n]`` class numbers; none or -1: not known.
            logits: ``[n, classes]`` of the student before its step; classes may grow over time.
            soft: ``[n, classes]`` soft targets of an ensemble, likewise.
            subject: whose rows: one name or ``[n]``; ``""`` or none is nobody's, public.
            ids: ``[n]`` row numbers of the caller's, kept beside the rows.
            scores: ``[n]`` for the policy ``hardest``.
            features: ``[n, d]`` for the policy ``herding``.
            time: when, one for all or ``[n]``; without, the clock counts rows. It never runs back.

        Returns:
            How many of these rows are in the buffer now.

        Raises:
            DataError: the rows do not fit each other or the buffer; nothing has changed then.
        """
        given = {
            "logits": logits,
            "soft": soft,
            "ids": ids,
            "scores": scores,
            "features": features,
        }
        rows = read_rows(
            inputs,
            labels,
            held=self._table.columns,
            needs=self.policy.needs,
            given=given,
            subject=subject,
        )
        count = len(rows["labels"])
        if time is not None:
            rows["times"] = read_times(time, count)
        if self.tombstones and "subject" in rows:
            rows = rows_of(rows, ~erasure.erased(rows["subject"], self.tombstones))
            count = len(rows["labels"])
        if not count:
            return 0
        random_state = self._key_random.bit_generator.state
        rows["numbers"] = self.seen + np.arange(count)
        rows["uniform"] = self._key_random.random(count)
        rows.setdefault("ids", rows["numbers"])
        rows.setdefault("times", rows["numbers"].astype(np.float64))
        rows["uses"] = np.ones(count, dtype=np.int64)
        if self.policy.lifelong:
            try:
                rows["keys"] = self._keys(rows)
            except FedistillError:
                self._key_random.bit_generator.state = random_state
                raise
        rows.pop("scores", None)
        self.seen += count
        self._tick(float(rows["times"].max()))
        if self.policy.needs == "features":
            self._means.add(rows["labels"], rows["features"])
        return self._insert(self._above(rows))

    # --- rows are replayed ---------------------------------------------------------------------

    def draw(
        self,
        count: int,
        how: str | Draw | None = None,
        *,
        score: Callable[[Replay], npt.ArrayLike] | None = None,
        candidates: int = CANDIDATES,
        now: float | None = None,
    ) -> Replay:
        """Different rows to replay, as many as asked for or as there are; each is used once more.

        Args:
            count: how many.
            how: ``uniform``, ``balanced``, ``mir`` or a function; None: the buffer's own.
            score: for ``mir``: from candidate rows to how much the loss of each would grow ``[n]``.
                Candidates that are not replayed are not counted as used.
            candidates: for ``mir``: how many rows are scored.
            now: on the buffer's clock, for ``ttl``; None: the latest time seen.

        Raises:
            FedistillError: a negative count, an unknown draw, ``mir`` without scores.
        """
        if count < 0:
            raise FedistillError(f"draw: expected a count from 0, found {count}")
        how = self.drawing if how is None else how
        if how == "mir" and score is None:
            raise FedistillError(
                "draw mir: expected a function that scores rows, found none: draw(..., score=)"
            )
        take = find_draw(how)
        self._tick(self.now if now is None else now)
        wanted = max(count, candidates) if how == "mir" else count
        labels = self._table.columns["labels"][self._slots] if len(self) else self._slots
        slots = self._slots[take(labels, wanted, self._draw_random)]
        if how == "mir" and score is not None and len(slots):
            scores = np.asarray(score(replay_of(self._table.take(slots))), dtype=np.float64)
            if scores.shape != (len(slots),) or not np.isfinite(scores).all():
                raise FedistillError(
                    f"draw mir: expected {len(slots)} finite scores, found shape "
                    f"{list(scores.shape)} or NaN: return one number a row"
                )
            slots = slots[most_interfered(scores, count)]
        if not len(slots):
            return replay_of(self._table.take(slots))
        self._table.columns["uses"][slots] += 1
        drawn = replay_of(self._table.take(slots))
        self._retire()
        return drawn

    def rows(self) -> Replay:
        """All rows in order of arrival, to look at: not counted as a use."""
        return replay_of(self._table.take(self._slots))

    # --- rows leave ----------------------------------------------------------------------------

    def erase(self, subject: object) -> ErasureReceipt:
        """Take out every row of a subject with all that lies beside it, and let none in again.

        A tombstone stays: rows of the subject are refused by :meth:`add`, :meth:`merge` and
        :meth:`load_state_dict`. The class means that herding steers by had counted the subject's
        rows, those long gone, too: they begin anew from the rows left. Thresholds stay; they are
        bare keys (under ``hardest``: the largest score that left).

        Files that were written before are not touched: write the state again, twice where the
        generation before is kept.

        Args:
            subject: as ``add`` was given it, compared as text.

        Raises:
            FedistillError: the empty subject, which is nobody.
            DataError: neither a text nor a whole number.
        """
        name = str(read_subjects(subject)[()])
        if not name:
            raise FedistillError("erase: expected a subject, found the empty one: name the person")
        slots = np.empty(0, dtype=np.int64)
        if "subject" in self._table.columns:
            slots = self._slots[self._table.columns["subject"][self._slots] == name]
        self._remove(slots, "erased")
        if "subject" in self._table.columns:  # as wide as the longest name left
            longest = int(np.char.str_len(self._table.columns["subject"]).max(initial=1))
            narrow = self._table.columns["subject"].astype(f"<U{max(longest, 1)}")
            self._table.columns["subject"] = narrow
        self._recount()
        left = self._table.take(self._slots)
        salt = derive(self.seed, "tombstone", len(self.tombstones))
        mark, digest = erasure.mark_of(name, salt), erasure.digest_of(rows_to_state(left))
        stone = Tombstone(salt, mark, self.now, len(slots), digest)
        if not any(old.marks(name) for old in self.tombstones):
            self.tombstones = (*self.tombstones, stone)
        stale = left["ids"][left["soft_classes"] > 0] if "soft" in left else np.empty(0, np.int64)
        return ErasureReceipt(stone, tuple(stale.tolist()))

    def bury(self, tombstones: Sequence[Tombstone]) -> int:
        """Take over tombstones of elsewhere, and erase whom they name; how many rows left."""
        news = set(tombstones) - set(self.tombstones)
        self.tombstones = tuple(dict.fromkeys((*self.tombstones, *tombstones)))
        slots: IntArray = np.empty(0, dtype=np.int64)
        if "subject" in self._table.columns and len(self):
            subjects = self._table.columns["subject"][self._slots]
            slots = self._slots[erasure.erased(subjects, self.tombstones)]
        self._remove(slots, "erased")
        if news or len(slots):  # class means may have counted rows of theirs that are long gone
            self._recount()
        return len(slots)

    def drop(self) -> int:
        """Let all rows go and begin a new sample: the world that they came from is gone.

        Thresholds begin anew, too. The clock, the count of rows seen and tombstones go on.

        Returns:
            How many left.
        """
        count = len(self)
        self._table.clear(self._slots)
        self._slots = np.empty(0, dtype=np.int64)
        self._thresholds.clear()
        self._recount()
        self._left["dropped"] += count
        return count

    def _tick(self, now: float) -> None:
        """The clock goes on, and rows that are too old leave."""
        self.now = max(self.now, now)
        if self.ttl is not None and len(self):
            old = self._table.columns["times"][self._slots] <= self.now - self.ttl
            self._remove(self._slots[old], "expired")

    def _retire(self) -> None:
        if self.max_uses is not None and len(self):
            worn = self._table.columns["uses"][self._slots] >= self.max_uses
            self._remove(self._slots[worn], "retired")

    def _remove(self, slots: IntArray, why: str) -> None:
        if not len(slots):
            return
        self._slots = self._slots[~np.isin(self._slots, slots)]
        self._table.clear(slots)
        self._left[why] += len(slots)
        if self.refill == "free":
            self._thresholds.clear()
        elif self.refill == "shrink" and len(self._thresholds):
            self._rebuild(len(self))

    # --- buffers change ------------------------------------------------------------------------

    def merge(self, other: ReplayBuffer) -> None:
        """Take in another buffer, as if this one had seen its stream after its own.

        Exact in law for policies with keys for life; with equal capacities the rows that result
        are the same in any order of merging. The other stays as it is. Its clock must be the same.
        Under ``recent`` the streams count as having run side by side, row by row.

        Raises:
            FedistillError: another policy or kind of rows, the same seed, or rows of this buffer.
        """
        if other.policy != self.policy:
            raise FedistillError(
                f"merge: expected a buffer with policy {self.policy.name}, found "
                f"{other.policy.name}: merge buffers of one policy"
            )
        for name in ("inputs", "features"):
            mine, theirs = self._table.columns.get(name), other._table.columns.get(name)
            if mine is None or theirs is None:
                continue
            if (mine.dtype, mine.shape[1:]) != (theirs.dtype, theirs.shape[1:]):
                raise FedistillError(
                    f"merge: expected {name} of {mine.dtype} {list(mine.shape[1:])}, found "
                    f"{theirs.dtype} {list(theirs.shape[1:])}: merge buffers of one kind"
                )
        rows = other._table.take(other._slots)
        held = self._table.take(self._slots)
        if self.seed == other.seed or (
            held and rows and np.isin(rows["uniform"], held["uniform"]).any()
        ):
            raise FedistillError(
                f"merge: expected a buffer with other keys, found seed {other.seed} or rows that "
                "are here already: give each buffer a seed of its own, and merge it once"
            )
        self.seen += other.seen
        self._means.merge(other._means)
        for name, number in other._left.items():
            self._left[name] += number
        theirs_above = other._thresholds
        self._thresholds.lift(theirs_above.groups, theirs_above.keys, theirs_above.uniform)
        if held and self.policy.lifelong:
            groups = self._groups(held["labels"])
            below = ~self._thresholds.admit(groups, held["keys"], held["uniform"])
            self._table.clear(self._slots[below])
            self._slots = self._slots[~below]
        if rows:
            self._insert(self._above(rows))
        self._sort()
        known = set(self.tombstones)
        self.bury(other.tombstones)
        if known - set(other.tombstones):
            self._recount()
        self._tick(other.now)
        self._retire()

    def resize(self, capacity: int) -> None:
        """Have room for that many rows; the same law as a buffer that was so small from the start.

        Growth opens places that rows which are gone cannot fill: see ``refill``.

        Raises:
            FedistillError: a capacity below 0.
        """
        grows = check_capacity(capacity) > self.capacity
        self._rebuild(capacity)
        if grows and self.refill == "free":
            self._thresholds.clear()

    # --- figures and state ---------------------------------------------------------------------

    def stats(self) -> Stats:
        """What is held, how old, how often used, and what left why."""
        rows = self._table.take(self._slots)
        labels, counts = np.unique(rows.get("labels", self._slots), return_counts=True)
        ages = self.now - rows["times"] if len(self) else np.zeros(1)
        uses = rows["uses"] if len(self) else np.zeros(1)
        return Stats(
            rows=len(self),
            capacity=self.capacity,
            fill=len(self) / self.capacity if self.capacity else 0.0,
            seen=self.seen,
            classes=dict(zip(labels.tolist(), counts.tolist(), strict=True)),
            age=(float(ages.mean()), float(ages.max())),
            uses=(float(uses.mean()), float(uses.max())),
            subjects=len(set(np.unique(rows["subject"])) - {""}) if "subject" in rows else 0,
            **self._left,
            bytes=sum(column.nbytes for column in rows.values()),
        )

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """All that a buffer is but its arguments: rows in order of arrival, thresholds, generators.

        The same rows give the same bytes, wherever they lie and however the stream was cut.
        """
        counters = [self.capacity, self.seen, self.seed, *self._left.values()]
        return {
            "policy": np.frombuffer(self.policy.name.encode(), dtype=np.uint8).copy(),
            "counters": np.array(counters, dtype=np.int64),
            "now": np.array([self.now]),
            "random.keys": generator_to_words(self._key_random),
            "random.draws": generator_to_words(self._draw_random),
            "thresholds.groups": self._thresholds.groups.copy(),
            "thresholds.keys": self._thresholds.keys.copy(),
            "thresholds.uniform": self._thresholds.uniform.copy(),
            "means.labels": self._means.labels.copy(),
            "means.sums": self._means.sums.copy(),
            "means.counts": self._means.counts.copy(),
            **erasure.stones_to_state(self.tombstones),
            **rows_to_state(self._table.take(self._slots)),
        }

    def load_state_dict(self, state: State) -> None:
        """Become what :meth:`state_dict` returned, capacity and seed included.

        Tombstones that are here already stay and are heeded: an older file brings nobody back.

        Raises:
            CheckpointError: the state is of another policy, or damaged; nothing has changed then.
        """
        try:
            name = bytes(state["policy"]).decode()
            if name != self.policy.name:
                raise CheckpointError(
                    f"the saved buffer has policy {name}, this one {self.policy.name}: resume "
                    "with the settings it was written with"
                )
            rows, stones = rows_from_state(state), erasure.stones_from_state(state)
            capacity, seen, seed, *left = (int(value) for value in state["counters"])
            now = float(state["now"][0])
            keys, draws = (generator_from_words(state[f"random.{n}"]) for n in ("keys", "draws"))
            thresholds, means = Thresholds(), ClassMeans()
            for field in ("groups", "keys", "uniform"):
                setattr(thresholds, field, np.array(state[f"thresholds.{field}"]))
            for field in ("labels", "sums", "counts"):
                setattr(means, field, np.array(state[f"means.{field}"]))
            table, count = Table(capacity), len(rows.get("labels", ()))
            if rows:
                table.put(np.arange(count), rows)
        except (KeyError, IndexError, ValueError) as problem:
            raise CheckpointError(
                f"the saved buffer cannot be read ({problem}): it is damaged, put a copy back"
            ) from None
        self.capacity, self.seen, self.seed, self.now = capacity, seen, seed, now
        self._left = dict(zip(self._left, left, strict=True))
        self._key_random, self._draw_random = keys, draws
        self._thresholds, self._means = thresholds, means
        self._table, self._slots = table, np.arange(count)
        own, self.tombstones = self.tombstones, tuple(stones)
        self.bury(own)
