"""What a federation says of the privacy that its clients spent, in rounds and in the summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedistill.client import Client, Site
from fedistill.errors import BudgetExhausted, FedistillError
from fedistill.privacy.account import Account
from fedistill.privacy.accounting import ACCOUNTANT
from fedistill.privacy.central import RELATION as CENTRAL_RELATION
from fedistill.privacy.central import CentralNoise
from fedistill.privacy.terms import PRIVATE, RELATION, SMALLEST_DELTA, STATEMENTS, settled, terms_of
from fedistill.server import Server
from fedistill.settings import PrivacySettings
from fedistill.tally import Tally
from fedistill.wire.messages import bucket

EXHAUSTED = "budget_exhausted"
RNG = "torch's Mersenne Twister, seeded by the operating system for each step; not a CSPRNG"


def check_budgets(tally: Tally) -> None:
    """Give up a round at once where nobody is missing but those who have spent their budget.

    Raises:
        BudgetExhausted: a further try would find the same.
    """
    out = [name for name, reason in tally.dropped.items() if reason == EXHAUSTED]
    if out and len(out) == len(tally.dropped):
        left = len(tally.answers)
        raise BudgetExhausted(
            f"round {tally.plan.round}: {len(out)} of {len(tally.plan.clients)} clients have spent "
            f"their privacy budget, {left} {'is' if left == 1 else 'are'} left, the quorum is "
            f"{tally.plan.quorum}: raise privacy.epsilon (and what sites allow), or end here"
        )


def keep_account(server: Server, how: PrivacySettings, rounds: int, folder: Path | None) -> None:
    """Give a trusted server its noisy rule, and the account that pays for it.

    Raises:
        FedistillError: too few clients, or another rule than the mean.
    """
    if server.method.rule != "mean" or server.student_rule is not None:
        found = server.method.student_rule or server.method.rule
        raise FedistillError(
            f'central-gauss is noise on the mean, for all who learn, found the rule "{found}": '
            'set method.rule = "mean", and no method.student_rule'
        )
    server.rule = CentralNoise(tuple(server.enrolled))
    terms = terms_of(how, rounds, len(server.enrolled), mechanism="central-gauss")
    # Noise is counted in distances between two answers of a client (replace-one). Of a client that
    # is there or not the same holds all the more, and that is how ledgers count.
    terms = replace(terms, unit="client")
    server.account = Account(terms, folder and folder / "checkpoint")


def replanned(client: Client, rounds: int) -> Client:
    """A client whose budget, if it has one, is planned for so many rounds."""
    terms = client.terms
    return replace(client, terms=replace(terms, rounds=rounds)) if terms is not None else client


def privacy_row(server: Server) -> dict[str, Any]:
    """Epsilon of each client after a round; nothing where nobody keeps an account."""
    known = {name: spent for name, spent in sorted(server.epsilons.items()) if spent is not None}
    return {"epsilon": known} if known else {}


def privacy_summary(
    how: PrivacySettings, server: Server, sites: Mapping[str, Site]
) -> dict[str, Any]:
    """What ``summary.json`` says of privacy: of real sites what they told, else all accounts."""
    told = {"mechanism": how.mechanism, "statement": STATEMENTS[how.mechanism]}
    private = how.mechanism in PRIVATE
    if how.purpose:
        told["purpose"] = how.purpose
    if not private and how.mechanism != "central-gauss":
        return told | {"private": False} if how.mechanism != "none" else told
    central = server.account
    if not private and central is None:
        return told | {"private": False}
    return {
        **told,
        "private": private,
        "unit": how.unit if central is None else central.terms.unit,
        "relation": RELATION if central is None else CENTRAL_RELATION,
        "budget": how.epsilon,
        "epsilon_max": server.epsilon_max(),
        "delta": (how.delta or SMALLEST_DELTA) if central is None else central.terms.delta,
        **({} if central is None else {"sigma": central.sigma}),
        "accountant": ACCOUNTANT,
        "rng": RNG,
        "clip_norm": how.clip_norm,
        "sample_rate": settled(how, how.mechanism).sample_rate,
        "rounds": how.rounds,
        "sites": {
            name: site_facts(sites[name]) if name in sites else {"epsilon": epsilon, "head": head}
            for name, epsilon, head in _heard(server)
        },
    }


def _heard(server: Server) -> list[tuple[str, float | None, str]]:
    return [
        (name, server.epsilons.get(name), server.receipts.get(name, "")) for name in server.enrolled
    ]


def site_facts(site: Site) -> dict[str, Any]:
    """What a simulated client's account says, as its owner would see it."""
    account = site.account
    if account is None:
        return {"epsilon": None, "mechanism": site.client.mechanism}
    entries = account.ledger.entries()
    return {
        "mechanism": account.terms.mechanism,
        "epsilon": account.spent(),
        "delta": account.terms.delta,
        "unit": account.terms.unit,
        "budget": account.terms.epsilon,
        "sigma": account.sigma,
        "reservations": sum(entry.kind == "reserve" for entry in entries),
        "releases": sum(entry.kind == "release" for entry in entries),
        "head": account.head,
        "exhausted": site.exhausted,
        "rows": bucket(len(site.data)),
    }
