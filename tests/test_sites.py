"""The per-site table and the means over seeds."""

from __future__ import annotations

import pytest

from fedistill.sites import average, site_table


def test_means_stand_beside_their_deviation():
    merged = average([{"a": 1.0, "n": 3, "t": "x"}, {"a": 3.0, "n": 3, "t": "y"}])
    assert merged == {"a": 2.0, "a_sd": pytest.approx(2**0.5), "n": 3, "t": "x"}


def test_what_some_seeds_lack_is_the_mean_of_the_others_and_their_number():
    merged = average([{"auc": None}, {"auc": 0.5}, {"auc": 0.9}])
    assert merged["auc"] == pytest.approx(0.7)
    assert merged["auc_n"] == 2
    assert average([{"auc": None}, {"auc": None}]) == {"auc": None}


def test_keys_that_only_a_later_seed_has_are_kept():
    merged = average([{"flags": {}}, {"flags": {"a": ["late"]}}])
    assert merged == {"flags": {"a": ["late"]}}


def test_a_site_is_shown_against_everything_that_could_serve_it():
    def figures(accuracy):
        return {"accuracy": accuracy, "auc": None}

    summary = {
        "history": [{"client_accuracy": {"a": 0.1, "b": 0.2}, "client_auc": None}],
        "rows": {"a": 5, "b": 6},
        "models": {"a": "mlp", "b": "linear"},
        "classes_seen": {"a": 2, "b": 1},
        "cross": {
            "a": {"a": figures(0.5)},
            "b": {"b": figures(0.6)},
            "student": {"*": figures(0.7)},
        },
    }
    alone = {
        "cross": {
            "a": {"a": figures(0.3), "b": figures(0.2)},
            "b": {"a": figures(0.25), "b": figures(0.4)},
        }
    }
    rest = {"a": {"cross": {"student": {"a": figures(0.45)}}}}
    table = site_table(summary, {"local": alone}, rest)
    found = {name: entry["accuracy"] for name, entry in table["a"]["figures"].items()}
    assert found == {
        "first round": 0.1,
        "client": 0.5,
        "student": 0.7,
        "local": 0.3,
        "left-out student": 0.45,
        "best single other": 0.25,
        "mean single other": 0.25,
    }
    assert (table["b"]["rows"], table["b"]["classes_seen"]) == (6, 1)


def test_lists_of_numbers_are_averaged_place_by_place_and_others_are_the_first():
    merged = average([{"a": [1, 2], "b": ["x"]}, {"a": [3, 4], "b": ["y"]}])
    assert merged == {"a": [2.0, 3.0], "b": ["x"]}
    assert average([{"a": [1, 2]}, {"a": [3]}]) == {"a": [1, 2]}
    assert average([{"a": [1, None]}, {"a": [3, 4]}]) == {"a": [1, None]}
