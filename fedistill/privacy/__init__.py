"""Differential privacy that can be audited: what may be spent, what was, and what it bought."""
