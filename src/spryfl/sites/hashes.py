"""The hash of a model's pretrained weights: what two machines compare before they train together.

    BLAKE2b over (name, type, shape, bytes) of every tensor below the head, the parts of encoded matrices too

The head is new for each task and travels with the run, so it is left out. Cost: loading the model; a second a GB.
"""

from __future__ import annotations

from pathlib import Path

from spryfl import models, tasks
from spryfl.config import Experiment
from spryfl.provenance import digest


def weights(experiment: Experiment) -> str:
    """Sixteen hex digits for the experiment's model; an empty text where the model is not on this machine."""
    m = experiment.model
    task = tasks.build(experiment.task)
    own = m.trust_remote_code
    try:
        module, _ = models.load(
            m.name, ("0", "1"), revision=m.revision, trust_remote_code=own, task=task, stream=m.stream
        )
    except ValueError:
        if Path(m.name).exists():  # it is here, and something is wrong with it
            raise
        return ""
    trunk = f"{getattr(module, 'base_model_prefix', '')}."
    below = any(path.startswith(trunk) for path, _ in module.named_modules())  # else the model is the trunk itself
    return digest((name, value) for name, value in models.stored(module) if not below or name.startswith(trunk))
