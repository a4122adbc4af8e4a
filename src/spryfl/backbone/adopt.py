"""Layers that bitsandbytes quantized, taken over as `Packed`: the same stored weights, another product.

On a CPU bitsandbytes' own layers cannot be trained through as they are: in evaluation mode its 4-bit product may run in
bfloat16 by a kernel without a derivative (an error with a bias; without one the gradient is lost but for a warning),
and its 8-bit product rounds the activations, which then have no forward derivative. Taken over, codes and scales stay
what they are, products are in float32, and forward mode and backprop are exact. Cost: nothing copied but the scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spryfl.backbone.codec import BLOCK, bitsandbytes
from spryfl.backbone.packed import Packed

_LIBRARY = "bitsandbytes."


def adopt(model: nn.Module) -> nn.Module:
    """Puts a `Packed` in the place of every quantized layer of bitsandbytes, in the model itself.

    Raises:
        ValueError: a layer is quantized in a way that is not followed.
    """
    for path, layer in list(_quantized(model)):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _taken(path, layer))
    return model


def _quantized(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Its layers with their names; one whose weight is still floating never was quantized."""
    for path, layer in model.named_modules():
        ours = type(layer).__module__.startswith(_LIBRARY) and isinstance(layer, nn.Linear)
        if ours and not layer.weight.is_floating_point():
            yield path, layer


def _taken(path: str, layer: Any) -> Packed:
    precision, parts = _eight(layer) if layer.weight.dtype == torch.int8 else _four(path, layer)
    return Packed(layer.in_features, layer.out_features, layer.bias, precision, lambda: parts)


def _eight(layer: Any) -> tuple[str, dict[str, Tensor]]:
    """int8 codes with one scale a row: the same scale for all blocks of a row."""
    codes = layer.weight.data
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB  # there after the first product
    blocks = -(-codes.shape[1] // BLOCK)
    filled = nn.functional.pad(codes, (0, blocks * BLOCK - codes.shape[1]))
    return "8bit", {"weight": filled, "scale": (scale.float() / 127).unsqueeze(1).repeat(1, blocks)}


def _four(path: str, layer: Any) -> tuple[str, dict[str, Tensor]]:
    """4-bit codes, whose blocks of 64 are those of the codec where 64 divides the rows."""
    state, (rows, width) = layer.weight.quant_state, (layer.out_features, layer.in_features)
    if state.blocksize != BLOCK or width % BLOCK or tuple(state.shape) != (rows, width):
        raise ValueError(
            f"{path} is quantized by bitsandbytes in blocks of {state.blocksize}, in rows of {width}; only blocks of "
            f"{BLOCK} in rows that are multiples of it can be trained on. Pack the model in float: `spryfl pack`."
        )
    absmax = _scales(state)  # before the next line, which does not bring back what a product has rounded
    layer.state_dict()  # takes back the order of codes in which it runs on some CPUs
    codes = layer.weight.data.contiguous().view(torch.uint8).view(rows, -1)
    parts = {"weight": codes, "absmax": absmax.reshape(rows, -1)}
    return "4bit" if state.quant_type == "nf4" else state.quant_type, parts


def _scales(state: Any) -> Tensor:
    """One a block, float32; a layer that has run on a CPU with bfloat16 products keeps them rounded and transposed."""
    if getattr(state, "packing_format_for_cpu", False):
        return state.absmax.t().float().contiguous()
    if state.nested:
        return bitsandbytes().functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    return state.absmax.float()
