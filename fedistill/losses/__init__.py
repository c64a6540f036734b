"""Losses: pure functions of tensors and plain numbers that return one number.

Each is a mean over rows, gives the teacher no gradient, computes in float32 at least and is 0 on
an empty batch. ``teacher`` stands for logits, features or scores; ``targets`` for probabilities.
"""

from fedistill.losses.attention import attention_transfer
from fedistill.losses.decoupled import decoupled_kd
from fedistill.losses.directions import cosine
from fedistill.losses.distillation import kd, label_loss, logit_kl
from fedistill.losses.hints import hint, regressor
from fedistill.losses.items import bpr, relaxed_ranking, sampled_kl, sampled_softmax
from fedistill.losses.kernels import kernel_loss
from fedistill.losses.lists import ranking, ranking_order
from fedistill.losses.logits import logit_mse
from fedistill.losses.prototypes import prototype_loss
from fedistill.losses.relational import relational_angle, relational_distance
from fedistill.losses.soft_targets import (
    kl_divergence,
    logit_mae,
    own_or_proxy,
    soft_cross_entropy,
    soften,
)

__all__ = [
    "attention_transfer",
    "bpr",
    "cosine",
    "decoupled_kd",
    "hint",
    "kd",
    "kernel_loss",
    "kl_divergence",
    "label_loss",
    "logit_kl",
    "logit_mae",
    "logit_mse",
    "own_or_proxy",
    "prototype_loss",
    "ranking",
    "ranking_order",
    "regressor",
    "relational_angle",
    "relational_distance",
    "relaxed_ranking",
    "sampled_kl",
    "sampled_softmax",
    "soft_cross_entropy",
    "soften",
]
