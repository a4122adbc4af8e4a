"""A loss whose gradient, head and cut are known: a two-layer network in plain tensors, in float64."""

from __future__ import annotations

import torch

from spryfl.types import Cut


class Toy:
    """loss = mean cross entropy of head(tanh(x W)) with `W` split in two units and a linear head."""

    head = frozenset({"head.weight", "head.bias"})

    def __init__(self, fixed=None, guide=None):
        self.fixed, self.guide = fixed or {}, guide or {}

    def _trunk(self, params, batch):
        p = {**self.fixed, **params}
        return (torch.tanh(torch.tanh(batch["x"] @ p["a"]) @ p["b"]),)

    def _head(self, params, features, batch):
        p = {**self.fixed, **params}
        logits = features[0] @ p["head.weight"].T + p["head.bias"]
        return torch.nn.functional.cross_entropy(logits, batch["labels"])

    def __call__(self, params, batch, seed=None):
        return self._head(params, self._trunk(params, batch), batch)

    def cut(self, batch, seed=None, top=0):
        return Cut(lambda p: self._trunk(p, batch), lambda p, f: self._head(p, f, batch), self.head)

    def checkpointed(self, params, batch, seed=None):
        return torch.utils.checkpoint.checkpoint(lambda: self(params, batch, seed), use_reentrant=False)


def problem(seed=0, dtype=torch.float64):
    """(params, batch) with 12 + 8 values in the trunk and 10 in the head."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    params = {"a": draw(3, 4), "b": draw(4, 2), "head.weight": draw(3, 2), "head.bias": draw(3)}
    return params, {"x": draw(5, 3), "labels": torch.tensor([0, 1, 2, 1, 0])}


def true_gradient(params, batch):
    """torch.autograd's gradient of the whole loss."""
    leaves = {n: v.detach().requires_grad_() for n, v in params.items()}
    grads = torch.autograd.grad(Toy()(leaves, batch), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))
