"""Losses that break the clipping are refused: each row of the reference's tables is a case."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedistill.distill.recipe import Recipe
from fedistill.errors import FedistillError
from fedistill.privacy import guard
from fedistill.privacy.clipping import cross_entropy
from fedistill.privacy.guard import REFUSED, check_loss, refuse, sensitivity

RANDOM = torch.Generator().manual_seed(11)
CENTRES = torch.randn(5, 20, generator=RANDOM)
LABELS = torch.arange(80) % 5
ROWS = CENTRES[LABELS] + 0.5 * torch.randn(80, 20, generator=RANDOM)
PRIVATE, PUBLIC = (ROWS[:64], LABELS[:64]), (ROWS[16:], LABELS[16:])


def network():
    return nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 5))


torch.manual_seed(5)
TEACHER = network().requires_grad_(False).eval()


@pytest.fixture
def module():
    torch.manual_seed(3)
    return network().train()


def with_teacher(net, inputs, labels, temperature=2.0):
    logits = net(inputs)
    said = F.log_softmax(logits / temperature, 1)
    wanted = F.softmax(TEACHER(inputs) / temperature, 1)
    apart = F.kl_div(said, wanted, reduction="none").sum(1)
    return F.cross_entropy(logits, labels, reduction="none") + temperature**2 * apart


def two_forwards(net, inputs, labels):
    beside = F.cross_entropy(
        net(PUBLIC[0][: len(inputs)]), PUBLIC[1][: len(inputs)], reduction="none"
    )
    return cross_entropy(net, inputs, labels) + beside


def mixup(net, inputs, labels):
    other, share = torch.randperm(len(inputs)), 0.7
    logits = net(share * inputs + (1 - share) * inputs[other])
    first = F.cross_entropy(logits, labels, reduction="none")
    return share * first + (1 - share) * F.cross_entropy(logits, labels[other], reduction="none")


def info_nce(net, inputs, labels):
    """Rows of one class attract one another, all others of the batch are negatives."""
    nobody = torch.eye(len(inputs))
    hidden = F.normalize(net(inputs), dim=1)
    likely = F.log_softmax(hidden @ hidden.T / 0.1 - 1e9 * nobody, 1)
    same = (labels[:, None] == labels).float() - nobody
    return -(same * likely).sum(1) / same.sum(1).clamp(min=1)


def cosine_relation(net, inputs, labels):
    logits = net(inputs)
    mine, theirs = F.normalize(logits, dim=1), F.normalize(TEACHER(inputs), dim=1)
    apart = ((mine @ mine.T - theirs @ theirs.T) ** 2).mean(1)
    return F.cross_entropy(logits, labels, reduction="none") + apart


def distance_relation(net, inputs, labels):
    logits, theirs = net(inputs), TEACHER(inputs)
    apart = ((_distances(logits) - _distances(theirs)) ** 2).mean(1)
    return F.cross_entropy(logits, labels, reduction="none") + apart


def _distances(rows):
    return ((rows[:, None] - rows) ** 2).sum(-1)


def normalised_logits(net, inputs, labels):
    logits = net(inputs)
    whitened = (logits - logits.mean(0)) / (logits.std(0, unbiased=False) + 1e-5)
    return F.cross_entropy(whitened, labels, reduction="none")


def normalised_weights(net, inputs, labels):
    losses = cross_entropy(net, inputs, labels)
    return losses * losses.detach() / losses.detach().mean()


def weighted_by_itself(net, inputs, labels):
    losses = cross_entropy(net, inputs, labels)
    return losses * (1 - torch.exp(-losses.detach()))


def summed(net, inputs, labels):
    return cross_entropy(net, inputs, labels).sum()


def averaged(net, inputs, labels):
    return cross_entropy(net, inputs, labels).mean()


GOOD = [cross_entropy, with_teacher, weighted_by_itself, summed]

# How far one row of 16 moves the sum, in clipping norms. The figures depend on the rows: what
# counts is which side of 1 they are on. The last two stay under it: the second test has them.
BAD = {
    two_forwards: (1.1, 3.0),
    mixup: (1.3, 4.0),
    info_nce: (1.5, 15.0),
    cosine_relation: (1.01, 3.0),
    distance_relation: (1.01, 3.0),
    normalised_logits: (0.7, 1.6),
    normalised_weights: (0.99, 1.01),
}


@pytest.mark.parametrize("loss", GOOD)
@pytest.mark.parametrize("count", [16, 64])
def test_a_row_moves_the_sum_of_a_sound_loss_by_the_norm(module, loss, count):
    rows = PRIVATE[0][:count], PRIVATE[1][:count]
    assert sensitivity(module, loss, *rows) == pytest.approx(1.0, abs=1e-3)


def test_every_way_of_clipping_that_training_may_take_is_tried(module, monkeypatch):
    plain, tried = guard._moved, []
    monkeypatch.setattr(guard, "_moved", lambda *args: (tried.append(args[-1]), plain(*args))[1])
    sensitivity(module, cross_entropy, PRIVATE[0][:4], PRIVATE[1][:4])
    assert tried == ["hooks", "gram", "ghost"]


@pytest.mark.parametrize("loss", GOOD)
def test_sound_losses_are_accepted(module, loss):
    check_loss(module, loss, *PRIVATE)


@pytest.mark.parametrize("loss", BAD)
def test_what_a_row_moves_with_an_unsound_loss(module, loss):
    low, high = BAD[loss]
    found = sensitivity(module, loss, PRIVATE[0][:16], PRIVATE[1][:16])
    assert low < found < high, found


@pytest.mark.parametrize("loss", [*BAD, averaged])
def test_unsound_losses_are_refused_by_name(module, loss):
    with pytest.raises(FedistillError, match=f"{loss.__name__} cannot be private"):
        check_loss(module, loss, *PRIVATE, name=loss.__name__)


@pytest.mark.parametrize("clip", [0.01, 1.0, 30.0])
def test_the_verdict_does_not_hang_on_the_norm(module, clip):
    check_loss(module, with_teacher, *PRIVATE, clip=clip)
    with pytest.raises(FedistillError, match="clipping norms"):
        check_loss(module, two_forwards, *PRIVATE, clip=clip)


def test_rows_that_hardly_meet_yet_are_found(module):
    """The sum does not show it, nor does the loss; it will, as weights grow."""

    def faint(net, inputs, labels):
        return cross_entropy(net, inputs + 1e-5 * inputs.mean(0), labels)

    assert sensitivity(module, faint, PRIVATE[0][:16], PRIVATE[1][:16]) < 1 + guard.SLACK
    with pytest.raises(FedistillError, match="the loss of a row changes with another one of 16"):
        check_loss(module, faint, *PRIVATE)


def test_a_module_may_write_over_what_it_is_given(module):
    check_loss(nn.Sequential(nn.ReLU(inplace=True), module), cross_entropy, *PRIVATE)


def test_few_rows_are_made_more(module):
    check_loss(module, cross_entropy, PRIVATE[0][:2], PRIVATE[1][:2])
    with pytest.raises(FedistillError, match="cannot be private"):
        check_loss(module, cosine_relation, PRIVATE[0][:2], PRIVATE[1][:2])
    with pytest.raises(FedistillError, match="found none"):
        check_loss(module, cross_entropy, PRIVATE[0][:0], PRIVATE[1][:0])


def test_a_loss_that_takes_one_number_of_rows_is_refused(module):
    targets = torch.zeros(16, dtype=torch.long)

    def fixed(net, inputs, labels):
        return F.cross_entropy(net(inputs), targets, reduction="none")

    with pytest.raises(FedistillError, match="fixed cannot be private: it fails for 6 rows"):
        check_loss(module, fixed, *PRIVATE, name="fixed")


def test_dropout_is_no_reason(module):
    check_loss(nn.Sequential(module[0], nn.Dropout(0.5), module[2]), cross_entropy, *PRIVATE)


def test_a_factory_will_do():
    check_loss(network, cross_entropy, *PRIVATE)


def test_the_module_is_left_as_it_was(module):
    module.eval()
    module[0].weight.grad = torch.ones_like(module[0].weight)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(1)
    check_loss(module, cross_entropy, *PRIVATE)
    with pytest.raises(FedistillError):
        check_loss(module, mixup, *PRIVATE)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(layer.training for layer in module.modules())
    assert not any(layer._forward_hooks for layer in module.modules())
    assert torch.equal(module[0].weight.grad, torch.ones_like(module[0].weight))


def test_a_projector_outside_the_module_is_refused(module):
    """Section 5: its gradients get no noise."""
    projector = nn.Linear(5, 7)

    def hinted(net, inputs, labels):
        logits = net(inputs)
        apart = ((projector(logits) - 1) ** 2).mean(1)
        return F.cross_entropy(logits, labels, reduction="none") + apart

    with pytest.raises(FedistillError, match=r"hinted cannot be private.*outside the module"):
        check_loss(module, hinted, *PRIVATE, name="hinted")
    projector.requires_grad_(False)
    check_loss(module, hinted, *PRIVATE, name="hinted")


def test_a_teacher_with_batch_norm_in_training_is_refused(module):
    teacher = nn.Sequential(nn.BatchNorm1d(20), nn.Linear(20, 5)).requires_grad_(False)

    def taught(net, inputs, labels):
        return F.cross_entropy(net(inputs), teacher(inputs).softmax(1), reduction="none")

    with pytest.raises(FedistillError, match="cannot be private"):
        check_loss(module, taught, *PRIVATE)
    teacher.eval()
    check_loss(module, taught, *PRIVATE)


def test_batch_norm_is_refused_and_frozen_batch_norm_is_not():
    module = nn.Sequential(nn.BatchNorm1d(20), nn.Linear(20, 5))
    with pytest.raises(FedistillError, match=r"layer 0 .*GroupNorm"):
        check_loss(module, cross_entropy, *PRIVATE)
    module[0].requires_grad_(False)
    check_loss(module, cross_entropy, *PRIVATE)


def test_a_module_that_mixes_rows_is_refused():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(20, 5)

        def forward(self, inputs):
            return self.head(inputs - inputs.mean(0))

    with pytest.raises(FedistillError, match="cannot be private"):
        check_loss(Centred(), cross_entropy, *PRIVATE)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_test_may_miss_is_refused_by_name(name):
    with pytest.raises(FedistillError, match=f"^{name} cannot be private: "):
        refuse(["kl", name])


def test_recipes():
    refuse(Recipe(mixup=1.0, average=0.9))
    for wrong in (Recipe(calibrate=True), Recipe(familiarity=True)):
        with pytest.raises(FedistillError, match="cannot be private"):
            refuse(wrong)


# --- weights used outside of their layers ---------------------------------------------------------


class Tied(torch.nn.Module):
    """A layer whose weight is also used by a function, where no hook of the layer sees it."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(20, 20)
        self.head = torch.nn.Linear(20, 5)

    def forward(self, inputs):
        hidden = torch.relu(self.layer(inputs))
        return self.head(torch.nn.functional.linear(hidden, self.layer.weight))


def penalised(net, inputs, labels):
    weights = sum(weight.square().sum() for weight in net.parameters())
    return torch.nn.functional.cross_entropy(net(inputs), labels, reduction="none") + 5 * weights


@pytest.mark.parametrize(("build", "loss"), [(Tied, cross_entropy), (network, penalised)])
def test_a_weight_used_outside_its_layer_escapes_ghost_clipping_and_is_refused(build, loss):
    with pytest.raises(FedistillError, match="moves the sum of clipped gradients"):
        check_loss(build, loss, *PRIVATE)
