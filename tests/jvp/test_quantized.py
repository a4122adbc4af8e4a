"""Linear maps with quantized weights (bitsandbytes): the exact derivative or an error, never a tangent that is lost."""

from __future__ import annotations

import pytest
import torch

from spryfl.jvp import jvp

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(4, 6, 64), (1, 64)])
def test_four_bits(dtype: torch.dtype, close: float, shape: tuple[int, ...]) -> None:
    """A quantized map is linear: its jvp is the map of the direction, its bias apart."""
    layer = bnb.nn.Linear4bit(64, 128, bias=False, compute_dtype=dtype).to("cpu").eval()
    x, d = torch.randn(shape, dtype=dtype), torch.randn(2, *shape, dtype=dtype)
    with torch.no_grad():
        reference = layer(x), torch.stack([layer(v) for v in d])
    torch.testing.assert_close(jvp(lambda p: layer(p["x"]), {"x": x}, {"x": d}), reference, rtol=close, atol=close)


def test_eight_bits_are_refused() -> None:
    """They round the activations too, which have no derivative then."""
    layer = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False).to("cpu").eval()
    x = torch.randn(4, 64, dtype=torch.float16)
    with pytest.raises(NotImplementedError, match="no forward-mode rule for bitsandbytes"):
        jvp(lambda p: layer(p["x"]), {"x": x}, {"x": torch.ones(1, 4, 64)})
