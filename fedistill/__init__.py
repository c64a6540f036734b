"""Federated distillation: organisations that teach one another through predictions.

Every public name is loaded on first use, so that ``import fedistill`` and the command line do
not import torch before they need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedistill import data, losses, metrics, models, privacy, testing
    from fedistill.client import Client, Member, Site
    from fedistill.config import Settings
    from fedistill.continual.adwin import Adwin
    from fedistill.continual.buffer import ReplayBuffer
    from fedistill.continual.mmd import Mmd
    from fedistill.continual.page_hinkley import PageHinkley
    from fedistill.data.stream import Experience
    from fedistill.deployment import open_site
    from fedistill.distill.distiller import Distiller
    from fedistill.distill.incremental import IncrementalDistiller
    from fedistill.distill.learner import Learner
    from fedistill.distill.recipe import Recipe
    from fedistill.distill.teachers import EmaTeacher, SelfTeacher
    from fedistill.errors import FedistillError
    from fedistill.experiment import run
    from fedistill.federation import Federation
    from fedistill.presets import Method, method
    from fedistill.privacy.dpsgd import PrivateStudent
    from fedistill.privacy.ledger import Ledger
    from fedistill.recommend import Recommender
    from fedistill.settings import Privacy
    from fedistill.types import Dataset, ProxySet, Rows

__version__ = "0.1.0"

_HOMES = {
    "Adwin": "fedistill.continual.adwin",
    "Client": "fedistill.client",
    "Dataset": "fedistill.types",
    "Distiller": "fedistill.distill.distiller",
    "EmaTeacher": "fedistill.distill.teachers",
    "Experience": "fedistill.data.stream",
    "Federation": "fedistill.federation",
    "FedistillError": "fedistill.errors",
    "IncrementalDistiller": "fedistill.distill.incremental",
    "Learner": "fedistill.distill.learner",
    "Ledger": "fedistill.privacy.ledger",
    "Member": "fedistill.client",
    "Method": "fedistill.presets",
    "Mmd": "fedistill.continual.mmd",
    "PageHinkley": "fedistill.continual.page_hinkley",
    "Privacy": "fedistill.settings",
    "PrivateStudent": "fedistill.privacy.dpsgd",
    "ProxySet": "fedistill.types",
    "Recipe": "fedistill.distill.recipe",
    "Recommender": "fedistill.recommend",
    "ReplayBuffer": "fedistill.continual.buffer",
    "Rows": "fedistill.types",
    "SelfTeacher": "fedistill.distill.teachers",
    "Settings": "fedistill.config",
    "Site": "fedistill.client",
    "method": "fedistill.presets",
    "open_site": "fedistill.deployment",
    "run": "fedistill.experiment",
}
_MODULES = ("data", "losses", "metrics", "models", "privacy", "testing")

__all__ = [
    "Adwin",
    "Client",
    "Dataset",
    "Distiller",
    "EmaTeacher",
    "Experience",
    "Federation",
    "FedistillError",
    "IncrementalDistiller",
    "Learner",
    "Ledger",
    "Member",
    "Method",
    "Mmd",
    "PageHinkley",
    "Privacy",
    "PrivateStudent",
    "ProxySet",
    "Recipe",
    "Recommender",
    "ReplayBuffer",
    "Rows",
    "SelfTeacher",
    "Settings",
    "Site",
    "data",
    "losses",
    "method",
    "metrics",
    "models",
    "open_site",
    "privacy",
    "run",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fedistill.{name}")
    else:
        raise AttributeError(f"module 'fedistill' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
