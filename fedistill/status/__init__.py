"""How a run stands, seen from its folder: in a terminal, on a page, or for a supervisor.

Nothing here talks to the run. :func:`read_status` reads what the run writes anyway, so it works
while the run is on, after it was killed, and from another account that may read the folder. A
site's folder has a status of its own.
"""

from fedistill.status.folder import (
    STATES,
    Attendance,
    RunStatus,
    SiteStatus,
    Status,
    read_status,
)
from fedistill.status.server import Server, address, serve
from fedistill.status.show import facts, health, lines, page, watch

__all__ = [
    "STATES",
    "Attendance",
    "RunStatus",
    "Server",
    "SiteStatus",
    "Status",
    "address",
    "facts",
    "health",
    "lines",
    "page",
    "read_status",
    "serve",
    "watch",
]
