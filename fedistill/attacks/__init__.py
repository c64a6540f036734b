"""Simulated bad clients: what a federation of honest ones has to survive.

A bad client is an honest :class:`~fedistill.client.Client` whose learner is wrapped in a
:class:`BadLearner`, and whose rows may be changed. It goes through its own site like any other and
keeps to the protocol, so that what is measured is what its *predictions* do; messages that break
the protocol are refused at the server's door. It is for simulations alone.

Predictions are probabilities by the time they are combined, which bounds every attack: a client
can put one vote on a wrong class and no more, however large its logits. What else bounds an attack
stands beside it in :data:`ATTACKS`. Settings name attacks, so nothing here imports torch.
"""

from __future__ import annotations

from fedistill.attacks.clients import corrupt as corrupt
from fedistill.attacks.kinds import ATTACKS as ATTACKS
from fedistill.attacks.kinds import Attack as Attack
from fedistill.attacks.learner import BadLearner as BadLearner
