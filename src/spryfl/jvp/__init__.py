"""Forward-mode derivatives of PyTorch functions in K directions at once. Needs torch alone, nothing else of spryfl."""

from .engine import jvp

__all__ = ["jvp"]
