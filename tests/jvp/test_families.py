"""The engine on every model family: jvp = <gradient, v> in float64, the attention as the model loads by default."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from spryfl.jvp import jvp

from .families import ADAPTERS, FAMILIES, base, batch, loss_of, trainable

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
FLOAT32_INSIDE = {
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3", "t5-encoder", "gpt-neox", "gptj",
    "modernbert", "deberta-v2", "bloom",
}  # fmt: skip


def directions(params: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    return {n: torch.randn(k, *p.shape, dtype=p.dtype) for n, p in params.items()}


def backprop(f, params, d):
    """<gradient, v> for each direction, by torch.autograd."""
    loss = f(params)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    products = [(d[n] * g).flatten(1).sum(1) for n, g in zip(params, grads, strict=True) if g is not None]
    return loss.detach(), torch.stack(products).sum(0)


def assert_close(ours: Tensor, reference: Tensor, relative: float) -> None:
    """Within `relative` of the largest entry: a derivative near zero is the sum of large terms."""
    scale = max(1.0, reference.abs().max().item())
    torch.testing.assert_close(ours.double(), reference.double(), rtol=0, atol=relative * scale)


@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_matches_backprop(family: str, adapter: str) -> None:
    model = ADAPTERS[adapter](base(family), family)
    params, f = trainable(model), loss_of(model, batch(family))
    d = directions(params, 4)
    reference_value, reference = backprop(f, params, d)
    close = 1e-6 if family in FLOAT32_INSIDE else 1e-9
    for k in (1, 4):
        value, tangents = jvp(f, params, {n: t[:k] for n, t in d.items()})
        assert_close(value, reference_value, close)
        assert_close(tangents, reference[:k], close)
    assert reference.abs().max() > 1e-3  # a comparison of zeros proves nothing
