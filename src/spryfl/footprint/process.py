"""What a process holds that has imported a client's packages and done nothing else: measured here, now.

Cost: a fresh process, 3 to 6 s, once; nothing where `measure_here` was called.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

# What a client of a federation imports. The kernel's word for memory that no file stands behind is RssAnon.
_CODE = "import spryfl.api, spryfl.backbone; from spryfl.footprint.process import own; print(own())"


_here: list[int] = []


def measure_here() -> None:
    """Lets this process stand for a client's: called by a command when it has imported all that one does."""
    if not _here:
        _here.append(own())


def own() -> int:
    """Bytes of anonymous resident memory of this process; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


@functools.cache
def _fresh() -> int:
    child = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, timeout=120, check=False)
    words = child.stdout.split()
    return int(words[-1]) if words else 0


def process() -> int:
    """Bytes of anonymous resident memory after the imports, on this machine; 0 where the system does not tell."""
    return _here[0] if _here else _fresh()
