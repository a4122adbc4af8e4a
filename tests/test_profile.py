"""`spryfl profile`: what the system and the allocator count in a real step, and the prediction beside it."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from transformers import BertConfig
from typer.testing import CliRunner

from spryfl import cli, methods, packing
from spryfl.config import Experiment
from spryfl.costs.resident import pages_of, resident, watched
from spryfl.footprint import Footprint, measure
from spryfl.footprint.measure import Measured, Profile, Request, predicted, run

MB = 1_000_000
WIDE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 256}
linux = pytest.mark.skipif(sys.platform != "linux", reason="the system must tell what is anonymous")


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """A folder with a configuration and no weights."""
    folder = tmp_path_factory.mktemp("shape")
    BertConfig(vocab_size=200, **WIDE).save_pretrained(folder)
    return folder


def request(folder, method="spry", **changes):
    usual = Request(str(folder), asdict(methods.named(method)), {"kind": "lora", "r": 1}, {"kind": "classification"},
                    ("0", "1"), rows=4, tokens=48, clients=8 if method == "spry" else 1)  # fmt: skip
    return usual._replace(**changes)


# What the system counts.


@linux
def test_anonymous_memory_is_what_was_written():
    before = resident().anonymous
    held = torch.ones(40 * MB // 4)
    grown = resident().anonymous - before
    assert 39 * MB < grown < 60 * MB
    assert held.sum() == 40 * MB / 4


@linux
def test_a_peak_between_marks_is_seen_and_belongs_to_its_phase():
    with watched(every=0.002) as watch:
        start = resident().anonymous
        watch.mark("short")
        for _ in range(20):  # long enough for some looks
            torch.ones(60 * MB // 4)
        watch.mark("after")
        kept = torch.ones(20 * MB // 4)
    peaks = {name: most.anonymous - start for name, most in watch.peaks}
    assert peaks["short"] > 50 * MB
    assert watch.peak.anonymous - start == max(peaks.values())
    assert kept.nbytes < resident().anonymous


@linux
def test_a_mark_looks_itself():
    with watched(every=60) as watch:
        start = resident().anonymous
        with mmap.mmap(
            -1, 30 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        ) as fresh:  # the C library has freed blocks at hand
            fresh.write(b"1" * (30 * MB))
            watch.mark("then")
    assert watch.peaks[0][1].anonymous - start > 29 * MB


@linux
def test_pages_of_a_folder_are_those_that_were_touched(tmp_path):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "weights"
    file.write_bytes(bytes(8 * MB))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert pages_of(str(tmp_path / "a")) < MB
        assert sum(mapped[::4096]) == 0
        assert 7.9 * MB < pages_of(str(tmp_path / "a")) < 8.2 * MB
        assert pages_of(str(tmp_path / "b")) == 0
    assert pages_of(str(tmp_path / "a")) == 0


FREED = """
import sys, torch
from spryfl.costs.resident import resident
from spryfl.jvp.memory import keep_freed, return_freed
{told}
held = [torch.ones(500_000) for _ in range(40)]
before = resident().anonymous
del held[::2]
print(before - resident().anonymous)
"""


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("told", "given_back"), [
    ("keep_freed()", False),
    ("return_freed()", True),
    ("keep_freed(); return_freed()", True),
    ("return_freed(); keep_freed()", False),  # a forward step after one by reverse mode
    ("return_freed(streams=True); keep_freed()", True),  # a process that streams its model stays small
])  # fmt: skip
def test_freed_blocks_are_kept_or_given_back(told, given_back):
    """20 blocks of 2 MB among 20 that live."""
    words = [sys.executable, "-c", FREED.format(told=told)]
    freed = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    assert freed > 38 * MB if given_back else freed < 10 * MB


FAULTS = """
import contextlib, resource, torch
from spryfl.jvp.memory import again, return_freed
return_freed()
with {inside}:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(1 << 20)  # 4 MB, freed at once
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@linux
@pytest.mark.slow
def test_a_loop_uses_the_pages_of_its_freed_block_again():
    def faults(inside):
        words = [sys.executable, "-c", FAULTS.format(inside=inside)]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    assert faults("contextlib.nullcontext()") > 10 * faults("again(4 << 20)")


# What a step holds.

TRIED = ["spry", "fedavg", "fedavg_checkpointed", "fedmezo", "fedspzo"]


@pytest.mark.parametrize("method", TRIED)
def test_the_allocators_count_is_the_predicted_one(method, shape):
    asked = request(shape, method)
    found, foretold = run(asked), predicted(asked)
    assert foretold.step == pytest.approx(found.counted, rel=0.03)
    assert found.parts.step == found.counted
    assert found.parts.gradients == foretold.gradients
    assert found.parts.total + found.beside == found.peak
    assert (found.parts.tangents > 0) == ("fedavg" not in method)
    assert found.passes[2] == (1 if "fedavg" in method else 0)


def test_micro_batches_hold_less_and_are_predicted(shape):
    whole, parts = (request(shape, "fedavg", micro_batch=most) for most in (0, 1))
    one, other = run(whole), run(parts)
    assert other.counted < 0.45 * one.counted
    assert predicted(parts).step == pytest.approx(other.counted, rel=0.05)
    assert other.passes == one.passes


def test_who_moves_what_is_the_slots(shape):
    first, last = (run(request(shape, "fedavg_split", clients=8, slot=slot)) for slot in (0, 7))
    assert first.counted > 1.5 * last.counted  # no graph is kept of what lies before the first moved block
    with pytest.raises(ValueError, match="client 8 of a round of 8"):
        predicted(request(shape, slot=8))


def test_streamed_buffers_are_two_of_the_largest_block(tmp_path):
    folder = tmp_path / "packed"
    from test_tasks import tokenizer

    packing.random_store(BertConfig(vocab_size=200, **WIDE), folder, "8bit", tokenizer=tokenizer("bert"))
    largest = max(file.stat().st_size for file in folder.glob("block-*.safetensors"))
    asked = request(folder, stream=True)
    found, resident_one = run(asked), run(asked._replace(stream=False))
    assert found.parts.buffers == pytest.approx(2 * largest, rel=0.02)
    assert resident_one.parts.buffers == 0
    assert found.counted == pytest.approx(resident_one.counted, rel=0.01)  # counters of the noise are kept
    assert predicted(asked).buffers == pytest.approx(found.parts.buffers, rel=0.1)
    assert predicted(asked).step == pytest.approx(found.counted, rel=0.05)


def test_a_configuration_alone_cannot_be_streamed(shape):
    with pytest.raises(ValueError, match="holds a configuration alone"):
        run(request(shape, stream=True))


# The process and the command.


@linux
@pytest.mark.slow
def test_a_fresh_process_and_its_prediction(shape):
    """Most of it is the imports: the gap is theirs and the C library's."""
    found = measure.profile(request(shape))
    assert abs(found.gap) < 0.15
    assert abs(found.counted_gap) < 0.03
    assert 150 * MB < found.measured.parts.process < found.measured.peak
    assert found.measured.peak - found.measured.counted - found.measured.parts.process < 150 * MB


def test_what_goes_wrong_there_is_said_here(shape, monkeypatch):
    started = "import sys; sys.stdin.read(); "
    for code, text in (
        ("print('no such model', file=sys.stderr); sys.exit(2)", "^no such model$"),
        ("import os; os.kill(os.getpid(), 9)", "killed, most likely as memory ran out"),
        ("1 / 0", "(?s)ended with 1 .*ZeroDivisionError"),
    ):
        monkeypatch.setattr(measure, "_CODE", started + code)
        with pytest.raises(ValueError, match=text):
            measure.measured(request(shape))


def test_a_request_and_its_answer_travel_as_they_are(shape, monkeypatch):
    asked = request(shape)
    monkeypatch.setattr(measure, "_CODE", "import sys; sys.stderr.write(sys.stdin.read()); sys.exit(2)")
    with pytest.raises(ValueError, match="spry") as said:
        measure.measured(asked)
    given = json.loads(str(said.value))
    method = {**given["method"], "classes": tuple(given["method"]["classes"])}
    assert Request(**{**given, "labels": tuple(given["labels"]), "method": method}) == asked


def test_the_command_shows_both_and_the_gap(shape, monkeypatch):
    asked = []
    parts = Footprint(*(n * MB for n in (360, 100, 10, 50, 20, 5, 0, 0)))
    found = Measured(parts, *(n * MB for n in (15, 560, 0, 130, 400, 75)), 1.5, (1, 1, 0))
    foretold = Footprint(*(n * MB for n in (350, 100, 10, 50, 20, 5, 0, 0)))
    monkeypatch.setattr(measure, "profile", lambda r: asked.append(r) or Profile(foretold, found))
    words = [str(shape), "-m", "fedavg", "--batch", "6", "--tokens", "32", "--micro-batch", "2", "--clients", "50"]
    words += ["--client", "3", "--adapter", "ia3", "--set", "method.estimator.checkpoint=true", "--labels", "3"]
    shown = CliRunner().invoke(cli.app, ["profile", *words])
    assert shown.exit_code == 0, shown.output
    [one] = asked
    assert (one.rows, one.tokens, one.micro_batch, one.clients, one.slot) == (6, 32, 2, 50, 3)
    assert (one.adapter["kind"], one.labels, one.method["estimator"]["checkpoint"]) == ("ia3", ("0", "1", "2"), True)
    rows = {line.split()[0]: line.split()[-3:] for line in shown.output.splitlines() if line and line.split()}
    assert rows["process"] == ["350.0", "360.0", "-10.0"]
    assert rows["peak"] == ["535.0", "560.0", "-25.0"]
    assert "off by -4.5%" in shown.output
    assert "75.0 of 75.0 MB by +0.0%" in shown.output


def test_an_experiment_is_asked_for_as_it_stands():
    one = measure.requested(Experiment(train={"keep_prefix": 3.0, "steps": 4, "dropout": False}, threads=2), slot=2)
    assert (one.keep_prefix, one.threads, one.slot, one.rows, one.tokens) == (3.0, 2, 2, 8, 128)
    assert one.method["name"] == "spry"
