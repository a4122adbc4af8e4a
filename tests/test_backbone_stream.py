"""Streamed layers: the same bits as resident ones for every estimator, read ahead both ways, never confused."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import weakref

import pytest
import torch
import transformers as hf
from jvp.families import FAMILIES

import spryfl
from spryfl import adapters, journal, models, opened, packing, tasks
from spryfl.backbone import CODECS, Packed
from spryfl.backbone.codec import ALIGN
from spryfl.backbone.store import open_store
from spryfl.backbone.stream import Resident, Streamer
from spryfl.data.examples import Examples
from spryfl.estimators import backprop, central_difference, forward, forward_difference, two_block

LABELS = ("bad", "good")
LAYERS = 5
ESTIMATORS = {
    "forward": forward(directions=2),
    "chunked": forward(directions=3, chunk=1),
    "exact head": forward(exact_head=True),
    "exact top": forward(directions=2, exact_top=2),
    "exact top, checkpointed": forward(exact_top=2, checkpoint=True),
    "all exact": forward(exact_top=-1),
    "central difference": central_difference(),
    "forward difference": forward_difference(),
    "two blocks": two_block(),
    "backprop": backprop(),
    "checkpointed": backprop(checkpoint=True),
}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A function: the packed folder of a small random model with five blocks, by family and precision."""
    here, made = tmp_path_factory.mktemp("packed"), set()

    def of(precision: str = "4bit", family: str = "llama") -> str:
        name = f"{family}-{precision}"
        if name not in made:
            kind, sizes, *_ = FAMILIES[family]
            config = getattr(hf, f"{kind}Config")(**{**sizes, "num_hidden_layers": LAYERS, "n_layer": LAYERS})
            tokenizer = hf.AutoTokenizer.from_pretrained(tiny)
            packing.random_store(config, here / name, precision, tokenizer=tokenizer, seed=1)
            made.add(name)
        return str(here / name)

    return of


def loaded(folder: str, stream: bool, targets: tuple[str, ...] | None = None) -> models.Model:
    base, tokenizer = models.load(folder, LABELS, seed=3, stream=stream)
    made = models.prepare(base, tokenizer, LABELS, adapters.lora(r=2, targets=targets or ()), source=folder, seed=4)
    draw = torch.Generator().manual_seed(5)
    params = {n: v + 0.3 * torch.randn(v.shape, generator=draw) for n, v in made.params.items()}
    return made._replace(params=params)


def rows(model: models.Model):
    texts = ("the film was good", "a sad day in town", "we saw it and they said it was warm", "dull")
    return tasks.encode(model.tokenizer, Examples(texts, None, (1, 0, 1, 0), None), 32)


def batch(model: models.Model):
    return tasks.collate(rows(model), range(4))


def source(model: models.Model):
    return opened.backbone_of(model.module).source


def same(one, other) -> None:
    """The same bits of an estimate."""
    assert one.loss == other.loss
    assert one.terms == other.terms
    assert one.scalars == other.scalars
    assert one.dense.keys() == other.dense.keys()
    assert all(torch.equal(one.dense[n], other.dense[n]) for n in one.dense)


class TestTheSameBits:
    @pytest.mark.parametrize("name", ESTIMATORS)
    @pytest.mark.parametrize("precision", CODECS)
    def test_of_every_estimator_in_every_precision(self, precision, name, folder):
        resident, streamed = (loaded(folder(precision), stream) for stream in (False, True))
        assert type(source(resident)) is Resident
        assert type(source(streamed)) is Streamer
        for seed in (1, 2):
            got = [ESTIMATORS[name](models.loss_fn(m, {}), m.params, batch(m), seed) for m in (resident, streamed)]
            same(*got)
            assert got[0].loss > 0

    @pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "opt"])
    @pytest.mark.parametrize("name", ["forward", "exact top", "checkpointed"])
    def test_of_other_families(self, family, name, folder):
        if family == "albert" and name == "exact top":
            name = "exact head"  # its blocks share their weights
        targets = {"gpt2": ("c_attn",)}.get(family)
        resident, streamed = (loaded(folder("4bit", family), stream, targets) for stream in (False, True))
        same(*(ESTIMATORS[name](models.loss_fn(m, {}), m.params, batch(m), 1) for m in (resident, streamed)))

    @pytest.mark.parametrize("name", ["forward", "exact head", "checkpointed"])
    def test_with_a_kept_prefix_and_one_unit(self, name, folder):
        got = []
        for stream in (False, True):
            model = loaded(folder(), stream)
            moved = {n: v for n, v in model.params.items() if ".layers.3." in n or "modules_to_save" in n}
            fixed = {n: v for n, v in model.params.items() if n not in moved}
            loss = models.loss_fn(model, fixed, keep=1_000_000)
            got.append([ESTIMATORS[name](loss, moved, batch(model), seed) for seed in (1, 2, 3)])
        for one, other in zip(*got, strict=True):
            same(one, other)

    def test_of_evaluation(self, folder):
        found = []
        for stream in (False, True):
            model = loaded(folder(), stream)
            given = rows(model)
            batches = [(chosen, tasks.collate(given, chosen)) for chosen in ([0, 1], [2, 3])]
            found.append(models.score(model, model.params, given, batches))
        assert found[0] == found[1]

    @pytest.mark.parametrize("stream", [False, True])
    def test_parts_begin_on_a_line(self, stream, folder):
        model = loaded(folder(), stream)
        maps = [m for m in model.module.modules() if isinstance(m, Packed)]
        assert len(maps) == 7 * LAYERS
        for one in maps:
            assert all(part.data_ptr() % ALIGN == 0 for part in one.matrix.parts().values())


def test_a_weight_that_was_asked_for_stays_when_its_block_has_gone(folder):
    model = loaded(folder("float32"), True)
    maps = [m for m in model.module.modules() if isinstance(m, Packed)]
    weight, eye = maps[0].weight, torch.eye(maps[0].in_features)
    first = weight @ eye
    for one in maps:
        one(torch.zeros(1, one.in_features))
    assert torch.equal(weight @ eye, first)
    assert torch.equal(maps[0].weight @ eye, first)


def asked(streamer: Streamer, store, blocks) -> list[bool]:
    """Asks for a matrix of each block in turn; whether each was read ahead."""
    found = []
    for block in blocks:
        before = streamer.counts.ahead
        for key in store.inside[store.blocks[block]]:
            streamer.parts(key)
        found.append(streamer.counts.ahead > before)
    return found


class TestReadingAhead:
    @pytest.fixture
    def store(self, folder):
        return open_store(folder())

    def test_forward_and_again(self, store):
        """The first pass begins with what cannot be known; the leap back to the start is known from then on."""
        streamer = Streamer(store)
        assert asked(streamer, store, range(LAYERS)) == [False] + [True] * (LAYERS - 1)
        assert asked(streamer, store, range(LAYERS)) == [False] + [True] * (LAYERS - 1)
        assert asked(streamer, store, range(LAYERS)) == [True] * LAYERS

    def test_backward(self, store):
        """Checkpointed backprop: up, and back down; the last block is still there when it is computed again."""
        streamer = Streamer(store)
        asked(streamer, store, range(LAYERS))
        down = asked(streamer, store, reversed(range(LAYERS - 1)))
        assert down == [False] + [True] * (LAYERS - 2)
        up_and_down = [*range(1, LAYERS), *reversed(range(LAYERS - 1))]
        asked(streamer, store, up_and_down)
        assert asked(streamer, store, up_and_down) == [True] * len(up_and_down)

    def test_a_pass_that_starts_in_the_middle(self, store):
        streamer = Streamer(store)
        for _ in range(2):
            asked(streamer, store, range(2, LAYERS))
        assert asked(streamer, store, range(2, LAYERS)) == [True] * (LAYERS - 2)

    @pytest.mark.parametrize("name", ["forward", "exact head", "exact top", "checkpointed", "central difference"])
    def test_of_an_estimator_from_the_second_step_on(self, name, folder):
        model = loaded(folder(), True)
        loss, given = models.loss_fn(model, {}), batch(model)
        for seed in range(2):
            ESTIMATORS[name](loss, model.params, given, seed)
        counts = source(model).counts
        before = counts.brought, counts.ahead
        ESTIMATORS[name](loss, model.params, given, 3)
        brought, ahead = counts.brought - before[0], counts.ahead - before[1]
        assert brought >= LAYERS - 1
        # Two passes of different kinds end alike: what comes next may be known wrongly once.
        assert ahead >= brought - 1

    def test_a_block_is_read_once_a_pass(self, folder):
        model = loaded(folder(), True)
        before = source(model).counts.brought
        forward(directions=4)(models.loss_fn(model, {}), model.params, batch(model), 1)
        assert source(model).counts.brought - before <= LAYERS

    def test_what_is_read_ahead_is_the_block(self, store):
        """Every order of blocks gives the parts of the block that is asked for."""
        streamer, resident = Streamer(store), Resident(store)
        order = torch.randint(LAYERS, (60,), generator=torch.Generator().manual_seed(1)).tolist()
        for block in order:
            for key in store.inside[store.blocks[block]]:
                expected = resident.parts(key)
                assert all(torch.equal(part, expected[name]) for name, part in streamer.parts(key).items())
        assert 0 < streamer.counts.ahead < streamer.counts.brought < 60


class TestWhatGoesWrong:
    @pytest.mark.parametrize("name", ["forward", "checkpointed", "exact top"])
    def test_an_error_in_the_middle_of_a_pass_leaves_it_usable(self, name, folder):
        model = loaded(folder(), True)
        loss, given = models.loss_fn(model, {}), batch(model)
        expected = ESTIMATORS[name](loss, model.params, given, 1)
        layers = [m for n, m in model.module.named_modules() if n.endswith("mlp.up_proj")]
        for layer in layers:

            def fail(*_):
                raise KeyboardInterrupt

            handle = layer.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                ESTIMATORS[name](loss, model.params, given, 1)
            handle.remove()
            same(ESTIMATORS[name](loss, model.params, given, 1), expected)

    def test_an_interruption_while_it_waits_leaves_it_usable(self, folder, monkeypatch):
        store = open_store(folder())
        streamer, resident = Streamer(store), Resident(store)
        asked(streamer, store, [0, 1])
        reading = streamer._reading
        join = reading._thread.join

        def interrupted():
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(reading._thread, "join", interrupted)
        first, second = store.inside[store.blocks[1]][0], store.inside[store.blocks[2]][0]
        with pytest.raises(KeyboardInterrupt):
            streamer.parts(second)
        join()
        for key in (first, second, first):
            expected = resident.parts(key)
            assert all(torch.equal(part, expected[name]) for name, part in streamer.parts(key).items())

    def test_a_damaged_block_is_named_when_it_is_reached_and_the_others_serve(self, folder, tmp_path):
        shutil.copytree(folder(), tmp_path / "p")
        file = tmp_path / "p" / "block-002.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        model = loaded(str(tmp_path / "p"), True)
        loss = models.loss_fn(model, {})
        for _ in range(2):
            with pytest.raises(ValueError, match=r"block-002.safetensors is damaged"):
                forward()(loss, model.params, batch(model), 1)
        store = open_store(tmp_path / "p")
        assert source(model).parts(store.inside["block-001.safetensors"][0])
        file.write_bytes(whole)
        same(
            forward()(loss, model.params, batch(model), 1),
            forward()(models.loss_fn(m := loaded(folder(), False), {}), m.params, batch(m), 1),
        )

    def test_resident_a_damaged_block_is_named_at_once(self, folder, tmp_path):
        shutil.copytree(folder(), tmp_path / "p")
        file = tmp_path / "p" / "block-002.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"block-002.safetensors is damaged"):
            loaded(str(tmp_path / "p"), False)

    def test_streaming_needs_a_packed_folder(self, tiny):
        with pytest.raises(ValueError, match=r"model.stream = true reads a packed folder.*spryfl pack"):
            models.load(str(tiny), LABELS, stream=True)
        with pytest.raises(ValueError, match=r"model.stream = true reads a packed folder.*spryfl pack"):
            spryfl.Experiment(model={"name": str(tiny), "stream": True})


class TestNoGrowth:
    def test_threads_and_buffers_stay_two(self, folder):
        model = loaded(folder(), True)
        loss, given = models.loss_fn(model, {}), batch(model)
        streamer = source(model)
        buffers = [buffer.data_ptr() for buffer in streamer._buffers]
        places = set()
        for step in range(12):
            backprop(checkpoint=True)(loss, model.params, given, step)
            forward()(loss, model.params, given, step)
            assert sum(t.name.startswith("spryfl reads") for t in threading.enumerate()) <= 1
            places.add(len(streamer._followed))
            assert [buffer.data_ptr() for buffer in streamer._buffers] == buffers
        assert max(places) <= 4 * LAYERS
        assert len(buffers) == 2

    def test_a_model_that_is_let_go_takes_its_buffers_along(self, folder):
        model = loaded(folder(), True)
        forward()(models.loss_fn(model, {}), model.params, batch(model), 1)
        buffer = weakref.ref(source(model)._buffers[0])
        del model
        gc.collect()
        for thread in threading.enumerate():
            if thread.name.startswith("spryfl reads"):
                thread.join()
        gc.collect()
        assert buffer() is None


class TestEndToEnd:
    @pytest.fixture(autouse=True)
    def _no_pictures(self, monkeypatch):
        monkeypatch.setattr("spryfl.pictures.curves", lambda runs, path: None)

    def test_pack_run_resume_evaluate_predict(self, spryfl, tiny, reviews, tmp_path):
        packed = tmp_path / "tiny-4bit"
        code, out, _ = spryfl("pack", tiny, packed, "--precision", "4bit")
        assert code == 0
        assert f"spryfl run --model {packed} --set model.stream=true" in out
        code, _, err = spryfl("pack", tiny, packed)
        assert (code, "is there already" in err) == (2, True)
        flags = ["--data", reviews, "--clients", 3, "--cohort", 2, "--rounds", 2, "--out", tmp_path]
        flags += ["--set", "data.train_rows=40", "--set", "data.test_rows=20", "--set", "train.steps=2"]
        for name, more in (("a", ["--set", "model.stream=true"]), ("b", [])):
            code, out, err = spryfl("run", "--model", packed, *flags, "--name", name, *more)
            assert code == 0, err
        told = [journal.facts_of(journal.open_folder(tmp_path / name))["model"] for name in "ab"]
        fingerprint = open_store(packed).fingerprint
        expected = {"source": str(packed), "precision": "4bit", "fingerprint": fingerprint}
        assert told == [{**expected, "stream": True}, {**expected, "stream": False}]
        lines = [(tmp_path / name / "records.jsonl").read_text().splitlines() for name in "ab"]
        losses = [[json.loads(line).get("loss") for line in one] for one in lines]
        assert losses[0] == losses[1] != [None] * 3
        said = [spryfl("evaluate", tmp_path / name, reviews / "test.csv") for name in "ab"]
        assert said[0] == said[1]
        assert said[0][0] == 0
        code, out, _ = spryfl("predict", tmp_path / "a", "a lovely film")
        assert (code, "a lovely film" in out) == (0, True)
        assert models.read_card(tmp_path / "a" / "adapter")["stream"] is True
        assert "stream" not in models.read_card(tmp_path / "b" / "adapter")
        config = tmp_path / "a" / "config.toml"
        config.write_text(config.read_text().replace("rounds = 2", "rounds = 3"))
        assert spryfl("resume", tmp_path / "a")[0] == 0
        assert len((tmp_path / "a" / "records.jsonl").read_text().splitlines()) == 4
        config.write_text(config.read_text().replace("rounds = 3", "rounds = 4"))
        shutil.rmtree(packed)
        spryfl("pack", tiny, packed, "--precision", "8bit")
        code, _, err = spryfl("resume", tmp_path / "a")
        assert (code, "is not the one that the run began with" in err) == (2, True)

    def test_finetune(self, folder, reviews):
        histories = [
            spryfl.finetune(
                {"name": folder("8bit", "bert"), "stream": stream},
                str(reviews),
                train={"rounds": 1, "steps": 2, "cohort": 2},
                partition={"clients": 2},
                reading={"train_rows": 20, "test_rows": 10},
            )
            for stream in (False, True)
        ]
        one, other = (history.params for history in histories)
        assert all(torch.equal(one[n], other[n]) for n in one)
        assert any(not torch.equal(one[n], histories[0].model.params[n]) for n in one)
