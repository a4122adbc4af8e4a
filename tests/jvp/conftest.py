"""Tests of the forward-mode engine: what they share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _own_generator():
    """Each test draws from its own seed and leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
