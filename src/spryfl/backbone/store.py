"""A frozen model in a folder of its own, in the form in which a pass reads it: block by block, encoded.

    config.json, tokenizer files     as the checkpoint had them
    spryfl_backbone.json             schema, precision; of each tensor file, type, shape, offset; of each file its sum
    block-000.safetensors ...        the encoded matrices of one block
    rest.safetensors                 all else: norms, biases, tables, pooler, map to the vocabulary

Every part of every tensor begins at a multiple of 64 bytes from the start of its file: a product's last bits depend on
where its matrix lies. The format allows no holes, so what fills them up are tensors too (`pad.*`). The list is written
last and the folder gets its name after that, so an unfinished one never opens. Cost of writing: one tensor and its
encoding in memory; of a checksum (SHA-256), once a process and file: 1.6 GB a second on one core of a Xeon.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spryfl.backbone.codec import codec_of

FILE = "spryfl_backbone.json"
REST = "rest.safetensors"
SCHEMA = 1
PIECE = 8 << 20  # bytes read or written at once
_MAKE = "Make one: spryfl pack MODEL DIR."
_AGAIN = "Copy it again from where it is whole, or pack the model again: spryfl pack MODEL DIR."
# As safetensors calls them.
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
}


class Part(NamedTuple):
    """Where a piece of a tensor lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # from the start of the file

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Stored(NamedTuple):
    """A tensor that was written."""

    file: str
    shape: tuple[int, ...]
    matrix: bool
    transposed: bool
    parts: dict[str, Part]  # of an encoded matrix its codec's, of a value one, ""


class File(NamedTuple):
    """One file of a folder."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Store:
    """An opened folder; what was read once in this process is not checked again."""

    folder: Path
    precision: str
    tensors: Mapping[str, Stored]
    files: Mapping[str, File]
    fingerprint: str  # of the list, and so of all the files
    checked: set[str] = field(default_factory=set)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The blocks' files, in order."""
        return tuple(sorted(name for name in self.files if name != REST))

    @cached_property
    def inside(self) -> Mapping[str, tuple[str, ...]]:
        """The tensors of each file."""
        return {file: tuple(key for key, one in self.tensors.items() if one.file == file) for file in self.files}

    def views(self, file: str, buffer: Tensor) -> dict[str, dict[str, Tensor]]:
        """The parts of a file's tensors by key, as views of its bytes."""
        return {
            key: {name: _view(buffer, part) for name, part in self.tensors[key].parts.items()}
            for key in self.inside[file]
        }

    def read(self, file: str, buffer: Tensor, stop: Callable[[], bool] = lambda: False) -> bool:
        """Reads a whole file into the first bytes of a buffer; False if `stop` said so on the way.

        Raises:
            ValueError: the file is gone, too short, or not what was written.
        """
        path, size = self.folder / file, self.files[file].nbytes
        view = memory(buffer)[:size]
        digest = None if file in self.checked else hashlib.sha256()
        with _opened(path) as source:
            done = 0
            while done < size:
                if stop():
                    return False
                got = os.preadv(source, [view[done : done + PIECE]], done)
                if not got:
                    raise _cut_short(path, done, size)
                if digest:
                    digest.update(view[done : done + got])
                done += got
        if digest:
            self._settle(file, digest.hexdigest())
        return True

    def mapped(self, file: str) -> Tensor:
        """A file's bytes where the system keeps them; checked by reading it through once, a piece at a time.

        Raises:
            ValueError: the file is gone, too short, or not what was written.
        """
        path, size = self.folder / file, self.files[file].nbytes
        if file not in self.checked:
            digest, piece = hashlib.sha256(), bytearray(min(PIECE, size))
            with _opened(path) as source:
                while got := os.readv(source, [piece]):
                    digest.update(memoryview(piece)[:got])
            self._settle(file, digest.hexdigest())
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)

    def _settle(self, file: str, found: str) -> None:
        if found != self.files[file].sha256:
            raise ValueError(
                f"{self.folder / file} is damaged: its checksum is not the one it was written with. {_AGAIN}"
            )
        self.checked.add(file)


def is_packed(name: str | Path) -> bool:
    """Whether a folder was written by `spryfl pack`."""
    return (Path(name) / FILE).is_file()


def check_streamed(name: str | Path) -> None:
    """A ValueError if a model cannot be streamed: it is no packed folder."""
    if not is_packed(name):
        raise ValueError(
            f'model.stream = true reads a packed folder block by block, and model "{name}" is none. Make one: '
            f"spryfl pack {name} DIR, and give --model DIR; or remove model.stream."
        )


def open_store(folder: str | Path) -> Store:
    """Opens a packed folder: reads its list, and sees that every file is there in its length.

    Raises:
        ValueError: it is no packed folder, another version wrote it, or a file is missing, cut short or too long.
    """
    folder = Path(folder)
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
        told = json.loads(text)
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is no packed model: there is no {FILE} in it. Make one: spryfl pack MODEL DIR."
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{folder / FILE} is damaged ({error}). Pack the model again: spryfl pack MODEL DIR."
        ) from None
    if not isinstance(told, dict) or told.get("schema") != SCHEMA:
        found = told.get("schema") if isinstance(told, dict) else None
        raise ValueError(
            f"{folder / FILE} has schema {found!r}; this version reads schema {SCHEMA}. Use the version that wrote it, "
            f"or pack the model again: spryfl pack MODEL DIR."
        )
    try:
        codec_of(told["precision"])
        files = {name: File(one["bytes"], one["sha256"]) for name, one in told["files"].items()}
        tensors = {key: _stored(one) for key, one in told["tensors"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / FILE} is damaged ({error!r}). {_AGAIN}") from None
    for name, file in files.items():
        _see(folder / name, file.nbytes)
    return Store(folder, told["precision"], tensors, files, hashlib.sha256(text.encode()).hexdigest()[:16])


def memory(tensor: Tensor) -> memoryview:
    """A tensor's bytes, in place if they lie one behind the other."""
    values: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def _view(buffer: Tensor, part: Part) -> Tensor:
    return buffer[part.offset : part.offset + part.nbytes].view(part.dtype).view(part.shape)


def _stored(told: Mapping[str, Any]) -> Stored:
    parts = {name: Part(TYPES[one["dtype"]], tuple(one["shape"]), one["offset"]) for name, one in told["parts"].items()}
    return Stored(told["file"], tuple(told["shape"]), told["matrix"], told["transposed"], parts)


def _see(path: Path, size: int) -> None:
    """That a file is there, in its length."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise _missing(path) from None
    if found != size:
        raise _cut_short(path, found, size)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        source = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise _missing(path) from None
    try:
        yield source
    finally:
        os.close(source)


def _missing(path: Path) -> ValueError:
    return ValueError(f"{path} is missing. {_AGAIN}")


def _cut_short(path: Path, found: int, size: int) -> ValueError:
    return ValueError(f"{path} has {found} bytes and should have {size}: cut short, or changed. {_AGAIN}")
