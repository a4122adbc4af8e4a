"""What random directions cost: time and memory of drawing K of d values, and of summing K terms of a gradient.

    python benchmarks/noise.py [--threads N]        a table; beside each, all values of a call in one tile

In one process by turns, medians; processor time, so that other programs do not count. Memory: the most bytes of live
tensor storage, counted at each operation, the directions themselves among them. d: MiniLM with LoRA-XS and head,
RoBERTa-Large with LoRA r = 1, the same with its head. Cost: a minute of one core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from spryfl import noise
from spryfl.costs import peak_memory
from spryfl.types import Directional

SHAPES = {"2,306": (1536, 770), "98,304": (98_304,), "1,152,004": (98_304, 1_053_700)}
DIRECTIONS = (1, 16)


def main() -> None:
    """A line a shape and K: as it is, and with all values of a call in one tile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print("| d | K | draw, ms | one tile, ms | draw, MB | one tile, MB | sum, ms | sum, MB | directions alone, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for said, sizes in SHAPES.items():
        like = {f"w{i}": torch.zeros(size) for i, size in enumerate(sizes)}
        for count in DIRECTIONS:
            print(f"| {said} | {count} | {line(like, count, asked.repeats)} |", flush=True)


def line(like: dict[str, torch.Tensor], count: int, repeats: int) -> str:
    """The numbers of one shape and K."""
    terms = [Directional(k, 0.5, tuple(like), "gaussian") for k in range(count)]
    tiled, own = noise.TILE, sum(value.nbytes for value in like.values())

    def draw(tile: int) -> Callable[[], Any]:
        def run() -> Any:
            noise.TILE = tile
            try:
                return noise.stack(list(range(count)), like)
            finally:
                noise.TILE = tiled

        return run

    ways = [draw(tiled), draw(1 << 40), lambda: noise.expand(terms, like)]
    seconds = by_turns(ways, repeats)
    held = [most(way) for way in ways]
    times, bytes_ = [f"{1e3 * one:.1f}" for one in seconds], [f"{one / 1e6:.1f}" for one in held]
    return " | ".join([times[0], times[1], bytes_[0], bytes_[1], times[2], bytes_[2], f"{count * own / 1e6:.1f}"])


def by_turns(ways: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median processor seconds of each."""
    seen: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats + 1):
        for way, kept in zip(ways, seen, strict=True):
            begun = time.process_time()
            way()
            kept.append(time.process_time() - begun)
    return [statistics.median(kept[1:]) for kept in seen]


def most(way: Callable[[], Any]) -> int:
    """The most bytes it holds at once."""
    with peak_memory() as held:
        way()
    return held()


if __name__ == "__main__":
    main()
