"""What may be told of a client's rows: the agreement that an account keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedistill.errors import Problem, SettingsError
from fedistill.settings import PolicySettings, PrivacySettings

PRIVATE = ("dpsgd", "dp-head", "gnmax")
"""Mechanisms whose releases are differentially private against everybody but the client itself."""
RELATION = "add-remove"
SMALLEST_DELTA = 1e-5
STATEMENTS: Mapping[str, str] = {
    "none": "no differential privacy",
    "hard-label": "labels in place of probabilities, which is NOT differentially private",
    "dpsgd": "students trained by DP-SGD; what they predict is post-processing",
    "dp-head": "heads trained by DP-SGD on features learnt from public rows",
    "gnmax": "noisy votes of sub-teachers (GNMax), each answer as sure as its votes",
    "central-gauss": "Gaussian noise on the mean, at a trusted server: it hides clients from one "
    "another and from the public, and nothing from the server",
}
"""What a report says of each mechanism."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What may be told of a client's rows.

    Attributes:
        mechanism: how the client is private.
        agreed: the mechanism that the whole federation agreed on; a group may have another one.
        unit: ``record`` or ``user``.
        epsilon: the most that may ever be spent of one unit.
        delta: at which epsilon is meant.
        rounds: rounds of the run in which rows are trained on.
        sigma: noise multiplier; None: planned from the budget.
        purpose: what the run is for.
        relation: which two data sets are neighbours.
    """

    mechanism: str
    agreed: str = ""
    unit: str = "record"
    epsilon: float = 8.0
    delta: float = SMALLEST_DELTA
    rounds: int = 1
    sigma: float | None = None
    purpose: str = ""
    relation: str = RELATION


def settled(how: PrivacySettings, mechanism: str) -> PrivacySettings:
    """The settings with what the mechanism decides where they are silent.

    A head learns by few large steps on all rows: with as many steps and the same epsilon, a full
    batch needs less noise than a part of it (epsilon 3, 16 steps: 5.56 to 6.03 for a half).
    """
    head = mechanism == "dp-head"
    return replace(
        how,
        sample_rate=how.sample_rate or (1.0 if head else 0.25),
        steps=how.steps or (1 if head else None),
    )


def terms_of(
    how: PrivacySettings,
    rounds: int,
    units: int,
    *,
    mechanism: str | None = None,
    policy: PolicySettings | None = None,
) -> Terms:
    """The terms of one client: as agreed, and no more than its own policy allows.

    Args:
        how: what all agreed on.
        rounds: of the run.
        units: how many records (or users) the client has.
        mechanism: of the client's group, where it has one of its own.
        policy: of a real site.

    Raises:
        SettingsError: delta is no smaller than one of the units: it would permit publishing one.
    """
    policy = policy or PolicySettings()
    # By the next power of two: epsilon is told, and would tell the exact number.
    rounded = 1 << max(units - 1, 0).bit_length()
    delta = min(SMALLEST_DELTA, 1 / (10 * rounded)) if how.delta is None else how.delta
    delta = min(delta, policy.delta or (SMALLEST_DELTA if policy.epsilon else delta))
    if units and delta >= 1 / units:
        text = (
            f"expected less than 1 / {units}, a client's number of {how.unit}s, found {delta:g}: "
            "leave it out"
        )
        raise SettingsError([Problem("privacy.delta", text)])
    return Terms(
        mechanism=mechanism or how.mechanism,
        agreed=how.mechanism,
        unit=how.unit,
        epsilon=min(how.epsilon, policy.epsilon or how.epsilon),
        delta=delta,
        rounds=how.rounds or rounds,
        sigma=how.sigma,
        purpose=how.purpose,
    )
