"""The drift detectors by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedistill.continual.adwin import Adwin
from fedistill.continual.mmd import Mmd
from fedistill.continual.page_hinkley import PageHinkley
from fedistill.continual.watcher import Detector
from fedistill.errors import FedistillError, did_you_mean

DETECTORS: dict[str, Callable[..., Detector]] = {
    "adwin": Adwin,
    "page-hinkley": PageHinkley,
    "mmd": Mmd,
}


def detector(name: str, **options: Any) -> Detector:
    """A detector by name, with its options.

    >>> detector("adwin", on="error", delta=1e-4).on
    'error'

    Raises:
        FedistillError: the name or an option is unknown, or an option is out of range.
    """
    if name not in DETECTORS:
        raise FedistillError(f'drift: unknown detector "{name}"{did_you_mean(name, DETECTORS)}')
    try:
        return DETECTORS[name](**options)
    except TypeError as error:
        raise FedistillError(f"{name}: {error}") from None
