"""What a step of incremental learning minimises: pure functions of what was said of some rows.

An objective is given a :class:`Step` (new rows, remembered rows, public rows, each with the
student's logits) and returns named terms, whose sum is minimised. How many remembered rows it
wants, in independent draws, stands in its ``draws``. One of your own is a class or a function::

    def cautious(step):
        (old,) = step.old
        return {"new": labels(step.new), "old": 2 * labels(old)}

    fd.IncrementalDistiller(build, objective=cautious)

Notation: f(x) are the student's logits, x' and x'' remembered rows of two draws, z' the logits
stored with x' when it came, CE the cross-entropy with labels, mean over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedistill.distill.steps import LOWEST as LOWEST
from fedistill.distill.steps import Ask as Ask
from fedistill.distill.steps import Group as Group
from fedistill.distill.steps import Objective as Objective
from fedistill.distill.steps import Step as Step
from fedistill.distill.steps import Terms as Terms
from fedistill.distill.steps import gradient, labels, logit_gap, present, soft_gap, told
from fedistill.errors import FedistillError, did_you_mean

# --- the objectives ------------------------------------------------------------------------------


class OneDraw:
    """What objectives with one draw from the memory share: ``rows`` of it in a step."""

    rows: int

    @property
    def draws(self) -> tuple[int, ...]:
        """One draw."""
        return (self.rows,)


@dataclass(frozen=True)
class FineTune:
    """CE on new rows alone: what forgets.

    The yardstick below which replay must not fall, and the whole objective without a memory.
    """

    draws: ClassVar[tuple[int, ...]] = ()

    def __call__(self, step: Step) -> Terms:
        """CE(x)."""
        return {"new": labels(step.new)}


@dataclass(frozen=True)
class Er(OneDraw):
    """Experience replay: CE on new and remembered rows together.

    Robins 1995; in this form Chaudhry et al., arXiv 1902.10486: one mean over both.

    Args:
        rows: remembered rows in a step; 0: as many as are new.
    """

    rows: int = 0

    def __call__(self, step: Step) -> Terms:
        """CE(x and x')."""
        (old,) = step.old
        new_rows, old_rows = ((group.labels >= 0).sum() for group in (step.new, old))
        total = (new_rows + old_rows).clamp_min(1)
        return {
            "new": labels(step.new) * new_rows / total,
            "old": labels(old) * old_rows / total,
        }


@dataclass(frozen=True)
class ErAce(OneDraw):
    """Experience replay in which new rows do not push old classes away.

    Caccia et al., arXiv 2104.05025: on new rows only the classes of the batch compete. As in the
    paper it holds from the first step on (mammoth begins with the second task and opens all
    classes not met yet).

    Args:
        rows: remembered rows in a step; 0: as many as are new.
    """

    rows: int = 0

    def __call__(self, step: Step) -> Terms:
        """CE(x) among the classes of the batch + CE(x')."""
        (old,) = step.old
        return {"new": labels(step.new, present(step.new)), "old": labels(old)}


@dataclass(frozen=True)
class Der(OneDraw):
    """Dark experience replay: remembered rows keep the logits that they had when they came.

    Buzzega et al., arXiv 2004.07211: CE(x) + alpha MSE(f(x'), z'), the mean over rows and classes.

    Args:
        alpha: weight of the logits.
        rows: remembered rows in a step.
    """

    alpha: float = 0.2
    rows: int = 128

    def __call__(self, step: Step) -> Terms:
        """CE(x) + alpha MSE(f(x'), z')."""
        (old,) = step.old
        return {"new": labels(step.new), "stored": self.alpha * logit_gap(old, old.stored)}


@dataclass(frozen=True)
class DerPlus:
    """DER++: DER, and the labels of a second, independent draw.

    Buzzega et al., arXiv 2004.07211: DER + beta CE(x'').

    Args:
        alpha: weight of the logits.
        beta: weight of the labels.
        rows: remembered rows in each draw.
    """

    alpha: float = 0.2
    beta: float = 1.0
    rows: int = 128

    @property
    def draws(self) -> tuple[int, ...]:
        """Two draws."""
        return (self.rows, self.rows)

    def __call__(self, step: Step) -> Terms:
        """CE(x) + alpha MSE(f(x'), z') + beta CE(x'')."""
        first, second = step.old
        return {
            "new": labels(step.new),
            "stored": self.alpha * logit_gap(first, first.stored),
            "old": self.beta * labels(second),
        }


@dataclass(frozen=True)
class Lwf:
    """Learning without forgetting: the student as it was teaches old classes, on new rows.

    Li and Hoiem, arXiv 1606.09282. CE(x) + weight T^2 KL over the classes met before this
    experience. Deviation: T^2, so that the weight means the same at every temperature.

    Args:
        weight: of the teacher's part.
        temperature: T.
    """

    weight: float = 1.0
    temperature: float = 2.0
    draws: ClassVar[tuple[int, ...]] = ()
    teacher: ClassVar[str] = "self"

    def __call__(self, step: Step) -> Terms:
        """CE(x) + weight T^2 KL(old student || student) over old classes."""
        taught = step.new.taught()
        gap = soft_gap(step.new, taught, step.known & told(taught), self.temperature)
        return {"new": labels(step.new), "teacher": self.weight * gap}


@dataclass(frozen=True)
class AGem(OneDraw):
    """Averaged GEM: a step may not raise the loss on remembered rows.

    Chaudhry et al., arXiv 1812.00420: with g the gradient on new rows and r on remembered ones, g
    becomes g - (g.r / r.r) r where g.r < 0. Here as a loss with that gradient: CE(x) + c CE(x'),
    c = max(0, -g.r / r.r) a constant.

    Args:
        rows: remembered rows in a step.
    """

    rows: int = 128

    def __call__(self, step: Step) -> Terms:
        """CE(x) + c CE(x')."""
        (old,) = step.old
        new, reference = labels(step.new), labels(old)
        if not len(old):
            return {"new": new}
        g = gradient(new, step.weights)
        r = gradient(reference, step.weights)
        along, size = g @ r, r @ r
        share = torch.where(size > 0, (-along / size.clamp_min(1e-30)).clamp_min(0.0), 0.0)
        return {"new": new, "old": share * reference}


@dataclass(frozen=True)
class GDumb:
    """Nothing is learned as it comes: a new student is trained on the memory alone.

    Prabhu et al., ECCV 2020: the floor of continual learning, with ``policy="class-balanced"``.
    The student is made anew after each experience. Deviations: the learning rate falls as one
    cosine and not with restarts, and nothing is cut and mixed.

    Args:
        epochs: passes over the memory.
    """

    epochs: int = 30
    draws: ClassVar[tuple[int, ...]] = ()
    afresh: ClassVar[bool] = True

    def __call__(self, step: Step) -> Terms:
        """Nothing."""
        return {"new": step.new.logits.sum() * 0}


@dataclass(frozen=True)
class Cfed:
    """The rule of CFeD: on public rows the student as it was is the teacher.

    Ma et al., IJCAI 2022 (unconfirmed beyond the authors' code): CE on the new rows, and weight
    times the soft cross-entropy at T on public rows, without T^2. In a federation a client learns
    in a round with probability ``learns`` and distils with probability ``distils``, independently.
    Deviations: a client that would do neither learns; alone (both 1) every step does both.

    Args:
        weight: of the public rows.
        temperature: T.
        rows: public rows in a step.
        learns: share of the rounds in which new rows are learned.
        distils: share of the rounds with public rows.
    """

    weight: float = 0.1
    temperature: float = 2.0
    rows: int = 50
    learns: float = 1.0
    distils: float = 1.0
    draws: ClassVar[tuple[int, ...]] = ()
    teacher: ClassVar[str] = "self"

    @property
    def public(self) -> int:
        """Public rows in a step."""
        return self.rows

    def __call__(self, step: Step) -> Terms:
        """CE(x) + weight CE at T on public rows."""
        taught = step.public.taught()
        gap = soft_gap(step.public, taught, told(taught), self.temperature)
        return {"new": labels(step.new), "public": self.weight / self.temperature**2 * gap}


@dataclass(frozen=True)
class Steady(OneDraw):
    """Ours: DER++ on one draw, its labels freed of what a step shows too often.

    A step shows the classes that come now far more often than the stream has shown them, and that
    is what pushes the others away. With n(c) and q(c) the shares of class c among new and
    remembered rows, a step shows p = (n + beta q) / (1 + beta), and g = f + log p - log q answers
    as a step would have it:

        CE(g(x)) + beta CE(g(x')) + alpha MSE(f(x'), z')

    What predicts and what is stored is f, whose classes are as likely as in memory: as in the
    stream so far with ``reservoir``, all alike with ``class-balanced``. Where the classes of new
    rows are those of the memory, p = q and only DER++ is left. A class that is not there counts
    half a row; nothing is adjusted while nothing is remembered.

    Builds on DER++ (Buzzega et al., arXiv 2004.07211) and logit adjustment (Menon et al., arXiv
    2007.07314; in a stream: Huang et al., arXiv 2311.06460). Deviations: the adjustment goes to the
    memory's shares and not to equal ones, so that a class met a moment ago is not at once as likely
    as the others; shares are those of one step; one draw serves labels and logits; averaged weights
    predict.

    Args:
        alpha: weight of the stored logits.
        beta: weight of the labels of remembered rows.
        rows: remembered rows in a step.
    """

    alpha: float = 0.5
    beta: float = 1.0
    rows: int = 64
    average: ClassVar[float] = 0.99

    def __call__(self, step: Step) -> Terms:
        """CE(g(x)) + beta CE(g(x')) + alpha MSE(f(x'), z')."""
        (old,) = step.old
        more = excess(step.new, old, self.beta)
        return {
            "new": labels(replace(step.new, logits=step.new.logits + more)),
            "stored": self.alpha * logit_gap(old, old.stored),
            "old": self.beta * labels(replace(old, logits=old.logits + more)),
        }


@dataclass(frozen=True)
class Follow:
    """Another objective, and on remembered rows (on new ones before there are any) the teacher.

    What a teacher does where the objective does not ask for one: Tarvainen and Valpola, arXiv
    1703.01780, on the memory's rows.

    Args:
        objective: the other one.
        weight: of the teacher's part.
    """

    objective: Objective
    weight: float = 0.1

    def __getattr__(self, name: str) -> Any:
        """What else is asked of an objective (its draws, public rows, ...) is the other one's."""
        if name == "objective" or name.startswith("__"):  # a copy that is still empty asks, too
            raise AttributeError(name)
        return getattr(self.objective, name)

    def __call__(self, step: Step) -> Terms:
        """The objective's terms + weight MSE(f, teacher)."""
        group = step.old[0] if step.old and len(step.old[0]) else step.new
        gap = logit_gap(group, group.taught())
        return {**self.objective(step), "teacher": self.weight * gap}


@dataclass(frozen=True)
class Only:
    """One term of another objective, and nothing that is remembered."""

    term: str
    objective: Objective
    draws: ClassVar[tuple[int, ...]] = ()

    @property
    def public(self) -> int:
        """Public rows in a step."""
        return int(getattr(self.objective, "public", 0))

    def __call__(self, step: Step) -> Terms:
        """That term."""
        return {k: v for k, v in self.objective(step).items() if k == self.term}


OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    "fine-tune": FineTune,
    "er": Er,
    "er-ace": ErAce,
    "der": Der,
    "der++": DerPlus,
    "lwf": Lwf,
    "a-gem": AGem,
    "gdumb": GDumb,
    "cfed": Cfed,
    "steady": Steady,
}
"""The objectives by name."""


def objective(name: str | Objective, **options: Any) -> Objective:
    """An objective by name, with its options; anything else is one already.

    >>> objective("der", alpha=0.5).alpha
    0.5

    Raises:
        FedistillError: the name or an option is unknown.
    """
    if not isinstance(name, str):
        return name
    if name not in OBJECTIVES:
        raise FedistillError(f'unknown objective "{name}"{did_you_mean(name, OBJECTIVES)}')
    try:
        return OBJECTIVES[name](**options)
    except TypeError as error:
        raise FedistillError(f"objective {name}: {error}") from None


def shares(group: Group) -> Tensor:
    """``[classes]`` the share of each class among the labels that are known; zeros without any."""
    counts = torch.bincount(group.labels + 1, minlength=group.logits.shape[1] + 1)[1:]
    return counts.to(group.logits) / counts.sum().clamp_min(1)


def excess(new: Group, old: Group, beta: float) -> Tensor:
    """``[classes]`` log of how much more often a step shows a class than the memory does.

    Args:
        new: the rows that came.
        old: remembered rows.
        beta: weight of the labels of all of ``old`` beside those of all of ``new``.

    Returns:
        Zeros where one of the two has no labels.
    """
    coming, there = shares(new), shares(old)
    if not bool(coming.any()) or not bool(there.any()):
        return torch.zeros_like(there)
    least = 0.5 / (len(new) + len(old))
    shown = (coming + beta * there) / (1 + beta)
    return shown.clamp_min(least).log() - there.clamp_min(least).log()
