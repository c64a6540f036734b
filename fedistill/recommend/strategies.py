"""How a recommender stays current: a few choices, named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedistill.errors import FedistillError, did_you_mean

UPDATES = ("none", "train", "retrain")
TEACHERS = ("none", "current", "everybody")


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What happens when a block has come.

    Attributes:
        summary: one line on it.
        update: ``none`` leaves the model as it is, ``train`` goes on from it with the block,
            ``retrain`` begins anew with everything: the oracle.
        replay: choices that are stored, as a share of all that came; they are replayed beside the
            block.
        replay_weight: of a replayed choice; "share": as many as it stands for, so that block and
            replay together weigh as the whole history does.
        teacher: who the model as it was is asked about: ``none``; ``current``, the users of the
            block (LwF); ``everybody`` it knew, in proportion to their choices.
        teacher_weight: of its word beside the block; "share": as many choices as it has learned
            for each of the block.
        anchor: the teacher's vectors hold the student's, too.
        sketch: a model that was learned as a sketch of the choices is learned anew from the new
            ones and the old sketch, which stands in for all before; nothing else is set beside it
            then. See :mod:`fedistill.recommend.spectral`.
        neighbours: new users and items begin near those they were met with, and not at random.
    """

    summary: str
    update: str = "train"
    replay: float = 0.0
    replay_weight: float | str = 1.0
    teacher: str = "none"
    teacher_weight: float | str = 1.0
    anchor: bool = False
    sketch: bool = False
    neighbours: bool = False

    def __post_init__(self) -> None:
        for name, known in (("update", UPDATES), ("teacher", TEACHERS)):
            if (found := getattr(self, name)) not in known:
                raise FedistillError(
                    f'strategy: expected {name} of {", ".join(known)}, found "{found}"'
                )
        if not 0 <= self.replay <= 1:
            raise FedistillError(
                f"strategy: expected replay as a share within 0 and 1, found {self.replay}"
            )
        for weight in (self.replay_weight, self.teacher_weight):
            if weight != "share" and (isinstance(weight, str) or weight < 0):
                raise FedistillError(
                    f'strategy: expected a weight from 0 or "share", found {weight!r}'
                )


STRATEGIES: Mapping[str, Strategy] = {
    "none": Strategy(summary="no update: the model of the first block", update="none"),
    "fine-tune": Strategy(summary="goes on with the new block alone"),
    "er": Strategy(summary="and replays 2 % of what came before", replay=0.02),
    "lwf": Strategy(
        summary="and keeps what the previous model scored for the users of the block",
        teacher="current",
    ),
    "fedistill": Strategy(
        summary="the old sketch, or the previous model's scores for everybody, stands for the past",
        teacher="everybody",
        teacher_weight="share",
        anchor=True,
        sketch=True,
        neighbours=True,
    ),
    "retrain": Strategy(summary="from scratch on everything: the oracle", update="retrain"),
}


def find_strategy(strategy: str | Strategy) -> Strategy:
    """By name, or as given.

    Raises:
        FedistillError: an unknown name.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if strategy not in STRATEGIES:
        raise FedistillError(f'unknown strategy "{strategy}"{did_you_mean(strategy, STRATEGIES)}')
    return STRATEGIES[strategy]
