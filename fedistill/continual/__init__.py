"""Students that stay current: replay, objectives, drift."""
