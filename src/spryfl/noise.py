"""Random directions as a function of (seed, name): the only source of randomness in an estimate.

    words     Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (index, hash of the name)
    normals   Box-Muller in float64 on 53-bit uniforms, rounded to float32
    signs     one bit of each word

No generator is read or moved. A client that holds some units and a server that holds all draw the same numbers, on
any device, in any order. All names and seeds of a call share one pass. Cost: about 0.1 microseconds a value.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from spryfl.types import Directional, Params

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def child_seed(seed: int, *facts: int | str) -> int:
    """A 63-bit seed for named facts: `child_seed(run, "client", 3, "round", 7)`. Injective but for hash collisions.

    Args:
        seed: the parent.
        facts: names and numbers that tell this use from all others.

    Returns:
        A whole number from 0 to 2^63 - 1.

    >>> child_seed(0, "round", 7) == child_seed(0, "round", 7) != child_seed(0, "round", 8)
    True
    """
    text = repr((int(seed), *facts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def philox(counter: Sequence[Tensor], key: Sequence[Tensor | int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words for each counter and key, which broadcast; int64 tensors hold 0 .. 2^32 - 1.

    Args:
        counter: four tensors of words.
        key: two words.
    """
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        # A product of two 32-bit words wraps in int64, and its 64 bits are still the right ones.
        p, q = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = ((q >> 32) & _MASK) ^ b ^ low, q & _MASK, ((p >> 32) & _MASK) ^ d ^ high, p & _MASK
        low, high = (low + _WEYL[0]) & _MASK, (high + _WEYL[1]) & _MASK
    return a, b, c, d


@functools.lru_cache(maxsize=16)
def _counters(blocks: tuple[tuple[str, int], ...]) -> tuple[Tensor, ...]:
    """The counters of some names, one after the other: (index low, index high, tag low, tag high), each (total,)."""
    index = torch.cat([torch.arange(count, dtype=torch.int64) for _, count in blocks])
    tags = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") for name, _ in blocks]
    counts, total = torch.tensor([count for _, count in blocks]), len(index)
    low, high = (
        torch.tensor([word(t) for t in tags]).repeat_interleave(counts, output_size=total) for word in (_low, _high)
    )
    return index & _MASK, index >> 32, low, high


def forget() -> None:
    """Lets go of the counters that are kept between calls."""
    _counters.cache_clear()


def _low(word: int) -> int:
    return word & _MASK


def _high(word: int) -> int:
    return (word >> 32) & _MASK


def words(seeds: Sequence[int], blocks: tuple[tuple[str, int], ...]) -> Tensor:
    """Random 32-bit words for each seed and name, int64, (seeds, total blocks, 4), on the CPU.

    Args:
        seeds: the keys.
        blocks: (name, how many blocks of four words) for each name; the names follow each other along dimension 1.
    """
    key = [torch.tensor([[word(seed)] for seed in seeds]) for word in (_low, _high)]
    return torch.stack(philox(_counters(blocks), key), dim=-1)


def _normals(word: Tensor) -> Tensor:
    """Two standard normals from each block: (..., 4) -> (..., 2), float32."""
    bits = (word[..., 0::2] >> 5) * (1 << 26) + (word[..., 1::2] >> 6)  # 53 bits each
    uniform = bits.double() * 2.0**-53
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0] + 2.0**-53))
    angle = uniform[..., 1] * (2.0 * math.pi)
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).float()


def _signs(word: Tensor) -> Tensor:
    """Four signs from each block: (..., 4) -> (..., 4), float32; the same bits on every machine."""
    return ((word >> 31) * 2 - 1).float()


def _drawn(seeds: Sequence[int], like: Params, make: Callable[[Tensor], Tensor], each: int) -> dict[str, Tensor]:
    """Values for every seed and name, all names and seeds in one pass; `each` values come from a block."""
    blocks = tuple((name, -(-value.numel() // each)) for name, value in like.items())
    values, out, start = make(words(seeds, blocks)), {}, 0
    for name, count in blocks:
        own = values[:, start : start + count].flatten(1)[:, : like[name].numel()]
        out[name], start = own.reshape(len(seeds), *like[name].shape), start + count
    return out


def _gaussian(seeds: Sequence[int], like: Params) -> dict[str, Tensor]:
    return _drawn(seeds, like, _normals, 2)


def _rademacher(seeds: Sequence[int], like: Params) -> dict[str, Tensor]:
    return _drawn(seeds, like, _signs, 4)


def _sphere(seeds: Sequence[int], like: Params) -> dict[str, Tensor]:
    """Uniform on the sphere of radius sqrt(d) over the whole block, so that E[v v^T] = I here too."""
    raw = _gaussian(seeds, like)
    squares = torch.stack([value.double().flatten(1).square().sum(1) for value in raw.values()]).sum(0)
    dimension = sum(value[0].numel() for value in raw.values())
    factor = (dimension / squares).sqrt()
    return {n: (v * factor.reshape(-1, *[1] * (v.dim() - 1))).float() for n, v in raw.items()}


def _orthogonal(seeds: Sequence[int], like: Params) -> dict[str, Tensor]:
    """Gaussian directions made orthogonal one after the other over the whole block, each of length sqrt(d).

    Gram-Schmidt in float64, twice, as once leaves a rest where two directions nearly agree. E[v v^T] = I for each.
    """
    raw = _gaussian(seeds, like)
    rows = torch.cat([value.double().flatten(1) for value in raw.values()], dim=1)
    count, dimension = rows.shape
    if count > dimension:
        raise ValueError(
            f"{count} orthogonal directions do not fit into {dimension} values. Use fewer directions or another "
            f"distribution: {', '.join(name for name in DISTRIBUTIONS if name not in JOINT)}."
        )
    for k in range(count):
        for _ in range(2):
            rows[k] -= (rows[:k] @ rows[k]) @ rows[:k]
        rows[k] /= rows[k].norm()
    parts = (rows * math.sqrt(dimension)).float().split([value[0].numel() for value in raw.values()], dim=1)
    return {name: part.reshape(value.shape) for (name, value), part in zip(raw.items(), parts, strict=True)}


def _basis(seeds: Sequence[int], like: Params) -> dict[str, Tensor]:
    """Axes of the block, each of length sqrt(d), no axis twice in a call: all d of them give the exact gradient.

    Each seed draws among the axes that those before it left. E[v v^T] = I for each.
    """
    sizes = [value.numel() for value in like.values()]
    count, dimension = len(seeds), sum(sizes)
    if count > dimension:
        raise ValueError(
            f"{count} axes do not fit into {dimension} values. Use fewer directions or another distribution: "
            f"{', '.join(name for name in DISTRIBUTIONS if name not in JOINT)}."
        )
    left = list(range(dimension))
    rows = torch.zeros(count, dimension)
    for k, seed in enumerate(seeds):
        at = child_seed(seed, "axis") % len(left)  # 63 bits against d: even to 1e-12
        left[at], left[-1] = left[-1], left[at]
        rows[k, left.pop()] = math.sqrt(dimension)
    parts = rows.split(sizes, dim=1)
    return {name: part.reshape(count, *like[name].shape) for name, part in zip(like, parts, strict=True)}


# A law of your own is a function here, by its name, on both sides of the wire: equal seeds, names and shapes must give
# equal values anywhere, one direction must not hang on the others of the call, and E[v v^T] must be I.
DISTRIBUTIONS: dict[str, Callable[[Sequence[int], Params], dict[str, Tensor]]] = {
    "gaussian": _gaussian,
    "rademacher": _rademacher,
    "sphere": _sphere,
    "orthogonal": _orthogonal,
    "basis": _basis,
}
JOINT = frozenset({"orthogonal", "basis"})  # a direction depends on those that are drawn before it in the same call


# E|g_hat - g|^2 / |g|^2 of g_hat = (1/K) sum_k c_k v_k with exact c_k = <g, v_k>, by a law's name: (d values, K).
#   gaussian           E[v v^T v v^T] = (d + 2) I, so E|c v|^2 = (d + 2)|g|^2, less the mean's |g|^2: d + 1, over K
#   signs, sphere      |v|^2 = d always, so E|c v|^2 = d |g|^2: d - 1, over K
#   orthogonal, basis  K of d orthogonal axes: g_hat is d/K of a projection that keeps K/d of |g|^2: d/K - 1
# The first is Nesterov and Spokoiny 2017, the others follow in the same way.
VARIANCES: dict[str, Callable[[int, int], float]] = {
    "gaussian": lambda d, k: (d + 1) / k,
    "rademacher": lambda d, k: (d - 1) / k,
    "sphere": lambda d, k: (d - 1) / k,
    "orthogonal": lambda d, k: (d - k) / k,
    "basis": lambda d, k: (d - k) / k,
}


def relative_variance(terms: Iterable[Directional], like: Params) -> dict[str, float]:
    """v by name, E|g_hat - g|^2 = v |g|^2 predicted from an estimate's terms alone; 0 for a name without a term.

    All names of a block have the block's v: that of each alone is the same where the gradient is spread evenly over the
    block's values. Terms that two blocks share (joint pairing) and candidates that were chosen are taken for free draws
    of their own block. A law that `VARIANCES` does not know is taken for Gaussian.

    Args:
        terms: of one estimate.
        like: name -> tensor of all that the estimate is of; only names and sizes are looked at.

    >>> import torch
    >>> like = {"a": torch.zeros(6), "b": torch.zeros(2), "head": torch.zeros(3)}
    >>> relative_variance([Directional(k, 0.1, ("a", "b"), "gaussian") for k in range(3)], like)
    {'a': 3.0, 'b': 3.0, 'head': 0.0}
    """
    drawn = Counter((term.block, term.distribution) for term in terms)
    out = dict.fromkeys(like, 0.0)
    for (block, distribution), count in drawn.items():
        law = VARIANCES.get(distribution, VARIANCES["gaussian"])
        size = sum(like[name].numel() for name in block)
        out.update(dict.fromkeys(block, max(law(size, count), 0.0)))
    return out


def stack(seeds: Sequence[int], like: Params, distribution: str = "gaussian") -> dict[str, Tensor]:
    """K random directions over a block at once: E[v] = 0, E[v v^T] = I.

    Args:
        seeds: one for each direction; equal seeds give equal values.
        like: name -> tensor; only names, shapes and devices are looked at.
        distribution: gaussian, rademacher (independent signs), sphere (radius sqrt(d), d values in the block) or
            orthogonal (as on the sphere, and at right angles to the other directions of this call).

    Returns:
        name -> float32 (K, *shape), on the device of `like`.
    """
    drawn = DISTRIBUTIONS[distribution](seeds, like)
    return {name: value.to(like[name].device) for name, value in drawn.items()}


def direction(seed: int, like: Params, distribution: str = "gaussian") -> dict[str, Tensor]:
    """One random direction over a block: name -> float32 tensor of the same shape.

    Args:
        seed: 0 to 2^63 - 1.
        like: name -> tensor; only names, shapes and devices are looked at.
        distribution: as `stack`'s.

    >>> import torch
    >>> direction(7, {"a": torch.zeros(3)}, "rademacher")["a"].abs()
    tensor([1., 1., 1.])
    """
    return {name: value[0] for name, value in stack([seed], like, distribution).items()}


def expand(terms: Iterable[Directional], like: Params) -> dict[str, Tensor]:
    """The gradient that seeded terms stand for: sum_k coefficient_k * direction(seed_k), summed in the order given.

    Call it once a step, with all of the step's terms as the estimator made them: terms of one block and distribution
    that follow each other are drawn together, and orthogonal directions are so among those drawn together.

    Args:
        terms: of one step's estimate.
        like: name -> tensor of the values that the terms are about.

    Returns:
        name -> tensor, of each name that a term has.
    """
    total: dict[str, Tensor] = {}
    for (block, distribution), group in itertools.groupby(terms, key=lambda t: (t.block, t.distribution)):
        own = list(group)
        drawn = stack([term.seed for term in own], {name: like[name] for name in block}, distribution)
        for name, values in drawn.items():
            for term, value in zip(own, values, strict=True):
                step = value.to(like[name].dtype) * term.coefficient
                total[name] = total[name] + step if name in total else step
    return total
