"""FedAvg, the baseline to beat: the same loop, with weights in place of predictions.

McMahan et al. 2017, arXiv 1602.05629. It is here for comparison only. Weights leave the clients,
so it runs only where the settings ask for it by name, and every client must have the
architecture of the server's student.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedistill.client import Site
from fedistill.distill.torch_student import TorchStudent
from fedistill.errors import Problem, Rejected, SettingsError
from fedistill.server import Answer, Combined, Server
from fedistill.types import FloatArray, Probs, fingerprint_classes
from fedistill.wire.messages import Plan, RowSpec, Upload, bucket


def flat_weights(student: TorchStudent) -> FloatArray:
    """All parameters and float buffers as one float32 vector."""
    return np.concatenate(
        [
            tensor.detach().cpu().numpy().ravel().astype("<f4")
            for tensor in student.module.state_dict().values()
            if tensor.is_floating_point()
        ]
    )


def set_weights(student: TorchStudent, vector: FloatArray) -> None:
    """The inverse of :func:`flat_weights`."""
    start = 0
    for tensor in student.module.state_dict().values():
        if tensor.is_floating_point():
            part = np.array(vector[start : start + tensor.numel()])
            tensor.copy_(torch.from_numpy(part).reshape(tensor.shape))
            start += tensor.numel()


class FedAvgSite(Site):
    """A client that takes the average's weights, trains, and sends its own."""

    def absorb(self, plan: Plan) -> None:
        """Take the average's weights."""
        assert isinstance(self.learner, TorchStudent)
        set_weights(self.learner, np.frombuffer(plan.weights, dtype="<f4"))
        self.learner.restart()

    def share(self, plan: Plan) -> Upload:
        """The weights after training; a client without rows of its own sends none."""
        assert isinstance(self.learner, TorchStudent)
        teaches = len(self.client.data) > 0
        weights = flat_weights(self.learner) if teaches else np.empty(0, dtype="<f4")
        if not np.isfinite(weights).all():
            raise Rejected("nonfinite", "the weights are NaN or infinite: lower the lr")
        return Upload(
            client=self.client.id,
            run=plan.run,
            round=plan.round,
            proxy=plan.proxy,
            classes=plan.classes,
            share="weights" if teaches else "none",
            codec="float32",
            shape=(int(teaches), len(weights)),
            size=bucket(len(self.client.data)),
            payload=weights.tobytes(),
        )


class FedAvgServer(Server):
    """A server that averages weights by number of rows, as enrolled."""

    shares = "weights"

    def plan(self, number: int, attempt: int = 0) -> Plan:
        """Who is asked, with the average's weights."""
        return Plan(
            run=self.run,
            round=number,
            ask=RowSpec(0, number, 0, len(self.proxy)),
            proxy=self.proxy.fingerprint,
            classes=fingerprint_classes(self.classes),
            weights=flat_weights(self._student()).tobytes(),
            clients=self._participants(number, attempt),
            quorum=self.quorum,
        )

    def _expected_shape(self, plan: Plan, *, teaches: bool) -> tuple[int, int]:
        return (int(teaches), len(plan.weights) // 4 if teaches else 0)

    def _check_values(self, upload: Upload) -> tuple[Probs, None]:
        rows, count = upload.shape
        if len(upload.payload) != 4 * rows * count:
            raise Rejected("shape", "the payload is not as long as the header says")
        vector = np.frombuffer(upload.payload, dtype="<f4").reshape(rows, count)
        if not np.isfinite(vector).all():
            raise Rejected("nonfinite", "NaN or infinity among the weights")
        return vector, None

    def combine(self, plan: Plan, answers: Sequence[Answer]) -> Combined:
        """Average the weights."""
        teachers = self._teachers(plan, answers)
        sizes = np.array([self.enrolled[a.upload.client] for a in teachers], dtype=np.float64)
        stacked: Probs = np.array([a.probs[0] for a in teachers], dtype=np.float64)
        set_weights(self._student(), (sizes / sizes.sum()) @ stacked)
        return Combined()

    def distil(self) -> None:
        """Nothing: the average is the student."""

    def _student(self) -> TorchStudent:
        if not isinstance(self.student, TorchStudent):
            text = "fedavg needs a torch model at the server and the same one at every client"
            raise SettingsError([Problem("student.model", text)])
        return self.student
