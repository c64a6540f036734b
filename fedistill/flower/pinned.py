"""``flwr-clientapp`` as a site starts it: only the code that its administrator installed is run.

Flower ships an app with every run, and a node runs whatever comes. Here the app that came is
neither unpacked nor imported: the installed :func:`fedistill.flower.client_app` answers in its
place. The site's start script puts this first on its PATH, so the coordinator decides what is
asked, and the site what is run.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Sequence
from typing import Any

REPLACED = ("install_from_fab", "get_load_client_app_fn", "get_project_dir")
"""What :mod:`flwr.supernode.runtime.run_clientapp` calls to unpack and to import an app."""


def pin(module: Any) -> None:
    """Let Flower's runner of client apps run the installed one, whatever it was sent.

    Raises:
        SystemExit: this version of Flower works otherwise than the one this was written for; then
            nothing is run at all.
    """
    if missing := [name for name in REPLACED if not callable(getattr(module, name, None))]:
        raise SystemExit(
            f"this flwr has no {missing[0]} to replace, so foreign code could run: install the "
            "version of flwr that fedistill was tested with"
        )

    def installed(*anything: object) -> Any:
        del anything
        # Flower's own handler would end the process without a word, and the node would wait for
        # ever; killed outright, the process is missed after a while, and reported.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        from fedistill.flower.apps import client_app

        return client_app()

    def loader(*anything: object, **named: object) -> Callable[..., Any]:
        del anything, named
        return installed

    def nothing(*anything: object, **named: object) -> None:
        del anything, named

    module.install_from_fab = nothing
    module.get_project_dir = nothing
    module.get_load_client_app_fn = loader


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point, with the arguments of ``flwr-clientapp``.

    A process is started for every message, so only what the runner itself needs is imported:
    Flower's own entry point would load the whole SuperNode, half a second of work.
    """
    from flwr.common.args import add_args_flwr_app_common, try_obtain_flwr_app_token
    from flwr.supercore.tls import validate_and_resolve_root_certificates
    from flwr.supernode.runtime import run_clientapp

    pin(run_clientapp)
    parser = argparse.ArgumentParser(prog="flwr-clientapp")
    parser.add_argument("--runtime-api-address", required=True)
    add_args_flwr_app_common(parser)
    told = parser.parse_args(arguments)
    run_clientapp.run_clientapp(
        runtime_api_address=told.runtime_api_address,
        token=try_obtain_flwr_app_token(told),
        insecure=told.insecure,
        certificates=validate_and_resolve_root_certificates(told.root_certificates, told.insecure),
        parent_pid=told.parent_pid,
        runtime_dependency_install=False,
    )


if __name__ == "__main__":
    main()
