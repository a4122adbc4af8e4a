"""The hash of a model's pretrained weights: what two machines compare before they train together.

    BLAKE2b over (name, type, shape, bytes) of every tensor below the head, in the order of the names

The head is new for each task and travels with the run, so it is left out. Cost: loading the model; a second a GB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spryfl import models, tasks
from spryfl.config import Experiment


def weights(experiment: Experiment) -> str:
    """Sixteen hex digits for the experiment's model; an empty text where the model is not on this machine."""
    m = experiment.model
    task = tasks.build(experiment.task)
    own = m.trust_remote_code
    try:
        module, _ = models.load(m.name, ("0", "1"), revision=m.revision, trust_remote_code=own, task=task)
    except ValueError:
        if Path(m.name).exists():  # it is here, and something is wrong with it
            raise
        return ""
    return digest(pretrained(module.state_dict(), str(getattr(module, "base_model_prefix", ""))))


def pretrained(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a head: those under the name of the base model; all of them where it has no name of its own."""
    below = {name: value for name, value in state.items() if prefix and name.startswith(f"{prefix}.")}
    return below or dict(state)


def digest(state: Mapping[str, Tensor]) -> str:
    """The hash of named tensors, of any type and on any device.

    >>> digest({"w": torch.zeros(2)}) == digest({"w": torch.zeros(2, 1)})
    False
    """
    whole = hashlib.blake2b(digest_size=8)
    for name, value in sorted(state.items()):
        flat = value.detach().cpu().contiguous().reshape(-1)
        whole.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        whole.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return whole.hexdigest()
