"""Forward-mode derivatives of PyTorch functions in K directions at once. Needs torch alone; usable without the rest of spryfl."""

from .engine import jvp

__all__ = ["jvp"]
