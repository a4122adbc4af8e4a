"""Task types: losses and metrics by hand, derivatives, padding, whole runs, on a tiny encoder and tiny decoders."""

from __future__ import annotations

import json
import math
from importlib import import_module

import datasets
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizing
from typer.testing import CliRunner

import spryfl
from spryfl import adapters, api, cli, data, job, models, tasks
from spryfl.config import parse
from spryfl.data.examples import Examples
from spryfl.estimators import forward
from spryfl.jvp import jvp
from spryfl.noise import direction
from spryfl.tasks import template

# The files, whose names their builders took in the package.
multiple_choice, multirc, question_answering = (
    import_module(f"spryfl.tasks.{name}") for name in ("multiple_choice", "multirc", "question_answering")
)
WORDS_TEXT = """
    the film was a day we saw in town and they said it good bad very warm dull who what where when lives near tom anna
    house river is old new small . ? , no yes answer question
"""
WORDS = WORDS_TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[END]"]
FAMILIES = ("bert", "gpt2", "llama")
SIZES = {"vocab_size": len(SPECIAL + WORDS), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 5}


def tokenizer(family):
    """A word a token; the encoder's marks its texts, the decoders' put nothing around or between them."""
    made = Tokenizer(tokenizing.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if family != "bert":
        return hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="[END]")
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **names)


def network(family):
    wide = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if family == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(**SIZES, **wide, max_position_embeddings=64))
    if family == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=64))
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **wide, num_key_value_heads=1, max_position_embeddings=64))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Random models with their vocabulary head, whose features differ between texts."""
    made = {}
    for family in FAMILIES:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = network(family)
        for value in model.parameters():
            if value.dim() > 1:
                value.data.mul_(4.0)
        made[family] = str(tmp_path_factory.mktemp(family))
        model.save_pretrained(made[family])
        tokenizer(family).save_pretrained(made[family])
    return made


TEXTS = [
    "the film was good",
    "a very dull day in town and they said it was a bad film",
    "we saw it",
    "they said it was warm and the film was very good .",
    "a bad day",
    "it was good and very warm in town",
]
LABELS = [1, 0, 0, 1, 0, 1]
SENTIMENT = ["bad", "good"]
CHOICES = [["bad", "very very good"], ["dull day", "warm", "old house"], ["good", "bad"], ["no", "yes"]]
CONTEXT = "tom lives in the old house near the river . anna lives in a small new house in town and it is very warm"


def rows_of(kind):
    """Rows of a task, as a user's table would hold them."""
    if kind in ("classification", "prompted", "words"):
        return [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    if kind in ("multiple_choice", "prompted_choice"):
        return [{"text": t, "choices": c, "label": i % 2} for i, (t, c) in enumerate(zip(TEXTS, CHOICES, strict=False))]
    if kind == "question_answering":
        asked = [
            ("where is tom ?", "old house"),
            ("who lives in town ?", "anna"),
            ("when ?", ""),
            ("what is warm", "it"),
        ]
        return [
            {
                "question": question,
                "context": CONTEXT if answer != "it" else "we said it",
                "answers": {
                    "text": [answer] if answer else [],
                    "answer_start": [CONTEXT.index(answer) if answer != "it" else 8] if answer else [],
                },
            }
            for question, answer in asked
        ]
    if kind == "multirc":
        texts = [
            ("tom lives in town", i // 2, f"where is tom ? {a}") for i, a in enumerate(["town", "river", "old", "new"])
        ]
        texts += [("anna is old", 0, "who ? anna"), ("anna is old", 0, "who ? tom")]
        return [
            {"text": t, "question_idx": q, "text_pair": p, "label": int(i % 2 == 0)}
            for i, (t, q, p) in enumerate(texts)
        ]
    return [{"prompt": "what is it ?" if i % 2 else "", "completion": text} for i, text in enumerate(TEXTS)]


# case -> (the section [task], families)
CASES = {
    "classification": ({"kind": "classification"}, FAMILIES),
    "prompted": ({"kind": "prompted", "template": "{text} it was <mask> .", "words": ["bad", "good"]}, ("bert",)),
    "prompted causal": ({"kind": "prompted", "template": "{text} it was", "words": ["bad", "good"]}, ("gpt2", "llama")),
    "words": ({"kind": "prompted", "template": "{text} it was", "words": ["bad", "very very good"]}, ("gpt2", "llama")),
    "multiple_choice": ({"kind": "multiple_choice"}, FAMILIES),
    "prompted_choice": ({"kind": "prompted_choice", "template": "{text} it was"}, ("gpt2", "llama")),
    "question_answering": ({"kind": "question_answering", "stride": 4}, FAMILIES),
    "multirc": ({"kind": "multirc"}, FAMILIES),
    "causal_lm": ({"kind": "causal_lm"}, ("gpt2", "llama")),
}
EACH = [(case, family) for case, (_, families) in CASES.items() for family in families]
LENGTH = 24


def corpus_of(case, task=None):
    kind = case.split()[0]
    rows = datasets.Dataset.from_list(rows_of(kind))
    return data.from_datasets(rows, rows, needs=(task or tasks.build(CASES[case][0])).needs)


_OPEN = {}


@pytest.fixture
def opened(folders):
    """(model, params away from their start, rows) of a case on a family."""

    def make(case, family):
        if (case, family) not in _OPEN:
            task = tasks.build(CASES[case][0])
            corpus = corpus_of(case, task)
            base, words = models.load(folders[family], corpus.labels, task=task, seed=1)
            model = models.prepare(base, words, corpus.labels, adapters.lora(r=2), task=task, seed=1)
            draw = torch.Generator().manual_seed(3)
            params = {n: v + 0.2 * torch.randn(v.shape, generator=draw) for n, v in model.params.items()}
            models.carry(model, params)
            _OPEN[case, family] = model, params, task.encode(words, corpus.train, LENGTH), corpus
        return _OPEN[case, family]

    return make


def plainly(model, text, pair=None):
    """The module itself on one text, without padding, batch or hook: its output and its tokens."""
    table = model.tokenizer(*[one for one in (text, pair) if one is not None], return_tensors="pt")
    with torch.no_grad():
        return model.module(**table), table["input_ids"][0]


def followed(model, prompt, text):
    """log p of the words of `text`, each after all before it, out of the module itself."""
    output, ids = plainly(model, f"{prompt} {text}")
    count = len(text.split())
    chosen = output.logits[0].double().log_softmax(-1)
    return [float(chosen[place - 1, ids[place]]) for place in range(len(ids) - count, len(ids))]


def minus_log_softmax(scores, label):
    return math.log(sum(math.exp(score - scores[label]) for score in scores))


def by_hand(case, model, rows):
    """The loss of each row and its number of terms, from the module's own logits for one text at a time."""
    found = []
    words = CASES[case][0].get("words")
    for row in rows:
        if case in ("classification", "multirc"):
            output, _ = plainly(model, row["text"], row.get("text_pair"))
            found.append((minus_log_softmax(output.logits[0].tolist(), row["label"]), 1))
        elif case == "prompted":
            output, ids = plainly(model, f"{row['text']} it was [MASK] .")
            at = output.logits[0, ids.tolist().index(4)]
            found.append((minus_log_softmax([float(at[6 + WORDS.index(word)]) for word in words], row["label"]), 1))
        elif case in ("prompted causal", "words", "prompted_choice"):
            own = words or row["choices"]
            scores = [sum(followed(model, f"{row['text']} it was", word)) for word in own]
            found.append((minus_log_softmax(scores, row["label"]), 1))
        elif case == "multiple_choice":
            scores = [float(plainly(model, row["text"], f" {choice}")[0].logits[0, 0]) for choice in row["choices"]]
            found.append((minus_log_softmax(scores, row["label"]), 1))
        elif case == "causal_lm":
            asked = row["prompt"]
            own = row["completion"] if asked else row["completion"].partition(" ")[2]
            before = asked or row["completion"].partition(" ")[0]
            terms = followed(model, before, f"{own} [END]")
            found.append((-sum(terms) / len(terms), len(terms)))
        else:
            found.append(qa_by_hand(model, row))
    return found


def qa_by_hand(model, row):
    """Over the windows of a context, each word its own token: LENGTH tokens a window, four shared with the next."""
    words, question = row["context"].split(), row["question"].split()
    encoder = model.tokenizer.cls_token is not None
    room = LENGTH - len(question) - (3 if encoder else 1)
    answer = row["answers"]["text"][0].split() if row["answers"]["text"] else None
    at = len(row["context"][: row["answers"]["answer_start"][0]].split()) if answer else -1
    total, windows, begin = 0.0, 0, 0
    while True:
        part = words[begin : begin + room]
        text = [*question, *part] if not encoder else ["[CLS]", *question, "[SEP]", *part, "[SEP]"]
        ids = model.tokenizer.convert_tokens_to_ids(text + ([] if encoder else ["[END]"]))
        kinds = [0] * (len(question) + 2) + [1] * (len(part) + 1)
        with torch.no_grad():
            output = model.module(
                input_ids=torch.tensor([ids]), **({"token_type_ids": torch.tensor([kinds])} if encoder else {})
            )
        null = 0 if encoder else len(ids) - 1
        first = len(question) + 2 * encoder
        allowed = [null, *range(first, first + len(part))]
        whole = answer and begin <= at and at + len(answer) <= begin + len(part)
        ends = (first + at - begin, first + at - begin + len(answer) - 1) if whole else (null, null)
        for logits, right in zip((output.start_logits[0], output.end_logits[0]), ends, strict=True):
            total += minus_log_softmax([float(logits[place]) for place in allowed], allowed.index(right)) / 2
        windows += 1
        if begin + room >= len(words):
            return total / windows, windows
        begin += room - 4


@pytest.mark.parametrize(("family", "places"), [("Roberta", 16), ("Bert", 18)])
def test_a_row_may_be_as_long_as_the_model_has_places(family, places):
    """RoBERTa counts its places from behind the padding token's: 18 in its table are 16 tokens."""
    config = getattr(hf, f"{family}Config")(**{**SIZES, "pad_token_id": 1}, max_position_embeddings=18, hidden_size=12)
    module = getattr(hf, f"{family}Model")(config).eval()

    def rows(count):
        return tasks.Rows((({"input_ids": [3] * count},),), (0,), 0, 1)

    model = models.Model(module, None, {}, (), (), "", torch.device("cpu"), tasks.build({"kind": "classification"}))
    models.check_length(model, [rows(places)])
    module(torch.tensor([[3] * places]))
    with pytest.raises(
        ValueError, match=f"the longest row has {places + 1} tokens, and the model has places for {places}"
    ):
        models.check_length(model, [rows(3), rows(places + 1)])
    with pytest.raises((IndexError, RuntimeError)):
        module(torch.tensor([[3] * (places + 1)]))


def test_every_task_is_tested():
    assert {choice["kind"] for choice, _ in CASES.values()} == set(tasks.TASKS)


@pytest.mark.parametrize(("case", "family"), EACH)
class TestEveryTask:
    def test_the_loss_is_the_one_by_hand(self, case, family, opened):
        model, params, rows, _ = opened(case, family)
        fn = models.loss_fn(model, {})
        hand = by_hand(case, model, rows_of(case.split()[0]))
        for i, (expected, terms) in enumerate(hand):
            alone = tasks.collate(rows, [i])
            assert model.task.terms(alone) == terms
            with torch.no_grad():
                assert float(fn(params, alone)) == pytest.approx(expected, rel=2e-4, abs=2e-5)
        batch = tasks.collate(rows, range(len(hand)))  # padded, so padding does not count
        mean = sum(loss * terms for loss, terms in hand) / sum(terms for _, terms in hand)
        with torch.no_grad():
            assert float(fn(params, batch)) == pytest.approx(mean, rel=2e-4, abs=2e-5)

    def test_answers_do_not_depend_on_the_batch(self, case, family, opened):
        model, params, rows, _ = opened(case, family)
        every = models.answers(model, params, tasks.collate(rows, range(len(rows.labels))))
        assert len(every) == len(rows.labels)
        for i, answer in enumerate(every):
            (alone,) = models.answers(model, params, tasks.collate(rows, [i]))
            assert list(alone) == pytest.approx(list(answer), rel=1e-3, abs=1e-4)
        said = [model.task.say(a, t, model.labels) for a, t in zip(every, rows.labels, strict=True)]
        assert all(said)

    def test_scores_are_of_all_rows_at_once(self, case, family, opened):
        """In batches of two or in one: the same numbers; the mean loss is that of one batch."""
        model, params, rows, _ = opened(case, family)
        everything = range(len(rows.labels))
        pairs = [(list(part), tasks.collate(rows, part)) for part in (everything[i : i + 2] for i in everything[::2])]
        whole = [(list(everything), tasks.collate(rows, everything))]
        one, other = (models.score(model, params, rows, batches) for batches in (pairs, whole))
        assert one[0] == pytest.approx(other[0], rel=1e-5)
        assert one[1] == pytest.approx(other[1], rel=1e-5)
        assert model.task.metric in one[0]

    def test_jvp_is_autograd_in_float64(self, case, family, opened):
        model, params, rows, _ = opened(case, family)
        module = model.module.double()
        try:
            fn = models.loss_fn(model._replace(module=module), {})
            batch = tasks.collate(rows, range(len(rows.labels)))
            wide = {name: value.double() for name, value in params.items()}
            draw = torch.Generator().manual_seed(9)
            along = {n: torch.randn(2, *v.shape, generator=draw, dtype=torch.float64) for n, v in wide.items()}
            loss, slopes = jvp(lambda p: fn(p, batch), wide, along)
            leaves = {name: value.clone().requires_grad_() for name, value in wide.items()}
            true = fn(leaves, batch)
            grads = dict(zip(leaves, torch.autograd.grad(true, list(leaves.values())), strict=True))
            expected = [sum(float((grads[n] * along[n][k]).sum()) for n in grads) for k in range(2)]
            assert float(loss) == pytest.approx(float(true.detach()), rel=1e-12)
            # Llama's norms are in float32 whatever its values are.
            assert slopes.tolist() == pytest.approx(expected, rel=1e-5 if family == "llama" else 1e-9)
            assert any(abs(slope) > 1e-6 for slope in expected)
        finally:
            module.float()

    def test_an_exact_head_leaves_the_slopes_of_the_rest(self, case, family, opened):
        """Cut before the head: its gradient is autograd's where it is trained, and there is none where it is not."""
        model, params, rows, _ = opened(case, family)
        fn, batch = models.loss_fn(model, {}), tasks.collate(rows, range(len(rows.labels)))
        got = forward(directions=2, exact_head=True)(fn, params, batch, 1)
        assert bool(got.dense) is model.task.head
        assert set(got.dense) == set(fn.head)
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        grads = dict(zip(leaves, torch.autograd.grad(fn(leaves, batch), list(leaves.values())), strict=True))
        for name in got.dense:
            torch.testing.assert_close(got.dense[name], grads[name], rtol=1e-3, atol=1e-5)
        for term in got.terms:
            v = direction(term.seed, {name: params[name] for name in term.block}, term.distribution)
            slope = sum(float((grads[name] * value).sum()) for name, value in v.items())
            assert 2 * term.coefficient == pytest.approx(slope, rel=1e-3, abs=1e-4)


# Backprop on one family of each case: what a family changes shows under forward mode.
ROUNDS = [(case, family, "spry") for case, family in EACH]
ROUNDS += [(case, families[0], "fedavg") for case, (_, families) in CASES.items()]


@pytest.mark.parametrize(("case", "family", "method"), ROUNDS)
def test_a_round_runs_records_and_saves(case, family, method, folders, tmp_path):
    rows = datasets.Dataset.from_list(rows_of(case.split()[0]) * 2)
    history = spryfl.finetune(
        folders[family],
        (rows, rows),
        reading={"max_length": LENGTH},
        task=CASES[case][0],
        method=method,
        partition={"clients": 2, "held_out": 0.3, "split": {"kind": "iid"}},
        train={"rounds": 1, "cohort": 2, "steps": 2, "batch_size": 3},
        folder=tmp_path / "run",
    )
    metric = history.model.task.metric
    for record in history.records:
        assert {metric, "test_loss", "best"} <= set(record)
    last = history.records[-1]
    assert last["best"] == max(record[metric] for record in history.records)
    assert math.isfinite(last["loss"])
    assert math.isfinite(last["personal_after"])
    again = models.open_adapter(tmp_path / "run" / "adapter")
    assert again.task.metric == metric
    made = again.task.encode(again.tokenizer, corpus_of(case).train, LENGTH)
    batches = [(list(range(len(made.labels))), tasks.collate(made, range(len(made.labels))))]
    _, loss = models.score(again, again.params, made, batches)
    assert loss == pytest.approx(last["test_loss"], rel=1e-4)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["metric"] == metric


class TestQuestionAnswering:
    @pytest.mark.parametrize(
        ("said", "gold", "f1", "same"),
        [
            ("The Cat.", "cat", 1.0, True),
            ("an  old-house", "the oldhouse", 1.0, True),
            ("the old house near the river", "old house", 2 * (2 / 4) * 1 / (2 / 4 + 1), False),
            ("house house", "house", 2 / 3, False),
            ("river", "house", 0.0, False),
            ("", "", 1.0, True),
            ("house", "", 0.0, False),
            ("", "house", 0.0, False),
            ("the", "", 1.0, True),
        ],
    )
    def test_scores_of_one_answer(self, said, gold, f1, same):
        found = question_answering.score([said], [(gold,) if gold else ()])
        assert found == {"f1": pytest.approx(f1), "exact_match": float(same)}

    def test_the_best_of_several_right_answers_counts(self):
        found = question_answering.score(["old house", "x", ""], [("house", "the old house"), ("y",), ()])
        assert found == {"f1": pytest.approx(2 / 3), "exact_match": pytest.approx(2 / 3)}

    def test_right_answers_of_articles_alone_are_none(self):
        assert question_answering.score([""], [("the",)])["f1"] == 1.0

    def spans(self, start, end, null, inside, of, longest=3):
        batch = {
            "labels_of": torch.tensor(of),
            "labels_null": torch.tensor(null),
            "labels_context": torch.tensor(inside),
        }
        output = hf.modeling_outputs.QuestionAnsweringModelOutput(
            start_logits=torch.tensor(start), end_logits=torch.tensor(end)
        )
        return tasks.TASKS["question_answering"](longest=longest).answers(output, batch)

    def test_the_best_span_is_ordered_short_and_inside(self):
        """Against a search over all pairs."""
        draw = torch.Generator().manual_seed(0)
        start, end = (torch.randn(4, 9, generator=draw).mul(3).tolist() for _ in range(2))
        inside = [[0, 0, 0, 1, 1, 1, 1, 1, 0]] * 4
        found = self.spans(start, end, [0, 0, 8, 8], inside, [0, 0, 1, 2])
        assert len(found) == 3
        windows = {0: [0, 1], 1: [2], 2: [3]}
        nulls = [0, 0, 8, 8]
        for row, own in windows.items():
            pairs = [(s, e) for s in range(3, 8) for e in range(s, min(s + 3, 8))]
            best = max(((start[w][s] + end[w][e], w - own[0], s, e) for w in own for s, e in pairs))
            assert found[row][:4] == (*best[1:], pytest.approx(best[0]))
            assert found[row].null == pytest.approx(min(start[w][nulls[w]] + end[w][nulls[w]] for w in own))

    def test_no_answer_by_the_null_span(self):
        places = (((0, 3), (4, 9)),)
        truth = question_answering.Passage("old house", places, ())
        span = question_answering.Span(0, 0, 1, score=1.0, null=2.0)
        assert question_answering.text(span, truth) == ""
        assert question_answering.text(span, truth, threshold=1.5) == "old house"
        assert question_answering.text(span._replace(null=0.5), truth) == "old house"
        assert question_answering.text(span._replace(null=0.5, end=0), truth) == "old"
        task = tasks.TASKS["question_answering"]()
        assert task.say(span, truth, ()) == "(no answer)"
        assert task.score([span], [truth]) == {"f1": 1.0, "exact_match": 1.0}

    @pytest.mark.parametrize("family", FAMILIES)
    def test_windows_cover_the_context_and_name_the_answer(self, family, opened):
        _, _, rows, corpus = opened("question_answering", family)
        assert rows.cut == 3  # those with the long context
        for row, (windows, truth) in enumerate(zip(rows.inputs, rows.labels, strict=True)):
            seen, named = set(), 0
            for window, places in zip(windows, truth.offsets, strict=True):
                assert len(window["input_ids"]) <= LENGTH
                inside = [i for i, there in enumerate(window["labels_context"]) if there]
                seen.update(places[i] for i in inside)
                start, end = window["labels_start"], window["labels_end"]
                if start != window["labels_null"]:
                    named += 1
                    assert truth.context[places[start][0] : places[end][1]] == truth.answers[0]
            assert len(seen) == len(truth.context.split())
            assert (named > 0) is bool(truth.answers), row
        assert corpus.labels == ("all",)

    def test_every_way_to_write_answers(self):
        context = "tom lives in town"
        for answers, starts in (
            ({"text": ["town"], "answer_start": [13]}, None),
            (["town"], [13]),
            ("town", 13),
            ("town", None),
        ):
            extra = {"answers": (answers,)} | ({"starts": (starts,)} if starts is not None else {})
            assert question_answering._golds(Examples(("who",), (context,), (0,), None, extra)) == [[("town", 13)]]
        for none in ({"text": [], "answer_start": []}, [], "", None):
            assert question_answering._golds(Examples(("a",), (context,), (0,), None, {"answers": (none,)})) == [[]]
        with pytest.raises(ValueError, match="does not stand in its context"):
            question_answering._golds(Examples(("a",), (context,), (0,), None, {"answers": (["x"],), "starts": ([2],)}))

    def test_what_cannot_be(self):
        task = tasks.TASKS["question_answering"]()
        with pytest.raises(ValueError, match="needs a context"):
            task.encode(tokenizer("bert"), Examples(("a",), None, (0,), None), 128)
        with pytest.raises(ValueError, match="stride = 32 with data"):
            task.encode(tokenizer("bert"), Examples(("a",), ("b",), (0,), None), 64)
        with pytest.raises(ValueError, match="longest = 0"):
            tasks.TASKS["question_answering"](longest=0)
        table = datasets.Dataset.from_list([{"question": "a", "context": "b"}])
        with pytest.raises(ValueError, match="needs a column for answers"):
            data.from_datasets(table, table, needs=task.needs)


class TestMultiRC:
    def test_scores_by_hand(self):
        """Two questions of one text and one of another: 3 hits, 2 false alarms, 1 miss; one question wholly right."""
        rows = [  # said, label, question
            (1, 1, ("a", "0")),
            (0, 0, ("a", "0")),
            (1, 0, ("a", "1")),
            (1, 1, ("a", "1")),
            (1, 1, ("b", "0")),
            (0, 1, ("b", "0")),
            (1, 0, ("b", "0")),
        ]
        precision, recall = 3 / 5, 3 / 4
        found = multirc._score([[1 - s, s] for s, _, _ in rows], [multirc.Judged(y, q) for _, y, q in rows])
        assert found["f1a"] == pytest.approx(2 * precision * recall / (precision + recall))
        assert found["exact_match"] == pytest.approx(1 / 3)
        assert found["accuracy"] == pytest.approx(4 / 7)

    def test_nothing_said_to_be_right_scores_nothing(self):
        assert multirc._score([[1.0, 0.0]], [multirc.Judged(1, ("a", "0"))])["f1a"] == 0

    def test_question_and_answer_are_joined_once(self):
        rows = [
            {"paragraph": "p", "question": "q ?", "answer": "a", "label": 1},
            {"paragraph": "p", "question": "q ?", "answer": "b", "label": 0},
        ]
        task, table = tasks.TASKS["multirc"](), datasets.Dataset.from_list(rows)
        corpus = data.from_datasets(table, table, needs=task.needs)
        words = tokenizer("bert")
        got = task.encode(words, corpus.train, 16)
        assert [truth.question for truth in got.labels] == [("p", "q ?")] * 2
        assert got.inputs[0][0]["input_ids"] == words("p", "q ? a")["input_ids"]
        joined = corpus.train._replace(pair=("q ? a", "q ? b"))
        assert task.encode(words, joined, 16).inputs == got.inputs

    def test_questions_are_never_split(self):
        rows = [
            {"text": f"t {i // 5}", "text_pair": f"q {i}", "question_idx": i // 5, "label": i % 2} for i in range(100)
        ]
        table = datasets.Dataset.from_list(rows)
        needs = tasks.TASKS["multirc"]().needs
        corpus = data.from_datasets(table, needs=needs, test_share=0.25, train_rows=33)
        sides = [set(side.extra["question"]) for side in (corpus.train, corpus.test)]
        assert not sides[0] & sides[1]
        assert (len(corpus.test.label), len(corpus.train.label)) == (25, 30)
        for side in (corpus.train, corpus.test):
            assert all(side.extra["question"].count(one) == 5 for one in set(side.extra["question"]))
        assert data.from_datasets(table, needs=needs, test_share=0.25, seed=1).test != corpus.test
        assert "train_rows: 30 of 75 rows, each question whole" in corpus.notes


def test_a_clients_own_score_is_the_metric_times_its_rows(folders, tmp_path):
    """So that sums over clients, divided by all rows, give the mean weighted by rows."""
    file = tmp_path / "m.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows_of("classification") * 3))
    made = api.prepared(
        parse(
            {
                "task": "classification",
                "model": {"name": folders["bert"]},
                "data": {"name": str(file), "test_share": 0.4},
                "partition": {"clients": 2, "held_out": 0.5, "split": "iid"},
            }
        )
    )
    found = []
    for client in range(2):
        local, held = job.local(made)(client), list(made.held[client])
        total, count = local.score(made.model.params, local.held_out())
        batch = tasks.collate(made.rows, held)
        answers = models.answers(made.model, made.model.params, batch)
        expected = made.model.task.score(answers, [made.rows.labels[i] for i in held])["accuracy"]
        assert count == len(held) > 1
        assert total == pytest.approx(expected * len(held))
        found.append(expected)
    assert any(0 < one < 1 for one in found)
    nobody = made._replace(held=((), ()))
    assert job.local(nobody)(0).score(made.model.params, iter(())) == (0, 0)


class TestPrompts:
    def test_templates(self):
        made = template.parsed("{text} {pair} Does {word} mean the same? <mask>.")
        assert made.columns == ("text", "pair", "word")
        assert made.masked
        assert made.needs().extra == {"word": ("word",)}
        filled = made._written(tokenizer("bert"), ["{pair}", "b <mask>", "c"])
        assert filled == "{pair} b <mask> Does c mean the same? [MASK]."

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("no column", "must name a column"),
            ("{} x", "must name a column"),
            ("{text} <mask> <mask>", "2 times <mask>"),
            ("{text", "cannot be read"),
        ],
    )
    def test_templates_that_cannot_be(self, text, message):
        with pytest.raises(ValueError, match=message):
            template.parsed(text)

    def test_what_is_too_long_is_cut_in_the_longest_column(self):
        words = tokenizer("bert")
        made = template.parsed("{text} ? <mask> , {pair}")
        examples = Examples(("the film " * 10, "a"), ("a day in town", "b"), (0, 1), None)
        prompts, cut = made.filled(words, examples, 14)
        assert cut == 1
        assert prompts[0] == "the film the film the ? [MASK] , a day in town"
        assert len(words(prompts[0])["input_ids"]) == 14
        assert prompts[1] == "a ? [MASK] , b"
        with pytest.raises(ValueError, match="alone does not fit into 4 tokens"):
            made.filled(words, examples, 4)

    def test_logits_are_made_where_they_are_wanted_alone(self, opened):
        for case, family in (("prompted", "bert"), ("words", "llama"), ("causal_lm", "gpt2")):
            model, params, rows, _ = opened(case, family)
            batch = tasks.collate(rows, range(len(rows.labels)))
            with torch.no_grad():
                output = models.loss_fn(model, {}).output(params, batch)
            assert output.logits.shape == (int((batch["labels_at"] > 0).sum()), SIZES["vocab_size"])

    def test_single_words_need_one_sequence(self, opened):
        """And the loss is that of the same words as sequences of their own."""
        model, params, rows, corpus = opened("prompted causal", "gpt2")
        assert all(len(own) == 1 for own in rows.inputs)
        longer = tasks.build({"kind": "prompted_choice", "template": "{text} it was"})
        pairs = (("bad", "good"),) * len(corpus.train.text)
        examples = corpus.train._replace(extra={"choices": pairs})
        made = longer.encode(model.tokenizer, examples, LENGTH)
        assert all(len(own) == 1 for own in made.inputs)
        both = [tasks.collate(one, range(6)) for one in (rows, made)]
        with torch.no_grad():
            a, b = (models.loss_fn(model, {})(params, batch) for batch in both)
        assert torch.equal(a, b)

    def test_what_cannot_be(self, folders, opened):
        def encode(words, text, kind="bert", template="{text} it was <mask>"):
            task = tasks.build({"kind": "prompted", "template": template, "words": words})
            return task.encode(tokenizer(kind), Examples((text,), None, (0,), None), LENGTH)

        with pytest.raises(ValueError, match='"very good" is not one token of this masked model, but: very, good'):
            encode(["very good", "bad"], "a day")
        with pytest.raises(ValueError, match='"splendid" is not one token'):
            encode(["splendid", "bad"], "a day")
        with pytest.raises(ValueError, match="no mask token"):
            encode(["good", "bad"], "a day", "gpt2")
        with pytest.raises(ValueError, match="holds the mask token"):
            encode(["good", "bad"], "a [MASK] day")
        with pytest.raises(ValueError, match=r"needs \{pair\}, which these rows do not have"):
            encode(["good", "bad"], "a day", template="{pair} <mask>")
        with pytest.raises(ValueError, match="two different words"):
            tasks.build({"kind": "prompted", "words": ["good", "good"]})
        with pytest.raises(ValueError, match=r"2 words \(terrible, great\) and the data 3 classes"):
            tasks.build({"kind": "prompted"}).outputs(("a", "b", "c"))
        masked = tasks.build({"kind": "prompted"})
        with pytest.raises(ValueError, match="no such architecture under AutoModelForMaskedLM"):
            models.load(folders["gpt2"], ("a", "b"), task=masked)

    def test_a_head_that_was_never_trained_is_said(self, tiny):
        with pytest.warns(UserWarning, match=r"without its language-model head: cls\.predictions"):
            models.load(str(tiny), ("a", "b"), task=tasks.build({"kind": "prompted"}))

    def test_no_adapter_trains_the_vocabulary_head(self, folders):
        """Not even its biases, which PEFT would train with the trunk's, and not after saving."""
        task = tasks.build(CASES["prompted"][0])
        base, words = models.load(folders["bert"], ("a", "b"), task=task)
        model = models.prepare(base, words, ("a", "b"), adapters.bitfit(), task=task)
        assert model.units
        assert not any(unit.head for unit in model.units)
        assert all(".bert." in name for name in model.params)
        base, _ = models.load(folders["bert"], ("a", "b"), task=task)
        with pytest.raises(ValueError, match="nothing of BertForMaskedLM is left to train"):
            models.prepare(base, words, ("a", "b"), adapters.head(), task=task)


class TestChoices:
    def test_scores_by_row(self):
        batch = {"labels_of": torch.tensor([0, 0, 1, 1, 1]), "labels": torch.tensor([1, 1, 2, 2, 2])}
        found = multiple_choice.by_row(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), batch)
        assert found.tolist() == [[1, 2, multiple_choice.FAR], [3, 4, 5]]
        assert multiple_choice.right(batch).tolist() == [1, 2]
        shares = multiple_choice.softmaxed(found, batch)
        assert [len(row) for row in shares] == [2, 3]
        assert [sum(row) for row in shares] == pytest.approx([1, 1])

    def test_columns_of_choices(self):
        rows = [{"premise": "a", "choice1": "b", "choice2": f"c {i}", "label": i % 2} for i in range(4)]
        task = tasks.build({"kind": "multiple_choice", "choices": ["choice1", "choice2"]})
        corpus = data.from_datasets(datasets.Dataset.from_list(rows), test_share=0.5, needs=task.needs)
        assert multiple_choice.choices_of(corpus.train, ["choice1", "choice2"])[0][0] == "b"
        assert not [note for note in corpus.notes if "choice" in note]  # named, not guessed
        with pytest.raises(ValueError, match="row 1 has 2 choices and the label 2"):
            multiple_choice.choices_of(Examples(("a",), None, (2,), None, {"choices": (("x", "y"),)}), ())


class TestCausal:
    def test_perplexity_is_of_all_tokens(self):
        say = tasks.build({"kind": "causal_lm"}).say
        assert say((3.0, 2), None, ()) == f"perplexity {math.exp(1.5):.3f}"
        assert say((0.0, 0), None, ()) == "(one token: nothing to foresee)"
        found = tasks.build({"kind": "causal_lm"}).score([(3.0, 1), (1.0, 3)], [None, None])
        assert found == {"log_likelihood": -1.0, "perplexity": pytest.approx(math.e)}

    @pytest.mark.parametrize("length", [4, 6, 8])
    def test_the_completion_keeps_half_at_least(self, length):
        words = tokenizer("gpt2")
        examples = Examples(
            ("good good good good good good",), None, (0,), None, {"prompt": ("the film was a very dull day",)}
        )
        task = tasks.build({"kind": "causal_lm", "between": " "})
        rows = task.encode(words, examples, length)
        (sequence,) = rows.inputs[0]
        assert rows.cut == 1
        assert len(sequence["input_ids"]) == length
        learnt = [t for t, at in zip(sequence["labels_next"], sequence["labels_at"], strict=True) if at]
        assert len(learnt) >= length // 2
        assert set(learnt) <= {6 + WORDS.index("good"), 5}
        whole = task.encode(words, examples, 64)
        assert whole.cut == 0
        assert sum(whole.inputs[0][0]["labels_at"]) == 7  # six words and the end
        without = tasks.build({"kind": "causal_lm", "between": " ", "end": False}).encode(words, examples, 64)
        assert sum(without.inputs[0][0]["labels_at"]) == 6


class TestSettings:
    def given(self, folders, **more):
        return {"model": {"name": folders["bert"]}, "data": {"name": "x.csv"}, **more}

    def test_options_are_those_of_the_builder(self, folders):
        made = parse(self.given(folders, task="question_answering"))
        assert made.task == {"kind": "question_answering", "stride": 32, "longest": 30, "threshold": 0.0}
        assert made.partition.split["kind"] == "iid"
        assert parse({}).task == {"kind": "classification"}
        assert "[task]" in made.toml()
        with pytest.raises(
            ValueError, match=r"unknown key task \(question_answering\).strid \(did you mean stride\?\)"
        ):
            parse(self.given(folders, task={"kind": "question_answering", "strid": 3}))
        with pytest.raises(ValueError, match=r'task.kind = "qa" is unknown'):
            parse(self.given(folders, task="qa"))

    def test_settings_without_effect(self, folders):
        with pytest.raises(ValueError, match=r'"dirichlet" has no effect with task "causal_lm"'):
            parse(self.given(folders, task="causal_lm", partition={"split": "dirichlet"}))
        with pytest.raises(ValueError, match=r'data.label has no effect with task "causal_lm"'):
            parse(self.given(folders, task="causal_lm", data={"name": "x.csv", "label": "y"}))
        with pytest.raises(ValueError, match="keeps the pretrained head"):
            parse(self.given(folders, task="prompted", method="head_only"))
        with pytest.raises(ValueError, match="this task needs answers"):
            data.load("docstrings", needs=tasks.build({"kind": "question_answering"}).needs)

    @pytest.mark.parametrize(
        "task", ["causal_lm", {"kind": "prompted", "template": "{text} it was", "words": SENTIMENT}]
    )
    def test_an_encoder_says_nothing_that_comes_next(self, task, folders):
        """It would see the answer, and look very good."""
        built = tasks.build(task if isinstance(task, dict) else {"kind": task})
        for family, causal in (("bert", False), ("gpt2", True), ("llama", True)):
            base, words = models.load(folders[family], ("neg", "pos"), task=built)
            ready = lambda b=base, w=words: models.prepare(b, w, ("neg", "pos"), adapters.lora(), task=built)  # noqa: E731
            if causal:
                assert ready().task is built
            else:
                with pytest.raises(ValueError, match=r"BertLMHeadModel\) reads ahead"):
                    ready()

    def test_a_task_of_ones_own_is_one_builder(self, folders):
        """Whether a text is long, by a head of two outputs, measured by its own number."""

        def length_task(above: int = 4) -> tasks.Task:
            def encode(words, examples, most):
                labels = tuple(int(len(text.split()) > above) for text in examples.text)
                return tasks.encode(words, examples._replace(label=labels), most)

            return tasks.classification()._replace(
                metric="brier",
                encode=encode,
                needs=data.Needs(label=False),
                outputs=lambda classes: ("short", "long"),
                score=lambda answers, truths: {
                    "brier": -sum((a[t] - 1) ** 2 for a, t in zip(answers, truths, strict=True)) / len(truths)
                },
            )

        table = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
        history = spryfl.finetune(
            folders["bert"],
            (table, table),
            task={"kind": length_task, "above": 5},
            method="fedavg",
            partition={"clients": 2},
            train={"rounds": 2, "cohort": 2, "eval_every": 1, "steps": 8},
        )
        scores = [record["brier"] for record in history.records]
        assert all(-1 <= score < 0 for score in scores)
        assert history.records[-1]["best"] == max(scores)  # below zero, and yet a best
        assert history.records[-1]["test_loss"] < history.records[0]["test_loss"]

    def test_a_module_with_another_head_is_refused(self, folders):
        table = datasets.Dataset.from_list(rows_of("multiple_choice"))
        module = hf.AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=3)
        with pytest.raises(ValueError, match=r"the model has 3 labels and the task 1 \(score\)"):
            api.finetune(module, (table, table), tokenizer=tokenizer("bert"), task="multiple_choice")


@pytest.fixture(scope="module")
def done(folders, tmp_path_factory):
    """Run folders of three tasks."""
    here, made = tmp_path_factory.mktemp("runs"), {}
    for case, family in (("question_answering", "bert"), ("causal_lm", "gpt2"), ("multiple_choice", "llama")):
        file = here / f"{case}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows_of(case) * 2))
        (here / f"{case}.toml").write_text(
            f'name = "{case}"\nmethod = "fedavg"\n[task]\nkind = "{case}"\n'
            + ("stride = 4\n" if case == "question_answering" else "")
            + f'[model]\nname = "{folders[family]}"\n[data]\nname = "{file}"\nmax_length = {LENGTH}\n'
            "[partition]\nclients = 2\nsplit = {kind = 'iid'}\n[train]\nrounds = 1\ncohort = 2\nsteps = 1\n"
        )
        ran = CliRunner().invoke(cli.app, ["run", "--config", str(here / f"{case}.toml"), "--out", str(here)])
        made[case] = here / case, file, ran
    return made


class TestCommands:
    def say(self, *words):
        return CliRunner().invoke(cli.app, [str(word) for word in words])

    @pytest.mark.parametrize(
        ("case", "metric"),
        [("question_answering", "f1"), ("causal_lm", "log_likelihood"), ("multiple_choice", "accuracy")],
    )
    def test_run_shows_the_metric_by_name(self, case, metric, done):
        folder, file, ran = done[case]
        assert ran.exit_code == 0, ran.output
        assert f"{metric} on the untouched test rows: " in ran.output
        assert metric in self.say("report", folder, "--to", folder / "a.png").output
        out = self.say("evaluate", folder, file).output
        assert out.startswith(f"{metric} ")
        assert f"on {len(rows_of(case)) * 2} rows" in out
        assert self.say("partition", "--config", folder / "config.toml").exit_code == 0

    def test_predict(self, done):
        out = self.say("predict", done["question_answering"][0], "where is tom ?", "--pair", CONTEXT).output
        answer, _, question = out.strip().rpartition("\t")
        assert question == "where is tom ?"
        assert answer in CONTEXT or answer == "(no answer)"
        out = self.say("predict", done["causal_lm"][0], "the film was good", "--with", "prompt=what is it ?").output
        assert out.startswith("perplexity ")
        out = self.say("predict", done["multiple_choice"][0], "a day", "--with", 'choices=["in town", "it was"]').output
        assert out.split("\t")[0] in ("in town", "it was")
        failed = self.say("predict", done["multiple_choice"][0], "a day")
        assert isinstance(failed.exception, ValueError)
        assert "needs choices, which is not there" in str(failed.exception)
        for case, reads in (("multiple_choice", "choices"), ("causal_lm", "prompt, input")):
            failed = self.say("predict", done[case][0], "a day", "--with", "chioces=3")
            assert str(failed.exception) == f"--with chioces has no effect: this task reads {reads}. Remove it."
        failed = self.say("predict", done["causal_lm"][0], "a day", "--with", "prompt")
        assert '--with "prompt" is not of the form name=value' in str(failed.exception)
