"""From honest clients to the same ones, of whom some are bad."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fedistill.attacks.kinds import ATTACKS, Attack
from fedistill.attacks.learner import BadLearner, Pact
from fedistill.errors import Problem, SettingsError, did_you_mean
from fedistill.seeding import derive, generator
from fedistill.types import Rows

if TYPE_CHECKING:
    from fedistill.client import Client


def corrupt(
    clients: Sequence[Client],
    kind: str,
    count: int,
    *,
    collude: bool = False,
    classes: int,
    seed: int,
) -> list[Client]:
    """The same clients, of which ``count`` are bad; ids and order stay.

    Who is bad is drawn from the seed among the clients with rows of their own: the others teach
    nobody.

    Args:
        clients: all of them, honest.
        kind: a name of :data:`ATTACKS`.
        count: how many are bad.
        collude: the bad pool their rows and train alike, so that clients of one architecture
            share one model and one target; each adds a little noise of its own, or their equal
            uploads would count as one.
        classes: number of classes.
        seed: of the experiment.

    Raises:
        SettingsError: no such attack, or more bad clients than there are with rows.
    """
    if kind not in ATTACKS:
        text = f'unknown attack "{kind}"{did_you_mean(kind, ATTACKS)}'
        raise SettingsError([Problem("attack.kind", text)])
    able = [number for number, client in enumerate(clients) if len(client.data)]
    if not 0 <= count <= len(able):
        text = f"expected 0 to {len(able)} (clients with rows of their own), found {count}"
        raise SettingsError([Problem("attack.count", text)])
    drawn = {able[n] for n in generator(seed, "attack").permutation(len(able))[:count]}
    pooled = _pooled([clients[number].data for number in sorted(drawn)]) if collude else None
    made = list(clients)
    for number in drawn:
        client = clients[number]
        pact = Pact(derive(seed, "attack"), derive(seed, "attack", client.id)) if collude else None
        attack = ATTACKS[kind]
        made[number] = dataclasses.replace(
            client,
            data=spoilt(pooled or client.data, attack, classes),
            wrap=partial(BadLearner, attack=attack, classes=classes, pact=pact),
        )
    return made


def spoilt(rows: Rows, attack: Attack, classes: int) -> Rows:
    """The rows as a bad client counts and labels them."""
    labelled = dataclasses.replace(rows, labels=attack.relabel(rows.labels, classes))
    if attack.repeats == 1:
        return labelled
    return labelled.take(np.tile(np.arange(len(rows)), attack.repeats))


def _pooled(parts: Sequence[Rows]) -> Rows | None:
    """All rows together; None of nobody's."""
    if not parts:
        return None
    return Rows(
        np.concatenate([part.inputs for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )
