"""Every rule against torch's own forward mode, over the table of rules, so that a new one cannot be forgotten."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spryfl.jvp import attention, jvp
from spryfl.jvp.registry import RULES
from spryfl.jvp.rules_linear import LIBRARIES

from .samples import SAMPLES

# Both are the reference's own.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:DeprecationWarning", "ignore:There is a perf:UserWarning"
)
NO_SAMPLE = {"cuda", *LIBRARIES}  # need the device, the library
CALLS = [pytest.param(f, s, id=f"{name}-{i}") for name, calls in SAMPLES.items() for i, (f, s) in enumerate(calls)]


def test_every_rule_has_a_sample() -> None:
    assert set(RULES) - NO_SAMPLE == set(SAMPLES)


def inputs(shapes: tuple[Any, ...]) -> dict[str, Tensor]:
    made = (s if isinstance(s, Tensor) else torch.randn(s, dtype=torch.float64) for s in shapes)
    return {str(i): x for i, x in enumerate(made)}


def reference(f: Any, params: dict[str, Tensor], d: dict[str, Tensor]) -> tuple[Any, Any]:
    """vmap(torch.func.jvp) over the directions."""

    def one(direction: dict[str, Tensor]) -> Any:
        inner = lambda moved: f(*{**params, **moved}.values())  # noqa: E731
        return torch.func.jvp(inner, ({n: params[n] for n in d},), (direction,))

    with sdpa_kernel([SDPBackend.MATH]):
        value, tangents = torch.vmap(one, out_dims=(None, 0), randomness="same")(d)
    return (tuple(value), tuple(tangents)) if isinstance(value, list) else (value, tangents)


def outputs(y: Any) -> Any:
    return tuple(y) if isinstance(y, list) else y


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("f", "shapes"), CALLS)
def test_rule_matches_torch(f: Any, shapes: tuple[Any, ...], k: int) -> None:
    """Every choice of perturbed arguments, one direction and several."""
    params = inputs(shapes)
    for size in range(1, len(params) + 1):
        for names in combinations(params, size):
            d = {n: torch.randn(k, *params[n].shape, dtype=torch.float64) for n in names}
            value, tangents = jvp(lambda p: outputs(f(*p.values())), params, d)
            torch.testing.assert_close((value, tangents), reference(f, params, d), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("f", "shapes"), SAMPLES["scaled_dot_product_attention"])
@pytest.mark.parametrize("block", [1, 60, 100])
def test_attention_in_blocks(f: Any, shapes: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for every size of a block: one query, some queries, some items of the batch."""
    params = inputs(shapes)
    d = {n: torch.randn(2, *x.shape, dtype=torch.float64) for n, x in params.items()}
    whole = jvp(lambda p: f(*p.values()), params, d)
    monkeypatch.setattr(attention, "BLOCK", block)
    torch.testing.assert_close(jvp(lambda p: f(*p.values()), params, d), whole, rtol=1e-12, atol=1e-12)
