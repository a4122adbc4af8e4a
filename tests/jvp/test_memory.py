"""The engine's memory: independent of depth, in blocks of attention, its buffers used again and safely."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spryfl.jvp import jvp, memory


class Peak(TorchDispatchMode):
    """Bytes of the storages that operations make while it is on: the peak of the live ones, and the largest."""

    def __init__(self, *kept: Tensor) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known = {t.untyped_storage()._cdata for t in kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.known:
                self.note(t.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, storage.nbytes())
        weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def measured(model: nn.Module, x: Tensor, k: int) -> tuple[int, int]:
    """Peak of a forward pass and of a jvp."""
    params = {n: p.detach() for n, p in model.named_parameters()}
    d = {n: torch.randn(k, *p.shape) for n, p in params.items() if "linear" in n and "weight" in n}
    f = lambda p: functional_call(model, p, (x,)).square().mean()  # noqa: E731
    kept = (x, *model.parameters(), *d.values())
    with torch.no_grad(), Peak(*kept) as forward:
        f(params)
    with Peak(*kept) as ours:
        jvp(f, params, d)
    return forward.peak, ours.peak


class Layer(nn.Module):
    """A transformer's layer, 64 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.linear1, self.linear2, self.norm = nn.Linear(64, 256), nn.Linear(256, 64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        x = self.norm(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.norm(x + self.linear2(F.gelu(self.linear1(x))))


def encoder(depth: int) -> nn.Module:
    return nn.Sequential(*(Layer() for _ in range(depth)))


@pytest.mark.parametrize("k", [1, 4])
def test_peak_does_not_grow_with_depth(k: int) -> None:
    x = torch.randn(4, 512, 64)
    shallow, deep = measured(encoder(2), x, k), measured(encoder(6), x, k)
    assert deep[1] < 1.05 * shallow[1]
    assert deep[1] < 1.15 * (1 + k) * deep[0]


def test_attention_holds_no_square_of_the_tokens() -> None:
    q = torch.randn(1, 8, 2048, 16)
    d = {n: torch.randn(2, *q.shape) for n in "qkv"}
    with Peak(q, *d.values()) as peak:
        jvp(lambda p: F.scaled_dot_product_attention(*p.values(), is_causal=True), dict.fromkeys("qkv", q), d)
    assert peak.largest < 2048 * 2048
    assert peak.peak < 12 * q.nbytes


def test_buffers_are_used_again_only_when_nobody_holds_them() -> None:
    token = memory.pool.set({})
    try:
        ask = lambda: memory.empty((512, 512), torch.float32, torch.device("cpu"))  # noqa: E731
        first = ask()
        view = first.view(-1)[5:9]
        place = first.data_ptr()
        del first
        second = ask()  # a view still holds the first
        assert second.data_ptr() != place
        del view
        assert ask().data_ptr() == place
        memory.empty((2048, 512), torch.float32, torch.device("cpu"))  # larger ones drop what is less than half
        assert list(memory.pool.get() or {}) == [(2048 * 512, torch.float32)]
    finally:
        memory.pool.reset(token)


def test_tangents_that_are_kept_stay_as_they_were() -> None:
    """Outputs of several layers of one size, all returned: none may lie in another's memory."""
    w, x = torch.randn(512, 512) / 16, torch.randn(512, 512)

    def layers(p: dict[str, Tensor]) -> tuple[Tensor, ...]:
        h = [F.gelu(F.linear(x, p["w"]))]
        for _ in range(3):
            h.append(F.gelu(F.linear(h[-1], w)))
        return tuple(h)

    d = {"w": torch.randn(2, 512, 512)}
    _, together = jvp(layers, {"w": w}, d)
    for i, tangent in enumerate(together):
        torch.testing.assert_close(jvp(lambda p, i=i: layers(p)[i], {"w": w}, d)[1], tangent)
        assert i == 0 or tangent.abs().max() > 0
