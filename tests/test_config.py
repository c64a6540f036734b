"""Settings: read, judged as a whole, written back."""

from __future__ import annotations

import dataclasses
import types
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill import catalog, config
from fedistill.config import Settings, parse, to_toml
from fedistill.errors import SettingsError

SECTIONS = {
    item.name: type(getattr(Settings(), item.name))
    for item in dataclasses.fields(Settings)
    if dataclasses.is_dataclass(getattr(Settings(), item.name))
}
FIELDS = [(name, item) for name, kind in SECTIONS.items() for item in dataclasses.fields(kind)]


def problems(text, overrides=()):
    with pytest.raises(SettingsError) as caught:
        parse(text, overrides)
    return [str(problem) for problem in caught.value.problems]


# --- problems ------------------------------------------------------------------------------------


def test_all_problems_come_at_once_with_their_lines():
    text = """\
seed = -1
rouns = 3

[clients]
alpha = 0.0
model = "mpl"
epochs = "two"

[[clients.group]]
count = 1
lr = true

[student]
widht = 5
"""
    assert problems(text) == [
        "line 1: seed: expected a number at least 0, found -1",
        'line 2: rouns: unknown key; did you mean "rounds"?',
        "line 5: clients.alpha: expected a number above 0, found 0.0",
        'line 6: clients.model: unknown value "mpl"; did you mean "mlp"?',
        'line 7: clients.epochs: expected a whole number, found a text ("two")',
        "line 11: clients.group.0.lr: expected a number, found true or false (true)",
        'line 14: student.widht: unknown key; did you mean "width"?',
    ]


def test_the_text_of_several_problems_names_the_file_and_counts_them():
    with pytest.raises(SettingsError) as caught:
        parse("a = 1\nb = 2", source="x.toml")
    assert str(caught.value).startswith("x.toml: 2 problems\n  line 1: a: unknown key")
    assert caught.value.exit_code == 2


def test_a_key_that_resembles_nothing_is_told_the_known_ones():
    (told,) = problems("[qqqq]\n")
    assert told.startswith("line 1: qqqq: unknown key; known sections: seed, rounds, data, proxy")
    (told,) = problems("[backend]\nzzzzzz = 1")
    assert (
        told == "line 2: backend.zzzzzz: unknown key; known: device, max_message_mb, name, threads"
        or told.startswith("line 2: backend.zzzzzz: unknown key; known: ")
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rounds = 1.5", "rounds: expected a whole number, found a number (1.5)"),
        ("rounds = true", "rounds: expected a whole number, found true or false (true)"),
        ("data = 3", "data: expected a table, found a whole number (3)"),
        ("[data]\nsource = 3", "data.source: expected a text, found a whole number (3)"),
        ("[data]\nheader = 1", "data.header: expected true or false, found a whole number (1)"),
        ("[data]\ndrop = 'a'", 'data.drop: expected a list, found a text ("a")'),
        ("[data]\ndrop = [1]", "data.drop.0: expected a text, found a whole number (1)"),
        ("[clients]\nlr = []", "clients.lr: expected a number, found a list"),
        (
            "[data]\ntest_rows = 'x'",
            'data.test_rows: expected a whole number or a number, found a text ("x")',
        ),
    ],
)
def test_a_wrong_type_names_both_types(text, told):
    (found,) = problems(text)
    assert found.split(": ", 1)[1] == told


def test_infinity_and_nan_are_refused():
    for number in ("inf", "nan", "-inf"):
        (told,) = problems(f"[clients]\nlr = {number}")
        assert "expected a finite number" in told


@pytest.mark.parametrize(("section", "item"), FIELDS, ids=lambda part: getattr(part, "name", part))
def test_every_limit_of_every_setting_is_kept(section, item):
    limits = item.metadata
    bad = []
    if limits["low"] is not None:
        bad.append(limits["low"] - 1)
    if limits["high"] is not None:
        bad.append(limits["high"] + 1)
    if limits["above"] is not None:
        bad.append(limits["above"])
    if limits["choices"] is not None:
        bad.append("no-such-choice")
    for value in bad:
        (told, *_) = problems(f"[{section}]\n{item.name} = {config.to_value(value)}")
        assert told.startswith(f"line 2: {section}.{item.name}: ")
    for edge in filter(lambda value: value is not None, (limits["low"], limits["high"])):
        try:
            found = parse(f"[{section}]\n{item.name} = {edge}")
        except SettingsError as error:
            told = str(error)
            assert "expected" in told
            assert "at least" not in told
            assert "at most" not in told or "clients.count" in told
        else:
            assert getattr(getattr(found, section), item.name) == edge


@pytest.mark.parametrize(
    "zero",
    [
        "clients.epochs",
        "clients.momentum",
        "clients.clip",
        "clients.weight_decay",
        "proxy.per_round",
        "student.epochs",
    ],
)
def test_zero_is_a_number_and_not_an_absence(zero):
    section, name = zero.split(".")
    found = getattr(getattr(parse(f"[{section}]\n{name} = 0"), section), name)
    assert found == 0
    assert found is not None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[proxy]\nrows = 5\nper_round = 6", "proxy.per_round: expected at most proxy.rows (5)"),
        ("[proxy]\nrows = 5\nlabelled = 6", "proxy.labelled: expected at most proxy.rows (5)"),
        (
            "[proxy]\nlabelled = 5\n[deployment]\nsites = ['a']",
            "proxy.labelled: real sites and their coordinator read one file of proxy rows without",
        ),
        ("[clients]\npartition = 'by-column'", "clients.column: by-column needs"),
        ("[clients]\npartition = 'file'", "clients.partition_path: a file partition needs"),
        ("[clients]\ncount = 2\nquorum = 3", "clients.quorum: expected at most clients.count (2)"),
        ("[clients]\ncount = 2\n[[clients.group]]\ncount = 3", "clients.group: the counts"),
        ("[[clients.group]]\nlr = 0.1", "clients.group.0: expected count or sites, found neither"),
        ("[[clients.group]]\ncount = 1\nsites = ['a']", "expected count or sites, found both"),
        ("[method]\nsharpen = 'era:'", "method.sharpen: expected none, era:0.1 or power:2"),
        ("[evaluation]\nbaselines = ['locale']", 'did you mean "local"?'),
        ("[backend]\ndevice = 'gpu'", "backend.device: expected auto, cpu or cuda"),
        ("[attack]\ncount = 2", "attack.kind: 2 bad clients need a kind, found none"),
        (
            "[clients]\ncount = 3\n[attack]\nkind = 'fdla'\ncount = 4",
            "attack.count: expected at most clients.count (3), found 4",
        ),
        ("[attack]\nkind = 'fdlb'", 'attack.kind: unknown value "fdlb"; did you mean "fdla"?'),
        (
            "[method]\npreset = 'fedavg'\n[attack]\nkind = 'fdla'",
            'attack.kind: bad clients tamper with predictions, found the baseline "fedavg"',
        ),
        (
            "[evaluation]\nleave_one_out = true\n[attack]\nkind = 'fdla'",
            "attack.kind: without one client others would be drawn to be bad",
        ),
        (
            "[deployment]\nsites = ['a', 'b']\n[attack]\nkind = 'fdla'",
            "attack.kind: simulated bad clients are for simulations, found real sites",
        ),
        (
            "[deployment]\nsites = ['a', 'b']\n[clients]\ndropout = 0.1",
            "clients.dropout: clients are lost for simulations only, found real sites",
        ),
        (
            "[backend]\nname = 'flower'\n[clients]\nstragglers = 0.1",
            "clients.stragglers: lost and late clients are simulated by every backend",
        ),
    ],
)
def test_what_is_possible_alone_and_impossible_together(text, told):
    assert any(told in found for found in problems(text))


# --- files ---------------------------------------------------------------------------------------


def test_broken_toml_is_told_with_its_line():
    (told,) = problems("seed = 1\nrounds = = 2")
    assert told.startswith("line 2: TOML: cannot be read: ")


def test_an_absent_file_and_a_binary_one(tmp_path):
    with pytest.raises(SettingsError, match="expected a settings file, found none"):
        config.load(tmp_path / "no.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="readable UTF-8 text"):
        config.load(tmp_path / "b.toml")
    with pytest.raises(SettingsError, match="IsADirectoryError"):
        config.load(tmp_path)


def test_lines_of_keys_in_every_notation():
    lines = config.key_lines(
        'a = 1\n[t]  # table\nb.c = 2\n\n[[x.y]]\nk = 1\n[[x.y]]\n  k = 2\n[ s . u ]\n"q" = 1\n'
    )
    assert lines[("a",)] == 1
    assert lines[("t",)] == 2
    assert lines[("t", "b", "c")] == 3
    assert lines[("x", "y", 0, "k")] == 6
    assert lines[("x", "y", 1, "k")] == 8
    assert lines[("s", "u", "q")] == 10


# --- overrides -----------------------------------------------------------------------------------


def test_overrides_win_and_take_toml_or_plain_words():
    text = "rounds = 3\n[clients]\nalpha = 0.5\n[[clients.group]]\ncount = 1"
    found = parse(
        text,
        [
            "rounds=9",
            "clients.model=linear",
            "clients.alpha = 2",
            'data.drop=["a", "b"]',
            "clients.group.0.lr=0.5",
            "data.source=csv:x=y.csv",
            "student.width=7",
        ],
    )
    assert found.rounds == 9
    assert found.clients.model == "linear"
    assert found.clients.alpha == 2.0
    assert found.data.drop == ("a", "b")
    assert found.clients.group[0].lr == 0.5
    assert found.data.source == "csv:x=y.csv"
    assert found.student.width == 7


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rounds", "rounds: expected key=value"),
        ("=3", "=3: expected key=value"),
        ("seed.x=1", "seed.x: names no table of the settings"),
        ("clients.group.5.lr=1", "clients.group.5.lr: names no table of the settings"),
        ("clients.widht=3", 'clients.widht: unknown key; did you mean "width"?'),
        ("rounds=0", "rounds: expected a number at least 1, found 0"),
    ],
)
def test_a_wrong_override_is_a_problem_like_any_other(override, told):
    text = "seed = 1\n[[clients.group]]\ncount = 1"
    assert any(told in found for found in problems(text, [override]))


# --- groups --------------------------------------------------------------------------------------


def test_groups_take_clients_in_order_after_those_named():
    clients = parse("""
[clients]
count = 5
lr = 0.5
[[clients.group]]
count = 2
width = 8
[[clients.group]]
sites = ["b"]
model = "linear"
epochs = 0
""").clients
    found = config.client_settings(clients, ["a", "b", "c", "d", "e"])
    assert {name: train.width for name, train in found.items()} == {
        "a": 8,
        "b": 64,
        "c": 8,
        "d": 64,
        "e": 64,
    }
    assert found["b"].model == "linear"
    assert found["b"].epochs == 0
    assert all(train.lr == 0.5 for train in found.values())


def test_a_group_names_a_site_that_does_not_exist():
    clients = parse("[[clients.group]]\nsites = ['clevland']").clients
    with pytest.raises(SettingsError, match=r'no client "clevland"; did you mean "cleveland"'):
        config.client_settings(clients, ["cleveland", "zurich"])


# --- round trip ----------------------------------------------------------------------------------


def values(item, hint):
    """Values that a field accepts on its own."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    limits, found = item.metadata, []
    for option in options:
        if limits["choices"] is not None and option is str:
            choices = limits["choices"]
            found.append(
                st.sampled_from(catalog.known(choices) if isinstance(choices, str) else choices)
            )
        elif option is bool:
            found.append(st.booleans())
        elif option is str:
            found.append(st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
        elif option is int:
            low = int(limits["above"] or 0) + 1 if limits["above"] is not None else limits["low"]
            found.append(st.integers(int(low or 0), int(limits["high"] or 10**9)))
        elif option is float:
            low = limits["above"] if limits["above"] is not None else limits["low"]
            found.append(
                st.floats(
                    low,
                    limits["high"] if limits["high"] is not None else 1e9,
                    exclude_min=limits["above"] is not None,
                    allow_nan=False,
                    allow_infinity=low is None and False,
                )
            )
        elif option is type(None):
            found.append(st.none())
        elif typing.get_origin(option) is tuple:
            found.append(st.lists(st.text(max_size=4), max_size=3).map(tuple))
    return st.one_of(found)


FREE = {"data": config.DataSettings, "student": config.StudentSettings}


@st.composite
def sections(draw):
    made = {}
    for name, kind in FREE.items():
        hints = typing.get_type_hints(kind)
        made[name] = kind(
            **{item.name: draw(values(item, hints[item.name])) for item in dataclasses.fields(kind)}
        )
    # A source must be of a known kind; what follows the colon is free.
    # And rows are counted in whole numbers, or are a share.
    amount = made["data"].test_rows
    made["data"] = dataclasses.replace(
        made["data"], test_rows=(amount or 0.5) if amount < 1 else float(int(amount))
    )
    names = {key: "csv:" + getattr(made["data"], key) for key in ("source", "test")}
    made["data"] = dataclasses.replace(made["data"], **names)
    return made


@given(sections())
@settings(max_examples=40, deadline=None)
def test_whatever_is_written_reads_back_equal(made):
    wanted = dataclasses.replace(Settings(), **made)
    assert parse(to_toml(wanted)) == wanted


def test_defaults_and_groups_read_back_equal_with_and_without_comments():
    groups = (config.GroupSettings(count=2, lr=0.5), config.GroupSettings(sites=("a", "b")))
    full = dataclasses.replace(
        Settings(),
        clients=config.ClientsSettings(group=groups),
        method=config.MethodSettings(rule="mean", sharpen="era:0.1"),
        evaluation=config.EvaluationSettings(baselines=("local",), repeats=3),
    )
    for wanted in (Settings(), full):
        assert parse(to_toml(wanted)) == wanted
        assert parse(to_toml(wanted, comment=lambda doc: f"# {doc}")) == wanted
    assert parse("") == Settings()


def test_every_setting_says_what_it_means():
    silent = [
        f"{section}.{item.name}"
        for section, item in FIELDS
        if not item.metadata["doc"] and item.name != "group"
    ]
    assert silent == []


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().seed = 3


# --- the file of one real site -------------------------------------------------------------------


def test_a_site_file_needs_an_id_and_nothing_else():
    site = config.parse_site('id = "north"')
    assert site == config.SiteSettings(id="north")
    assert (site.federation, site.data.source) == ("federation.toml", "")
    assert config.parse_site(to_toml(site)) == site
    assert config.parse_site(to_toml(site, config.comment)) == site


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "id: "),
        ('id = "a/b"', "line 1: id: "),
        ("id = 5", "line 1: id: expected a text, found a whole number"),
        ('id = "a"\n[data]\nsource = "cvs:x"', 'line 3: data.source: unknown source "cvs"; did'),
        ('id = "a"\n[policy]\nround = 3', 'policy.round: unknown key; did you mean "rounds"?'),
        ('id = "a"\n[policy]\nseconds = -1', "policy.seconds: expected a number at least 0"),
        ('id = "a"\n[training]\nlr = 0', "training.lr: expected a number above 0"),
        ('id = "a"\n[clients]\ncount = 3', "clients: unknown key"),
    ],
)
def test_what_is_wrong_with_a_site_file_is_said(text, words):
    with pytest.raises(SettingsError) as caught:
        config.parse_site(text, source="site.toml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("site.toml")


def test_a_site_file_is_told_from_that_of_an_experiment():
    site = config.SiteSettings(id="a")
    for told in (to_toml(site), to_toml(site, config.comment), '# mine\n\nid = "a"\n'):
        assert config.speaks_of_a_site(told)
    for told in (to_toml(Settings()), to_toml(Settings(), config.comment), "", "[data]\nid = 1\n"):
        assert not config.speaks_of_a_site(told)


# --- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "rounds = 3\n[stream]\nexperiences = 5",
            "stream.experiences: expected at most",
        ),
        (
            "[stream]\nexperiences = 5\nevery = 3",
            "stream.experiences: expected at most",
        ),
        ('[stream]\nexperiences = 2\norder = "own"', "stream.order: time runs one way for all"),
        (
            '[stream]\nexperiences = 2\n[attack]\nkind = "fdla"\ncount = 1',
            "attack.kind: bad",
        ),
        (
            "[stream]\nexperiences = 2\n[evaluation]\nleave_one_out = true",
            "evaluation.leave_one_out",
        ),
        (
            '[stream]\nexperiences = 2\n[backend]\nname = "flower"',
            "by every backend",
        ),
        ('[stream]\nexperiences = 2\nshift = "rotations"', 'did you mean "rotation"?'),
        ('[continual]\nobjective = "der"', "continual.buffer: der replays remembered rows"),
        ('[continual]\nobjective = "dre"', 'did you mean "der"?'),
        ("[continual]\nquorum = 2", "continual.drift: a quorum of alarms needs a detector"),
        ('[continual]\ndrift = "adwin"\nquorum = 9', "continual.quorum: expected at most"),
        (
            '[continual]\ndrift = "adwin"\non = "predictions"',
            "continual.on: adwin",
        ),
        (
            '[method]\npreset = "centralised"\n[continual]\ndrift = "adwin"\nquorum = 2',
            "a baseline in which nobody shares has no quorum",
        ),
    ],
)
def test_a_stream_that_cannot_be_is_refused(text, told):
    assert any(told in problem for problem in problems(text))


def test_memories_are_named_for_every_objective_that_needs_one():
    from fedistill.contradictions import NEED_MEMORY
    from fedistill.distill.objectives import OBJECTIVES

    draws = {name for name, make in OBJECTIVES.items() if getattr(make(), "draws", (1,))}
    assert set(NEED_MEMORY) == draws | {"gdumb"}
