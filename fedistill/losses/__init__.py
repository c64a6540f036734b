"""Losses: pure functions of tensors and plain numbers that return one number."""

from fedistill.losses.soft_targets import (
    kl_divergence,
    logit_mae,
    own_or_proxy,
    soft_cross_entropy,
    soften,
)

__all__ = ["kl_divergence", "logit_mae", "own_or_proxy", "soft_cross_entropy", "soften"]
