"""From a teacher to a student."""

from __future__ import annotations

import copy
import importlib.util
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import INPUTS, gaussian
from torch import nn

from fedistill import losses, models
from fedistill.distill import schedules
from fedistill.distill.distiller import Distiller, Feature
from fedistill.distill.hooks import captured
from fedistill.distill.recipe import Recipe
from fedistill.distill.teachers import EmaTeacher, Ensemble
from fedistill.errors import CheckpointError, DataError, FedistillError, RunError
from fedistill.types import Rows

ROWS = gaussian(40, 1)
TEST = gaussian(60, 2)
SMALL = partial(models.MLP, INPUTS, 3, width=4)
SGD = Recipe(batch_size=8, lr=0.05, momentum=0.9, epochs=2)
HINT = {("trunk", "trunk"): Feature(losses.hint, 0.5, losses.regressor)}


@pytest.fixture(scope="module")
def teacher():
    made = Distiller(partial(models.MLP, INPUTS, 3, width=16, depth=2), training=SGD, seed=3)
    list(made.fit(gaussian(120, 5), epochs=6))
    return made.student


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(INPUTS, 6), nn.BatchNorm1d(6), nn.Dropout(0.3))
        self.head = nn.Linear(6, 3)

    def forward(self, inputs):
        return self.head(self.trunk(inputs))


def weights(module):
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


def trained(*arguments, rows=ROWS, epochs=2, **options):
    made = Distiller(*arguments, **({"training": SGD} | options))
    figures = list(made.fit(rows, epochs))
    return made, figures


def unlabelled(rows):
    return Rows(rows.inputs, np.full(len(rows), -1))


# --- what it minimises ---------------------------------------------------------------------------


def test_a_step_is_that_of_the_plain_loop(teacher):
    """The whole class against the ten lines one would write by hand."""
    recipe = Recipe(batch_size=40, lr=0.1, clip=0.0)
    made = Distiller(SMALL, teacher, soft_weight=0.6, temperature=3.0, training=recipe)
    student = copy.deepcopy(made.student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    inputs, labels = torch.from_numpy(ROWS.inputs), torch.from_numpy(ROWS.labels)
    for figures in made.fit(ROWS, epochs=3):
        with torch.no_grad():
            taught = teacher(inputs)
        total = losses.kd(student(inputs), taught, labels, 0.6, 3.0)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        assert figures["loss"] == pytest.approx(float(total.detach()), rel=1e-5)
    torch.testing.assert_close(weights(made.student), weights(student))


def test_without_a_teacher_it_is_plain_training_that_learns():
    made, figures = trained(SMALL, epochs=12)
    assert figures[-1]["loss"] < figures[0]["loss"] / 2
    assert figures[0].keys() == {"epoch", "loss", "labels"}
    accuracy = (made.predict(TEST.inputs).argmax(1) == TEST.labels).mean()
    assert accuracy > 0.75


def test_defaults_teach(teacher):
    """P6: a default that switches the soft part off."""
    plain, _ = trained(SMALL, teacher, soft_weight=0.0)
    taught, _ = trained(SMALL, teacher)
    assert not torch.equal(weights(plain.student), weights(taught.student))


def test_weight_zero_ignores_the_teacher_and_weight_one_the_labels(teacher):
    """P10."""

    def nonsense(inputs):
        return torch.full((len(inputs), 3), torch.nan)

    plain, _ = trained(SMALL)
    ignoring, _ = trained(SMALL, nonsense, soft_weight=0.0)
    assert torch.equal(weights(plain.student), weights(ignoring.student))
    one, _ = trained(SMALL, teacher, soft_weight=1.0)
    other, _ = trained(
        SMALL, teacher, soft_weight=1.0, rows=Rows(ROWS.inputs, (ROWS.labels + 1) % 3)
    )
    assert torch.equal(weights(one.student), weights(other.student))


def test_rows_without_labels_are_taught_by_the_soft_part_alone(teacher):
    """P8."""
    alone, _ = trained(SMALL, teacher, rows=unlabelled(ROWS), soft_weight=0.2)
    full, _ = trained(SMALL, teacher, soft_weight=1.0)
    assert torch.equal(weights(alone.student), weights(full.student))


def test_labelled_and_unlabelled_rows_may_be_mixed(teacher):
    labels = np.where(np.arange(40) < 10, ROWS.labels, -1)
    recipe = Recipe(batch_size=40, clip=0.0)
    made = Distiller(SMALL, teacher, soft_weight=0.6, training=recipe)
    student = copy.deepcopy(made.student)
    (figures,) = made.fit(Rows(ROWS.inputs, labels), epochs=1)
    inputs, known = torch.from_numpy(ROWS.inputs), torch.from_numpy(labels[:10])
    with torch.no_grad():
        hard = losses.label_loss(student(inputs[:10]), known)
        soft = losses.logit_kl(student(inputs), teacher(inputs))
    assert figures["labels"] == pytest.approx(float(hard), rel=1e-5)
    assert figures["loss"] == pytest.approx(float(0.1 * hard + 0.9 * soft), rel=1e-5)


@pytest.mark.parametrize(
    "loss", [losses.logit_mse, losses.decoupled_kd, losses.ranking, losses.ranking_order]
)
def test_other_soft_losses_take_its_place(teacher, loss):
    _, figures = trained(SMALL, teacher, loss=loss, epochs=4)
    assert figures[-1]["soft"] < figures[0]["soft"]


def test_what_a_partial_has_settled_stays_settled(teacher):
    kept, _ = trained(SMALL, teacher, loss=partial(losses.logit_kl, temperature=5.0))
    same, _ = trained(SMALL, teacher, temperature=5.0)
    assert torch.equal(weights(kept.student), weights(same.student))


def test_schedules_are_asked_for_the_epoch(teacher):
    _, figures = trained(
        SMALL,
        teacher,
        soft_weight=lambda epoch: epoch / 2,
        temperature=partial(schedules.linear, start=4.0, stop=1.0, epochs=3),
        epochs=3,
    )
    assert [row["soft_weight"] for row in figures] == [0.0, 0.5, 1.0]
    assert [row["temperature"] for row in figures] == [4.0, 2.5, 1.0]


def test_strength_weighs_rows_and_is_logged(teacher):
    _, figures = trained(SMALL, teacher, strength=schedules.certainty)
    assert figures[0]["strength_max"] > 1
    with pytest.raises(FedistillError, match="a loss that takes one"):
        Distiller(SMALL, teacher, loss=losses.logit_mse, strength=schedules.certainty)


def test_balance_takes_the_place_of_the_weight_and_is_trained_along(teacher):
    balance = schedules.Uncertainty()
    trained(SMALL, teacher, balance=balance)
    assert balance.log_variance.abs().min() > 0
    _, figures = trained(SMALL, teacher, balance=schedules.by_loss_ratio)
    assert all(np.isfinite(row["loss"]) for row in figures)


# --- the teacher ---------------------------------------------------------------------------------


def test_the_teacher_is_not_changed(teacher):
    """P7."""
    before = weights(teacher).clone()
    teacher.train()
    trained(SMALL, teacher, feature_losses=HINT)
    assert torch.equal(weights(teacher), before)

    assert teacher.training


def test_student_and_teacher_see_the_same_tensor(teacher):
    """P14: another view for each side."""
    seen = []

    class Watching(models.MLP):
        def forward(self, inputs):
            seen.append(inputs)
            return super().forward(inputs)

    class Teacher(EmaTeacher):
        def __call__(self, inputs):
            seen.append(inputs)
            return super().__call__(inputs)

    made = Distiller(partial(Watching, INPUTS, 3), Teacher(), training=SGD)
    seen.clear()
    (_,) = made.fit(ROWS, epochs=1)
    own = [inputs for inputs in seen if len(inputs) == 8]
    assert len(own) == 3 * 5, "the student, the teacher and its average, five times"
    for step in range(5):
        first, *others = own[3 * step : 3 * step + 3]
        assert all(one is first for one in others)


def test_a_teacher_that_stays_is_asked_once(teacher):
    asked = []

    def counting(inputs):
        asked.append(len(inputs))
        return teacher(inputs)

    trained(SMALL, counting, epochs=3)
    assert sum(asked) == 2 + len(ROWS), "a dry run on two rows, then each row once"


def test_rows_are_visited_in_an_order_of_its_own_in_each_epoch():
    """P15: ascending order each epoch."""
    orders = []

    class Watching(models.Linear):
        def forward(self, inputs):
            orders.append(inputs[:, 0].tolist())
            return super().forward(inputs)

    rows = Rows(np.arange(8, dtype=np.float32)[:, None] * np.ones(INPUTS, np.float32), [0] * 8)
    trained(partial(Watching, INPUTS, 3), rows=rows)
    first, second = orders[-2:]
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second != sorted(second) != first


def test_an_ema_teacher_follows_the_student():
    ema = EmaTeacher(decay=0.5)
    made, figures = trained(SMALL, ema, epochs=4)
    gap = (weights(ema.module) - weights(made.student)).abs().max()
    assert 0 < gap < 0.5
    assert figures[-1]["soft"] > 0


def test_an_ensemble_teaches_and_its_layers_can_be_watched(teacher):
    pair = ("trunk", "1.trunk")
    _, figures = trained(
        SMALL, Ensemble([teacher, teacher]), feature_losses={pair: losses.relational_distance}
    )
    assert figures[0]["trunk:1.trunk"] > 0


# --- features and phases -------------------------------------------------------------------------


def test_a_regressor_is_trained_along_and_left_behind(teacher):
    made = Distiller(SMALL, teacher, feature_losses=HINT, training=SGD)
    list(made.fit(ROWS, epochs=1))
    before = made.state_dict()
    figures = list(made.fit(ROWS, epochs=8))
    after = made.state_dict()
    assert after["along.0.weight"].shape == (16, 4)
    assert (before["along.0.weight"] != after["along.0.weight"]).any()
    assert figures[-1]["trunk:trunk"] < figures[0]["trunk:trunk"]
    assert sum(w.numel() for w in made.student.parameters()) == sum(
        w.numel() for w in SMALL().parameters()
    )


def test_no_hook_stays_behind_not_even_after_an_error(teacher):
    def hooks(module):
        return sum(len(layer._forward_hooks) for layer in module.modules())

    made = Distiller(SMALL, teacher, feature_losses=HINT, training=SGD)
    for _ in made.fit(ROWS, epochs=2):
        assert hooks(made.student) == hooks(teacher) == 0

    def broken(student, teacher):
        raise ZeroDivisionError

    made = Distiller(SMALL, teacher, feature_losses={("trunk", "trunk"): broken}, training=SGD)
    with pytest.raises(ZeroDivisionError):
        list(made.fit(ROWS, epochs=1))
    assert hooks(made.student) == hooks(teacher) == 0


def test_phases_go_first_and_then_everything_is_on(teacher):
    low, high = ("trunk.0", "trunk.0"), ("trunk", "trunk")
    made = Distiller(
        SMALL,
        teacher,
        feature_losses={pair: Feature(regressor=losses.regressor) for pair in (low, high)},
        phases=[(1, [low]), (2, [low, high]), (1, ["labels"])],
        training=SGD,
    )
    head = made.student.head.weight.detach().clone()
    on = []
    for figures in made.fit(ROWS, epochs=5):
        on.append(figures.keys() - {"epoch", "loss", "soft_weight", "temperature"})
        if len(on) <= 3:
            assert torch.equal(made.student.head.weight, head), "no loss reaches the head yet"
    names = {"trunk.0:trunk.0", "trunk:trunk"}
    assert on == [{"trunk.0:trunk.0"}, names, names, {"labels"}, names | {"labels", "soft"}]


def test_one_part_alone_has_its_whole_weight(teacher):
    phase, _ = trained(SMALL, teacher, phases=[(2, ["labels"])])
    plain, _ = trained(SMALL)
    assert torch.equal(weights(phase.student), weights(plain.student))
    phase, _ = trained(SMALL, teacher, phases=[(2, ["soft"])])
    soft, _ = trained(SMALL, teacher, soft_weight=1.0)
    assert torch.equal(weights(phase.student), weights(soft.student))


def test_an_output_changed_in_place_is_refused():
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    with captured(module, ["0", "1"]) as layers:
        module(torch.randn(4, 2))
        assert layers["1"].shape == (4, 3)
        assert set(layers) == {"0", "1"}
        with pytest.raises(FedistillError, match="changed in place"):
            layers["0"]
        with pytest.raises(FedistillError, match="did not run"):
            layers["2"]


def test_layers_are_known_by_name_and_say_one_tensor():
    lstm = nn.Sequential(nn.LSTM(2, 3))
    with pytest.raises(FedistillError, match='no layer "1"'), captured(lstm, ["1"]):
        pass
    with captured(lstm, ["0"]), pytest.raises(FedistillError, match="must return a tensor"):
        lstm(torch.randn(4, 1, 2))


# --- seeds and state -----------------------------------------------------------------------------


def test_equal_seeds_equal_students_whatever_the_global_seed(teacher):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        made, _ = trained(Dropping, teacher, feature_losses=HINT, seed=4)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(weights(made.student))
    assert torch.equal(*found)
    other, _ = trained(Dropping, teacher, feature_losses=HINT, seed=5)
    assert not torch.equal(weights(other.student), found[0])


def test_each_epoch_has_dropout_of_its_own_whatever_their_number():
    masks = []

    class Watching(Dropping):
        def forward(self, inputs):
            if self.training:
                masks.append(nn.functional.dropout(torch.ones(40)).tolist())
            return super().forward(inputs)

    for epochs in (2, 3):
        trained(Watching, training=Recipe(batch_size=40), epochs=epochs)
    assert masks[:2] == masks[2:4]
    assert masks[2] != masks[3] != masks[4] != masks[2]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_it_goes_on_from_its_state_to_the_same_bytes(teacher, optimizer, schedule):
    recipe = Recipe(batch_size=8, lr=0.01, momentum=0.9, optimizer=optimizer, schedule=schedule)

    def make(who):
        return Distiller(
            Dropping,
            who,
            feature_losses=HINT,
            balance=schedules.Uncertainty(["labels", "soft", "trunk:trunk"]),
            phases=[(1, ["labels"])],
            training=recipe,
            seed=9,
        )

    for who in (lambda: teacher, EmaTeacher):
        options = who(), who(), who()
        whole, first, second = (make(one) for one in options)
        straight = list(whole.fit(ROWS, epochs=4))
        _take(first.fit(ROWS, epochs=4), 2)
        state = first.state_dict()
        assert all(isinstance(value, np.ndarray) for value in state.values())
        second.load_state_dict(state, ROWS)
        rest = list(second.fit(ROWS, epochs=4))
        assert rest == straight[2:]
        ours, theirs = second.state_dict(), whole.state_dict()
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def _take(figures, count):
    for _ in range(count):
        next(figures)


def test_fit_counts_epochs_in_all_and_measures_test_rows():
    made = Distiller(SMALL, training=SGD)
    assert [row["epoch"] for row in made.fit(ROWS, test=TEST)] == [1, 2]
    assert [row["epoch"] for row in made.fit(ROWS, epochs=3, test=TEST)] == [3]
    assert list(made.fit(ROWS, epochs=3)) == []
    predicted = made.predict(TEST.inputs)
    assert predicted.dtype == np.float32
    assert predicted.shape == (60, 3)


def test_a_ready_module_is_trained_in_place():
    module = SMALL()
    before = weights(module).clone()
    made, _ = trained(module)
    assert made.student is module
    assert not torch.equal(weights(module), before)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"training": Recipe(temperature=4.0)}, "does not read temperature from its recipe"),
        ({"training": Recipe(mixup=1.0)}, "does not read mixup"),
        ({"loss": losses.kd}, "give logit_kl in place of kd"),
        ({"phases": [(1, ["hint"])]}, "a phase names 'hint'"),
        ({"teacher": None, "feature_losses": HINT}, "has one, found none"),
        ({"teacher": lambda inputs: inputs, "feature_losses": HINT}, "found a plain function"),
    ],
)
def test_parts_that_do_not_fit_are_refused_at_once(teacher, options, told):
    with pytest.raises(FedistillError, match=told):
        Distiller(SMALL, **({"teacher": teacher} | options))


@pytest.mark.parametrize(
    ("options", "rows", "told"),
    [
        ({}, ROWS.take([]), "one row at least"),
        ({}, Rows(ROWS.inputs, np.full(40, 3)), "has 3 classes, found label 3"),
        ({"loss": losses.decoupled_kd}, unlabelled(ROWS), "needs a label for each row"),
        ({"soft_weight": lambda epoch: 2}, ROWS, "within 0 and 1, found 2.0"),
        ({"feature_losses": {("tronk", "trunk"): losses.hint}}, ROWS, 'no layer "tronk"; did you'),
        ({"feature_losses": {("trunk", "trunk"): losses.hint}}, ROWS, "one shape"),
        ({"teacher": partial(models.MLP, INPUTS, 4)()}, ROWS, r"logits of one shape"),
    ],
)
def test_rows_that_do_not_fit_are_refused(teacher, options, rows, told):
    made = Distiller(SMALL, **({"teacher": teacher, "training": SGD} | options))
    with pytest.raises(FedistillError, match=told):
        list(made.fit(rows, epochs=1))


def test_a_student_cannot_teach_itself_by_mistake():
    module = SMALL()
    with pytest.raises(FedistillError, match="the teacher is the student"):
        Distiller(module, module)


def test_a_state_of_another_student_is_refused(teacher):
    made, _ = trained(SMALL, teacher)
    other = Distiller(partial(models.MLP, INPUTS, 3, width=5), teacher)
    with pytest.raises(CheckpointError, match="another distiller"):
        other.load_state_dict(made.state_dict(), ROWS)
    assert issubclass(DataError, FedistillError)


def test_a_loss_that_explodes_is_named():
    recipe = Recipe(batch_size=8, lr=1e30, clip=0.0)
    with pytest.raises(RunError, match="no longer a number in epoch"):
        trained(SMALL, training=recipe, epochs=5)


# --- the example ---------------------------------------------------------------------------------


@pytest.fixture
def compress(monkeypatch):
    path = Path(__file__).parents[2] / "simulations" / "compress.py"
    spec = importlib.util.spec_from_file_location("compress", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compress", module)
    spec.loader.exec_module(module)
    return module


def test_the_example_compresses_and_prints_its_table(compress, monkeypatch, capsys):
    words = "compress.py --data digits --seeds 0 --epochs 2"
    monkeypatch.setattr(sys, "argv", words.split())
    compress.main()
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in ("teacher", *compress.WAYS))
    assert "| 85,002 |" in table
    assert table.count("| 760 |") == len(compress.WAYS)


def test_the_example_says_what_data_it_lacks(compress, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("FEDISTILL_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["compress.py"])
    compress.main()
    assert capsys.readouterr().out.startswith("skipped: ")
