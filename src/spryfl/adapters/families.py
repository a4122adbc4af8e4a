"""The families of adapters: one builder each, options -> what `wrap` needs. A new family is a builder in this file.

Sizes are for one map of n inputs and m outputs unless said otherwise; the head comes on top. Where "starts at the base
model" is not said, it does, exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from peft import (
    FourierFTConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)

from spryfl.adapters.core import put as core_put

# PEFT's own name for "no module at all": what is left are biases and modules_to_save.
NOTHING = "dummy-target-modules"
_CORE = re.compile(r"\^\[\^0-9\]\*\\\.(-?\d+)\\\.\.\*")  # what `core_pattern` writes
Named = tuple[str, ...]
Numbered = tuple[int, ...]


class Adapter(NamedTuple):
    """What a builder makes: how PEFT is configured, and what is done to its model before anything is listed."""

    config: Callable[[Sequence[str]], PeftConfig]  # names of the head's modules -> PEFT's configuration
    finish: Callable[[PeftModel], None] = lambda module: None


def lora(r: int = 1, alpha: float = 1.0, dropout: float = 0.0, targets: Named = (), layers: Numbered = ()) -> Adapter:
    """LoRA, W x + (alpha/r) B A x; r (n + m) values.

    Args:
        r: rank.
        alpha: scale of the update.
        dropout: on the adapter's input, while training.
        targets: ends of module names; empty is PEFT's choice for the model (query and value).
        layers: numbers of the layers that get one, 0 the first, -1 the last; empty is all.

    Raises:
        ValueError: an option is out of its range.

    >>> from spryfl.adapters import wrap
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> small = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    >>> config = BertConfig(num_hidden_layers=1, **small)
    >>> made = wrap(BertForSequenceClassification(config), lora(r=2))
    >>> [(unit.name, unit.size) for unit in made.units if not unit.head]
    [('bert.encoder.layer.0.attention.self.query', 32), ('bert.encoder.layer.0.attention.self.value', 32)]
    """
    _least("lora", r=r)
    return _lora("lora", r, alpha, dropout, targets, layers)


def lora_fa(
    r: int = 1, alpha: float = 1.0, dropout: float = 0.0, targets: Named = (), layers: Numbered = ()
) -> Adapter:
    """LoRA-FA: LoRA whose A stays as it was drawn and whose B alone is trained; r m values. Options as lora's.

    Args:
        r: rank.
        alpha: scale of the update.
        dropout: on the adapter's input, while training.
        targets, layers: as lora's.

    Raises:
        ValueError: an option is out of its range.
    """
    _least("lora_fa", r=r)
    return _lora("lora_fa", r, alpha, dropout, targets, layers)._replace(finish=_freeze_a)


def lora_xs(r: int = 8, alpha: float = 8.0, std: float = 1e-5, targets: Named = (), layers: Numbered = ()) -> Adapter:
    """LoRA-XS, W x + (alpha/r) P R A x, P = U S and A = V^T of W's r leading singular vectors; r^2 values.

    Args:
        r: rank, and the side of the core R.
        alpha: scale of the update.
        std: of the entries of R at the start; the paper's 1e-5 is the base model but for rounding, 0 is it exactly.
        targets, layers: as lora's.

    Raises:
        ValueError: an option is out of its range.
    """
    _least("lora_xs", r=r)
    if std < 0:
        raise ValueError(f"std = {std} of lora_xs; it must be 0 or more.")
    made = _lora("lora_xs", r, alpha, 0.0, targets, layers)
    return made._replace(finish=lambda module: core_put(module, std))


def graded(
    r: int = 8,
    alpha: float = 16.0,
    core: int = 4,
    core_alpha: float = 4.0,
    cores: Numbered = (0,),
    std: float = 1e-5,
    targets: Named = (),
    layers: Numbered = (),
) -> Adapter:
    """LoRA of rank r in most layers, LoRA-XS of rank `core` in `cores`: many values here, core^2 a map there.

    For methods that know the gradient of the last blocks exactly and estimate it below: an estimate's alignment falls
    with the number of values, so the blocks below the cut get few.

    Args:
        r: rank of the LoRAs, r (n + m) values a map.
        alpha: scale of their update, alpha / r.
        core: rank of the LoRA-XS.
        core_alpha: scale of its update, core_alpha / core.
        cores: numbers of the layers that get one, 0 the first, -1 the last.
        std: of a core's entries at the start, as lora_xs's.
        targets: as lora's.
        layers: those that get anything, `cores` among them; empty is all.

    Raises:
        ValueError: an option is out of its range, or `cores` is empty or names a layer that `layers` does not.

    >>> from spryfl.adapters import wrap
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> small = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    >>> config = BertConfig(num_hidden_layers=2, **small)
    >>> made = wrap(BertForSequenceClassification(config), graded(r=4, core=2, cores=(0,), targets=("query",)))
    >>> [unit.size for unit in made.units if not unit.head]
    [4, 64]
    """
    _least("graded", r=r, core=core)
    if std < 0:
        raise ValueError(f"std = {std} of graded; it must be 0 or more.")
    if not cores or (layers and set(cores) - set(layers)):
        raise ValueError(
            f"cores = {list(cores)} of graded with layers = {list(layers)}: name the layers that get a LoRA-XS, each "
            f"among `layers` where that is given. For the same in all layers take lora, or lora_xs."
        )
    ranks, alphas = ({core_pattern(i): value for i in cores} for value in (core, core_alpha))
    options: dict[str, Any] = {"r": r, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas}
    return Adapter(
        lambda head: LoraConfig(**options, **_where(targets, layers, head)),
        lambda module: core_put(module, std, core_layers(module.peft_config["default"])),
    )


def core_pattern(number: int) -> str:
    """What PEFT finds the maps of a layer by: its number is the first in their paths, whatever comes behind it."""
    return rf"^[^0-9]*\.{number}\..*"


def core_layers(config: Any) -> tuple[int, ...]:
    """The layers in which `graded` puts cores, by PEFT's configuration; nothing for any other family."""
    found = (_CORE.fullmatch(pattern) for pattern in getattr(config, "rank_pattern", None) or {})
    return tuple(int(one[1]) for one in found if one)


def from_the_front(config: Any, count: int) -> Any:
    """PEFT's configuration with its layers counted from the front, in place: -1 is the last of `count`."""

    def place(number: int) -> int:
        return number + count if -count <= number < 0 else number

    layers, cores = getattr(config, "layers_to_transform", None), core_layers(config)
    if isinstance(layers, list):
        config.layers_to_transform = [place(number) for number in layers]
    for name in ("rank_pattern", "alpha_pattern") if cores else ():
        values = getattr(config, name).values()
        setattr(config, name, {core_pattern(place(i)): value for i, value in zip(cores, values, strict=True)})
    return config


def vera(r: int = 256, initial: float = 0.1, seed: int = 0, targets: Named = (), layers: Numbered = ()) -> Adapter:
    """VeRA, W x + b * (B (d * (A x))), A and B random and shared by all maps; r + m values, b = 0 at the start.

    Args:
        r: rows of A.
        initial: value of d at the start.
        seed: of A and B, which are saved with the adapter: r (n + m) fixed values in all.
        targets, layers: as lora's.

    Raises:
        ValueError: an option is out of its range.
    """
    _least("vera", r=r, seed=seed)
    return Adapter(
        lambda head: VeraConfig(r=r, d_initial=initial, projection_prng_key=seed, **_where(targets, layers, head))
    )


def tiny_lora(
    u: int = 16, r: int = 2, tying: float = 0.0, seed: int = 42, targets: Named = (), layers: Numbered = ()
) -> Adapter:
    """TinyLoRA: LoRA-XS whose core is sum_i v_i P_i for random P_i; u values, v = 0 at the start.

    Args:
        u: length of v.
        r: rank of the core, 2 in the paper.
        tying: 0 is a v for each map, 1 one for all, between them so many fewer.
        seed: of the P_i, which are saved with the adapter.
        targets, layers: as lora's.

    Raises:
        ValueError: an option is out of its range.
    """
    _least("tiny_lora", u=u, r=r, seed=seed)
    if not 0 <= tying <= 1:
        raise ValueError(f"tying = {tying} of tiny_lora; it must be in [0, 1].")
    options: dict[str, Any] = {"u": u, "r": r, "weight_tying": tying, "projection_seed": seed}
    return Adapter(lambda head: TinyLoraConfig(**options, **_where(targets, layers, head)))


def uni_lora(
    d: int = 256, r: int = 4, bound: float = 0.02, seed: int = 42, targets: Named = (), layers: Numbered = ()
) -> Adapter:
    """Uni-LoRA: every entry of every LoRA is one of d shared values; d values in all, one unit.

    It does not start at the base model: neither A nor B may be 0, so the values are uniform within `bound`.

    Args:
        d: shared values.
        r: rank of the LoRAs.
        bound: of the values at the start.
        seed: of who takes which value; NumPy draws it, and it is drawn anew when the adapter is opened.
        targets, layers: as lora's.

    Raises:
        ValueError: an option is out of its range.
    """
    _least("uni_lora", d=d, r=r, seed=seed)
    _above("uni_lora", bound=bound)
    options: dict[str, Any] = {"theta_d_length": d, "r": r, "init_theta_d_bound": bound, "proj_seed": seed}
    return Adapter(lambda head: UniLoraConfig(**options, **_where(targets, layers, head)))


def vb_lora(
    r: int = 2,
    vectors: int = 16,
    length: int = 64,
    topk: int = 2,
    bound: float = 0.02,
    targets: Named = (),
    layers: Numbered = (),
) -> Adapter:
    """VB-LoRA: pieces of A and B are mixtures of the `topk` best of a shared bank of vectors.

    vectors * length values for the bank, one unit, and r (n + m) / length * vectors for a map's choice among them. It
    does not start at the base model: the bank is uniform within `bound`, the choices are random. The loss is smooth
    only while no choice changes; gradient and jvp are those of the present choice.

    Args:
        r: rank of the LoRAs.
        vectors: in the bank.
        length: of a vector; it must divide the inputs and outputs of every target.
        topk: vectors mixed.
        bound: of the bank at the start.
        targets, layers: as lora's.

    Raises:
        ValueError: an option is out of its range.
    """
    _least("vb_lora", r=r, vectors=vectors, length=length, topk=topk)
    _above("vb_lora", bound=bound)
    if topk > vectors:
        raise ValueError(f"topk = {topk} of vb_lora is more than vectors = {vectors}. Lower topk.")
    options: dict[str, Any] = {"r": r, "num_vectors": vectors, "vector_length": length, "topk": topk}
    options["init_vector_bank_bound"] = bound
    return Adapter(lambda head: VBLoRAConfig(**options, **_where(targets, layers, head)))


def fourierft(n: int = 100, scaling: float = 150.0, targets: Named = (), layers: Numbered = ()) -> Adapter:
    """FourierFT: the update is the inverse Fourier transform of n trained coefficients, the same places in all maps.

    n values, 0 at the start. It computes in float32 and forms the whole (m, n) update at every call: memory and time
    are those of a second weight matrix a map, and of one more for each direction.

    Args:
        n: coefficients a map.
        scaling: of the update.
        targets, layers: as lora's, but PEFT's choice for GPT-2 is its second feed-forward map.

    Raises:
        ValueError: an option is out of its range.
    """
    _least("fourierft", n=n)
    # PEFT draws the coefficients unless it is told otherwise; the update would be noise at the start.
    options: dict[str, Any] = {"n_frequency": n, "scaling": scaling, "init_weights": True}
    return Adapter(lambda head: FourierFTConfig(**options, **_where(targets, layers, head)))


def ia3(targets: Named = (), feedforward: Named = ()) -> Adapter:
    """IA3: one learned factor for each output of `targets`, for each input of those named in `feedforward` too.

    Args:
        targets: ends of module names; empty is PEFT's choice for the model (key, value, second feed-forward map).
        feedforward: those of them whose inputs are scaled in place of their outputs.

    Raises:
        ValueError: `feedforward` names what `targets` does not.
    """
    if set(feedforward) - set(targets):
        raise ValueError(f"feedforward = {list(feedforward)} of ia3 must be among targets = {list(targets)}.")
    named: dict[str, Any] = (
        {"target_modules": list(targets), "feedforward_modules": list(feedforward)} if targets else {}
    )
    return Adapter(lambda head: IA3Config(modules_to_save=list(head), **named))


def bitfit() -> Adapter:
    """BitFit: every bias of the trunk, a unit a layer."""
    return Adapter(lambda head: LoraConfig(r=1, target_modules=NOTHING, bias="all", modules_to_save=list(head)))


def head() -> Adapter:
    """No adapter: the head alone."""
    return Adapter(lambda head: LoraConfig(r=1, target_modules=NOTHING, modules_to_save=list(head)))


ADAPTERS: dict[str, Callable[..., Adapter]] = {
    "lora": lora,
    "lora_fa": lora_fa,
    "lora_xs": lora_xs,
    "graded": graded,
    "vera": vera,
    "tiny_lora": tiny_lora,
    "uni_lora": uni_lora,
    "vb_lora": vb_lora,
    "fourierft": fourierft,
    "ia3": ia3,
    "bitfit": bitfit,
    "head": head,
}


def _lora(kind: str, r: int, alpha: float, dropout: float, targets: Named, layers: Numbered) -> Adapter:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout} of {kind}; it must be in [0, 1).")
    options: dict[str, Any] = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout}
    return Adapter(lambda head: LoraConfig(**options, **_where(targets, layers, head)))


def _where(targets: Named, layers: Numbered, head: Sequence[str]) -> dict[str, Any]:
    return {
        "target_modules": list(targets) or None,
        "layers_to_transform": list(layers) or None,
        "modules_to_save": list(head),
    }


def _freeze_a(module: PeftModel) -> None:
    for name, value in module.named_parameters():
        if ".lora_A." in name:
            value.requires_grad_(False)


def _least(kind: str, **numbers: int) -> None:
    """Counts must be 1 or more, seeds 0."""
    for name, number in numbers.items():
        least = 0 if name == "seed" else 1
        if number < least:
            what = "the rank" if name == "r" else "it"
            raise ValueError(f"{name} = {number} of {kind}; {what} must be {least} or more.")


def _above(kind: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if number <= 0:
            raise ValueError(f"{name} = {number} of {kind}; it must be more than 0.")
