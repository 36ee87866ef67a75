"""The models of docs/model hold, and each wrong way breaks as it is said to."""

import pytest

from docs.model.__main__ import Case, as_expected, cases
from docs.model.search import explore

CASES = cases(full=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_holds_in_every_state_and_each_wrong_way_breaks_as_told(case: Case) -> None:
    outcome = explore(case.model)
    assert as_expected(case, outcome), (outcome.broken, *outcome.trace)
    # A model that can't move would hold as well.
    assert outcome.states > (1_000 if case.breaks is None else 10)


def test_a_trace_is_a_way_of_the_model_itself() -> None:
    broken = next(case for case in CASES if case.breaks == "reordered")
    outcome = explore(broken.model)
    state = broken.model.initial()
    for words in outcome.trace:
        assert broken.model.broken(state) is None
        state = dict(broken.model.steps(state))[words]
    assert broken.model.broken(state) == outcome.broken
