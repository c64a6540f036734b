"""Is this machine's clock right enough? ``python3 -m fedistill.flower.clock HOST:PORT CA``.

A SuperLink accepts a node's signature when its time is less than 5 seconds ahead and at most 305
behind. Otherwise the node ends, and says nothing but that it ended: so a site asks first.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
import sys
import time
from collections.abc import Sequence
from email.utils import mktime_tz, parsedate_tz

AHEAD = 4.0
BEHIND = 300.0
PATIENCE = 5.0


def offset(address: str, ca: str) -> float | None:
    """Seconds that this clock is ahead of the coordinator's; None if it cannot be asked.

    A date header has whole seconds, so the answer is right to about one.
    """
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=ca)
    connection = http.client.HTTPSConnection(
        host.strip("[]"), int(port), timeout=PATIENCE, context=context
    )
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health")
            told = parsedate_tz(connection.getresponse().getheader("date") or "")
        except (OSError, http.client.HTTPException):
            return None
    return None if told is None else time.time() - mktime_tz(told) - 0.5


def complaint(ahead: float) -> str | None:
    """What to tell the administrator; None if the clock will do."""
    if -BEHIND <= ahead <= AHEAD:
        return None
    way = "ahead of" if ahead > 0 else "behind"
    return (
        f"expected a clock within {AHEAD:g} seconds of the coordinator's, found this one "
        f"{abs(ahead):.0f} seconds {way} it: synchronise it (timedatectl set-ntp true)"
    )


def main(arguments: Sequence[str]) -> int:
    """Print the complaint, if there is one; 1 then, else 0."""
    if len(arguments) != 2:
        print("usage: python3 -m fedistill.flower.clock HOST:PORT CA", file=sys.stderr)
        return 2
    ahead = offset(*arguments)
    if ahead is None or (text := complaint(ahead)) is None:
        return 0
    print(f"start: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
