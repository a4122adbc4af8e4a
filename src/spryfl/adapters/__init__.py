"""Few trainable values on a frozen Hugging Face model, through PEFT; and the units in which they are trained.

    lora       W x + (alpha/r) B A x, B = 0 at the start                Hu et al., arXiv 2106.09685
    lora_fa    the same with A as drawn, B alone trained                Zhang et al., arXiv 2308.03303
    lora_xs    W x + (alpha/r) P R A x, P and A from W's SVD            Balazy et al., arXiv 2405.17604
    graded     lora in some layers, lora_xs in others                   (both)
    vera       W x + b * (B (d * (A x))), A and B random, shared        Kopiczko et al., arXiv 2310.11454
    tiny_lora  lora_xs with R a random function of a few values         Morris et al., arXiv 2602.04118
    uni_lora   every entry of A and B is one of d shared values         Li et al., arXiv 2506.00799
    vb_lora    pieces of A and B are mixtures of a bank of vectors      Li et al., arXiv 2405.15179
    fourierft  W x + F^-1(c) x, a few coefficients c                    Gao et al., arXiv 2405.03003
    ia3        a learned factor on keys, values, feed-forward           Liu et al., arXiv 2205.05638
    bitfit     the biases                                               Ben Zaken et al., arXiv 2106.10199
    head       nothing but the head

A forward-mode estimate from K directions has cos^2 = K/(d + K + 1) with the gradient of d values: few values are the
strongest lever there is. Whatever the adapter, the task's head (all that the model has outside its trunk) is trained
and saved with it. A family is one builder in families.py, or one of yours: options -> what `wrap` needs. Cost: the
values themselves, float32, and what a family says of its fixed ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spryfl import registry
from spryfl.adapters.families import (
    ADAPTERS,
    Adapter,
    bitfit,
    fourierft,
    graded,
    head,
    ia3,
    lora,
    lora_fa,
    lora_xs,
    tiny_lora,
    uni_lora,
    vb_lora,
    vera,
)
from spryfl.adapters.put import TRAINED, load, save, wrap
from spryfl.adapters.units import Adapted, adapted, foreign, head_modules


def build(choice: Mapping[str, Any]) -> Adapter:
    """The adapter that a choice names: {"kind": key or builder, option: value, ...}; a ValueError if no key is so.

    Args:
        choice: {"kind": a key of ADAPTERS or a builder, and its options by name}.

    Raises:
        ValueError: no key is so, or an option is out of its range.

    >>> adapter = build({"kind": "lora", "r": 2})
    """
    return registry.made("adapter", ADAPTERS, choice)


__all__ = [
    "ADAPTERS",
    "TRAINED",
    "Adapted",
    "Adapter",
    "adapted",
    "bitfit",
    "build",
    "foreign",
    "fourierft",
    "graded",
    "head",
    "head_modules",
    "ia3",
    "load",
    "lora",
    "lora_fa",
    "lora_xs",
    "save",
    "tiny_lora",
    "uni_lora",
    "vb_lora",
    "vera",
    "wrap",
]
