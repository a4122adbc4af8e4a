"""Forward-mode derivatives of PyTorch functions in K directions at once. Needs torch alone, nothing else of spryfl."""

from .engine import jvp
from .registry import rule_for

__all__ = ["jvp", "rule_for"]
