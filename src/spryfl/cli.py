"""The command line. Its commands stand in commands/, one file a group, in the order of --help.

Whatever is wrong with what was given ends in one clear message and exit code 2; an interruption in 130.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import Any

from spryfl.commands import app, err

# Files of commands/, in the order of --help; importing one registers its commands.
GROUPS = (
    "training",
    "tuning",
    "reporting",
    "tables",
    "answers",
    "planning",
    "profiling",
    "packing",
    "flower",
)
for _group in GROUPS:
    importlib.import_module(f"spryfl.commands.{_group}")


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:  # without the place in the source
    err.print(f"warning {message}", style="yellow", soft_wrap=True)


def main() -> None:
    """The entry point: every ValueError, and what the system refuses, is a message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _warn
    try:
        app()
    except (ValueError, OSError) as error:
        err.print(f"spryfl: {error}", style="red", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
