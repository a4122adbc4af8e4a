"""What a process holds that has imported a client's packages and done nothing else: measured here, now.

Cost: a fresh process, 3 to 6 s; `begun` starts it beside other work.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable

# What a client of a federation imports. The kernel's word for memory that no file stands behind is RssAnon.
_CODE = """
import spryfl.api, spryfl.backbone
print(dict(line.split(':', 1) for line in open('/proc/self/status'))['RssAnon'].split()[0])
"""


@functools.cache
def begun() -> Callable[[], int]:
    """Starts the measuring process; the function that comes back waits for it. Once in a process."""
    child = subprocess.Popen([sys.executable, "-c", _CODE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    @functools.cache
    def wait() -> int:
        said, _ = child.communicate(timeout=120)
        words = said.split()
        return int(words[-1]) * 1024 if words else 0

    return wait


def process() -> int:
    """Bytes of anonymous resident memory after the imports, on this machine; 0 where the system does not tell."""
    return begun()()
