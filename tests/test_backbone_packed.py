"""Encoded matrices and the linear map over them, against autograd and jvp on the decoded weights."""

from __future__ import annotations

import contextlib
import copy
import gc
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call

from spryfl.backbone import CODECS, Matrix, Packed, codec, codec_of, multiply, nbytes, pack, packed
from spryfl.jvp import jvp

SHAPES = [(48, 64), (50, 100), (33, 96), (16, 33), (1, 1)]  # (out, in)
ERRORS = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11, "8bit": 1e-2, "4bit": 0.12}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Sixteen rows at once, so that every product here goes over several chunks."""
    monkeypatch.setattr(packed, "CHUNK", 1)


def pair(shape: tuple[int, int], precision: str, bias: bool = True) -> tuple[Packed, nn.Linear]:
    """A packed map, and an ordinary one with its decoded weight."""
    torch.manual_seed(sum(shape))
    layer = nn.Linear(shape[1], shape[0], bias=bias)
    made = pack(layer, precision)
    layer.weight.data = made.weight.clone()
    return made, layer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", CODECS)
def test_any_rows_decode_by_themselves(precision, shape):
    weight = torch.randn(shape)
    made = CODECS[precision].encode(weight)
    whole = CODECS[precision].decode(made, shape, 0, shape[0])
    assert whole.shape == weight.shape
    assert whole.dtype == torch.float32
    assert (whole - weight).norm() <= ERRORS[precision] * weight.norm()
    first, last = shape[0] // 3, shape[0]
    cut = {name: part.clone() for name, part in made.items()}
    for part in cut.values():  # what lies outside the range is not read
        part[:first] = 1
    assert torch.equal(CODECS[precision].decode(cut, shape, first, last), whole[first:last])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", CODECS)
def test_the_layout_is_what_is_encoded(precision, shape):
    parts = CODECS[precision].encode(torch.randn(shape, dtype=torch.float64))
    assert CODECS[precision].layout(shape) == {n: (p.dtype, tuple(p.shape)) for n, p in parts.items()}
    assert nbytes(precision, shape) == sum(part.nbytes for part in parts.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("precision", CODECS)
def test_any_floating_type_is_encoded(precision, dtype):
    weight = torch.randn(8, 64).to(dtype)
    plain, given = (CODECS[precision].encode(w) for w in (weight.float(), weight))
    assert all(torch.equal(plain[name], given[name]) for name in plain)


def test_four_bits_are_bitsandbytes():
    """Where rows are whole blocks, the parts are those of the library, value by value."""
    bnb = codec.bitsandbytes().functional
    weight = torch.randn(8, 128)
    parts, (codes, state) = CODECS["4bit"].encode(weight), bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(parts["weight"].flatten(), codes.flatten())
    assert torch.equal(CODECS["4bit"].decode(parts, (8, 128), 0, 8), bnb.dequantize_4bit(codes, state))


def test_eight_bits_are_off_by_half_a_step_at_most():
    """A step is a 127th of the largest value in the block."""
    weight = torch.randn(16, 256)
    blocks = weight.unflatten(1, (-1, 64))
    step = blocks.abs().amax(2, keepdim=True) / 127
    parts = CODECS["8bit"].encode(weight)
    off = (CODECS["8bit"].decode(parts, (16, 256), 0, 16).unflatten(1, (-1, 64)) - blocks).abs()
    assert (off <= 0.501 * step).all()
    assert (off.amax(2, keepdim=True) > 0.4 * step).all()


def test_a_row_of_zeros_stays_zero():
    for precision in CODECS:
        assert not pack_of(torch.zeros(4, 64), precision).weight.clone().any()


def pack_of(weight: torch.Tensor, precision: str) -> Packed:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return pack(layer, precision)


def test_unknown_precision():
    with pytest.raises(ValueError, match=r'precision = "3bit" is unknown\. Possible: float32, bfloat16'):
        codec_of("3bit")
    with pytest.raises(ValueError, match="is unknown"):
        Packed(4, 4, None, "3bit", dict)


def test_four_bits_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: `pip install \"spryfl\[quant\]\"`"):
        CODECS["4bit"].encode(torch.ones(2, 64))
    CODECS["8bit"].encode(torch.ones(2, 64))


@pytest.mark.parametrize("names", [("x",), ("x", "bias"), ("bias",)], ids=" and ".join)
@pytest.mark.parametrize(("k", "chunk"), [(1, None), (8, None), (8, 3)])
@pytest.mark.parametrize("precision", CODECS)
@pytest.mark.parametrize("shape", [(48, 64), (50, 100)])
def test_forward_mode_is_that_of_the_decoded_weight(shape, precision, k, chunk, names):
    made, plain = pair(shape, precision)
    point = {"x": torch.randn(3, 5, shape[1]), "bias": torch.randn(shape[0])}
    directions = {name: torch.randn(k, *point[name].shape) for name in names}
    found, truth = (
        jvp(lambda p, m=m: functional_call(m, {"bias": p["bias"]}, (p["x"],)), point, directions, chunk=chunk)
        for m in (made, plain)
    )
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("precision", CODECS)
def test_backprop_is_that_of_the_decoded_weight(precision):
    made, plain = pair((50, 100), precision)
    made.bias.requires_grad_()
    x, g = torch.randn(3, 5, 100), torch.randn(3, 5, 50)
    grads = []
    for layer in (made, plain):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(layer(leaf), [leaf, layer.bias], g))
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-5)


def test_a_chunk_is_decoded_once_for_the_value_and_all_directions(monkeypatch):
    """Two chunks of 24 rows are decoded for K = 8: twice, not eighteen times; and twice more on the way back."""
    decoded = []
    plain = CODECS["8bit"]

    def counted(parts, shape, first, last):
        decoded.append((first, last))
        return plain.decode(parts, shape, first, last)

    monkeypatch.setitem(CODECS, "8bit", plain._replace(decode=counted))
    made, _ = pair((24, 64), "8bit")
    decoded.clear()
    jvp(lambda p: made(p["x"]), {"x": torch.randn(4, 64)}, {"x": torch.randn(8, 4, 64)})
    assert decoded == [(0, 16), (16, 24)]
    made(torch.randn(4, 64, requires_grad=True)).sum().backward()
    assert decoded == [(0, 16), (16, 24)] * 3


def test_the_value_of_a_jvp_is_the_forward_pass_bit_for_bit():
    made, _ = pair((50, 100), "4bit")
    x = torch.randn(6, 100)
    value, _ = jvp(lambda p: made(p["x"]), {"x": x}, {"x": torch.randn(3, 6, 100)})
    assert torch.equal(value, made(x))


@pytest.mark.parametrize("shape", [(11008, 4096), (4096, 11008), (50, 100), (1, 1 << 22)])
def test_chunks_cover_the_rows_once_and_start_on_a_line(shape, monkeypatch):
    monkeypatch.setattr(packed, "CHUNK", 4 << 20)
    chunks = list(Matrix("4bit", shape, dict).chunks())
    assert [row for at in chunks for row in range(at.start, at.stop)] == list(range(shape[0]))
    for at in chunks:
        assert at.start * 4 * shape[1] % 64 == 0
        assert at.stop - at.start <= 16 or (at.stop - at.start) * 4 * shape[1] <= 4 << 20


def test_backprop_keeps_neither_the_input_nor_the_weight_nor_the_parts():
    weight = torch.randn(48, 64)
    held = []

    def parts():
        made = CODECS["8bit"].encode(weight)
        held.extend(weakref.ref(part) for part in made.values())
        return made

    layer = Packed(64, 48, None, "8bit", parts)
    leaf = torch.randn(4, 64, requires_grad=True)
    x = leaf * 2
    kept = weakref.ref(x)
    y = layer(x)
    del x
    gc.collect()
    assert kept() is None
    assert len(held) == 2
    assert all(ref() is None for ref in held)
    y.sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * layer.weight.clone().sum(0).expand(4, 64), rtol=1e-5, atol=1e-5)


def test_backprop_asks_for_the_parts_again():
    """A streamer may have let the block go meanwhile."""
    asked = []
    parts = CODECS["4bit"].encode(torch.randn(48, 64))
    layer = Packed(64, 48, None, "4bit", lambda: asked.append(1) or parts)
    y = layer(torch.randn(2, 64, requires_grad=True))
    assert len(asked) == 1
    y.sum().backward()
    assert len(asked) == 2


@pytest.mark.parametrize("precision", CODECS)
def test_the_bits_do_not_depend_on_where_the_parts_lie(precision):
    torch.manual_seed(1)
    made = CODECS[precision].encode(torch.randn(50, 100))
    x, products = torch.randn(7, 100), []
    for off in (0, 4, 8, 60):
        moved = {}
        for name, part in made.items():
            room = torch.zeros(part.nbytes + 128, dtype=torch.uint8)
            start = -room.data_ptr() % 64 + off
            moved[name] = room[start : start + part.nbytes].view(part.dtype).view(part.shape)
            moved[name].copy_(part)
            assert moved[name].data_ptr() % 64 == off
        rows = CODECS[precision].decode(moved, (50, 100), 16, 32)
        assert rows.data_ptr() % 64 == 0  # what decides on the bits, at some shapes
        products.append(multiply(x, None, Matrix(precision, (50, 100), lambda moved=moved: moved)))
    assert all(torch.equal(products[0], one) for one in products[1:])


def test_low_precision_inputs_are_multiplied_in_float32():
    made, plain = pair((50, 100), "8bit")
    x = torch.randn(4, 100).bfloat16()
    assert torch.equal(made(x), made(x.float()).bfloat16())
    torch.testing.assert_close(made(x).float(), plain(x.float()), rtol=1e-2, atol=1e-2)


def test_it_is_a_linear_layer_without_a_weight_of_its_own():
    made, plain = pair((50, 100), "4bit")
    assert isinstance(made, nn.Linear)
    assert [name for name, _ in made.named_parameters()] == ["bias"]
    assert list(made.state_dict()) == ["bias"]
    assert not made.bias.requires_grad
    assert not list(pack(nn.Linear(4, 4, bias=False), "8bit").parameters())
    assert repr(made) == "Packed(in_features=100, out_features=50, bias=True, precision=4bit)"
    bias = torch.randn(50)
    x = torch.randn(2, 100)
    torch.testing.assert_close(functional_call(made, {"bias": bias}, (x,), strict=True), plain(x) - plain.bias + bias)
    made.load_state_dict({"bias": bias})
    assert torch.equal(made.bias, bias)


def test_a_copy_shares_the_parts_and_not_the_bias():
    made, _ = pair((48, 64), "8bit")
    other = copy.deepcopy(made)
    assert other.matrix is made.matrix
    other.bias.data.zero_()
    assert made.bias.any()


def test_the_weight_costs_nothing_until_it_is_used():
    asked = []
    parts = CODECS["8bit"].encode(torch.randn(8, 64))
    layer = Packed(64, 8, None, "8bit", lambda: asked.append(1) or parts)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == ((8, 64), torch.float32, torch.device("cpu"))
    assert weight.detach().data.float().shape == (8, 64)
    assert not weight.requires_grad
    assert not asked
    truth = CODECS["8bit"].decode(parts, (8, 64), 0, 8)
    assert torch.equal(weight.t() * 2, truth.t() * 2)
    torch.linalg.svd(weight.detach())
    assert len(asked) == 1
    assert type(weight * 2) is torch.Tensor


def test_nothing_is_merged_into_it():
    layer = pack(nn.Linear(64, 8), "8bit")
    with pytest.raises(ValueError, match="cannot be written to"):
        layer.weight.data += 1
    with pytest.raises(ValueError, match="cannot be written to"):
        layer.weight.data = torch.ones(8, 64)
    with pytest.raises(ValueError, match="cannot be written to"):
        layer.weight.add_(1)


def test_a_conv1d_is_packed_the_other_way_round():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(48, 64)
    layer.bias.data = torch.randn(48)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(pack(layer, "float32")(x), layer(x), rtol=1e-5, atol=1e-5)


def test_chunks_use_their_pages_again_only_where_nobody_keeps_activations(monkeypatch):
    told = []
    monkeypatch.setattr(packed, "again", lambda nbytes: told.append(nbytes) or contextlib.nullcontext())
    layer, x = pack(nn.Linear(64, 32), "8bit"), torch.ones(4, 64)
    layer(x)
    jvp(lambda p: layer(p["x"]), {"x": x}, {"x": x[None]})
    assert told == [packed.CHUNK] * 2
    layer(x.clone().requires_grad_()).sum().backward()
    assert told == [packed.CHUNK] * 2
