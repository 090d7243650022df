"""The numbers that were right stay: all scores of `golden.py` as they were frozen."""

import numpy as np
import pytest

import golden
from problems import NAMES

pytestmark = [
    pytest.mark.filterwarnings("ignore::wherefrom.errors.AttributionWarning"),
    pytest.mark.filterwarnings("ignore::wherefrom.errors.ConvergenceWarning"),
]
FROZEN = np.load(golden.FILE)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_that_were_frozen(name):
    differing = {}
    for label, scores in golden.cases(name):
        wanted = FROZEN[f"{name}/{label}"]
        found = scores().numpy()
        assert found.shape == wanted.shape, label
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        if not error <= golden.TOLERANCE:
            differing[label] = float(error)
    assert not differing


def test_every_problem_and_case_is_frozen():
    frozen = {key for key in FROZEN.files if "/" in key}
    assert frozen == {f"{name}/{label}" for name in NAMES for label, _ in golden.cases(name)}
