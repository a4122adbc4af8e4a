"""Instructions and updates as bytes, and back: the only place where bytes are counted.

    magic (8) | length of the header (4) | CRC-32 of all else but the magic (4) | header, JSON | tensors, little-endian

No pickle. The same container holds the state of a run on disk. Cost: one copy of the tensors.
"""

from __future__ import annotations

import ctypes
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spryfl.types import Instruction, Passes, Update

SCHEMA = 1
_MAGIC = b"SPRYFL\x00\x01"
_PREFIX = struct.Struct("<8sII")
_MEASURED = struct.Struct("<dq")  # seconds, peak bytes: of one length, so that the bytes sent do not hang on the clock
_DTYPES = {
    str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
}


def pack(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """One container of a JSON header and named tensors.

    Args:
        header: anything JSON can hold. Floats keep their value: JSON writes the shortest text that reads back the same.
        tensors: float32, float64, float16, bfloat16 or int64, on any device.
    """
    index = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()]
    head = json.dumps({"schema": SCHEMA, "tensors": index, **header}).encode()
    body = b"".join([head, *(_raw(value) for value in tensors.values())])
    return _PREFIX.pack(_MAGIC, len(head), _checksum(len(head), body)) + body


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a container; a ValueError says what is wrong with one that is damaged."""
    if len(data) < _PREFIX.size:
        raise ValueError(f"not a spryfl container, or cut short: {len(data)} bytes, at least {_PREFIX.size} expected.")
    magic, length, checksum = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError(f"not a spryfl container: it begins with {magic!r}, expected {_MAGIC!r}.")
    body = memoryview(data)[_PREFIX.size :]
    if _checksum(length, body) != checksum:
        raise ValueError(f"the container of {len(data)} bytes is cut short or damaged: its checksum does not match.")
    header = json.loads(bytes(body[:length]))
    if header.pop("schema") != SCHEMA:
        raise ValueError(f"the container has another schema than {SCHEMA}; read it with the version that wrote it.")
    return header, _tensors(header.pop("tensors"), body[length:])


def encode(message: Instruction | Update) -> bytes:
    """A message as bytes; `len` of it is what travels."""
    fields = message._asdict()
    if isinstance(message, Update):
        fields["measured"] = _MEASURED.pack(fields.pop("seconds"), fields.pop("peak_bytes")).hex()
    return pack({"kind": type(message).__name__, **fields, "params": None}, fields["params"])


def decode(data: bytes) -> Instruction | Update:
    """The message that `encode` made."""
    header, tensors = unpack(data)
    kind = header.pop("kind")
    header["params"] = tensors
    if kind == "Instruction":
        return Instruction(**{**header, "names": tuple(header["names"])})
    if kind == "Update":
        header["seconds"], header["peak_bytes"] = _MEASURED.unpack(bytes.fromhex(header.pop("measured")))
        return Update(**{**header, "passes": Passes(*header["passes"])})
    raise ValueError(f"a message of unknown kind {kind!r}; possible: Instruction, Update.")


def _checksum(length: int, body: bytes | memoryview) -> int:
    return zlib.crc32(body, length)


def _raw(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous()
    return ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size()) if flat.numel() else b""


def _tensors(index: list[tuple[str, str, list[int]]], data: memoryview) -> dict[str, Tensor]:
    out, start = {}, 0
    for name, dtype, shape in index:
        empty = torch.empty(shape, dtype=_DTYPES[dtype])
        size = empty.numel() * empty.element_size()
        if size:
            ctypes.memmove(empty.data_ptr(), bytes(data[start : start + size]), size)
        out[name], start = empty, start + size
    return out
