"""The same seed plans the same faults; every kind comes; two at once are of different areas."""

from itertools import pairwise

import pytest

from chaos.mutation import MUTANTS
from chaos.schedule import Planned, plan
from chaos.strikes import KINDS, natures


def of_ten_minutes(seed: int) -> list[Planned]:
    return plan(natures(), duration_s=600, seed=seed)


def test_the_same_seed_plans_the_same_faults_and_another_one_others() -> None:
    assert of_ten_minutes(1) == of_ten_minutes(1)
    assert of_ten_minutes(1) != of_ten_minutes(2)


@pytest.mark.parametrize("seed", range(1, 6))
def test_ten_minutes_have_every_kind_of_fault(seed: int) -> None:
    assert {fault.kind for fault in of_ten_minutes(seed)} == KINDS.keys()


def test_at_most_two_faults_are_there_at_once_and_never_of_one_area() -> None:
    faults = of_ten_minutes(3)
    for fault in faults:
        present = [one for one in faults if one.starts_s <= fault.starts_s < one.ends_s]
        areas = [KINDS[one.kind].nature.area for one in present]
        assert len(areas) <= 2
        assert len(set(areas)) == len(areas)
    assert all(one.number < other.number for one, other in pairwise(faults))


def test_each_mutant_has_a_fault_that_there_is() -> None:
    assert {mutant.fault for mutant in MUTANTS} <= KINDS.keys()
