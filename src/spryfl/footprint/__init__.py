"""What one client's step holds at its peak, part by part, predicted from a model's configuration alone.

    process       what a process holds that has imported a client's packages and done nothing
    backbone      frozen values held in memory
    adapters      adapter and head: in the module, and the values as the client has them
    activations   the value pass alone, at its peak; with reverse mode what the graph keeps on top, up to the way back
    tangents      what directions add: K tangents, the directions and what they are drawn from, moved copies
    gradients     gradient and optimizer state, by their sizes
    prefix        hidden states kept for the next pass over the same batch
    buffers       streamed blocks, and the decoded piece of a packed matrix

The step's own code runs on tensors without storage (`phantom`), for short forms of the model, and what it holds is
continued to all blocks: every phase of a step grows by the same bytes with each further block of a kind. Cost: 0.1 to
0.5 s a step; nothing is read but the configuration.
"""

from spryfl.footprint.outline import Outline, outline, outlined, shapes
from spryfl.footprint.predict import Footprint, footprint, held
from spryfl.footprint.process import measure_here, process
from spryfl.footprint.step import Marked, prefix_bytes, step, values

__all__ = [
    "Footprint",
    "Marked",
    "Outline",
    "footprint",
    "held",
    "measure_here",
    "outline",
    "outlined",
    "prefix_bytes",
    "process",
    "shapes",
    "step",
    "values",
]
