"""fedistill over Flower: the only place that imports flwr.

:func:`client_app` and :func:`server_app` are whole Flower apps, also for use in an app of your own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedistill.flower.apps import client_app, server_app

__all__ = ["client_app", "server_app"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from fedistill.flower import apps

        return getattr(apps, name)
    raise AttributeError(f"module 'fedistill.flower' has no attribute '{name}'")
