"""The terms of a client: as agreed, and no more than its own policy allows."""

import pytest

from fedistill.errors import SettingsError
from fedistill.privacy.terms import terms_of
from fedistill.settings import PolicySettings, PrivacySettings


def test_delta_follows_the_number_of_units():
    how = PrivacySettings(mechanism="dpsgd")
    assert terms_of(how, 5, 100).delta == 1e-5
    many = terms_of(how, 5, 1_000_000).delta
    assert many == terms_of(how, 5, 600_000).delta == 1 / (10 * 2**20)  # not of the exact number


def test_delta_that_would_permit_publishing_a_row_is_refused():  # fault 42
    how = PrivacySettings(mechanism="dpsgd", delta=0.01)
    with pytest.raises(SettingsError, match=r"privacy\.delta: expected less than 1 / 100"):
        terms_of(how, 5, 100)
    assert terms_of(how, 5, 99).delta == 0.01
    assert terms_of(how, 5, 0).delta == 0.01


def test_the_policy_of_a_site_wins_only_downwards():
    how = PrivacySettings(mechanism="dpsgd", epsilon=8.0, delta=1e-4)
    stricter = terms_of(how, 5, 100, policy=PolicySettings(epsilon=2.0, delta=1e-6))
    assert (stricter.epsilon, stricter.delta) == (2.0, 1e-6)
    assert terms_of(how, 5, 100, policy=PolicySettings(epsilon=2.0)).delta == 1e-5
    looser = terms_of(how, 5, 100, policy=PolicySettings(epsilon=20.0, delta=1e-3))
    assert (looser.epsilon, looser.delta) == (8.0, 1e-4)


def test_a_group_may_have_another_mechanism_than_was_agreed():
    how = PrivacySettings(mechanism="dpsgd", rounds=9)
    terms = terms_of(how, 5, 100, mechanism="gnmax")  # planned for more rounds than are run now
    assert (terms.mechanism, terms.agreed, terms.rounds) == ("gnmax", "dpsgd", 9)
