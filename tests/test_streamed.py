"""A federation whose rows change: what it does, what it notes down, and that it can be killed."""

from __future__ import annotations

import functools
import json
from functools import partial

import numpy as np
import pytest
from builders import CENTRES, INPUTS, MEAN, federation, gaussian, reseal, tampered, timeless

import fedistill as fd
from fedistill import config, experiment, models
from fedistill.assembly import assemble, method_of
from fedistill.backends import Reply
from fedistill.backends.serial import Serial
from fedistill.client import Client
from fedistill.continual.adwin import Adwin
from fedistill.continual.buffer import ReplayBuffer
from fedistill.continual.watcher import DriftState
from fedistill.course import Timetable, timetable
from fedistill.distill.incremental import IncrementalDistiller
from fedistill.distill.recipe import Recipe
from fedistill.distill.rehearsal import Rehearsal
from fedistill.distill.sklearn_student import SklearnStudent
from fedistill.door import check_terms
from fedistill.errors import Rejected
from fedistill.streamed import Streamed, summary_of
from fedistill.types import Rows
from fedistill.wire.envelope import unseal
from fedistill.wire.messages import Plan, Upload

SETTINGS = """
seed = 3
rounds = 4
[data]
source = "digits"
test_rows = 150
[proxy]
rows = 40
[clients]
count = 3
partition = "iid"
width = 8
epochs = 2
batch_size = 16
labelled = 60
[student]
width = 8
[stream]
experiences = 2
every = 2
shift = "class-incremental"
[continual]
buffer = 20
[backend]
device = "cpu"
"""

OPTIONS = {
    "the default": [],
    "der++": ['continual.objective="der++"', "continual.alpha=0.3", "continual.beta=0.7"],
    "steady": ['continual.objective="steady"', 'continual.policy="class-balanced"'],
    "gdumb": ['continual.objective="gdumb"', "clients.labelled=30"],
    "cfed": ['continual.objective="cfed"', "continual.learns=0.6", "continual.distils=0.6"],
    "herding": ['continual.policy="herding"', "continual.max_uses=9"],
    "mir": ['continual.draw="mir"', 'continual.teacher="ema"'],
    "self": ['continual.teacher="self"', 'continual.policy="recent"'],
    "own order": ['stream.order="own"'],
    "lag": ["stream.lag=1"],
    "recurring": ['stream.course="recurring"', "stream.experiences=4", "stream.every=1"],
    "gradual": ['stream.course="gradual"', 'stream.shift="permutation"'],
    "a detector": ['continual.drift="mmd"', 'continual.on="predictions"', "continual.quorum=1"],
    "ds-fl": ['method.preset="ds-fl"'],
    "a cache": ['method.preset="scarlet"', "continual.drift='adwin'", "continual.quorum=2"],
    "fedavg": ['method.preset="fedavg"'],
    "local": ['method.preset="local"'],
    "centralised": ['method.preset="centralised"'],
    "scikit-learn": ['clients.model="logistic-regression"'],
    "nothing remembered": ["continual.buffer=0"],
}


@functools.cache
def prepared(*overrides):
    settings = config.parse(SETTINGS, overrides)
    return settings, experiment.rows_of(settings)


def assembled(*overrides):
    settings, federated = prepared(*overrides)
    return assemble(settings, federated, method_of(settings))


def go(made, overrides, out, stop=0, resume=False):
    """Run to the end, or as far as a killed process came."""
    settings, federated = prepared(*overrides)
    rounds = made.run(
        settings.rounds, federated.dataset.test, out=out, resume=resume, measure_every=9
    )
    for row in rounds:
        if row["round"] == stop:
            rounds.close()
            break
    return made


def lines(out, name):
    return timeless(json.loads(line) for line in (out / name).read_text().splitlines())


@functools.cache
def naive(told, same):
    """The figures of a stream, from its lines, one loop for each."""
    told = json.loads(told)
    who = "student" if told[-1]["student"] is not None else "clients"
    R, T = [line[who] for line in told], len(told)
    found = {"of": who, "experiences": T, "forward_transfer": None}
    found["average_accuracy"] = sum(R[-1]) / T
    found["anytime_accuracy"] = found["forgetting"] = found["backward_transfer"] = None
    if same:
        found["anytime_accuracy"] = sum(sum(R[i][: i + 1]) / (i + 1) for i in range(T)) / T
        lost = [max(R[i][j] for i in range(j, T - 1)) - R[-1][j] for j in range(T - 1)]
        found["forgetting"] = sum(lost) / (T - 1)
        found["backward_transfer"] = sum(R[-1][j] - R[j][j] for j in range(T - 1)) / (T - 1)
    found["prequential"] = sum(line["prequential"] for line in told) / T
    return found


# --- every option, killed and resumed ------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_a_stream_that_was_killed_ends_with_the_same_bytes(name, tmp_path):
    overrides = OPTIONS[name]
    whole = go(assembled(*overrides), overrides, tmp_path / "whole")
    go(assembled(*overrides), overrides, tmp_path / "killed", stop=3)
    resumed = go(assembled(*overrides), overrides, tmp_path / "killed", resume=True)
    assert resumed.server.digest() == whole.server.digest()
    for file in ("rounds.jsonl", "stream.jsonl"):
        assert lines(tmp_path / "killed", file) == lines(tmp_path / "whole", file)
    for site, other in zip(whole.sites.values(), resumed.sites.values(), strict=True):
        assert site.met == other.met
        np.testing.assert_array_equal(
            site.learner.predict(whole.proxy.inputs), other.learner.predict(whole.proxy.inputs)
        )

    settings, federated = prepared(*overrides)
    told = lines(tmp_path / "whole", "stream.jsonl")
    regular = [row for row in lines(tmp_path / "whole", "rounds.jsonl") if not row["extra"]]
    assert len(regular) == settings.rounds
    assert [line["experience"] for line in told] == [*range(1, settings.stream.experiences + 1)]
    same = settings.stream.order == "same"
    summary = whole.summary()["stream"]
    assert summary == pytest.approx(naive(json.dumps(told), same))
    assert ("experience" in whole.summary()) is False
    for line in told:
        rows = sum(met.rows for site in whole.sites.values() for met in site.met)
        assert line["rows"] <= rows
        if settings.continual.buffer and name != "nothing remembered":
            assert line["buffer"]["rows"] <= line["buffer"]["capacity"]
        else:
            assert line["buffer"] is None
    assert federated.stream is not None


def test_what_stands_in_a_line_is_what_sites_met(tmp_path):
    made = go(assembled(), [], tmp_path)
    first, second = lines(tmp_path, "stream.jsonl")
    _, federated = prepared()
    parts = federated.stream.train
    for position, line in enumerate((first, second)):
        assert line["name"] == federated.stream.names[position]
        assert line["round"] == 2 * (position + 1)
        assert line["rows"] == sum(len(parts[name][position]) for name in parts)
        for name, site in made.sites.items():
            met = site.met[position]
            assert met.rows == len(parts[name][position])
            assert line["prequential_by_client"][name] == met.correct / met.rows
            before = sum(one.rows for one in site.met[:position])
            assert line["curve"][name][-1][0] == before + met.rows
        shares = [*line["prequential_by_client"].values()]
        assert line["prequential"] == pytest.approx(sum(shares) / len(shares))
    # All rows of all experiences so far, with as much company as the rows of this one had.
    anew = [
        site.met[1].trained * (site.met[0].rows + site.met[1].rows) / site.met[1].rows
        for site in made.sites.values()
    ]
    assert second["rows_retrain"] == round(sum(anew))
    assert second["rows_retrain"] > second["rows_trained"]
    assert second["rows_trained"] == sum(site.met[1].trained for site in made.sites.values())
    tests = federated.stream.tests
    student = made.server.student
    for j, share in enumerate(second["student"]):
        right = student.predict(tests[j].inputs).argmax(axis=1) == tests[j].labels
        assert share == pytest.approx(right.mean())


def test_run_writes_it_all_and_resumes(tmp_path):
    settings, _ = prepared()

    class Killed(Exception):
        pass

    class Watch:
        def __init__(self, last):
            self.last = last

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def advance(self, *_):
            pass

        def add(self, row):
            if row["round"] == self.last:
                raise Killed

    whole = fd.run(settings, out=tmp_path / "whole")
    with pytest.raises(Killed):
        fd.run(settings, out=tmp_path / "killed", show=lambda *_: Watch(3))
    resumed = fd.run(settings, out=tmp_path / "killed", resume=True)
    assert resumed["soft_targets_sha256"] == whole["soft_targets_sha256"]
    assert resumed["stream"] == whole["stream"]
    for file in ("rounds.jsonl", "stream.jsonl"):
        assert lines(tmp_path / "killed", file) == lines(tmp_path / "whole", file)
    assert (tmp_path / "whole" / "report.html").stat().st_size > 1000


def test_own_order_and_lag_are_met_as_they_come(tmp_path):
    made = go(assembled("stream.lag=1"), ["stream.lag=1"], tmp_path)
    starts = [site.client.course.starts for site in made.sites.values()]
    assert starts == [(1, 3), (1, 4), (1, 5)]
    assert [len(site.met) for site in made.sites.values()] == [2, 2, 1]
    _, line = lines(tmp_path, "stream.jsonl")
    assert set(line["prequential_by_client"]) == set([*made.sites][:2])
    own = ['stream.order="own"']
    _, federated = prepared(*own)
    assert len(set(federated.stream.order.values())) > 1
    made = go(assembled(*own), own, tmp_path / "own")
    told = lines(tmp_path / "own", "stream.jsonl")
    assert [line["name"] for line in told] == ["experience 1", "experience 2"]


def test_a_client_that_remembers_forgets_less(tmp_path):
    found = {}
    more = ["clients.labelled=0", "clients.epochs=4", 'method.preset="local"']
    for buffer in (0, 60):
        overrides = [*more, f"continual.buffer={buffer}"]
        found[buffer] = go(assembled(*overrides), overrides, tmp_path / f"{buffer}").summary()
    lost = {buffer: one["stream"]["forgetting"] for buffer, one in found.items()}
    assert lost[60] < lost[0] - 0.2


def test_the_figures_of_an_unfinished_stream():
    told = [{"student": [0.9, 0.1, 0.0], "prequential": 0.2}]
    found = summary_of(told, same=True)
    assert found["average_accuracy"] == found["anytime_accuracy"] == 0.9
    assert found["forgetting"] is found["backward_transfer"] is None
    assert summary_of(told, same=False)["average_accuracy"] is None
    assert summary_of([], same=True) is None
    told.append({"student": [0.5, 0.8, 0.0], "prequential": None})
    found = summary_of(told, same=True)
    assert found["average_accuracy"] == pytest.approx(0.65)
    assert found["forgetting"] == found["backward_transfer"] * -1 == pytest.approx(0.4)
    assert found["prequential"] == 0.2


# --- alarms --------------------------------------------------------------------------------------


class Scripted:
    """A detector that alarms in its updates of these numbers, the first being 0."""

    def __init__(self, *alarming):
        self.on, self.alarms, self.alarming, self.number, self.seen = "entropy", (), alarming, 0, 0

    def update(self, values):
        alarm = self.number in self.alarming
        self.alarms = (self.seen,) if alarm else ()
        self.number += 1
        self.seen += len(values)
        return DriftState.DRIFT if alarm else DriftState.OK

    def reset(self):
        pass

    def state_dict(self):
        return {"number": self.number, "seen": self.seen}

    def load_state_dict(self, state):
        self.number, self.seen = state["number"], state["seen"]


def remembering(detector, build, recipe, *, classes, seed, background=None, **_):
    """What makes a client's learner, with a detector made for it."""
    memory = ReplayBuffer(30, seed=seed)
    if build is models.logistic_regression:
        plain = SklearnStudent(build, recipe, classes=classes, background=background)
        return Rehearsal(plain, memory, detector())
    return IncrementalDistiller(
        build, replay=memory, drift=detector(), training=recipe, classes=classes, seed=seed
    )


SMALL = partial(models.MLP, INPUTS, 3, width=8)


def people(detectors, experiences=3, every=2, builds=(SMALL,)):
    """Clients, each with its detector and a stream of its own rows."""
    for k, detector in enumerate(detectors):
        met = tuple(gaussian(20, 100 * k + number) for number in range(experiences))
        yield Client(
            f"site-{k}",
            builds[k % len(builds)],
            met[0],
            training=Recipe(epochs=1, batch_size=16),
            course=timetable(met, every),
            make=partial(remembering, detector),
        )


def streaming(detectors, quorum=2, experiences=3, every=2, builds=(SMALL,), **options):
    tests = tuple(gaussian(20, 900 + number) for number in range(experiences))
    ends = tuple(every * (number + 1) for number in range(experiences))
    stream = Streamed(tuple(f"day {k}" for k in range(experiences)), tests, ends)
    clients = list(people(detectors, experiences, every, builds))
    return federation(clients, stream=stream, alarm_quorum=quorum, **options)


class Tap(Serial):
    """Notes the plans and the uploads."""

    def __init__(self, sites, noted):
        super().__init__(sites)
        self.noted = noted

    def run(self, plan):
        for reply in super().run(plan):
            self.noted.append((plan, reply))
            yield reply


# The first experience is not shown: nothing is known yet. Update 0 is experience 2.
TWO = [partial(Scripted, 0), partial(Scripted, 0), partial(Scripted)]


@pytest.mark.parametrize("method", ["fedistill", "ds-fl", "scarlet", "fedavg", "fd"])
def test_a_quorum_of_alarms_leads_to_one_round_of_distillation(method):
    made, noted = streaming(TWO, method=method, student=SMALL), []
    rows = list(made.run(6, backend=partial(Tap, noted=noted)))
    assert [row["extra"] for row in rows] == [False] * 3 + [True] + [False] * 3
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[2]["alarms"] == ["site-0", "site-1"]
    assert all(row["alarms"] == [] for row in rows if row["round"] != 3)
    plans = {plan.round: plan for plan, _ in noted}
    assert [plans[n].extra for n in range(1, 8)] == [0, 0, 0, 1, 1, 1, 1]
    assert [plans[n].consolidate for n in range(1, 8)] == [False] * 3 + [True] + [False] * 3
    told = [row["experience"] for row in rows if "experience" in row]
    assert [line["round"] for line in told] == [2, 5, 7]
    assert [line["consolidated"] for line in told] == [False, True, False]
    assert told[1]["alarms"] == {"site-0": [20], "site-1": [20]}
    for site in made.sites.values():
        assert [met.position for met in site.met] == [0, 1, 2]
        assert site.learner.replay.seen == 60, "nothing new came in the extra round"


def test_fewer_alarms_than_the_quorum_change_nothing():
    made = streaming(TWO, quorum=3)
    rows = list(made.run(6))
    assert len(rows) == 6
    assert rows[2]["alarms"] == ["site-0", "site-1"]
    assert not any(row["extra"] for row in rows)


def test_each_quorum_leads_to_its_own_round_and_the_last_one_too():
    made = streaming([partial(Scripted, 0, 1)] * 3, quorum=1, every=1)
    rows = list(made.run(3))
    assert [row["extra"] for row in rows] == [False, False, True, False, True]
    told = [row["experience"] for row in rows if "experience" in row]
    assert [line["round"] for line in told] == [1, 2, 4]
    assert [line["consolidated"] for line in told] == [False, False, True], "before it began"
    assert list(made.run(3)) == []


def test_a_round_of_distillation_learns_no_row_of_the_day():
    made = streaming(TWO)
    rounds = made.run(6)
    for _ in range(3):
        next(rounds)
    site = made.sites["site-2"]
    fitted = []
    fit = site.learner.fit
    site.learner.fit = lambda rows, seed: fitted.append(len(rows)) or fit(rows, seed=seed)
    before = site.learner.predict(made.proxy.inputs)
    next(rounds)
    assert fitted == []
    assert (site.learner.predict(made.proxy.inputs) != before).any()
    next(rounds)
    assert fitted == [20]


@pytest.mark.parametrize("builds", [(SMALL,), (SMALL, models.logistic_regression)])
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_killed_around_an_extra_round(stop, builds, tmp_path):
    whole = streaming(TWO, builds=builds)
    wanted = list(whole.run(6, out=tmp_path / "whole"))
    rounds = streaming(TWO, builds=builds).run(6, out=tmp_path / "killed")
    for _ in range(stop):
        next(rounds)
    rounds.close()
    resumed = streaming(TWO, builds=builds)
    list(resumed.run(6, out=tmp_path / "killed", resume=True))
    assert resumed.server.digest() == whole.server.digest()
    assert len(resumed.history) == len(wanted) == 7
    for file in ("rounds.jsonl", "stream.jsonl"):
        assert lines(tmp_path / "killed", file) == lines(tmp_path / "whole", file)


def test_killed_before_the_server_wrote_the_extra_round(tmp_path):
    """The sites have answered it, the server has not heard: they send the same again."""
    whole = streaming(TWO)
    list(whole.run(6, out=tmp_path / "whole"))

    class Dies(Serial):
        def run(self, plan):
            yield from super().run(plan)
            if plan.consolidate:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(streaming(TWO).run(6, out=tmp_path / "killed", backend=Dies))
    resumed = streaming(TWO)
    list(resumed.run(6, out=tmp_path / "killed", resume=True))
    assert resumed.server.digest() == whole.server.digest()
    for file in ("rounds.jsonl", "stream.jsonl"):
        assert lines(tmp_path / "killed", file) == lines(tmp_path / "whole", file)


def test_a_real_shift_is_noticed_by_a_quorum_of_clients():
    """Three calm days, then rows between all classes."""

    def sure(seed, scale):
        rows = gaussian(120, seed)
        calm = CENTRES[rows.labels] + np.float32(0.1) * (rows.inputs - CENTRES[rows.labels])
        return Rows(np.float32(scale) * calm, rows.labels)

    def client(k, last):
        met = tuple(sure(10 * k + day, 3 if day < 3 else last) for day in range(4))
        return Client(
            f"site-{k}",
            SMALL,
            met[0],
            training=Recipe(epochs=6, batch_size=16),
            course=timetable(met, 1),
            make=partial(remembering, partial(Adwin, on="entropy")),
        )

    def extra(last):
        stream = Streamed(("1", "2", "3", "4"), (gaussian(9, 1),) * 4, (1, 2, 3, 4))
        clients = [client(k, last) for k in range(3)]
        made = federation(clients, stream=stream, alarm_quorum=2, method="ds-fl")
        return [row["round"] for row in made.run(4) if row["extra"]]

    assert extra(3) == []
    assert extra(0.01) == [5]


# --- what travels --------------------------------------------------------------------------------


@pytest.mark.parametrize("quorum", [0, 1])
def test_an_upload_tells_of_drift_where_it_is_asked_only(quorum):
    made, noted = streaming(TWO, quorum=quorum), []
    list(made.run(4, backend=partial(Tap, noted=noted)))
    for plan, reply in noted:
        header, _ = unseal(reply.data, 1 << 20)
        sent, _ = unseal(plan.message(reply.client), 1 << 20)
        assert ("drift" in header) == bool(quorum)
        assert ("watch" in sent) == bool(quorum)
        if quorum:
            assert type(header["drift"]) is bool
    alarmed = {(p.round, r.client) for p, r in noted if Upload.from_bytes(r.data).drift}
    assert alarmed == ({(3, "site-0"), (3, "site-1")} if quorum else set())


@pytest.mark.parametrize("quorum", [0, 1])
def test_an_unexpected_or_missing_bit_is_refused_at_the_door(quorum):
    def change(name, data, plan):
        return Reply(name, reseal(data, drift=... if quorum else True))

    made = streaming(TWO, quorum=quorum)
    with pytest.raises(fd.FedistillError, match="fields"):
        list(made.run(1, backend=tampered(change)))
    given = {"run": "r", "round": 1, "proxy": "p", "classes": "c"}
    plan = Plan(ask=made.server._ask(1), watch=bool(quorum), **given)
    upload = Upload(client="a", drift=None if quorum else False, **given)
    with pytest.raises(Rejected, match="alarm bit"):
        check_terms(upload, plan, shares="probs", codec="u8", familiarity=False)


@pytest.mark.parametrize("bad", [1, "yes", None, [True]])
def test_a_bit_that_is_none_is_refused(bad):
    made, noted = streaming(TWO, quorum=1), []
    next(made.run(1, backend=partial(Tap, noted=noted)))
    with pytest.raises(Rejected, match="field"):
        Upload.from_bytes(reseal(noted[0][1].data, drift=bad))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("extra", 3),
        ("extra", -1),
        ("extra", 10**12),
        ("extra", "1"),
        ("extra", True),
        ("extra", 1.0),
        ("consolidate", 1),
        ("watch", "yes"),
        ("alarm", True),
    ],
)
def test_an_impossible_plan_is_rejected_by_a_site(field, value):
    made = streaming(TWO, quorum=1)
    list(made.run(2))
    message = made.server.plan(3).message("site-0")
    site = made.sites["site-0"]
    before = site.learner.state_dict()
    with pytest.raises(Rejected):
        site.answer(reseal(message, **{field: value}))
    assert (site.round, site.position, len(site.met)) == (2, 0, 1)
    for name, value in site.learner.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    site.answer(message)
    assert site.position == 1


def test_asked_twice_a_site_meets_an_experience_once():
    made = streaming(TWO, quorum=1)
    list(made.run(2))
    site, message = made.sites["site-0"], made.server.plan(3).message("site-0")
    first = site.answer(message)
    assert site.answer(message) == first
    assert [met.position for met in site.met] == [0, 1]
    assert site.learner.replay.seen == 40


def test_no_row_of_an_experience_is_in_a_message():
    made, noted = streaming(TWO, quorum=1), []
    list(made.run(6, backend=partial(Tap, noted=noted)))
    for _, reply in noted:
        for rows in made.sites[reply.client].client.experiences():
            assert not any(row.tobytes() in reply.data for row in rows.inputs)


# --- clients without rows for a while ------------------------------------------------------------


def test_a_client_without_rows_in_an_experience_learns_and_does_not_teach():
    met = [tuple(gaussian(20, 10 * k + day) for day in range(3)) for k in range(4)]
    met[3] = (met[3][0], met[3][1].take([]), met[3][2])
    clients = [
        Client(
            f"site-{k}",
            SMALL,
            days[0],
            training=Recipe(epochs=1, batch_size=16),
            course=Timetable(days, (1, 2, 3)),
            make=partial(remembering, partial(Scripted, 0)),
        )
        for k, days in enumerate(met)
    ]
    stream = Streamed(("1", "2", "3"), (gaussian(9, 1),) * 3, (1, 2, 3))
    made = federation(clients, method=MEAN, stream=stream, alarm_quorum=9)
    rows = list(made.run(3))
    assert [row["clients_ok"] for row in rows] == [4, 4, 4]
    assert rows[1]["alarms"] == ["site-0", "site-1", "site-2"]
    assert rows[2]["alarms"] == ["site-3"], "its second experience with rows"
    told = rows[1]["experience"]
    assert "site-3" not in told["prequential_by_client"]
    assert told["curve"]["site-3"] == []
    assert told["rows"] == 60
