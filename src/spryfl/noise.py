"""Random directions as a function of (seed, name): the only source of randomness in an estimate.

    words     Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (index, hash of the name)
    normals   Box-Muller in float64 on 53-bit uniforms, rounded to float32
    signs     one bit of each word

No generator is read or moved. A client that holds some units and a server that holds all draw the same numbers, on
any device, in any order. Many small names share a pass; a large one is drawn in tiles that stay in a core's cache.
Cost: about 0.04 microseconds a value, and 3 MB beside the values, however many.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from spryfl.types import Directional, Params

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Tile = tuple[tuple[str, int, int], ...]  # (name, its first block of four words, how many)
TILE = 1 << 14  # blocks at once, of all seeds: three times as fast as all of a million at once
SMALL = 1 << 18  # values of all directions that are made at once where they are only summed
SOME: ContextVar[int | None] = ContextVar("SOME", default=None)  # tiles of a call that are drawn; for the planner


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


def _counters(tile: Tile) -> tuple[Tensor, ...]:
    """The counters of a tile's n blocks, one after the other: (index low, index high, tag low, tag high), each (n,)."""
    index = torch.cat([torch.arange(first, first + count) for _, first, count in tile])
    counts, tags = torch.tensor([count for *_, count in tile]), [_tag(name) for name, *_ in tile]
    low, high = (
        torch.tensor([word(tag) for tag in tags]).repeat_interleave(counts, output_size=len(index))
        for word in (_low, _high)
    )
    return index & _MASK, index >> 32, low, high


@functools.cache
def _tag(name: str) -> int:
    """64 bits of a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _low(word: int) -> int:
    return word & _MASK


def _high(word: int) -> int:
    return (word >> 32) & _MASK


def words(seeds: Sequence[int], tile: Tile) -> Tensor:
    """Random 32-bit words for each seed and block, int64, (seeds, blocks of the tile, 4), on the CPU.

    Args:
        seeds: the keys.
        tile: (name, its first block, how many) for each name; they follow each other along dimension 1.
    """
    key = [torch.tensor([[word(seed)] for seed in seeds]) for word in (_low, _high)]
    return torch.stack(philox(_counters(tile), key), dim=-1)


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
    """Values for every seed and name, a tile of names and seeds at a time; `each` values come from a block."""
    out = {name: torch.empty(len(seeds), value.numel(), dtype=torch.float32) for name, value in like.items()}
    counts = {name: -(-value.numel() // each) for name, value in like.items()}
    for tile in itertools.islice(_tiles(counts, max(1, TILE // max(len(seeds), 1))), SOME.get()):
        _fill(out, tile, make(words(seeds, tile)), each)
    return {name: value.reshape(len(seeds), *like[name].shape) for name, value in out.items()}


def _fill(out: dict[str, Tensor], tile: Tile, values: Tensor, each: int) -> None:
    """Puts a tile's values in their places; those past a name's end are dropped."""
    start = 0
    for name, first, count in tile:
        own = out[name][:, first * each : (first + count) * each]
        own.copy_(values[:, start : start + count].flatten(1)[:, : own.shape[1]])
        start += count


def _tiles(counts: Mapping[str, int], most: int) -> Iterator[Tile]:
    """All blocks of all names in order, `most` at a time: small names share a tile, large ones are cut."""
    tile: list[tuple[str, int, int]] = []
    room = most
    for name, left in counts.items():
        while left:
            here = min(room, left)
            tile.append((name, counts[name] - left, here))
            left, room = left - here, room - here
            if not room:
                yield tuple(tile)
                tile, room = [], most
    if tile:
        yield tuple(tile)


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
    that follow each other belong together, and orthogonal directions are so among those. Memory: up to
    four times the sum and 4 MB, however many they are.

    Args:
        terms: of one step's estimate.
        like: name -> tensor of the values that the terms are about.

    Returns:
        name -> tensor, of each name that a term has.
    """
    total: dict[str, Tensor] = {}
    for (block, distribution), group in itertools.groupby(terms, key=lambda t: (t.block, t.distribution)):
        own, inside = list(group), {name: like[name] for name in block}
        for part in _parts(own, distribution, sum(value.numel() for value in inside.values())):
            for name, values in stack([term.seed for term in part], inside, distribution).items():
                for term, value in zip(part, values, strict=True):
                    step = value.to(like[name].dtype) * term.coefficient
                    total[name] = total[name].add_(step) if name in total else step
    return total


def _parts(own: list[Directional], distribution: str, size: int) -> Iterator[list[Directional]]:
    """Terms whose directions are drawn together, which is fast: all of a joint law, and small ones; else one by one."""
    together = distribution in JOINT or len(own) * size <= SMALL
    yield from [own] if together else ([term] for term in own)
