"""Learners: what trains on rows, absorbs soft targets and predicts."""
