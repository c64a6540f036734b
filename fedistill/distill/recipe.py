"""How a learner trains: numbers only, fixed for the whole run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training of one learner, private part and distillation part.

    Attributes:
        epochs: passes over the own rows in a round.
        batch_size: own rows in a step; as many proxy rows join them.
        lr: learning rate.
        optimizer: ``sgd``, ``adam`` or ``adamw``; its state goes on from round to round.
        momentum: of sgd; None leaves it to the method, which may leave it at 0.
        weight_decay: of the optimizer.
        clip: largest gradient norm; 0 leaves gradients alone.
        schedule: ``constant``, or ``cosine``: the rate falls to 0 over each call.
        distil: ``inside`` the local steps, in a ``phase`` of its own before them, or ``never``.
        distil_epochs: passes over the soft targets in a phase; inside the local steps, passes
            that they get at least, however few the own rows are.
        soft_weight: weight of the soft part beside the cross-entropy of own rows.
        scarce_rows: with fewer own rows than this the soft part weighs more, in proportion.
        temperature: of the distillation loss.
        loss: ``kl``, or ``mae`` on row-centred logits (FedMD).
        mixup: concentration of the Beta law that mixes pairs of rows and their targets, 1 is
            uniform, 0 is off; inside the local steps own rows are mixed with proxy rows too.
        average: decay of the moving average of weights that predicts; 0 predicts with the last.
        familiarity: also learn to tell own rows from proxy rows.
        calibrate: add the log of the own class shares to the logits while training on own rows,
            so that what is shared is free of the own class mix.
        guide_weight: weight of a guide (see :class:`fedistill.distill.guide.Guide`) beside the
            cross-entropy of own rows; 0 trains without it.
        predict: from the ``head``, or by the nearest of the ``prototypes`` of the guide; before
            there are any, from the head.
    """

    epochs: int = 2
    batch_size: int = 50
    lr: float = 0.1
    optimizer: str = "sgd"
    momentum: float | None = None
    weight_decay: float = 0.0
    clip: float = 5.0
    schedule: str = "constant"
    distil: str = "inside"
    distil_epochs: int = 1
    soft_weight: float = 1.0
    scarce_rows: int = 0
    temperature: float = 1.0
    loss: str = "kl"
    mixup: float = 0.0
    average: float = 0.0
    familiarity: bool = False
    calibrate: bool = False
    guide_weight: float = 1.0
    predict: str = "head"

    def soft_weight_for(self, rows: int) -> float:
        """Weight of the soft part for a learner with this many own rows.

        Few labels are weak evidence, and the ensemble's targets stand in for the missing ones.
        """
        return self.soft_weight * max(1.0, self.scarce_rows / max(rows, 1))
