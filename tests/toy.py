"""The toy loss of `spryfl.testing`, under the name that tests import."""

from spryfl.testing import Toy, problem, true_gradient

__all__ = ["Toy", "problem", "true_gradient"]
