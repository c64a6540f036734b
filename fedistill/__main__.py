"""``python -m fedistill`` is the command line."""

from fedistill.cli import main

main()
