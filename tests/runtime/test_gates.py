"""The limits themselves: whoever changes one changes it here, too, and says why in `runtime/gates.py`."""

from runtime.gates import GATES, Gates


def test_the_limits_are_those_that_were_agreed_upon() -> None:
    assert Gates(wrong_tokens=0, near_tie_ratio=2.0, action_error=1e-5, stats_error=1e-5) == GATES
