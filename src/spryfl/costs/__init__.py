"""What a method costs, predicted and measured in one unit: passes, operations, bytes; and memory, measured.

    predict(...)        a method at given shapes      shapes(...)        the shapes from a few numbers
    counted_flops()     operations that run           peak_memory()      bytes held at once

Predictions need no weights. Tests hold each against what a run counts.
"""

from spryfl.costs.flops import counted_flops
from spryfl.costs.memory import peak_memory
from spryfl.costs.passes import PREDICTED, Step, passes, predictor, step_flops
from spryfl.costs.predict import DRAW, Costs, predict, work
from spryfl.costs.shapes import Shapes, shapes
from spryfl.costs.traffic import ACCOUNT, Part, Traffic, header

__all__ = [
    "ACCOUNT",
    "DRAW",
    "PREDICTED",
    "Costs",
    "Part",
    "Shapes",
    "Step",
    "Traffic",
    "counted_flops",
    "header",
    "passes",
    "peak_memory",
    "predict",
    "predictor",
    "shapes",
    "step_flops",
    "work",
]
