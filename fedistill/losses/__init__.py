"""Losses: pure functions of tensors and plain numbers that return one number."""

from fedistill.losses.soft_targets import kl_divergence, logit_mae, own_or_proxy

__all__ = ["kl_divergence", "logit_mae", "own_or_proxy"]
