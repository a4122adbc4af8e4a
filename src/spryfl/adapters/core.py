"""LoRA-XS: a trainable r x r core between fixed factors of a weight's singular value decomposition.

    W x + (alpha/r) P R A x,   A = V^T (r, n), P = W V = U S (m, r), V the r leading right singular vectors
    Balazy et al., LoRA-XS, arXiv 2405.17604

It is PEFT's LoRA whose second map computes its weight as B = P R, so that what is trained is, bit for bit, the plain
LoRA of rank r that is saved. P follows from W and A, so a folder needs A, B and R alone. Cost: r (n + m) fixed values
a map and, once, its decomposition: exact up to EXACT on the short side (0.03 s for MiniLM's largest on one core of a
Xeon), randomised above (0.4 s for 4096 x 4096). It is the same for equal seeds on one machine. Elsewhere a singular
vector may come out otherwise where two singular values nearly agree (their signs are fixed here): devices that train
together should open one saved adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spryfl import tree

EXACT = 1024  # shortest side of a matrix above which the decomposition is randomised
MORE, ROUNDS = 32, 8  # of the randomised one: vectors beyond r, power iterations
_ADAPTER = "default"  # PEFT's name for it


class Core(nn.Module):
    """The second map of a LoRA with weight P R, R alone trained. PEFT and a state dict see the weight alone."""

    def __init__(self, reach: Tensor, core: Tensor) -> None:
        super().__init__()
        self.register_buffer("reach", reach, persistent=False)  # P, (m, r)
        self.core = nn.Parameter(core)  # R, (r, r)

    @property
    def weight(self) -> Tensor:
        """B = P R, (m, r)."""
        return self.through(self.core)

    def through(self, core: Tensor) -> Tensor:
        """P R for another R."""
        reach: Any = self.reach
        return reach @ core.to(reach)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()


def put(module: nn.Module, std: float, layers: Collection[int] | None = None) -> None:
    """Makes the LoRAs of a model, or of some layers, LoRA-XS, R drawn from N(0, std^2) by PyTorch's generator."""
    for path, layer in _loras(module):
        if layers is not None and tree.block(path) not in layers:
            continue
        weight = _matrix(path, layer)
        r = layer.r[_ADAPTER]
        if r > min(weight.shape):
            raise ValueError(f"r = {r} of lora_xs is more than the {min(weight.shape)} of {path}. Lower r.")
        first = layer.lora_A[_ADAPTER].weight
        first.data.copy_(leading(weight, r))
        first.requires_grad_(False)
        start = nn.init.normal_(torch.empty(r, r), std=std)
        layer.lora_B[_ADAPTER] = Core(_reach(weight, first), start.to(first))


def restore(module: nn.Module, cores: Mapping[str, Tensor]) -> None:
    """Makes the LoRAs of a model that was just opened LoRA-XS again, with these cores by name.

    Raises:
        ValueError: a LoRA's B is not P R, so it was trained on as a plain LoRA, or put on another model.
    """
    for path, layer in _loras(module):
        core = cores.get(f"{path}.lora_B.{_ADAPTER}.core")
        if core is None:
            continue
        first, second = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        made = Core(_reach(_matrix(path, layer), first), core.to(first))
        if not torch.allclose(made.weight, second, rtol=1e-3, atol=1e-4 * float(second.detach().abs().max())):
            raise ValueError(f"{path} is no longer the LoRA-XS that was saved: it was trained on as a plain LoRA.")
        layer.lora_B[_ADAPTER] = made


def leading(weight: Tensor, r: int) -> Tensor:
    """The r leading right singular vectors of a matrix (m, n) as rows (r, n); each one's largest entry is positive."""
    if min(weight.shape) <= EXACT:
        rows = torch.linalg.svd(weight, full_matrices=False).Vh[:r]
    else:
        rows = torch.svd_lowrank(weight, q=min(r + MORE, *weight.shape), niter=ROUNDS)[2].T[:r]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign()


def _reach(weight: Tensor, first: Tensor) -> Tensor:
    return (weight.to(first) @ first.detach().T).contiguous()


def _loras(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            yield path, layer


def _matrix(path: str, layer: Any) -> Tensor:
    """The base weight of a LoRA as (outputs, inputs)."""
    base = layer.get_base_layer()
    weight: Tensor = base.weight.detach()
    if not isinstance(base, nn.Linear | Conv1D) or not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError(f"lora_xs needs the weight of {path} as a plain matrix; {type(base).__name__} has none.")
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return weight.T if isinstance(base, Conv1D) else weight
