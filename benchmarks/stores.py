"""Writes a packed folder of random values for a shape: python benchmarks/stores.py llama2-7b DIR [precision] [auto].

Time and memory of making it are printed at the end: one block is drawn, encoded, and written for all.
"""

from __future__ import annotations

import resource
import sys
import time

from shapes import config, tokenizer

from spryfl import packing


def main(name: str, folder: str, precision: str = "4bit", auto: str = "AutoModel") -> None:
    """Makes the folder."""
    start = time.perf_counter()
    packing.random_store(config(name), folder, precision, auto=auto, tokenizer=tokenizer())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{folder}: {name} {precision}, {time.perf_counter() - start:.0f} s, peak of resident memory {peak:.2f} GB")


if __name__ == "__main__":
    main(*sys.argv[1:])
