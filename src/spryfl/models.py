"""Loads a Hugging Face model, puts an adapter on it, scores it, saves the adapter. Cost: the model's weights, once."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from spryfl import adapters, hub, opened, tasks
from spryfl.backbone import Packed, adopt
from spryfl.backbone.store import check_streamed, is_packed, open_store
from spryfl.costs import Shapes
from spryfl.hooks import seeded
from spryfl.loss import ModelLoss, Prefix
from spryfl.named import explained, first, resolve, silent
from spryfl.tasks import Rows, Task
from spryfl.types import Batch, Params, Unit

# What configurations call the width of the feed-forward part; four times the width where they say nothing.
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff")
_PLACES = ("position_embeddings", "wpe", "embed_positions")  # tables of learnt positions
CARD = "spryfl.json"  # beside an adapter: base model, label names, maximum length


class Model(NamedTuple):
    """A model ready to be finetuned."""

    module: nn.Module  # PEFT's, frozen and in evaluation mode
    tokenizer: Any
    params: dict[str, Tensor]  # the trainable values as they start, float32
    units: tuple[Unit, ...]
    labels: tuple[str, ...]
    source: str  # a folder or a hub name that opens the base model
    device: torch.device
    task: Task


def load(
    name: str,
    labels: tuple[str, ...],
    *,
    revision: str = "",
    attention: str = "default",
    trust_remote_code: bool = False,
    seed: int = 0,
    task: Task | None = None,
    stream: bool = False,
) -> tuple[nn.Module, Any]:
    """A model with the task's head and its tokenizer; a new head starts from `seed`. Classification is the default.

    With `stream`, which needs a packed folder, one block of it is in memory at a time.
    """
    task = task or tasks.classification()
    where, _ = resolve(name)
    options: dict[str, Any] = {"revision": revision or None, "trust_remote_code": trust_remote_code}
    options["local_files_only"] = Path(where).is_dir() or not hub.reachable()
    chosen = {} if attention == "default" else {"attn_implementation": attention}
    names = _outputs(task.outputs(labels))
    auto = getattr(transformers, task.auto)
    if stream:
        check_streamed(name)
    with seeded(seed), silent(), explained(name, task.auto):
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        if is_packed(where):
            model, missing = _unpacked(where, task, names, chosen, stream, options)
        else:
            model, missing = opened.from_files(auto, where, name, {**names, **chosen, **options})
    if not task.head:
        _warn_of_random(name, model, missing)
    return settled(model, tokenizer), tokenizer


def _unpacked(
    where: str, task: Task, names: dict[str, Any], chosen: dict[str, Any], stream: bool, options: dict[str, Any]
) -> tuple[Any, set[str]]:
    """The model of a packed folder, and the names of values that it does not have."""
    store = open_store(where)
    config = AutoConfig.from_pretrained(where, **names, **options)
    shapes = {key: one.shape[::-1] if one.transposed else one.shape for key, one in store.tensors.items()}
    trusted = {"trust_remote_code": options["trust_remote_code"]}
    stand = opened.standing(opened.kind_of(getattr(transformers, task.auto), config, **trusted), config, shapes)
    model, missing = opened.from_files(stand, where, where, chosen)
    opened.fill(model, stand.given, missing, store, stream, task.head)
    return model, missing


def _warn_of_random(name: str, model: Any, missing: Iterable[str]) -> None:
    """A head that is not trained should have been, before."""
    random = sorted(key for key in missing if not key.startswith(f"{model.base_model_prefix}."))
    if random:
        warnings.warn(
            f'model "{name}" was saved without its language-model head: {", ".join(random[:3])} and so on start at '
            f"random, and this task does not train them. Use a model that was pretrained with that head.",
            stacklevel=3,
        )


def _outputs(names: tuple[str, ...]) -> dict[str, Any]:
    """What a configuration says of its head's outputs; nothing where the task leaves the head as it is."""
    if not names:
        return {}
    numbers = {name: i for i, name in enumerate(names)}
    return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": numbers}


def settled(model: Any, tokenizer: Any) -> Any:
    """Gives a decoder without a padding token one, its end-of-text token; a cache of keys would only cost memory."""
    model.config.use_cache = False
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A decoder's classifier reads the last token that is not this one: what batches are padded with.
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def prepare(
    model: nn.Module,
    tokenizer: Any,
    labels: tuple[str, ...],
    adapter: adapters.Adapter | str,
    *,
    source: str = "",
    seed: int = 0,
    device: str = "cpu",
    task: Task | None = None,
) -> Model:
    """Puts an adapter (a new one, or the folder of a saved one) on a model and lists its units."""
    task = task or tasks.classification()
    if task.auto == "AutoModelForCausalLM":
        _check_causal(source, model)
    adopt(model)
    with seeded(seed):
        made = adapters.load(model, adapter) if isinstance(adapter, str) else adapters.wrap(model, adapter, task.head)
    where = usable(device)
    return Model(made.module.to(where), tokenizer, made.params, made.units, labels, source, where, task)


def _check_causal(name: str, model: Any) -> None:
    """A ValueError for a model that sees the token it is to say: BERT opens as a causal one too, and reads ahead."""
    ids = torch.tensor([[3, 3, 3], [3, 3, 2]])
    with torch.no_grad():
        one, other = model(input_ids=ids.to(model.device)).logits[:, 0].double()
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max())):
        raise ValueError(
            f'model "{name}" ({type(model).__name__}) reads ahead: what it says of a token hangs on those after it. '
            f"This task needs a causal model, for example GPT-2's or Llama's family; for a masked one there is task "
            f'"prompted" with <mask> in its template.'
        )


def shapes(
    name: str,
    labels: tuple[str, ...],
    adapter: adapters.Adapter,
    *,
    rows: int,
    tokens: int,
    task: Task | None = None,
) -> Shapes:
    """The shapes of a model by its configuration alone, no weights: it is built without storage.

    Args:
        name: a local folder, a hub name, or an alias.
        labels: names of the classes.
        adapter: what would be put on it.
        rows, tokens: of a batch.
        task: what it is asked; classification is the default.

    Raises:
        ValueError: it cannot be opened, or it is an encoder with a decoder.
    """
    task = task or tasks.classification()
    config = configured(name, labels, task)
    with torch.device("meta"):
        made = adapters.wrap(empty(config, task), adapter, task.head)
    return shapes_of(made.module, made.units, rows, tokens)


def configured(name: str, labels: tuple[str, ...], task: Task, attention: str = "default") -> Any:
    """A model's configuration for a task; a ValueError for an encoder with a decoder."""
    where, _ = resolve(name)
    chosen = {} if attention == "default" else {"attn_implementation": attention}
    with silent(), explained(name, task.auto):
        local = Path(where).is_dir() or not hub.reachable()
        config = AutoConfig.from_pretrained(where, local_files_only=local, **_outputs(task.outputs(labels)), **chosen)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f'model "{name}" has an encoder and a decoder; costs are predicted for one stack of blocks.')
    return config


def empty(config: Any, task: Task, dtype: torch.dtype | None = None) -> Any:
    """A model by its configuration, its values not initialised: for the meta device. Its type is else the file's."""
    config.use_cache = False
    if config.pad_token_id is None:
        config.pad_token_id = 0
    return getattr(transformers, task.auto).from_config(config, dtype=dtype or config.dtype or torch.float32)


def shapes_of(module: Any, units: tuple[Unit, ...], rows: int, tokens: int) -> Shapes:
    """The shapes of a PEFT model and of a batch."""
    base, config = module.get_base_model(), module.config
    width, heads = config.hidden_size, config.num_attention_heads
    inner = next((getattr(config, key) for key in _INNER if getattr(config, key, None)), 4 * width)
    trunk = getattr(base, base.base_model_prefix)
    names = [name for name, _ in trunk.named_modules()]
    wide = any(isinstance(m, nn.Linear) and m.out_features == 2 * inner != 3 * width for m in trunk.modules())
    return Shapes(
        layers=config.num_hidden_layers,
        width=width,
        inner=inner,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or width // heads,
        vocabulary=config.vocab_size,
        tokens=tokens,
        rows=rows,
        labels=config.num_labels,
        units=units,
        gated=wide or any(".gate_proj" in name for name in names),
        products=any(".lora_" in name for unit in units for name in unit.params),
        shared=config.model_type == "albert",
        pooler=any(name == "pooler" or name.startswith("pooler.") for name in names),
        norm_first=hasattr(base, "score") and getattr(config, "do_layer_norm_before", True),
        every_token=hasattr(base, "score"),
    )


def usable(device: str) -> torch.device:
    """The device of that name; a ValueError if there is none here."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown, not built in, not there
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        possible = ", ".join(["cpu", *(name for name, there in found.items() if there)])
        raise ValueError(f'device = "{device}" cannot be used here: {first(error)} Possible: {possible}.') from error


def stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a model holds by name, the parts of encoded matrices too; of a streamed model block by block.

    A part may be gone once the next is asked for.
    """
    state = module.state_dict()
    yield from ((name, state[name]) for name in sorted(state))
    for path, inner in module.named_modules():
        if isinstance(inner, Packed):
            yield from ((f"{path}.weight.{part}", value) for part, value in inner.matrix.parts().items())


def foreign(model: Model) -> bool:
    """Whether layers of another library compute in it, with weights in a form of their own."""
    return any(map(adapters.foreign, model.module.modules()))


def check_length(model: Model, sides: Iterable[Rows]) -> None:
    """A ValueError if a row is longer than the model has places, where it keeps a table of them."""
    most = places(model.module)
    longest = max((length for rows in sides for length in tasks.lengths(rows)), default=0)
    if longest > most:
        raise ValueError(
            f"the longest row has {longest} tokens, and the model has places for {most}. "
            f"Set data.max_length to {most} or less."
        )


def places(module: nn.Module) -> float:
    """How many tokens a row may have; infinite where the model keeps no table of them."""
    tables = [
        one.num_embeddings - (0 if one.padding_idx is None else one.padding_idx + 1)  # RoBERTa counts from behind it
        for name, one in module.named_modules()
        if isinstance(one, nn.Embedding) and name.rpartition(".")[2] in _PLACES
    ]
    return min(tables, default=math.inf)


def loss_fn(
    model: Model,
    fixed: Params,
    guide: Params | None = None,
    dropout: bool = False,
    keep: int = 0,
    micro_batch: int = 0,
) -> ModelLoss:
    """The model's loss as a function of all trainable values but `fixed`; `keep` bytes for a prefix."""
    head = frozenset(name for unit in model.units if unit.head for name in unit.params)
    return ModelLoss(model.module, head, fixed, dropout, Prefix(keep), guide or {}, model.task, micro_batch)


def logits(model: Model, params: Params, batch: Batch) -> Tensor:
    """The model's logits in evaluation mode, without a graph."""
    with torch.inference_mode():
        return loss_fn(model, {}).output(params, batch).logits


def answers(model: Model, params: Params, batch: Batch) -> list[Any]:
    """The task's answer to each row of a batch, in evaluation mode."""
    with torch.inference_mode():
        return model.task.answers(loss_fn(model, {}).output(params, batch), batch)


def score(
    model: Model, params: Params, rows: Rows, batches: Iterable[tuple[Sequence[int], Batch]]
) -> tuple[dict[str, float], float]:
    """(the task's metrics over all rows at once, mean loss) over batches of `rows`, each with its indices."""
    fn, found, truths, total, terms = loss_fn(model, {}), [], [], 0.0, 0
    for chosen, batch in batches:
        with torch.inference_mode():
            output = fn.output(params, batch)
            found += model.task.answers(output, batch)
            count = model.task.terms(batch)
            total += float(model.task.loss(output, batch)) * count
        truths += [rows.labels[i] for i in chosen]
        terms += count
    return model.task.score(found, truths), total / max(terms, 1)


def save_adapter(model: Model, params: Params, folder: Path, card: Mapping[str, Any]) -> None:
    """Writes the adapter and the head in PEFT's own format, and what that has no place for into spryfl.json."""
    module: Any = model.module
    values = {name: params.get(name, module.get_parameter(name)) for name in model.params}
    module.peft_config["default"].base_model_name_or_path = model.source
    with silent():
        adapters.save(module, values, folder)
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def read_card(folder: Path) -> dict[str, Any]:
    """The facts beside a saved adapter: model, labels, max_length."""
    try:
        return json.loads((folder / CARD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no adapter of spryfl: there is no {CARD} in it. Runs keep theirs in adapter/."
        ) from None


def drawn(adapter: str | Path, seed: int = 0) -> int:
    """The seed that drew what the base model's files lack and nobody trains, a pooler, where an adapter says it."""
    return read_card(Path(adapter)).get("seed", seed) if adapter and (Path(adapter) / CARD).is_file() else seed


def open_adapter(folder: Path, trust_remote_code: bool = False, device: str = "cpu", task: Task | None = None) -> Model:
    """The model that a saved adapter belongs to, with the adapter on it; a task of one's own is given again."""
    card = read_card(folder)
    labels = tuple(card["labels"])
    task = task or tasks.build(card.get("task", {"kind": "classification"}))
    own: dict[str, Any] = {"revision": card["revision"], "trust_remote_code": trust_remote_code, "task": task}
    base, tokenizer = load(card["model"], labels, stream=card.get("stream", False), seed=drawn(folder), **own)
    _, source = resolve(card["model"])
    return prepare(base, tokenizer, labels, str(folder), source=source, device=device, task=task)


def facts(model: Model) -> dict[str, Any]:
    """What a result says of the weights it stands on: where they are from and, of a packed folder, which and how."""
    backbone = opened.backbone_of(model.module)
    return {"source": model.source, **(backbone.facts if backbone else {})}


def same(then: Mapping[str, Any], model: Model) -> None:
    """A ValueError if a run began on other packed weights; whether they are streamed makes no difference."""
    now = facts(model)
    if then.get("fingerprint") != now.get("fingerprint"):
        raise ValueError(
            f"the packed model {model.source} is not the one that the run began with (fingerprint "
            f"{now.get('fingerprint', 'none')}, then {then.get('fingerprint', 'none')}). Restore it, or start anew."
        )


def carry(model: Model, params: Params) -> None:
    """Writes values into the module itself, for use outside this package."""
    with torch.no_grad():
        for name, value in params.items():
            model.module.get_parameter(name).copy_(value)
