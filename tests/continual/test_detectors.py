"""The table of detectors: every entry keeps the seam's promises."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedistill.continual.detectors import DETECTORS, detector
from fedistill.continual.watcher import DriftState
from fedistill.errors import FedistillError


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_keeps_the_seam(name: str) -> None:
    made = detector(name, on="confidence")
    rng = np.random.default_rng(0)
    assert made.update(rng.beta(18, 2, 900)) is DriftState.OK
    state = json.loads(json.dumps(made.state_dict(), allow_nan=False))
    other = detector(name, on="confidence")
    other.load_state_dict(state)
    shifted = rng.beta(3, 7, 900)
    assert made.update(shifted) is other.update(shifted) is DriftState.DRIFT
    assert made.alarms == other.alarms
    made.reset()
    assert made.update(shifted[:100]) is DriftState.OK
    with pytest.raises(FedistillError, match="resume with the detector"):
        detector(name, on="entropy").load_state_dict(state)


def test_unknown_names_and_options() -> None:
    with pytest.raises(FedistillError, match='did you mean "adwin"'):
        detector("adwim")
    with pytest.raises(FedistillError, match="unexpected keyword"):
        detector("adwin", theta=1)
