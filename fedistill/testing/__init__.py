"""Checkers for parts of your own: each proves a part by the properties that its seam promises.

A checker returns nothing when the part keeps its promises and raises :class:`CheckFailed` at the
first that it breaks, with what was expected and what was found::

    def test_my_rule():
        fd.testing.check_rule(my_rule)
"""

from fedistill.testing.continual import check_detector, check_objective, check_policy
from fedistill.testing.parts import CheckFailed, check_codec, check_learner, check_rule, expect

__all__ = [
    "CheckFailed",
    "check_codec",
    "check_detector",
    "check_learner",
    "check_objective",
    "check_policy",
    "check_rule",
    "expect",
]
