"""Writes a packed folder (store.py): its files one after the other, one tensor and its encoding in memory at a time.

What fills up the holes before a multiple of 64 are tensors too (`pad.*`), as safetensors allows none. The list is
written last and the folder gets its name after that, so an unfinished one never opens. Cost: encoding, and the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spryfl.backbone.codec import ALIGN, Parts, codec_of
from spryfl.backbone.store import FILE, PIECE, SCHEMA, TYPES, Part, memory

_NAMES = {dtype: name for name, dtype in TYPES.items()}


class Item(NamedTuple):
    """A tensor that is to be written."""

    key: str  # its name in the checkpoint
    file: str
    shape: tuple[int, ...]  # as a linear map has it, (out, in), where it is a matrix
    dtype: torch.dtype  # of a value that is not encoded
    matrix: bool  # encoded in the folder's precision
    transposed: bool = False  # the checkpoint has (in, out)


def write_store(
    folder: str | Path,
    precision: str,
    items: Sequence[Item],
    make: Callable[[Item], Mapping[str, Tensor]],
    beside: Callable[[Path], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a packed folder, which is there under its name once it is whole.

    Args:
        folder: where; must not be there yet.
        precision: a key of CODECS, of the items that are matrices.
        items: what is to be written; those of one file stand in their order in it.
        make: an item's parts; asked for one after the other.
        beside: writes configuration and tokenizer into the folder it is given.
        progress: told (bytes written, bytes in all).

    Raises:
        ValueError: the folder is there, the disk is too small, or the precision is unknown.
    """
    folder = Path(folder)
    absent(folder)
    plan = {file: _laid_out([one for one in items if one.file == file], precision) for file in _files(items)}
    total, done = sum(_end(laid) for laid in plan.values()), 0
    with partial(folder, total) as made:
        beside(made)
        files: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for file, laid in plan.items():
            header = _header(laid)
            with _Writing(made / file) as out:
                out.write(header)
                for size in _filling(out, laid, make):
                    progress(done + size, total)
            files[file] = {"bytes": out.nbytes, "sha256": out.digest.hexdigest()}
            tensors.update(_told(laid, file, len(header)))
            done += _end(laid)
        about = {"schema": SCHEMA, "precision": precision, "files": files, "tensors": tensors}
        with _Writing(made / FILE) as out:
            out.write(json.dumps(about, indent=1).encode())


def absent(folder: Path) -> None:
    """A ValueError if there is something under that name."""
    if folder.exists():
        raise ValueError(f"{folder} is there already, and nothing in it was touched. Give another folder.")


class _Laid(NamedTuple):
    """A piece of a file; without an item it fills up a hole."""

    item: Item | None
    name: str  # of the item's part
    part: Part  # its offset counts from the end of the header


def _files(items: Sequence[Item]) -> list[str]:
    return list(dict.fromkeys(item.file for item in items))


def _laid_out(items: Sequence[Item], precision: str) -> list[_Laid]:
    """The pieces of one file in their order, each at a multiple of 64 bytes."""
    laid: list[_Laid] = []
    for item in items:
        kinds = codec_of(precision).layout(_pair(item.shape)) if item.matrix else {"": (item.dtype, item.shape)}
        for name, (dtype, shape) in kinds.items():
            if gap := -_end(laid) % ALIGN:
                laid.append(_Laid(None, "", Part(torch.uint8, (gap,), _end(laid))))
            laid.append(_Laid(item, name, Part(dtype, tuple(shape), _end(laid))))
    return laid


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, width = shape
    return rows, width


def _end(laid: Sequence[_Laid]) -> int:
    return laid[-1].part.offset + laid[-1].part.nbytes if laid else 0


def _header(laid: Sequence[_Laid]) -> bytes:
    """The file's own header, as long as lets the data begin at a multiple of 64."""
    told: dict[str, Any] = {}
    for i, (item, name, part) in enumerate(laid):
        called = f"pad.{i}" if item is None else ".".join([item.key, name] if name else [item.key])
        ends = [part.offset, part.offset + part.nbytes]
        told[called] = {"dtype": _NAMES[part.dtype], "shape": list(part.shape), "data_offsets": ends}
    text = json.dumps(told).encode()
    text += b" " * (-(len(text) + 8) % ALIGN)
    return struct.pack("<Q", len(text)) + text


def _filling(out: _Writing, laid: Sequence[_Laid], make: Callable[[Item], Parts]) -> Iterator[int]:
    """Writes the pieces of one file; yields how many bytes of them are written."""
    made: Parts = {}
    current: Item | None = None
    for item, name, part in laid:
        if item is None:
            out.write(bytes(part.nbytes))
            continue
        if item is not current:
            made = {}  # before the next is made: one at a time
            made, current = make(item), item
        out.write(_bytes(item, made[name], part))
        yield part.offset + part.nbytes


def _bytes(item: Item, tensor: Tensor, part: Part) -> memoryview:
    if (tensor.dtype, tuple(tensor.shape)) != (part.dtype, part.shape):
        raise ValueError(
            f"{item.key} came as {tensor.dtype} {tuple(tensor.shape)}, and {part.dtype} {part.shape} was announced. "
            f"Get the checkpoint again: its header and its data disagree."
        )
    return memory(tensor)


def _told(laid: Sequence[_Laid], file: str, header: int) -> dict[str, Any]:
    """What the list says of a file's tensors."""
    told: dict[str, Any] = {}
    for item, name, part in laid:
        if item is not None:
            about = {"file": file, "shape": item.shape, "matrix": item.matrix, "transposed": item.transposed}
            where = {"dtype": _NAMES[part.dtype], "shape": part.shape, "offset": header + part.offset}
            told.setdefault(item.key, {**about, "parts": {}})["parts"][name] = where
    return told


class _Writing:
    """A new file, on the disk when it is closed, and the checksum of what went into it."""

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self.nbytes = 0
        self._file = path.open("xb")

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *_: Any) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def write(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), PIECE):
            piece = memoryview(data)[start : start + PIECE]
            self._file.write(piece)
            self.digest.update(piece)
        self.nbytes += len(data)


@contextlib.contextmanager
def partial(folder: Path, total: int = 0) -> Iterator[Path]:
    """A folder under another name, which becomes `folder` at the end or is removed; so is what a killed one left.

    Args:
        folder: must not be there.
        total: bytes that it will take, where that is known.

    Raises:
        ValueError: the folder is there, or the disk is too small.
    """
    made = folder.with_name(f"{folder.name}.partial")
    made.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(made, ignore_errors=True)
    if total > (free := shutil.disk_usage(made.parent).free):
        raise ValueError(
            f"{folder} would take {total / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left. Make room, give a "
            f"folder on another disk, or choose a smaller precision."
        )
    made.mkdir()
    try:
        yield made
        absent(folder)
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
