"""Epsilons that were computed once, kept beside the chain so that a site need not compute again.

A site opens its ledger in a new process for each message, and an epsilon costs it two seconds. A
kept number that someone edits would lie about all that is on the chain, so each has a seal (HMAC
under the key of the ledger, over question and answer). One whose seal does not fit is computed
anew: the number that is shown is always a function of the chain.
"""

from __future__ import annotations

import hmac
import json

from fedistill.errors import LedgerError
from fedistill.privacy import accounting
from fedistill.privacy.events import Spending
from fedistill.privacy.ledger_file import LedgerFile


def known_epsilon(
    file: LedgerFile, spending: Spending, delta: float, relation: str = "add-remove"
) -> float:
    """:func:`fedistill.privacy.accounting.epsilon`, from the ledger where it was kept."""
    key = _key(file)
    if key is None or not spending:
        return accounting.epsilon(spending, delta, relation)
    asked = json.dumps([spending.to_json(), delta, relation, accounting.ACCOUNTANT])
    found = file.recall(asked)
    if found and hmac.compare_digest(str(found[1]), _seal(key, asked, found[0])):
        return found[0]
    epsilon = accounting.epsilon(spending, delta, relation)
    file.remember(asked, epsilon, _seal(key, asked, epsilon))
    return epsilon


def _key(file: LedgerFile) -> bytes | None:
    if file.path is None:
        return None
    try:
        return file.key()
    except LedgerError:  # a copy without its key can be read, and proves itself
        return None


def _seal(key: bytes, asked: str, epsilon: float) -> str:
    return hmac.digest(key, f"{asked}\n{epsilon!r}".encode(), "sha256").hex()
