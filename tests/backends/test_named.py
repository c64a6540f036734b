"""A backend by its name."""

import pytest
from builders import federation

from fedistill.backends import BUILT_IN, backend_of
from fedistill.backends.processes import Pool
from fedistill.backends.serial import Serial
from fedistill.backends.vectorized import Vectorized
from fedistill.errors import FedistillError


def test_names_are_those_of_the_settings_and_what_makes_a_backend_is_itself():
    made = {name: backend_of(name) for name in BUILT_IN}
    assert made == {"serial": Serial, "vectorized": Vectorized, "processes": Pool}
    assert backend_of(Serial) is Serial


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("vectorised", r'found "vectorised".*did you mean "vectorized"'),
        ("flower", "expected serial, vectorized, processes, or what makes one"),
        (None, 'found "None"'),
    ],
)
def test_another_name_is_told_what_there_is(named, told):
    with pytest.raises(FedistillError, match=told):
        list(federation().run(1, backend=named))


def test_a_run_by_name_is_that_run():
    one, other = federation(), federation()
    list(one.run(2, backend="vectorized"))
    list(other.run(2, backend=Vectorized))
    assert one.server.digest() == other.server.digest()
