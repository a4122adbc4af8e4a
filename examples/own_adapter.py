"""An adapter family of one's own: the trunk's layer norms are trained, their weights and biases, and nothing is added.

    norm(x) * w + b, w and b trained        2 n values a norm of width n; it starts at the base model exactly
    Zhao et al., Tuning LayerNorm in Attention, arXiv 2312.11420

The folder that a run leaves is PEFT's (LN tuning) and opens without this file.
Run it: python examples/own_adapter.py [MODEL DATA]
"""

import sys

from peft import LNTuningConfig

import spryfl
from spryfl.adapters import Adapter


def layer_norms(targets: tuple[str, ...] = ("LayerNorm",)) -> Adapter:
    """`targets`: ends of the norms' names in the model; "LayerNorm" in BERT's family, ("ln_1", "ln_2") in GPT-2."""
    if not targets:
        raise ValueError('targets of layer_norms is empty: name the norms by the ends of their names, ("LayerNorm",).')
    return Adapter(lambda head: LNTuningConfig(target_modules=list(targets), modules_to_save=list(head)))


def main(model: str = "minilm", data: str = "docstrings") -> None:
    history = spryfl.finetune(
        model,
        data,
        reading={"train_rows": 1000, "test_rows": 200},
        adapter={"kind": layer_norms},
        method=spryfl.methods.fedavg(local_optimizer={"kind": "adamw", "lr": 5e-3}),
        train={"rounds": 10, "cohort": 8, "steps": 5, "eval_every": 5},
        on_record=lambda r: print({key: r[key] for key in ("round", "loss", "accuracy") if key in r}),
    )
    print(f"{len(history.model.units)} units, {sum(unit.size for unit in history.model.units)} values, head included")


if __name__ == "__main__":
    main(*sys.argv[1:])
