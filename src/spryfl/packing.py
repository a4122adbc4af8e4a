"""Makes a packed folder: of a checkpoint, or of random values of a configuration. One tensor in memory at a time.

    checkpoint (one safetensors file, or several with an index)  ->  store.py's folder, under the checkpoint's names

What is encoded is the weight of a linear map in the trunk, and a map to the vocabulary that is not tied to a table.
Tables stay as the checkpoint has them, as do norms, biases, and a task head's values. Cost: encoding (4 bits: 70 ns a
value on one core of a Xeon, so 8 minutes for 7e9) and one tensor with its encoding in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from spryfl import hub, opened
from spryfl.backbone.codec import Parts, codec_of
from spryfl.backbone.store import FILE, REST, TYPES, is_packed
from spryfl.backbone.writing import Item, absent, write_store
from spryfl.hooks import seeded
from spryfl.layout import blocks_of
from spryfl.named import explained, resolve, silent

_BESIDE = (".json", ".txt", ".model", ".py", ".jinja", ".spm", ".bpe", ".tiktoken")  # configuration, tokenizer
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
Progress = Callable[[int, int], None]  # told (bytes written, bytes in all)


class Source(NamedTuple):
    """A tensor of a checkpoint."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Packing(NamedTuple):
    """What was packed."""

    before: int  # bytes of the checkpoint
    after: int
    left_out: tuple[str, ...]  # what the checkpoint has and its class does not


def pack(
    name: str,
    folder: str | Path,
    precision: str = "4bit",
    *,
    revision: str = "",
    trust_remote_code: bool = False,
    progress: Progress = lambda done, total: None,
) -> Packing:
    """Packs a checkpoint; its weights are never in memory but one tensor at a time.

    Args:
        name: a local folder with safetensors, a hub name, or an alias.
        folder: the new folder.
        precision: a key of CODECS: 4bit, 8bit, bfloat16, float16, float32.
        revision, trust_remote_code: of a hub name.
        progress: told (bytes written, bytes in all).

    Raises:
        ValueError: the folder is there, the checkpoint cannot be read, or it is quantized already.

    Example:
        pack("meta-llama/Llama-2-7b-hf", "llama-4bit")
        spryfl.finetune({"name": "llama-4bit", "stream": True}, "reviews.csv")
    """
    codec_of(precision)
    absent(Path(folder))
    where, _ = resolve(name)
    if is_packed(where):
        raise ValueError(f'model "{name}" is packed already. Give the checkpoint it was made from.')
    with silent(), explained(name, "AutoModel"):
        options = {"revision": revision or None, "local_files_only": Path(where).is_dir() or not hub.reachable()}
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **options)
        files = Path(where) if Path(where).is_dir() else _fetched(where, trust_remote_code, options)
        if getattr(config, "quantization_config", None):
            raise ValueError(
                f'model "{name}" is quantized already. Give the checkpoint in 16 or 32 bits it was made from.'
            )
        tensors = _tensors(files)
        known = getattr(transformers, (config.architectures or [""])[0], None)
        kind = known or opened.kind_of(transformers.AutoModel, config, trust_remote_code=trust_remote_code)
        items, left_out = _plan(kind, config, name, tensors)
    write_store(folder, precision, items, partial(_made, tensors, precision), partial(_copy, files), progress)
    before = sum(one.dtype.itemsize * math.prod(one.shape) for one in tensors.values())
    return Packing(before, sum(file.stat().st_size for file in Path(folder).iterdir()), left_out)


def random_store(
    config: PretrainedConfig,
    folder: str | Path,
    precision: str = "4bit",
    *,
    auto: str = "AutoModel",
    tokenizer: Any = None,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> None:
    """A packed folder of random values, for measuring: one block is drawn and encoded, and written for all.

    Args:
        config: of the model.
        folder: the new folder.
        precision: a key of CODECS.
        auto: the class whose values are stored; AutoModel is the trunk, AutoModelForCausalLM brings the map to words.
        tokenizer: saved beside it, where one is given.
        seed: of the values.
        progress: told (bytes written, bytes in all).
    """
    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if value.is_floating_point()}
    table = torch.float32 if precision == "float32" else torch.bfloat16
    tensors = {key: Source(Path(), shape, table if len(shape) == 2 else torch.float32) for key, shape in shapes.items()}
    items, _ = _plan(type(model), config, config.model_type, tensors)

    def beside(made: Path) -> None:
        config.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)

    with seeded(seed):
        write_store(folder, precision, items, _drawing(items, precision), beside, progress)


def _drawing(items: Sequence[Item], precision: str) -> Callable[[Item], Parts]:
    """Makes random values; where two blocks have a matrix of one shape at one place, it is the same."""
    encode = codec_of(precision).encode
    in_file = {file: [one.key for one in items if one.file == file] for file in {one.file for one in items}}
    kept: dict[Any, Parts] = {}

    def make(item: Item) -> Parts:
        if not item.matrix:
            return {"": _values(item)}
        place = in_file[item.file].index(item.key), item.shape
        if item.file != REST and place in kept:
            return kept[place]
        made = encode(torch.empty(item.shape).normal_(0, 0.02))
        if item.file != REST:
            kept[place] = made
        return made

    return make


def _values(item: Item) -> Tensor:
    """A table at random, a norm's factors 1, biases 0."""
    empty = torch.empty(item.shape, dtype=item.dtype)
    if len(item.shape) > 1:
        return empty.normal_(0, 0.02)
    return empty.fill_(float(item.key.endswith("weight")))


def _plan(
    kind: Any, config: PretrainedConfig, name: str, tensors: Mapping[str, Source]
) -> tuple[list[Item], tuple[str, ...]]:
    """What is to be written, block by block and then the rest, its tables last; and what the class does not have."""
    stand = opened.standing(kind, config, {key: one.shape for key, one in tensors.items()})
    model, missing = opened.from_files(stand, "", name, {})
    found = opened.origins(model, stand.given, missing)
    trunk = opened.trunk_of(model)
    tables = {id(one.value) for one in found if opened.is_table(one)}
    maps = {id(module) for module in (*trunk.modules(), _to_words(model)) if module is not None}
    blocks = {id(inner): i for i, block in enumerate(blocks_of(trunk)) for inner in block.modules()}
    items: dict[str, Item] = {}
    for one in found:
        shape, dtype = tensors[one.key].shape, tensors[one.key].dtype
        matrix = opened.is_map(one.module) and one.name == "weight" and id(one.module) in maps
        matrix, turned = matrix and id(one.value) not in tables, not isinstance(one.module, nn.Linear)
        inside = matrix and id(one.module) in blocks
        file = f"block-{blocks[id(one.module)]:03d}.safetensors" if inside else REST
        flip = matrix and turned
        items.setdefault(one.key, Item(one.key, file, shape[::-1] if flip else shape, dtype, matrix, flip))
    # Tables at the end of what is mapped: the small values before them share a few pages.
    ordered = sorted(items.values(), key=lambda one: (one.file == REST, one.file, len(one.shape)))
    return ordered, tuple(key for key in tensors if key not in items)


def _to_words(model: Any) -> nn.Module | None:
    """The map to the vocabulary, where a model has one."""
    try:
        return model.get_output_embeddings()
    except NotImplementedError:
        return None


def _made(tensors: Mapping[str, Source], precision: str, item: Item) -> Parts:
    """One tensor of the checkpoint, as it is written."""
    with _reading(tensors[item.key].path) as file:
        value = file.get_tensor(item.key)
    if not item.matrix:
        return {"": value}
    return codec_of(precision).encode(value.t() if item.transposed else value)


def _tensors(files: Path) -> dict[str, Source]:
    """The floating tensors of a checkpoint, by its headers alone."""
    if (files / _INDEX).is_file():
        places = json.loads((files / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    else:
        names = [_WEIGHTS]
    if not (files / names[0]).is_file() and len(names) == 1:
        raise ValueError(
            f"{files} has no {_WEIGHTS} and no {_INDEX}: packing reads safetensors. Save the model anew: "
            f"AutoModel.from_pretrained(...).save_pretrained(DIR)."
        )
    found: dict[str, Source] = {}
    for name in names:
        with _reading(files / name) as file:
            for key in file.keys():  # noqa: SIM118
                piece = file.get_slice(key)
                kind = piece.get_dtype()
                if kind.startswith("F8"):
                    raise ValueError(
                        f"{files / name} holds {key} as {kind}: quantized already. Give it in 16 or 32 bits."
                    )
                if kind in ("F64", "F32", "F16", "BF16"):
                    found[key] = Source(files / name, tuple(piece.get_shape()), TYPES[kind])
    return found


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """A safetensors file; a ValueError that names it if it is damaged or missing."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{path} is damaged or missing ({str(error).splitlines()[0]}). Get the checkpoint again."
        ) from None


def _fetched(name: str, code: bool, options: Mapping[str, Any]) -> Path:
    """The folder in the hub's cache with a checkpoint's files, fetched where they are not there."""
    wanted = [f"*{end}" for end in _BESIDE if code or end != ".py"] + ["model.safetensors", "model-*.safetensors"]
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"], **options))


def _copy(files: Path, made: Path) -> None:
    """Configuration and tokenizer, as they are."""
    for file in files.iterdir():
        if file.suffix in _BESIDE and file.name not in (_INDEX, FILE) and file.is_file():
            shutil.copyfile(file, made / file.name)
