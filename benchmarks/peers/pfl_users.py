"""pfl-research 0.6.0 trains users: https://github.com/apple/pfl-research, `pip install pfl==0.6.0`.

One central iteration of its FederatedAveraging on its SimulatedBackend, as its tutorials have it: a
module with `loss` and `metrics`, a dataset a user, SGD. Without its evaluation of every user before
and after training, which is optional.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from task import BATCH, RATE, Outcome, Round, Task, begin, flat
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """A module as pfl wants one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.inner(inputs)
        return logits

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Of a batch."""
        self.train()
        return F.cross_entropy(self(inputs), labels)

    @torch.no_grad()
    def metrics(self, inputs: Tensor, labels: Tensor) -> dict[str, Weighted]:
        """Asked for, and not called here."""
        self.eval()
        loss = F.cross_entropy(self(inputs), labels, reduction="sum").item()
        return {"loss": Weighted(loss, len(inputs))}


@contextmanager
def users(given: Task) -> Iterator[Round]:
    """The engine."""
    clients = len(given)
    net = Net(begin(given.plain, given.starts[0]))
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    rows = [
        PyTorchTensorDataset((given.inputs[k][order], given.labels[k][order]), user_id=str(k))
        for k, order in enumerate(given.orders)
    ]
    sampler = get_user_sampler("minimize_reuse", list(range(clients)))
    data = FederatedDataset(rows.__getitem__, sampler)
    backend = SimulatedBackend(training_data=data, val_data=data)
    params = NNAlgorithmParams(
        central_num_iterations=10**9,
        evaluation_frequency=10**9,
        train_cohort_size=clients,
        val_cohort_size=None,
    )
    training = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=RATE, local_batch_size=BATCH
    )
    algorithm = FederatedAveraging()
    start = model.get_parameters()

    def run() -> Outcome:
        (context,), _, _ = algorithm.get_next_central_contexts(model, 1, params, training)
        statistics, metrics = backend.gather_results(model, algorithm, central_context=context)
        algorithm.process_aggregated_statistics(context, metrics, model, statistics)
        weights = flat(list(net.parameters()))
        model.set_parameters(start)
        return torch.empty(0), weights

    yield run
