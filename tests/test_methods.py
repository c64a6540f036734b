"""Every preset that exchanges predictions, on a case that fits on a sheet of paper.

Three clients always say the same about four proxy rows of three classes, and write down what they
are taught; so does the server's student. What is published and what is learned must be what the
formula of the paper gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from builders import CLASSES, INPUTS, Saying, federation, gaussian, proxy

from fedistill import models
from fedistill.backends.serial import Serial
from fedistill.backends.unreliable import unreliable
from fedistill.client import Client
from fedistill.distill import density
from fedistill.distill.recipe import Recipe
from fedistill.federation import Federation
from fedistill.presets import METHODS, method
from fedistill.types import ProxySet, Rows
from fedistill.wire.codec import decode_familiarity, encode_familiarity
from fedistill.wire.envelope import count_bits
from fedistill.wire.messages import Plan

P = {
    "c0": [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.5, 0.25], [0.6, 0.3, 0.1]],
    "c1": [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.2, 0.3, 0.5], [0.1, 0.2, 0.7]],
    "c2": [[0.1, 0.6, 0.3], [0.3, 0.3, 0.4], [0.4, 0.35, 0.25], [0.3, 0.6, 0.1]],
}
STUDENT = np.array([[51, 102, 102], [153, 51, 51], [85, 85, 85], [17, 204, 34]]) / 255
"""What the server's student says: exact in 255 units."""
SUMS = np.array([[1.3, 1.1, 0.6], [0.6, 1.3, 1.1], [0.85, 1.15, 1.0], [1.0, 1.1, 0.9]])
MEAN = SUMS / 3
PRODUCTS = np.array(
    [[0.035, 0.036, 0.006], [0.006, 0.048, 0.024], [0.02, 0.0525, 0.03125], [0.018, 0.036, 0.007]]
)
GEOMETRIC = np.cbrt(PRODUCTS) / np.cbrt(PRODUCTS).sum(axis=1, keepdims=True)
PUBLIC = np.array([[row, 1, -row, row % 2] for row in range(4)], dtype=np.float32)
OWN = 100
"""Inputs of own rows begin with 100 and the number of the client, those of public rows below."""
LOW = 1e-4 / 1.0002
"""What a label leaves to the other classes: nobody has a veto."""


class Noting(Saying):
    """Says what a table says of a public row, and notes what it is taught."""

    def __init__(self, table: Any, log: list[str] | None = None) -> None:
        super().__init__(np.log(np.asarray(table)))
        self.lessons: list[dict[int, Any]] = []
        self.weights: list[list[float]] = []
        self.log = [] if log is None else log

    def absorb(self, inputs: Any, soft_targets: Any, *, seed: int, weights: Any = None) -> None:
        rows = inputs[:, 0].astype(int).tolist()
        self.lessons.append(dict(zip(rows, np.array(soft_targets), strict=True)))
        self.weights.append([] if weights is None else weights.tolist())
        self.log.append("absorb")

    def fit(self, rows: Rows, *, seed: int) -> None:
        self.log.append("fit")

    def predict(self, inputs: Any) -> Any:
        self.log.append("predict")
        return self.logits[inputs[:, 0].astype(int) % 4].astype(np.float32)


class Scoring(Noting):
    """One that also tells how familiar a row is; its own rows are all of familiarity 0."""

    def __init__(self, table: Any, scores: Any) -> None:
        super().__init__(table)
        self.scores = np.asarray(scores, dtype=np.float32)

    def familiarity(self, inputs: Any) -> Any:
        rows = inputs[:, 0].astype(int)
        return np.where(rows < OWN, self.scores[rows % 4], 0).astype(np.float32)


def noting(name: str, build: Callable[[], Any] | None = None) -> Client:
    number = int(name[1])
    inputs = np.full((8, INPUTS), OWN + number, dtype=np.float32)
    own = Rows(inputs, np.arange(8) % 3)
    return Client(name, build or partial(Noting, P[name]), own)


def case(
    name: str, clients: Mapping[str, Callable[[], Any]] | None = None, **options: Any
) -> Federation:
    changes = options.pop("changes", {})
    given = {"student": partial(Noting, STUDENT), "proxy": ProxySet(PUBLIC.copy())}
    people = [noting(one, (clients or {}).get(one)) for one in P]
    return federation(people, method=method(name, **changes), **(given | options))


def taught(fed: Federation, name: str) -> list[dict[int, Any]]:
    """Lessons of a client, by proxy row, or of the student."""
    learner = fed.server.student if name == "student" else fed.sites[name].learner
    assert isinstance(learner, Noting)
    return learner.lessons


def check(lesson: Mapping[int, Any], expected: Any, atol: float = 1e-6) -> None:
    wanted = dict(expected if isinstance(expected, dict) else enumerate(expected))
    assert sorted(lesson) == sorted(wanted)
    for row, target in wanted.items():
        np.testing.assert_allclose(lesson[row], target, atol=atol, err_msg=f"row {row}")


def softmax(values: Any) -> Any:
    powers = np.exp(np.asarray(values, dtype=np.float64))
    return powers / powers.sum(axis=-1, keepdims=True)


# --- all learn from one rule's targets -----------------------------------------------------------

POWERED = MEAN**2.0 / (MEAN**2.0).sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fedmd", GEOMETRIC),
        ("ds-fl", softmax(MEAN / 0.1)),
        ("feddf", GEOMETRIC),
        ("scarlet", POWERED),
    ],
)
def test_clients_and_student_learn_what_the_formula_gives(name: str, expected: Any) -> None:
    fed = case(name)
    list(fed.run(2))
    np.testing.assert_allclose(fed.server.table, expected, atol=1e-6)
    for client in P:
        (lesson,) = taught(fed, client)
        check(lesson, expected)
    for lesson in taught(fed, "student"):
        check(lesson, expected)


def test_numbers_of_the_first_row_worked_out() -> None:
    """So that a slip in the tables above cannot hide: row 0 by a pocket calculator."""
    np.testing.assert_allclose(GEOMETRIC[0], [0.38987, 0.39355, 0.21658], atol=2e-5)
    np.testing.assert_allclose(softmax(MEAN / 0.1)[0], [0.62097, 0.31882, 0.06022], atol=2e-5)
    np.testing.assert_allclose(POWERED[0], [0.51840, 0.37117, 0.11043], atol=2e-5)


@pytest.mark.parametrize(
    ("name", "remembers"), [("fedmd", False), ("ds-fl", False), ("feddf", True)]
)
def test_of_earlier_rounds_is_taught_what_the_method_remembers(name: str, remembers: bool) -> None:
    fed = case(name, per_round=2)
    list(fed.run(3))
    asked = [set(fed.server.plan(number).ask.rows().tolist()) for number in (1, 2)]
    assert asked[0] | asked[1] == {0, 1, 2, 3}
    first, second = taught(fed, "c0")
    assert set(first) == asked[0]
    assert set(second) == (asked[0] | asked[1] if remembers else asked[1])
    learner = fed.sites["c0"].learner
    assert isinstance(learner, Noting)
    assert set(learner.weights[-1]) == {1.0}


def test_fedmd_aggregates_then_clients_digest_then_revisit() -> None:
    log: list[str] = []
    rule = method("fedmd").bound_rule()

    def aggregate(logits: Any, weights: Any) -> Any:
        log.append("aggregate")
        return rule(logits, weights)

    people = {"c0": lambda: Noting(P["c0"], log)}
    fed = case("fedmd", people, changes={"rule": aggregate}, student=None)
    list(fed.run(3))
    digest_revisit = ["absorb", "fit", "predict", "aggregate"]
    assert log == ["fit", "predict", "aggregate", *digest_revisit * 2]
    recipe = fed.method.client_recipe(Recipe())
    assert (recipe.distil, recipe.loss) == ("phase", "mae")


# --- the student teaches -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedema-distill", "cfd", "fed-et"])
def test_where_the_student_teaches_clients_learn_what_it_says(name: str) -> None:
    fed = case(name)
    list(fed.run(3))
    atol = 5e-4 if name == "fedema-distill" else 1e-6  # two bytes a value
    for client in P:
        assert len(taught(fed, client)) == 2
        for lesson in taught(fed, client):
            check(lesson, STUDENT, atol)


def test_fedema_distill_teaches_the_mean_to_a_student_of_averaged_weights() -> None:
    fed = case("fedema-distill")
    list(fed.run(1))
    (lesson,) = taught(fed, "student")
    check(lesson, MEAN, 5e-4)
    assert fed.method.student_recipe(Recipe()).average == 0.99


def test_cfd_sends_labels_up_and_changes_down() -> None:
    fed = case("cfd")
    list(fed.run(3))
    # Top classes: row 0: 0 0 1, row 1: 1 2 2, row 2: 1 2 0, row 3: 0 2 1
    votes = np.array([[2, 1, 0], [0, 1, 2], [1, 1, 1], [1, 1, 1]])
    expected = votes / 3 * (1 / 1.0002) + (3 - votes) / 3 * LOW
    for lesson in taught(fed, "student"):
        check(lesson, expected)
    plan = Plan.from_bytes(fed.server.plan(4).message("c0"))
    assert plan.targets is not None
    assert count_bits(plan.targets.based, 4) == 4
    assert len(plan.targets.payload) == 5, "nothing changed"
    assert plan.heard == 3
    fixed = [fed.server.plan(number).ask for number in (1, 4)]
    assert fixed[0] == fixed[1]


def test_fed_et_teaches_the_label_and_those_who_disagree() -> None:
    fed = case("fed-et")
    list(fed.run(1))
    expected = []
    for row in range(4):
        logs = [np.log(P[name][row]) for name in P]
        centred = [log - sum(log) / 3 for log in logs]
        weights = [sum(value**2 for value in one) / 3 for one in centred]
        summed = sum(w * one for w, one in zip(weights, centred, strict=True))
        label = int(np.argmax(summed))
        against = [
            w if np.argmax(one) != label else 0 for w, one in zip(weights, logs, strict=True)
        ]
        dissent = sum(w * np.array(P[name][row]) for w, name in zip(against, P, strict=True))
        target = np.eye(3)[label]
        if sum(against):
            target = (target + 0.2 * dissent / sum(against)) / 1.2
        expected.append(target)
    (lesson,) = taught(fed, "student")
    check(lesson, expected)


# --- what is kept --------------------------------------------------------------------------------


def test_scarlet_asks_no_row_twice_while_its_target_is_fresh() -> None:
    fed = case("scarlet", changes={"cache_rounds": 3})
    plans = []
    for row in fed.run(5):
        plans.append(fed.server.plan(row["round"] + 1))
    # Made in round 1, fresh in 2 and 3, asked again in 4, fresh in 5 and 6.
    assert [plan.count() for plan in plans] == [0, 0, 4, 0, 0]
    for client in P:
        assert len(taught(fed, client)) == 4
        for lesson in taught(fed, client):
            check(lesson, POWERED)
    ups = [row["bytes_up"] for row in fed.history]
    assert ups[1] == ups[2] == ups[4] < ups[0]
    told = Plan.from_bytes(plans[1].message("c0")).targets
    assert told is not None
    assert count_bits(told.held, 4) == 4


# --- which client teaches which row --------------------------------------------------------------


@pytest.mark.parametrize(
    ("anchors", "best"),
    [
        (None, ["c0", "c0", "c1", "c1"]),  # the smallest entropy
        ([1, 1, 2, -1], ["c2", "c0", "c1", "c1"]),  # the smallest cross-entropy; row 3: entropy
        ([2, 2, 0, 0], ["c2", "c1", "c2", "c0"]),
    ],
)
def test_fedmkt_lets_the_best_teacher_of_each_row_teach(
    anchors: list[int] | None, best: list[str]
) -> None:
    fed = case("fedmkt", anchors=None if anchors is None else np.array(anchors))
    list(fed.run(2))
    expected = [P[name][row] for row, name in enumerate(best)]
    for client in P:
        (lesson,) = taught(fed, client)
        check(lesson, expected, 0.02)  # a byte a value


class Known:
    """A density ratio that is given."""

    def __init__(self, scores: Any) -> None:
        self.scores = np.asarray(scores, dtype=np.float64)

    def score(self, inputs: Any) -> Any:
        return self.scores[inputs[:, 0].astype(int)]

    def threshold(self, quantile: float) -> float:
        assert quantile == 0.25
        return 0.0


def with_scores(monkeypatch: pytest.MonkeyPatch, name: str, scores: Mapping[str, Any]) -> None:
    def make(own: Any, public: Any, *, seed: int) -> Known:
        return Known(scores[f"c{int(own[0, 0]) - OWN}"])

    monkeypatch.setitem(density.DENSITIES, name, make)  # type: ignore[arg-type]


def test_selective_fd_averages_over_those_to_whom_a_row_is_familiar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = {"c0": [1, 0, -1, -1], "c1": [-1, 2, 3, -1], "c2": [-1, 0.1, -0.1, -9]}
    with_scores(monkeypatch, "kulsif", scores)
    fed = case("selective-fd")
    list(fed.run(2))
    expected = {0: P["c0"][0], 1: MEAN[1], 2: P["c1"][2]}  # row 3: nobody
    for name in (*P, "student"):
        for lesson in taught(fed, name):
            check(lesson, expected)
    assert (fed.server.stamp > 0).tolist() == [True, True, True, False]


def test_ssfl_puts_the_labels_of_familiar_rows_to_the_vote() -> None:
    scores = {"c0": [1, 1, 1, -1], "c1": [1, 0, -1, -1], "c2": [-1, 2, 1, -1]}
    people = {name: partial(Scoring, P[name], scores[name]) for name in P}
    fed = case("ssfl", people)
    list(fed.run(2))
    # Row 0: 0 0, row 1: 1 2 2, row 2: 1 against 0, the lower class; row 3: nobody.
    high = 1 / 1.0002
    expected = {0: [high, LOW, LOW], 1: [LOW, LOW, high], 2: [high, LOW, LOW]}
    for client in P:
        (lesson,) = taught(fed, client)
        check(lesson, expected)


def test_fedaux_weighs_logits_by_certainty(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"c0": [4, -4, 0, 1], "c1": [0, 0, 0, -3], "c2": [-6, 3, 0, 8]}
    with_scores(monkeypatch, "logistic", scores)
    fed = case("fedaux")
    list(fed.run(2))
    expected = []
    for row in range(4):
        shares = []
        for name in P:
            told = float(decode_familiarity(encode_familiarity(np.array([scores[name][row]])))[0])
            shares.append(1 / (1 + math.exp(-told)))
        logits = sum(s * np.log(P[name][row]) for s, name in zip(shares, P, strict=True))
        expected.append(softmax(logits / sum(shares)))
    np.testing.assert_allclose(expected[2], GEOMETRIC[2], atol=1e-6)
    for client in P:
        (lesson,) = taught(fed, client)
        check(lesson, expected)


def test_comet_offers_two_centres_and_each_takes_the_nearer() -> None:
    fed = case("comet")
    list(fed.run(2))
    together = [[0.6, 0.25, 0.15], [0.25, 0.25, 0.5], [0.325, 0.425, 0.25], [0.45, 0.45, 0.1]]
    alone = [P["c2"][0], P["c0"][1], P["c1"][2], P["c1"][3]]
    outsider = ["c2", "c0", "c1", "c1"]
    for client in P:
        (lesson,) = taught(fed, client)
        check(
            lesson,
            [alone[r] if outsider[r] == client else together[r] for r in range(4)],
        )
    for lesson in taught(fed, "student"):
        check(lesson, MEAN)
    told = fed.server.plan(3).targets
    assert told is not None
    assert told.probs().shape == (4, 2, 3)


def test_comet_offers_no_more_centres_than_there_are_uploads() -> None:
    people = [noting("c0")]
    fed = federation(
        people, method="comet", proxy=ProxySet(PUBLIC.copy()), student=partial(Noting, STUDENT)
    )
    list(fed.run(2))
    (lesson,) = taught(fed, "c0")
    check(lesson, P["c0"])


def test_the_default_listens_to_those_to_whom_a_row_is_familiar() -> None:
    scores = {"c0": [3, -3, 0, 1], "c1": [-2, 2, 0, -3], "c2": [0, 0, 0, 5]}
    people = {name: partial(Scoring, P[name], scores[name]) for name in P}
    fed = case("fedistill", people, changes={"codec": "float32", "prior_rows": 0.0})
    list(fed.run(1))
    expected = []
    told = {n: decode_familiarity(encode_familiarity(np.array(scores[n]))) for n in P}
    ratios = {n: np.exp(told[n].astype(float)) / np.exp(told[n].astype(float)).mean() for n in P}
    for row in range(4):
        shares = np.array([ratios[name][row] for name in P])  # all have as many own rows
        said = np.array([P[name][row] for name in P])
        expected.append(shares @ said / shares.sum())
    np.testing.assert_allclose(fed.server.table, expected, atol=1e-5)


# --- all presets ---------------------------------------------------------------------------------

PREDICTING = [name for name, entry in METHODS.items() if entry.exchange == "predictions"]
SMALL = partial(models.MLP, INPUTS, 3, width=8)


def real(name: str, builds: Any = (SMALL, SMALL, SMALL), **changes: Any) -> Federation:
    training = Recipe(epochs=1, batch_size=16)
    people = [
        Client(f"site-{k}", build, gaussian(24, k), training=training)
        for k, build in enumerate(builds)
    ]
    return federation(people, method=method(name, **changes), student=SMALL, classes=CLASSES)


@pytest.mark.parametrize("name", PREDICTING)
def test_what_is_taught_changes_every_client(name: str) -> None:
    """P6: no default switches the soft part off."""
    fed, never = real(name), real(name, distil="never")
    list(fed.run(2))
    list(never.run(2))
    inputs = proxy().inputs
    for site in fed.sites:
        said = [made.sites[site].learner.predict(inputs) for made in (fed, never)]
        assert np.abs(said[0] - said[1]).max() > 1e-4
    student = fed.server.student
    assert student is not None
    fresh = real(name).server.student
    assert fresh is not None
    assert np.abs(student.predict(inputs) - fresh.predict(inputs)).max() > 1e-4


@pytest.mark.parametrize("name", PREDICTING)
def test_three_architectures_teach_one_another(name: str) -> None:
    """P26: a network, a linear model and a logistic regression of another library."""
    fed = real(name, (SMALL, partial(models.Linear, INPUTS, 3), models.logistic_regression))
    rows = list(fed.run(3))
    assert [row["clients_ok"] for row in rows] == [3, 3, 3]
    assert [row["dropped"] for row in rows] == [{}, {}, {}]
    assert len({type(site.learner).__name__ for site in fed.sites.values()}) == 2
    known = fed.server.table[fed.server.stamp > 0]
    assert len(known)
    np.testing.assert_allclose(known.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("name", PREDICTING)
def test_every_preset_survives_clients_that_drop_out(name: str) -> None:
    """P23: 30 % are away in each round."""
    fed = federation(5, method=name, quorum=1, per_round=15)
    backend = unreliable(Serial, seed=3, dropout=0.3)
    rows = list(fed.run(6, backend=backend))
    assert {reason for row in rows for reason in row["dropped"].values()} == {"offline"}
    assert len(rows) == 6


def test_the_case_is_what_it_says() -> None:
    for table in P.values():
        np.testing.assert_allclose(np.sum(table, axis=1), 1)
    np.testing.assert_allclose(SUMS, np.sum(list(P.values()), axis=0))
    np.testing.assert_allclose(PRODUCTS, np.prod(list(P.values()), axis=0))
