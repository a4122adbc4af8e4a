"""A frozen backbone that is kept small: encoded matrices, decoded a few rows at a time where they are multiplied."""

from spryfl.backbone.adopt import adopt
from spryfl.backbone.codec import CODECS, Codec, codec_of, nbytes
from spryfl.backbone.packed import Matrix, Packed, multiply, pack

__all__ = ["CODECS", "Codec", "Matrix", "Packed", "adopt", "codec_of", "multiply", "nbytes", "pack"]
