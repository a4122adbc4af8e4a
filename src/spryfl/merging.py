"""From a saved adapter to an ordinary Hugging Face folder: merged into the base weights, head and tokenizer with it.

    W' = W + what the adapter adds to it, by PEFT's own merge        transformers alone opens the folder

Every family of `adapters` merges: their updates are linear in a layer's input. A packed backbone, and one that
bitsandbytes quantized, is decoded first: what was trained on is what is written, in ordinary numbers. Merging is done
in float32; in 16 bits a small update may round away, so float32 is also what is written unless another type is asked
for. Cost: the whole model in float32 in memory, 4 bytes a value, however small it was kept in training; two passes of
one short text, which say how far the merged model's outputs are from the adapter's.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spryfl import adapters, models
from spryfl.backbone import Packed
from spryfl.backbone.writing import absent, partial
from spryfl.models import Model
from spryfl.named import silent
from spryfl.tasks import Task

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROBE = "The merged model must answer this as the adapter does."


class Merged(NamedTuple):
    """What was written."""

    folder: Path
    auto: str  # the class of transformers that opens it
    nbytes: int  # of the folder
    difference: float  # largest, between the outputs of the model that was trained and of the one that was written
    scale: float  # largest output, to judge it by


def export(
    adapter: str | Path,
    folder: str | Path,
    *,
    precision: str = "float32",
    trust_remote_code: bool = False,
    task: Task | None = None,
) -> Merged:
    """Writes the model of a saved adapter as one folder that transformers opens alone: W' = W + the adapter's update.

    Args:
        adapter: an adapter's folder, as a run leaves it in adapter/.
        folder: the new folder; nothing that is there already is touched.
        precision: float32, bfloat16 or float16: the type of the written values.
        trust_remote_code: whether code that comes with the base model may run.
        task: a task of one's own, where the adapter was trained with one.

    Returns:
        The folder, the class that opens it, its bytes, and how far its outputs are from the adapter's.

    Raises:
        ValueError: the folder is there, there is no adapter of this package, the precision is unknown, or the base
            model's weights are in the form of a library that this package cannot decode.

    Example:
        export("runs/a/adapter", "merged")
        model = AutoModelForSequenceClassification.from_pretrained("merged")
    """
    adapter, folder = Path(adapter), Path(folder)
    absent(folder)
    if precision not in PRECISIONS:
        raise ValueError(f'precision = "{precision}" is unknown. Possible: {", ".join(PRECISIONS)}.')
    model = models.open_adapter(adapter, trust_remote_code, task=task)
    before = _outputs(model, model.module)
    module = merged(model)
    if precision != "float32":
        module = module.to(PRECISIONS[precision])
    after = _outputs(model, module)
    with partial(folder) as made, silent():
        module.save_pretrained(made)
        model.tokenizer.save_pretrained(made)
    apart = max(float((x - y).abs().max()) for x, y in zip(before, after, strict=True))
    size = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
    return Merged(folder, model.task.auto, size, apart, max(float(x.abs().max()) for x in before))


def merged(model: Model) -> Any:
    """The base model with the adapter's updates in its weights, float32; what `model` held is used up.

    Raises:
        ValueError: weights in the form of a library that cannot be decoded here (torchao's).

    Args:
        model: as `models.open_adapter` or a run leaves it, with the values to be merged in its module.
    """
    module: Any = model.module
    _decode(module)
    base = module.float().merge_and_unload(safe_merge=True)
    base.config.use_cache = True  # training had switched it off
    base.config.dtype = torch.float32
    return base.eval()


def _decode(module: nn.Module) -> None:
    """Ordinary linear maps in the place of encoded ones; in place."""
    for parent, name, layer in list(_encoded(module)):
        made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        made.weight = nn.Parameter(layer.matrix.whole(layer.device), requires_grad=False)
        made.bias = layer.bias
        setattr(parent, name, made)
    strange = [path for path, one in module.named_modules() if adapters.foreign(one)]
    if strange:
        raise ValueError(
            f"{strange[0]} keeps its weight in a form of another library, which cannot be merged into. Train on the "
            f"unquantized model, or on one packed by `spryfl pack`; the adapter itself opens in PEFT beside the model."
        )
    _forget_quantization(module)


def _encoded(module: nn.Module) -> Iterator[tuple[nn.Module, str, Packed]]:
    for parent in module.modules():
        yield from ((parent, name, one) for name, one in parent.named_children() if isinstance(one, Packed))


def _forget_quantization(module: Any) -> None:
    """What was decoded is said to be quantized no longer, neither to transformers nor in config.json."""
    base = module.get_base_model()
    if getattr(base.config, "quantization_config", None) is not None:
        del base.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        base.__dict__.pop(name, None)
    gc.collect()


def _outputs(model: Model, module: Any) -> list[Tensor]:
    """What a module says of one text: its floating outputs, float32."""
    ids = model.tokenizer(_PROBE, truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        said = module(input_ids=ids, attention_mask=torch.ones_like(ids)).to_tuple()
    return [one.float() for one in said if isinstance(one, Tensor) and one.is_floating_point()]
