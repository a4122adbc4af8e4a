"""What a result must carry of where it was made: versions, hardware, threads, commit, date; the hash of its weights.

Cost: two calls of git, a short file; a hash a second a GB.
"""

from __future__ import annotations

import datetime
import hashlib
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PACKAGES = ("spryfl", "torch", "transformers", "peft", "datasets", "tokenizers")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, threads and commit."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "device": _named(device),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """The hash of named tensors, of any type and on any device, in the order given: 16 hex digits of BLAKE2b.

    >>> digest([("w", torch.zeros(2))]) == digest([("w", torch.zeros(2, 1))])
    False
    """
    whole = hashlib.blake2b(digest_size=8)
    for name, value in named:
        flat = value.detach().cpu().contiguous().reshape(-1)
        whole.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        whole.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return whole.hexdigest()


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of the source tree, if the package runs from one."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        return git("rev-parse", "HEAD") if git("ls-files", __file__) else ""
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _named(device: torch.device) -> str:
    """The GPU, or the processor: its sums' last bits are its own, and after many rounds an accuracy's digits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (_processor() or platform.processor() or device.type) if device.type == "cpu" else device.type


def _processor(told: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as Linux tells it, or nothing: `platform.processor` knows none there."""
    try:
        lines = told.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
