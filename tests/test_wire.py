"""Messages survive their bytes, damage is noticed, and what travels is what was predicted."""

from __future__ import annotations

import json
import struct
import zlib

import pytest
import torch

from spryfl import costs, wire
from spryfl.types import Instruction, Passes, Update

TOLD = Instruction(
    3, 7, 2**62 + 1, ("a", "b"), {"a": torch.randn(2, 3), "b": torch.randn(0), "c": torch.ones(4)}, 0.1, True
)
DONE = Update(3, 7, {"a": torch.randn(2, 3)}, 11, 0.1 + 0.2, Passes(1, 4, 0), 12345, 0.25, 3, 1, 2)


@pytest.mark.parametrize("message", [TOLD, DONE])
def test_a_message_survives_its_bytes(message):
    back = wire.decode(wire.encode(message))
    assert type(back) is type(message)
    assert back._replace(params={}) == message._replace(params={})
    assert list(back.params) == list(message.params)
    assert all(torch.equal(back.params[name], value) for name, value in message.params.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_keep_their_bits(dtype):
    value = torch.tensor([[1.5, -0.0, 3.25e-3]]).to(dtype).T  # not contiguous
    _, back = wire.unpack(wire.pack({}, {"x": value}))
    assert back["x"].dtype == dtype
    assert torch.equal(*(x.flatten().view(torch.uint8) for x in (back["x"], value)))


def test_a_scalar_and_an_empty_tensor_keep_their_shapes():
    _, back = wire.unpack(wire.pack({}, {"s": torch.tensor(3), "e": torch.zeros(0, 4)}))
    assert (back["s"].shape, back["e"].shape) == (torch.Size([]), torch.Size([0, 4]))


@pytest.mark.parametrize("cut", [0, 5, 16, 60, -1])
def test_a_container_cut_short_is_noticed(cut):
    with pytest.raises(ValueError, match=r"cut short|not a spryfl"):
        wire.unpack(wire.encode(TOLD)[:cut])


def test_every_damaged_byte_is_noticed():
    data = wire.encode(DONE)
    for i in range(len(data)):
        with pytest.raises(ValueError, match=r"cut short|not a spryfl"):
            wire.unpack(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])


def test_another_schema_is_refused(monkeypatch):
    monkeypatch.setattr(wire, "SCHEMA", 99)
    data = wire.pack({}, {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="schema"):
        wire.unpack(data)


def test_peak_memory_counts_what_is_alive_at_once():
    with costs.peak_memory() as peak:
        a = torch.zeros(1000)
        del a
        b = torch.zeros(2000)
        c = b.view(2, 1000)[0] + 1
    assert peak() == 4 * 3000
    assert c.shape == (1000,)


def test_peak_memory_sees_what_autograd_keeps():
    def chain(x):
        for _ in range(10):
            x = torch.tanh(x)
        return x.sum()

    x = torch.zeros(1000)
    with costs.peak_memory() as kept:
        chain(x.requires_grad_()).backward()
    with costs.peak_memory() as let_go, torch.no_grad():
        chain(x)
    assert kept() >= 10 * 4000
    assert let_go() <= 3 * 4000


def _container(header, body=b""):
    """A container of any header and body, its checksum right: what only a sender with intent makes."""
    head = zlib.compress(header)
    prefix = struct.Struct("<8sII")
    whole = head + body
    return prefix.pack(b"SPRYFL\x00\x01", len(head), zlib.crc32(whole, len(head))) + whole


@pytest.mark.parametrize(
    "shape", [[3], [1], [10**15], [-2, -1], [2, 2]], ids=["more", "fewer", "huge", "negative", "other"]
)
def test_a_header_that_lies_about_its_tensors_is_refused(shape):
    index = {"schema": wire.SCHEMA, "tensors": [["x", "float32", shape]]}
    with pytest.raises(ValueError, match="by its header, and there are 8"):
        wire.unpack(_container(json.dumps(index).encode(), b"\0" * 8))
    index["tensors"][0][2] = [2]
    assert wire.unpack(_container(json.dumps(index).encode(), b"\0" * 8))[1]["x"].tolist() == [0, 0]


def test_a_header_that_swells_is_refused(monkeypatch):
    monkeypatch.setattr(wire, "_LARGEST", 10_000)
    small = json.dumps({"schema": wire.SCHEMA, "tensors": [], "x": "a" * 9_000}).encode()
    assert wire.unpack(_container(small))[0]["x"][0] == "a"
    with pytest.raises(ValueError, match="over 10000 bytes"):
        wire.unpack(_container(small.replace(b"aaa", b"aaaaaa")))
