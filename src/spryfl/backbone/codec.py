"""The precisions in which a frozen matrix may be stored, and how some of its rows come back as float32.

    float32     as it is                                                 32 bits a value
    bfloat16    rounded                                                  16
    float16     rounded                                                  16
    8bit        round(W / s), s = max |W| / 127 of a block               8.5     LLM.int8's, arXiv 2208.07339
    4bit        nearest of NF4's 16 levels times max |W| of a block      4.5     QLoRA's NF4, arXiv 2305.14314

A block is 64 neighbours in a row; rows whose length 64 does not divide are filled up with zeros, so that every row
starts a block and any range of rows decodes by itself. Relative error |W - decoded| / |W| of a normal matrix: 1.7e-3,
2.1e-4, 6e-3, 9.2e-2. Cost of decoding 4096 x 4096 in pieces that fit a cache, one core of a Xeon: 4 ms, whatever the
precision; in one piece of 64 MB seven times that, for page faults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # values that share a scale
ALIGN = 64  # bytes; a product's last bits depend on where its matrix lies
Shape = tuple[int, int]
Parts = Mapping[str, Tensor]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Codec(NamedTuple):
    """One precision; every part of an encoded matrix has the matrix's rows as its first dimension."""

    encode: Callable[[Tensor], dict[str, Tensor]]  # W (out, in), any floating type -> parts
    decode: Callable[[Parts, Shape, int, int], Tensor]  # parts, (out, in), first, last -> those rows, float32
    layout: Callable[[Shape], Layout]  # (out, in) -> type and shape of each part


def codec_of(precision: str) -> Codec:
    """The codec of that name.

    Raises:
        ValueError: there is none.
    """
    if precision not in CODECS and precision not in FOUND:
        raise ValueError(f'precision = "{precision}" is unknown. Possible: {", ".join(CODECS)}.')
    return CODECS[precision] if precision in CODECS else FOUND[precision]


def nbytes(precision: str, shape: Shape) -> int:
    """Bytes of a matrix in a precision.

    Example:
        >>> nbytes("4bit", (4096, 4096)) / 4096**2 * 8  # bits a value
        4.5
    """
    parts = codec_of(precision).layout(shape).values()
    return sum(dtype.itemsize * torch.Size(size).numel() for dtype, size in parts)


def _plain(dtype: torch.dtype) -> Codec:
    """Values one by one in a floating type of torch."""

    def decode(parts: Parts, shape: Shape, first: int, last: int) -> Tensor:
        return parts["weight"][first:last].float()

    return Codec(
        encode=lambda weight: {"weight": weight.detach().to(dtype, copy=True).contiguous()},
        decode=decode,
        layout=lambda shape: {"weight": (dtype, shape)},
    )


def _float32_rows(parts: Parts, shape: Shape, first: int, last: int) -> Tensor:
    rows = parts["weight"][first:last]
    return rows.clone() if misaligned(parts["weight"]) else rows


def misaligned(part: Tensor) -> bool:
    """Whether a tensor with memory of its own begins off a 64-byte line, as data in a mapped file may."""
    real = type(part) is Tensor and part.device.type == "cpu"  # fake tensors have no address
    return real and part.data_ptr() % ALIGN != 0


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


def _scaled(weight: Tensor) -> Tensor:
    """A matrix (out, in) as float32 blocks (out, blocks, 64), filled up with zeros."""
    return F.pad(weight.detach().float(), (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _encode_8bit(weight: Tensor) -> dict[str, Tensor]:
    blocks = _scaled(weight)
    scale = blocks.abs().amax(2, keepdim=True) / 127
    codes = (blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
    return {"weight": codes.flatten(1), "scale": scale.squeeze(2)}


def _decode_8bit(parts: Parts, shape: Shape, first: int, last: int) -> Tensor:
    # Two steps: one multiplication of two types is seven times slower.
    rows = parts["weight"][first:last].float()
    rows.unflatten(1, (-1, BLOCK)).mul_(parts["scale"][first:last].unsqueeze(2))
    return rows[:, : shape[1]]


def _layout_8bit(shape: Shape) -> Layout:
    rows, blocks = shape[0], _blocks(shape[1])
    return {"weight": (torch.int8, (rows, blocks * BLOCK)), "scale": (torch.float32, (rows, blocks))}


def _four_bits(levels: str) -> Codec:
    """bitsandbytes' 4-bit codes: "nf4", the quantiles of a normal distribution, or "fp4"."""

    def encode(weight: Tensor) -> dict[str, Tensor]:
        blocks = _scaled(weight).flatten(1).contiguous()
        codes, state = bitsandbytes().functional.quantize_4bit(blocks, blocksize=BLOCK, quant_type=levels)
        return {"weight": codes.view(len(blocks), -1), "absmax": state.absmax.view(len(blocks), -1)}

    def decode(parts: Parts, shape: Shape, first: int, last: int) -> Tensor:
        bitsandbytes()
        codes, absmax = parts["weight"][first:last], parts["absmax"][first:last]
        size = [last - first, absmax.shape[1] * BLOCK]
        decoded = torch.ops.bitsandbytes.dequantize_4bit.default
        rows: Tensor = decoded(codes.reshape(-1, 1), absmax.reshape(-1), BLOCK, levels, size, torch.float32)
        return rows[:, : shape[1]]

    return Codec(encode, decode, _layout_4bit)


def _layout_4bit(shape: Shape) -> Layout:
    rows, blocks = shape[0], _blocks(shape[1])
    return {"weight": (torch.uint8, (rows, blocks * BLOCK // 2)), "absmax": (torch.float32, (rows, blocks))}


def bitsandbytes() -> Any:
    """The library of the 4-bit codec.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            'precision = "4bit" needs bitsandbytes: `pip install "spryfl[quant]"`. Or use precision = "8bit".'
        ) from error
    return bitsandbytes


CODECS: dict[str, Codec] = {
    "float32": _plain(torch.float32)._replace(decode=_float32_rows),
    "bfloat16": _plain(torch.bfloat16),
    "float16": _plain(torch.float16),
    "8bit": Codec(_encode_8bit, _decode_8bit, _layout_8bit),
    "4bit": _four_bits("nf4"),
}
# In which models come that others quantized; nothing is packed so.
FOUND = {"fp4": _four_bits("fp4")}
