"""Instructions and updates as bytes, and back: the only place where bytes are counted.

    magic (8) | length of the header (4) | CRC-32 of all else but the magic (4) | header, JSON, deflated | tensors

No pickle; little-endian. The same container holds the state of a run on disk. Cost: one copy of the tensors.
"""

from __future__ import annotations

import ctypes
import json
import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spryfl.types import (
    CatchUp,
    Instruction,
    Ledger,
    Passes,
    Pool,
    Round,
    Scalars,
    ServerState,
    Share,
    Trace,
    Update,
)

SCHEMA = 2
_MAGIC = b"SPRYFL\x00\x01"
_LARGEST = 1 << 27  # bytes of a header once inflated: no sender may fill the memory with a few bytes
_PREFIX = struct.Struct("<8sII")
_RECORDS: dict[str, Any] = {
    one.__name__: one
    for one in (CatchUp, Instruction, Ledger, Passes, Pool, Round, Scalars, ServerState, Share, Trace, Update)
}
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
    head = zlib.compress(json.dumps({"schema": SCHEMA, "tensors": index, **header}, separators=(",", ":")).encode())
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
    header = json.loads(_inflated(body[:length]))
    if header.pop("schema") != SCHEMA:
        raise ValueError(f"the container has another schema than {SCHEMA}; read it with the version that wrote it.")
    return header, _tensors(header.pop("tensors"), body[length:])


def _inflated(data: memoryview) -> bytes:
    """A header, whose size is not left to whoever sent it."""
    inflate = zlib.decompressobj()
    header = inflate.decompress(data, _LARGEST)
    if not inflate.eof or inflate.unused_data:
        raise ValueError(f"the container's header is cut short, has more behind it, or is over {_LARGEST} bytes.")
    return header


def encode(message: Instruction | Update) -> bytes:
    """A message as bytes; `len` of it is what travels."""
    measured = {}
    if isinstance(message, Update):  # beside the header: its length must not hang on the clock
        measured = {"measured": torch.tensor([message.seconds, message.peak_bytes], dtype=torch.float64)}
        message = message._replace(seconds=0.0, peak_bytes=0)
    return dump(message, **measured)


def decode(data: bytes) -> Instruction | Update:
    """The message that `encode` made."""
    message, more = load(data)
    if isinstance(message, Update):
        seconds, peak = more["measured"].tolist()
        return message._replace(seconds=seconds, peak_bytes=int(peak))
    if isinstance(message, Instruction):
        return message
    raise ValueError(f"a message of unknown kind {type(message).__name__}; possible: Instruction, Update.")


def dump(value: Any, /, **more: Tensor) -> bytes:
    """Any nesting of the package's records, tuples, mappings, tensors and plain values as one container."""
    tensors: list[Tensor] = []
    plain = _plain(value, tensors)
    return pack({"value": plain}, {**more, **{str(i): tensor for i, tensor in enumerate(tensors)}})


def load(data: bytes) -> tuple[Any, dict[str, Tensor]]:
    """What `dump` was given: the value, and the tensors beside it."""
    header, tensors = unpack(data)
    value = _restored(header["value"], tensors)
    return value, {name: tensor for name, tensor in tensors.items() if not name.isdigit()}


def _plain(value: Any, tensors: list[Tensor]) -> Any:
    """A value as JSON can hold it; tensors go to the list, and leave their place in it."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"#": len(tensors) - 1}
    if type(value).__name__ in _RECORDS:
        usual = value._field_defaults
        fields = {k: v for k, v in value._asdict().items() if not (k in usual and _same(v, usual[k]))}
        return {"~": type(value).__name__, **{k: _plain(v, tensors) for k, v in fields.items()}}
    if isinstance(value, Mapping):
        return {"@": [[k, _plain(v, tensors)] for k, v in value.items()]}
    return [_plain(v, tensors) for v in value] if isinstance(value, tuple | list) else value


def _same(value: Any, usual: Any) -> bool:
    """Whether a field has its default, and so need not travel."""
    return not isinstance(value, Tensor) and not isinstance(usual, Tensor) and bool(value == usual)


def _restored(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(plain, list):
        return tuple(_restored(v, tensors) for v in plain)
    if not isinstance(plain, dict):
        return plain
    if "#" in plain:
        return tensors[str(plain["#"])]
    if "@" in plain:
        return {k: _restored(v, tensors) for k, v in plain["@"]}
    return _RECORDS[plain.pop("~")](**{k: _restored(v, tensors) for k, v in plain.items()})


def _checksum(length: int, body: bytes | memoryview) -> int:
    return zlib.crc32(body, length)


def _raw(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous()
    return ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size()) if flat.numel() else b""


def _tensors(index: list[tuple[str, str, list[int]]], data: memoryview) -> dict[str, Tensor]:
    out, start = {}, 0
    sizes = [math.prod(shape) * _DTYPES[dtype].itemsize for _, dtype, shape in index]
    if any(size < 0 for _, _, shape in index for size in shape) or sum(sizes) != len(data):
        raise ValueError(f"the container's tensors take {sum(sizes)} bytes by its header, and there are {len(data)}.")
    for (name, dtype, shape), size in zip(index, sizes, strict=True):
        empty = torch.empty(shape, dtype=_DTYPES[dtype])
        if size:
            ctypes.memmove(empty.data_ptr(), bytes(data[start : start + size]), size)
        out[name], start = empty, start + size
    return out
