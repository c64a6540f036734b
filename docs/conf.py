"""How the pages beside this file become a site: ``sphinx-build -W -b html docs docs/_build``."""

import fedistill

project = "fedistill"
author = "the fedistill authors"
release = version = fedistill.__version__
html_title = "fedistill"

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

html_theme = "furo"
html_theme_options = {"navigation_with_keys": True}
html_show_copyright = False
