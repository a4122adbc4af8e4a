"""The command `spryfl` with one more estimator, `projected`: forward mode's estimate, computed from the exact gradient.

    c_k = <g, v_k>,  g by reverse mode          g_hat = (1/K) sum_k c_k v_k

The same directions, and the same scalars to rounding, as `forward` finds by K tangent passes, for the price of one
backward pass: what makes K = 100 and M = 100 affordable on two cores. What a run learns is forward mode's; what it
takes in time and memory is not, so passes are counted as forward mode takes them. The comparison's row `forward_k10`
is forward mode itself, to hold `k10` against.

    python experiments/spry_figures/projected.py compare --config experiments/spry_figures/compare.toml --out runs/fig
"""

import torch

from spryfl import cli, noise
from spryfl.estimators import ESTIMATORS, backprop, cuts, terms
from spryfl.types import Batch, Estimate, Estimator, LossFn, Params, Passes


def projected(
    directions: int = 1,
    distribution: str = "gaussian",
    candidates: int = 1,
    clip: float = 0.0,
    guided: bool = False,
    exact_head: bool = False,
) -> Estimator:
    """As `forward` with these options, from the gradient by reverse mode."""
    terms.check(directions, distribution, clip, candidates)
    exact = backprop()

    def estimate(loss_fn: LossFn, params: Params, batch: Batch, seed: int) -> Estimate:
        inside, above = dict(params), {}
        if exact_head:
            (piece,) = loss_fn.pieces(batch, seed)
            inside, above = cuts.split(loss_fn.cut(piece.batch, piece.seed, 0, False), params)
        found = exact(loss_fn, params, batch, seed)
        heading = terms.heading(loss_fn.guide, inside) if guided else {}
        count = directions if inside else 0
        seeds = terms.chosen(seed, count - bool(heading), inside, distribution, candidates, loss_fn.guide)
        random = noise.stack(seeds, inside, distribution) if seeds else {}
        drawn, onto = terms.beside(heading, random), terms.onto(heading, random)
        parts = [value.flatten(1) @ found.dense[name].flatten().to(value) for name, value in drawn.items()]
        slopes = torch.stack(parts).sum(0).tolist() if parts else []
        kept = terms.guarded(terms.apart(slopes, onto), clip)
        made = terms.made(seeds, kept.mean(), tuple(inside), distribution)
        dense = {name: found.dense[name] for name in above} | terms.along_heading(heading, slopes, onto, kept)
        return Estimate(found.loss, dense, made, Passes(value=1, tangent=count), kept.scalars)

    return estimate


ESTIMATORS["projected"] = projected

if __name__ == "__main__":
    cli.main()
