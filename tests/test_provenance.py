"""What a result says of the machine that made it."""

from __future__ import annotations

import torch

from spryfl import provenance

LINUX = "processor\t: 0\nvendor_id\t: Somebody\nmodel name\t: A Processor: 3.0 GHz\nmodel name\t: Another\n"


def test_the_processor_of_linux(tmp_path):
    told = tmp_path / "cpuinfo"
    told.write_text(LINUX)
    assert provenance._processor(told) == "A Processor: 3.0 GHz"


def test_no_name_where_none_is_told(tmp_path):
    told = tmp_path / "cpuinfo"
    assert provenance._processor(told) == ""  # not Linux
    told.write_bytes(b"CPU part\t: 0xd0c\nodd \xff\n")
    assert provenance._processor(told) == ""


def test_hardware_is_said_in_words():
    hardware = provenance.environment(torch.device("cpu"))["hardware"]
    assert all(isinstance(value, str) and value for value in hardware.values())
    assert hardware["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert provenance.environment(torch.device("meta"))["hardware"]["device"] == "meta"
