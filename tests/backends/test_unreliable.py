"""Clients that are lost or late, and that a killed run meets the same ones."""

from __future__ import annotations

import os
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from builders import federation, participants, read_lines, timeless, write_settings

from fedistill import config, experiment
from fedistill.backends import Reply
from fedistill.backends.serial import Serial
from fedistill.backends.unreliable import Unreliable, unreliable
from fedistill.presets import method
from fedistill.wire.messages import Failure, Upload

SEED = 7


def recorded(heard, **chances):
    """A backend that notes for every run of a plan what came back, as short words."""

    def make(sites):
        inner = unreliable(Serial, seed=SEED, **chances)(sites)

        class Recording:
            def run(self, plan):
                words = []
                heard.append((plan.round, plan.clients, words))
                for reply in inner.run(plan):
                    if isinstance(reply, Failure):
                        words.append((reply.client, reply.reason, reply.asked))
                    else:
                        of = Upload.from_bytes(reply.data).round
                        words.append((reply.client, f"answer {of}", reply.asked))
                    yield reply

        return Recording()

    return make


def run(rounds=8, people=6, made=None, quorum=1, participation=1.0, **chances):
    heard = []
    made = made or federation(participants(people), quorum=quorum, participation=participation)
    list(made.run(rounds, backend=recorded(heard, **chances)))
    return made, heard


def words_of(heard, name):
    """Round by round what one client was heard to say."""
    return [(number, *word[1:]) for number, _, words in heard for word in words if word[0] == name]


# --- lost ----------------------------------------------------------------------------------------


def test_with_no_chance_of_loss_nothing_changes():
    plain = federation(4)
    rows = timeless(plain.run(3))
    wrapped = federation(4)
    assert timeless(wrapped.run(3, backend=unreliable(Serial, seed=SEED))) == rows
    assert wrapped.server.digest() == plain.server.digest()


def test_everybody_asked_answers_or_is_offline():
    _, heard = run(dropout=0.4)
    offline = 0
    for number, asked, words in heard:
        assert [name for name, *_ in words if words] != []
        assert sorted(name for name, *_ in words) == sorted(asked)
        assert {word[1:] for word in words} <= {("offline", 0), (f"answer {number}", 1)}
        offline += sum(word[1] == "offline" for word in words)
    assert 0.2 < offline / sum(len(asked) for _, asked, _ in heard) < 0.6


def test_all_may_be_lost_and_the_sites_are_not_touched():
    made = federation(3)
    sites = made._sites(None)
    plan = made.server.plan(1)
    replies = list(Unreliable(Serial(sites), sites, seed=1, dropout=1.0).run(plan))
    assert replies == [Failure(name, 1, "offline", asked=0) for name in plan.clients]
    assert all(site.round == 0 for site in sites.values())


def test_the_share_of_the_lost_is_that_of_the_settings():
    backend = Unreliable(Serial({}), {}, seed=3, dropout=0.3, stragglers=0.2)
    lost = [backend._offline(f"c{c}", r) for c in range(40) for r in range(50)]
    late = [backend._late(f"c{c}", r) for c in range(40) for r in range(50)]
    assert np.mean(lost) == pytest.approx(0.3, abs=0.04)
    assert np.mean(late) == pytest.approx(0.2, abs=0.04)
    assert np.mean(np.array(lost) & np.array(late)) == pytest.approx(0.06, abs=0.02)


def test_asked_again_in_the_same_round_some_are_back_and_nobody_is_lost_anew():
    made = federation(participants(8), quorum=1)
    sites = made._sites(None)
    backend = Unreliable(Serial(sites), sites, seed=5, dropout=0.5)
    plan = made.server.plan(1)
    answered = []
    for _ in range(6):
        replies = list(backend.run(plan))
        answered.append({reply.client for reply in replies if isinstance(reply, Reply)})
    assert all(before <= after for before, after in pairwise(answered))
    assert len(answered[0]) < len(answered[-1])


# --- late ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lateness", [1, 2, 3])
def test_a_late_upload_arrives_when_it_is_due_and_its_client_is_busy_until_then(lateness):
    made, heard = run(rounds=9, people=12, stragglers=0.2, lateness=lateness)
    met = 0
    for name in made.server.enrolled:
        said = words_of(heard, name)
        by_round = {number: [w[1:] for w in said if w[0] == number] for number in range(1, 10)}
        for number, words in by_round.items():
            if words[-1:] != [("deadline", 1)]:
                continue
            met += 1
            for later in range(number + 1, min(number + lateness, 10)):
                assert by_round[later] in ([("busy", 0)], [])
            if number + lateness < 10:
                assert by_round[number + lateness][0] == (f"answer {number}", 0)
        late = [w for w in said if w[1] != f"answer {w[0]}" and w[1].startswith("answer")]
        assert all(w[1] == f"answer {w[0] - lateness}" and w[2] == 0 for w in late)
    assert met > 3


def test_late_uploads_come_before_all_answers_of_the_round():
    _, heard = run(stragglers=0.5)
    for number, _, words in heard:
        kinds = [word[1] == f"answer {number - 1}" for word in words]
        assert kinds == sorted(kinds, reverse=True)


def test_a_late_upload_arrives_though_its_client_is_not_asked():
    _, heard = run(rounds=12, participation=0.5, stragglers=0.5)
    late = [
        (name, asked)
        for number, asked, words in heard
        for name, word, _ in words
        if word == f"answer {number - 1}"
    ]
    assert any(name not in asked for name, asked in late)


def test_the_late_upload_is_the_one_that_was_made_in_its_round():
    made = federation(3)
    sites = made._sites(None)
    backend = Unreliable(Serial(sites), sites, seed=1, stragglers=1.0, lateness=2)
    assert {reply.reason for reply in backend.run(made.server.plan(1))} == {"deadline"}
    stored = {name: site.upload for name, site in sites.items()}
    assert {reply.reason for reply in backend.run(made.server.plan(2))} == {"busy"}
    replies = list(backend.run(made.server.plan(3)))
    assert replies[:3] == [Reply(name, data, asked=0) for name, data in stored.items()]
    assert [reply.reason for reply in replies[3:]] == ["deadline"] * 3


def test_who_is_lost_is_not_late():
    made = federation(4)
    sites = made._sites(None)
    backend = Unreliable(Serial(sites), sites, seed=1, dropout=1.0, stragglers=1.0)
    for number in (1, 2):
        replies = list(backend.run(made.server.plan(number)))
        assert {reply.reason for reply in replies} == {"offline"}


def test_a_refusal_is_not_late():
    people = participants(3)
    made = federation(people, method="fedistill")
    sites = made._sites(None)
    for site in sites.values():
        site.learner.predict = lambda inputs: np.full((len(inputs), 3), np.nan, dtype=np.float32)
    backend = Unreliable(Serial(sites), sites, seed=1, stragglers=1.0, lateness=2)
    for number in (1, 2, 3):
        replies = list(backend.run(made.server.plan(number)))
        assert [reply.reason for reply in replies] == ["nonfinite"] * 3


# --- killed and resumed --------------------------------------------------------------------------

CHANCES = {"dropout": 0.3, "stragglers": 0.3, "lateness": 2}


def lossy(heard=None, **chances):
    return recorded([] if heard is None else heard, **(CHANCES | chances))


def small(late=0.5):
    """Late uploads count, so that a lost one would change the soft targets too."""
    return federation(
        participants(5), quorum=1, student=None, method=method("fedistill", late=late)
    )


class Killed(BaseException):
    """Stands for kill -9."""


def test_stopped_after_any_round_it_goes_on_with_the_same_losses(tmp_path):
    whole, heard = run(rounds=7, made=small(), **CHANCES)
    for stop in range(1, 7):
        out, again = tmp_path / str(stop), []
        list(small().run(stop, out=out, backend=lossy()))
        resumed = small()
        list(resumed.run(7, out=out, resume=True, backend=lossy(again)))
        assert again == heard[stop:]
        assert timeless(resumed.history) == timeless(whole.history)
        assert resumed.server.digest() == whole.server.digest()


@pytest.mark.parametrize("lateness", [1, 2])
def test_killed_at_any_rename_it_resumes_to_the_same_end(lateness, tmp_path):
    chances = {"lateness": lateness}
    whole = small()
    rows = timeless(whole.run(4, backend=lossy(**chances)))
    late = sum(row["dropped"].get(name) == "deadline" for row in rows for name in row["dropped"])
    assert late > 1

    def killing(k, out):
        calls, real = [0], Path.replace

        def replace(path, target):
            calls[0] += 1
            if calls[0] == k:
                raise Killed
            return real(path, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            list(small().run(4, out=out, backend=lossy(**chances)))
        return calls[0]

    total = killing(0, tmp_path / "count")
    assert total > 10
    for k in range(1, total + 1):
        out = tmp_path / str(k)
        with pytest.raises(Killed):
            killing(k, out)
        again = small()
        list(again.run(4, out=out, resume=True, backend=lossy(**chances)))
        assert (k, timeless(again.history)) == (k, rows)
        assert (k, again.server.digest()) == (k, whole.server.digest())


def test_the_losses_do_not_depend_on_where_state_is_kept(tmp_path):
    on_disk, in_memory = small(), small()
    list(on_disk.run(6, out=tmp_path, backend=lossy()))
    list(in_memory.run(6, backend=lossy()))
    assert on_disk.server.digest() == in_memory.server.digest()
    assert timeless(on_disk.history) == timeless(in_memory.history)
    assert os.listdir(tmp_path / "sites")


def test_the_factory_gives_what_a_federation_takes():
    made = partial(unreliable, Serial, seed=SEED)(dropout=0.5)({})
    assert isinstance(made, Unreliable)
    assert made.dropout == 0.5


def test_settings_lose_clients_and_a_resumed_run_ends_alike(tmp_path):
    path = write_settings(tmp_path, rounds=4, epochs=1)
    many = ["clients.count=9", "clients.quorum=1"]
    losses = [*many, "clients.dropout=0.3", "clients.stragglers=0.3"]
    whole = experiment.run(path, overrides=losses, out=tmp_path / "whole")
    reasons = {
        reason
        for row in read_lines(tmp_path / "whole/rounds.jsonl")
        for reason in row["dropped"].values()
    }
    assert {"offline", "deadline"} <= reasons
    experiment.run(path, overrides=[*losses, "rounds=2"], out=tmp_path / "parts")
    again = experiment.run(path, overrides=losses, out=tmp_path / "parts", resume=True)
    assert again["soft_targets_sha256"] == whole["soft_targets_sha256"]
    plain = experiment.run(path, overrides=many, out=tmp_path / "plain")
    assert plain["soft_targets_sha256"] != whole["soft_targets_sha256"]


def test_what_shares_nothing_and_what_runs_elsewhere_loses_nothing():
    settings = config.parse("[clients]\ndropout = 0.5")
    engine = experiment.serial
    assert experiment.lossy(settings, method("fedistill"), engine) is not engine
    assert experiment.lossy(settings, method("local"), engine) is engine
    assert experiment.lossy(settings, method("centralised"), engine) is engine
    elsewhere = partial(experiment.serial)
    assert experiment.lossy(settings, method("fedistill"), elsewhere) is elsewhere
    assert experiment.lossy(config.parse(""), method("fedistill"), engine) is engine
