"""An estimator of one's own: every tensor has its own orthogonal directions, and small tensors come out exactly.

    g_hat_b = (1/K_b) sum_k <grad_b loss, v_bk> v_bk,   K_b = min(K, d_b),   v_bk at right angles, |v_bk|^2 = d_b

Unbiased, with E|g_hat - g|^2 = sum_b (d_b / K_b - 1) |g_b|^2: 0 for a tensor of at most K values, such as the vectors
and biases of small adapters. Cost: a value pass a tensor and sum_b K_b tangent passes, K_b tangents in memory at once.
Run it: python examples/own_estimator.py [MODEL DATA]
"""

import sys

import spryfl
from spryfl import noise, testing
from spryfl.estimators.pieces import summed
from spryfl.jvp import jvp
from spryfl.types import Batch, Directional, Estimate, Estimator, LossFn, Params, Passes


def blockwise(directions: int = 4) -> Estimator:
    """`directions`: K, the most that a tensor gets."""
    if directions < 1:
        raise ValueError(f"directions = {directions} of blockwise; it must be 1 or more.")

    def estimate(loss_fn: LossFn, params: Params, batch: Batch, seed: int) -> Estimate:
        pieces, terms = loss_fn.pieces(batch, seed), list[Directional]()
        for name, value in params.items():
            count = min(directions, value.numel())
            seeds = [noise.child_seed(seed, "direction", len(terms) + k) for k in range(count)]
            v = noise.stack(seeds, {name: value}, "orthogonal")
            linear = lambda one, v=v: jvp(lambda p: loss_fn(p, one.batch, one.seed), params, v)  # noqa: E731
            loss, slopes = summed(pieces, linear)
            kept = (slopes / count).float().tolist()  # float32 is what four bytes carry, 1/K within
            terms += [Directional(s, c, (name,), "orthogonal") for s, c in zip(seeds, kept, strict=True)]
        return Estimate(float(loss), {}, tuple(terms), Passes(value=len(params), tangent=len(terms)))

    return estimate


def variance(directions: int, gradient: Params) -> float:
    """What the estimator claims, from the true gradient."""
    return sum((g.numel() / min(directions, g.numel()) - 1) * float(g.square().sum()) for g in gradient.values())


def main(model: str = "minilm", data: str = "docstrings") -> None:
    testing.check_estimator(blockwise(4), seeds=100, variance=lambda gradient: variance(4, gradient))
    spryfl.finetune(
        model,
        data,
        reading={"train_rows": 80, "test_rows": 40},
        method=spryfl.Method("blockwise", estimator={"kind": blockwise, "directions": 4}, exchange="scalars"),
        adapter={"kind": "lora_xs", "r": 2},
        train={"rounds": 2, "cohort": 2, "steps": 1},
        on_record=lambda r: print({key: r[key] for key in ("round", "accuracy", "bytes_up") if key in r}),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
