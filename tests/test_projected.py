"""The estimator of experiments/spry_figures against forward mode itself: same directions, same scalars to rounding."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from toy import Toy, problem

from spryfl import tree
from spryfl.estimators import ESTIMATORS, forward
from spryfl.noise import expand

SCRIPT = Path(__file__).parents[1] / "experiments" / "spry_figures" / "projected.py"


@pytest.fixture
def projected(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "projected", None)  # so that what the script registers is gone afterwards
    return runpy.run_path(str(SCRIPT))["projected"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exact_head": True},
        {"exact_head": True, "distribution": "orthogonal"},
        {"exact_head": True, "guided": True},
        {"guided": True, "distribution": "rademacher"},
        {"exact_head": True, "candidates": 3},
        {"clip": 0.05},
    ],
    ids=str,
)
def test_projected_is_forward_mode(projected, options):
    params, batch = problem()
    guide = {name: torch.randn_like(value) for name, value in params.items()}
    ours, theirs = (make(directions=4, **options)(Toy(guide=guide), params, batch, 5) for make in (projected, forward))
    one, other = ({**tree.zeros(params), **made.dense} for made in (ours, theirs))
    one, other = (tree.add(g, expand(m.terms, params)) for g, m in ((one, ours), (other, theirs)))
    assert tree.norm(other) > 0
    assert tree.norm(tree.subtract(one, other)) < 1e-5 * tree.norm(other)
    assert [term.seed for term in ours.terms] == [term.seed for term in theirs.terms]
    assert (ours.passes.value, ours.passes.tangent) == (1, 4)
