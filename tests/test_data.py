"""Reading examples: what is guessed is said, names are kept, bad input gets one clear message."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spryfl import data
from spryfl.data import docstrings

WORDS = "red blue green old new big small warm cold slow".split()  # noqa: SIM905


def some_rows(count: int = 60, names: tuple[Any, ...] = ("neg", "pos")) -> list[dict[str, Any]]:
    return [{"text": f"the {WORDS[i % 10]} thing, {i}", "label": names[i % 3 % len(names)]} for i in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows in the format that the extension says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        quote = '"{}"'.format if mark == "," else str
        lines = [mark.join(rows[0]), *(mark.join(quote(value) for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


FORMATS = ["parquet", "csv", "tsv", "jsonl", "json"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("names", [("neg", "pos"), (0, 1), (False, True)])
def test_every_format_gives_the_same_corpus(tmp_path: Path, kind: str, names: tuple[Any, ...]) -> None:
    rows = some_rows(names=names)
    corpus = data.load(write(tmp_path / f"d.{kind}", rows))
    reference = data.from_datasets(datasets.Dataset.from_list(rows))
    assert corpus.labels == tuple(map(str, names))
    assert corpus.fingerprint == reference.fingerprint
    assert "text column: 'text' (guessed)" in corpus.notes
    assert "label column: 'label' (guessed)" in corpus.notes
    assert any("split off for the test" in note for note in corpus.notes)
    given = {(row["text"], corpus.labels.index(str(row["label"]))) for row in rows}
    read = [
        *zip(corpus.train.text, corpus.train.label, strict=True),
        *zip(corpus.test.text, corpus.test.label, strict=True),
    ]
    assert set(read) == given
    assert len(read) == len(rows)


def test_a_share_of_each_class_is_split_off(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", some_rows(90))
    corpus = data.load(path, test_share=0.3)
    assert Counter(corpus.test.label) == {0: 18, 1: 9}
    assert Counter(corpus.train.label) == {0: 42, 1: 21}
    assert data.load(path, test_share=0.3) == corpus
    assert data.load(path, test_share=0.3, seed=1).test != corpus.test


def test_rows_are_limited_class_by_class(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", some_rows(300))
    everything = data.load(path)
    corpus = data.load(path, train_rows=31, test_rows=6)
    assert Counter(corpus.train.label) in ({0: 21, 1: 10}, {0: 20, 1: 11})
    assert Counter(corpus.test.label) == {0: 4, 1: 2}
    assert set(corpus.train.text) <= set(everything.train.text)
    assert set(corpus.test.text) <= set(everything.test.text)
    assert list(corpus.train.text) == [text for text in everything.train.text if text in set(corpus.train.text)]
    rows, test = datasets.Dataset.from_list(some_rows(100)), datasets.Dataset.from_list(some_rows(9))
    draws = [data.from_datasets(rows, test, train_rows=20, seed=seed).train for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert "train_rows = 999 changes nothing: there are 240 rows" in data.load(path, train_rows=999).notes
    with pytest.raises(ValueError, match="train_rows = 1 is less than one row for each of 2 classes"):
        data.load(path, train_rows=1)


def test_a_rare_class_keeps_a_row() -> None:
    rows = [{"text": f"t{i}", "label": int(i < 3)} for i in range(500)]
    assert Counter(data.from_datasets(datasets.Dataset.from_list(rows), train_rows=10).train.label) == {0: 9, 1: 1}


def class_labels(names: list[str]) -> datasets.Features:
    return datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})


def test_class_names_of_the_datasets_library_are_kept(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": i % 2} for i in range(40)]
    made = datasets.Dataset.from_list(rows, features=class_labels(["worse", "better"]))
    made.to_parquet(str(tmp_path / "d.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    corpora = [data.from_datasets(made), data.load(str(tmp_path / "d.parquet")), data.load(str(tmp_path / "saved"))]
    assert {corpus.labels for corpus in corpora} == {("worse", "better")}  # their order, not the alphabet's
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    for text, label in zip(corpora[0].train.text, corpora[0].train.label, strict=True):
        assert label == int(text.split()[1]) % 2


def test_a_named_class_without_rows_is_noted() -> None:
    rows = [{"text": f"t {i}", "label": i % 2} for i in range(40)]
    corpus = data.from_datasets(datasets.Dataset.from_list(rows, features=class_labels(["a", "b", "c"])))
    assert corpus.labels == ("a", "b", "c")
    assert "no training row has the label 'c'" in corpus.notes


@pytest.mark.parametrize(
    ("columns", "text", "pair"),
    [
        (("idx", "sentence"), "sentence", None),
        (("premise", "hypothesis"), "premise", "hypothesis"),
        (("sentence2", "sentence1"), "sentence1", "sentence2"),
        (("question", "sentence"), "question", "sentence"),
        (("question", "passage"), "question", "passage"),
        (("title", "text"), "text", None),
        (("text_pair", "text"), "text", "text_pair"),
        (("Review", "id"), "Review", None),
    ],
)
def test_columns_are_guessed(columns: tuple[str, str], text: str, pair: str | None) -> None:
    rows = [{name: f"{name} {i}" for name in columns} | {"label": i % 2} for i in range(10)]
    corpus = data.from_datasets(datasets.Dataset.from_list(rows))
    assert corpus.train.text[0].startswith(f"{text} ")
    assert (corpus.train.pair is not None and corpus.train.pair[0].split()[0]) == (pair or False)
    assert f"text column: {text!r} (guessed)" in corpus.notes


def test_columns_that_are_named_are_taken_and_not_called_guesses(tmp_path: Path) -> None:
    rows = [{"text": "x", "a": f"a {i}", "b": f"b {i}", "y": i % 2, "user": i % 5, "label": 0} for i in range(20)]
    corpus = data.load(write(tmp_path / "d.jsonl", rows), text="a", pair="b", label="y", group="user")
    assert corpus.train.text[0].startswith("a ")
    assert corpus.train.pair is not None
    assert corpus.train.pair[0].startswith("b ")
    assert set(corpus.train.group or ()) == {"0", "1", "2", "3", "4"}
    assert not [note for note in corpus.notes if "guessed" in note]
    rows = [{"text": "x", "text_pair": "y", "label": i % 2} for i in range(20)]
    assert data.load(write(tmp_path / "p.jsonl", rows), text="text").train.pair is None
    assert data.load(str(tmp_path / "p.jsonl")).train.pair is not None


def test_a_folder_with_train_and_test(tmp_path: Path) -> None:
    rows = some_rows(30)
    write(tmp_path / "train.csv", rows[:20])
    write(tmp_path / "validation.jsonl", rows[18:])
    write(tmp_path / "train_more.csv", rows)
    corpus = data.load(str(tmp_path))
    assert (len(corpus.train.label), len(corpus.test.label)) == (20, 12)
    assert "2 of 12 test texts are among the training texts too" in corpus.notes
    write(tmp_path / "test.csv", rows[25:])
    assert len(data.load(str(tmp_path)).test.label) == 5
    assert len(data.load(str(tmp_path), test="validation").test.label) == 12
    write(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match=r"holds train.csv and train.jsonl: which one\?"):
        data.load(str(tmp_path))


def test_shards_are_joined(tmp_path: Path) -> None:
    rows = some_rows(30)
    for i in range(3):
        write(tmp_path / f"train-0000{i}-of-00003.parquet", rows[10 * i : 10 * i + 10])
    write(tmp_path / "test-00000-of-00001.parquet", rows)
    assert data.load(str(tmp_path)).train.text == tuple(row["text"] for row in rows)


def test_a_hidden_test_is_passed_over_or_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", some_rows(20, (0, 1)))
    write(tmp_path / "test.csv", some_rows(20, (-1, -1)))
    with pytest.raises(ValueError, match=r'the label in "label" is -1 in 20 of 20 rows .*answers withheld'):
        data.load(str(tmp_path))
    write(tmp_path / "validation.csv", some_rows(7, (0, 1)))
    corpus = data.load(str(tmp_path))
    assert len(corpus.test.label) == 7
    assert "'test' has no labels and was passed over" in corpus.notes
    with pytest.raises(ValueError, match="answers withheld"):
        data.load(str(tmp_path), test="test")


def test_a_file_beside_another(tmp_path: Path) -> None:
    train, test = write(tmp_path / "a.csv", some_rows(20)), write(tmp_path / "b.jsonl", some_rows(9))
    assert len(data.load(train, test=test).test.label) == 9
    with pytest.raises(ValueError, match="given for training and for the test"):
        data.load(train, test=str(tmp_path / "x" / ".." / "a.csv"))


def test_data_sets_in_memory() -> None:
    train, test = (datasets.Dataset.from_list(some_rows(count)) for count in (30, 12))
    both = datasets.DatasetDict({"train": train, "validation": test})
    assert data.from_datasets(both).fingerprint == data.from_datasets(train, test).fingerprint
    assert len(data.from_datasets(datasets.DatasetDict({"train": train, "odd": test}), "odd").test.label) == 12
    shuffled = train.shuffle(seed=1).select(range(20))
    numbered = datasets.Dataset.from_list(some_rows(30, (0, 1)))
    assert data.from_datasets(numbered.with_format("numpy")) == data.from_datasets(numbered)
    assert len(data.from_datasets(shuffled, test).train.label) == 20
    with pytest.raises(ValueError, match=r"train is a list; a datasets.Dataset or DatasetDict is needed"):
        data.from_datasets([{"text": "a", "label": 0}])


def test_byte_order_mark_and_quotes(tmp_path: Path) -> None:
    text = 'text,label\r\n"said ""no"",\nand left",b\r\nyes,a\r\n"é",a\r\nno,b\r\n'
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    corpus = data.load(str(tmp_path / "d.csv"))
    assert set(corpus.train.text + corpus.test.text) == {'said "no",\nand left', "yes", "é", "no"}
    (tmp_path / "d.tsv").write_text('text\tlabel\n"a" and b\t0\n"said ""no"""\t1\n"c\t0\nd\t1\n', encoding="utf-8")
    corpus = data.load(str(tmp_path / "d.tsv"))
    assert set(corpus.train.text + corpus.test.text) == {'"a" and b', 'said "no"', '"c', "d"}


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [*some_rows(20), {"text": " ", "label": "neg"}, {"text": None, "label": "pos"}]
    corpus = data.load(write(tmp_path / "d.jsonl", rows))
    assert len(corpus.train.label) + len(corpus.test.label) == 20
    assert any(note.startswith("2 of 22 rows without a text were left out") for note in corpus.notes)


def bad(label: Any = "a", text: Any = "t", more: int = 10) -> list[dict[str, Any]]:
    return [*some_rows(more, ("a", "b")), {"text": text, "label": label}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "y": 1}], r"which column holds the label\? Columns: text, y\."),
        ([{"words": "a", "label": 1}], r"which column holds the text\? Columns: words, label\."),
        (bad(None), r'the label in "label" is empty in 1 of 11 rows \(rows 11\)'),
        (bad("  "), r'the label in "label" is empty in 1 of 11 rows \(rows 11\)'),
        (bad(float("nan")), "is empty in 1 of 11"),
        (some_rows(9, (0, 2)), r'are "0", "2"; numbers must be 0 to C-1 without a gap, and 1 is missing'),
        (some_rows(9, (1, 2)), r'are "1", "2"; .* and 0 is missing'),
        (some_rows(9, (1, -5)), r'are "-5", "1"; numbers must be 0 to C-1'),
        (some_rows(9, (0.0, 0.5)), r'the label in "label" is 0.5 in row 2; a class is a name or a whole number'),
        (some_rows(9, (0.0, float("inf"))), "is inf in row 2"),
        (bad(3), "mixes numbers and names"),
        (some_rows(9, ("a",)), r'every row has the label "a" in "label"'),
        ([{"text": "", "label": i % 2} for i in range(4)], 'column "text" has no text in any of 4 rows'),
        (bad(text=7), r'column "text" holds int, no text \(row 11: 7\)'),
        (some_rows(2), "every class has a single row"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    path = write(tmp_path / "d.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        data.load(path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("d.csv", b"text,label\na,0\nb,1,2\n", "line 3 has 3 fields, the first line names 2 columns"),
        ("d.tsv", b"text\tlabel\na\t0\n\nb\n", "line 4 has 1 fields, the first line names 2 columns"),
        ("d.csv", b"text,label\na,0\nb\xe9,1\n", "is not UTF-8: byte 2 of line 3 is 0xe9"),
        ("d.csv", b"\xef\xbb\xbfa\xff,label\n", "is not UTF-8: byte 2 of line 1 is 0xff"),
        ("d.csv", b'text,label\n"a" b,0\n', "line 2 is not well-formed CSV"),
        ("d.csv", b"text,text\na,0\n", "two columns have the same name"),
        ("d.csv", b"", "is empty"),
        ("d.csv", b"text,label\n", "has no rows to train on"),
        ("d.jsonl", b'{"text": "a", "label": 0}\n{"text": \n', "line 2 is not JSON"),
        ("d.jsonl", b"[1]\n", "line 1 is not an object"),
        ("d.json", b'[\n{"text": "a",]', "line 2 is not JSON"),
        ("d.json", b"[3]", "entry 1 is not an object"),
        ("d.jsonl", b"\n", "is empty"),
        ("d.parquet", b"no parquet", "cannot be read as Parquet"),
        ("d.xlsx", b"", r'the extension ".xlsx" is not known. Possible: .parquet, .csv, .tsv, .jsonl, .json'),
    ],
)
def test_bad_files_are_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / file))


def test_bad_requests_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", some_rows(20))
    for options, message in (
        ({"label": "y"}, r'no column "y" \(label\). Columns: text, label'),
        ({"group": "user"}, r'no column "user" \(group\)'),
        ({"test_share": 1.0}, "test_share = 1.0 must be between 0 and 1"),
        ({"revision": "main"}, 'revision = "main" has no effect here'),
        ({"test": str(tmp_path / "none.csv")}, "none.csv: there is no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(path, **options)
    with pytest.raises(ValueError, match=r"missing.csv does not exist.\n    Possible: docstrings, a file"):
        data.load(str(tmp_path / "missing.csv"))
    with pytest.raises(ValueError, match='text = "a" has no effect here'):
        data.load("docstrings", text="a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r'has no "train". There: nothing readable'):
        data.load(str(tmp_path / "empty"))


def test_labels_of_the_test_must_be_known(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", some_rows(20))
    with pytest.raises(ValueError, match=r'labels that are not among the classes: "neutral"'):
        data.load(train, test=write(tmp_path / "t.csv", some_rows(9, ("pos", "neutral"))))
    numbered = write(tmp_path / "n.csv", some_rows(9, (0, 1)))
    assert any('number 0 in "label" was read as "neg"' in note for note in data.load(train, test=numbered).notes)
    with pytest.raises(ValueError, match='not among the classes: "2"'):
        data.load(numbered, test=write(tmp_path / "t.csv", some_rows(9, (0, 2))))


def test_an_empty_group_is_named(tmp_path: Path) -> None:
    rows = [row | {"user": "u" if i else None} for i, row in enumerate(some_rows(20))]
    with pytest.raises(ValueError, match=r'the group in "user" is empty in 1 of 20 rows \(rows 1\)'):
        data.load(write(tmp_path / "d.jsonl", rows), group="user")


def test_read_labelled(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", some_rows(3))
    assert data.read_labelled(path, ("pos", "neg")).label == (1, 0, 1)  # the names given decide, not the alphabet
    assert data.read_labelled(write(tmp_path / "n.csv", some_rows(3, (0, 1))), ("pos", "neg")).label == (0, 1, 0)
    with pytest.raises(ValueError, match='not among the classes: "pos"'):
        data.read_labelled(path, ("neg", "none"))


def test_without_a_network_the_hub_gives_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to the hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"could not be had from the Hugging Face hub: no route to the hub\n    Check"):
        data.load("nyu-mll/glue:sst2")


def test_a_hub_name_is_read_with_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    rows = [{"text": f"t {i}", "label": i % 2} for i in range(40)]
    train = datasets.Dataset.from_list(rows, features=class_labels(["n", "p"]))

    def give(*args: Any, **kwargs: Any) -> datasets.DatasetDict:
        asked.append((args, kwargs))
        return datasets.DatasetDict(
            {"train": train, "test": train.map(lambda row: {"label": -1}), "validation": train.select(range(10))}
        )

    monkeypatch.setattr(datasets, "load_dataset", give)
    corpus = data.load("nyu-mll/glue:sst2", revision="abc")
    assert asked == [(("nyu-mll/glue", "sst2"), {"revision": "abc"})]
    assert len(corpus.test.label) == 10
    assert corpus.labels == ("n", "p")


def test_the_fingerprint_sees_every_value() -> None:
    base = some_rows(20)
    variants = [base]
    for row, key, value in ((0, "text", "other"), (3, "label", "pos")):
        changed = [dict(r) for r in base]
        changed[row][key] = value
        variants.append(changed)
    test = datasets.Dataset.from_list(some_rows(6))
    prints = [data.from_datasets(datasets.Dataset.from_list(rows), test).fingerprint for rows in variants]
    assert len(set(prints)) == 3
    corpus = data.from_datasets(datasets.Dataset.from_list(base), test)
    rows = [
        json.dumps([text, None, label, None]).encode() + b"\n"
        for side in (corpus.train, corpus.test)
        for text, label in zip(side.text, side.label, strict=True)
    ]
    lines = [b'["neg", "pos"]', *rows[:20], b"null\n", *rows[20:]]
    assert prints[0] == hashlib.sha256(b"".join(lines)).hexdigest()  # no address, no order of a set: any machine's


def test_what_else_a_task_reads_stays_with_its_row(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": i % 2, "Word": f"w {i}", "spans": [i, i + 1]} for i in range(40)]
    needs = data.Needs(extra={"word": ("term", "word"), "at": ("spans",), "note": ("remark",)}, optional=("note",))
    corpus = data.load(write(tmp_path / "d.jsonl", rows), needs=needs, train_rows=12)
    for side in (corpus.train, corpus.test):
        assert set(side.extra) == {"word", "at"}
        for text, word, at in zip(side.text, side.extra["word"], side.extra["at"], strict=True):
            number = int(text.split()[1])
            assert (word, at) == (f"w {number}", [number, number + 1])
    assert "word column: 'Word' (guessed)" in corpus.notes
    assert not [note for note in corpus.notes if note.startswith("at column")]  # one name: nothing was guessed
    plain = data.load(str(tmp_path / "d.jsonl"), train_rows=12)
    assert plain.train.text == corpus.train.text
    assert plain.fingerprint != corpus.fingerprint
    with pytest.raises(ValueError, match=r"needs a column for note, and none of these is there: remark"):
        data.load(str(tmp_path / "d.jsonl"), needs=needs._replace(optional=()))


def test_rows_without_classes_are_of_one(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"completion": f"t {i}", "label": "x"} for i in range(20)])
    corpus = data.load(path, needs=data.Needs(texts=("completion",), label=False))
    assert corpus.labels == ("all",)
    assert set(corpus.train.label) == {0}
    assert (len(corpus.train.label), len(corpus.test.label)) == (16, 4)


def test_the_docstrings_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tuple(docstrings.Row(f"text {i}", i % 5, f"m{i}", f"g{i % 7}") for i in range(100))
    monkeypatch.setattr(docstrings, "build", lambda: (rows[:80], rows[80:], "read somewhere"))
    corpus = data.load("docstrings", train_rows=40)
    assert corpus.labels == docstrings.PACKAGES
    assert Counter(corpus.train.label) == dict.fromkeys(range(5), 8)
    assert corpus.train.group is not None
    assert corpus.notes == ("read somewhere", "train_rows: 40 of 80 rows, class by class")


def test_no_global_generator_is_moved_and_torch_is_not_imported(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", some_rows(30))
    before = random.getstate()
    data.load(path, train_rows=10)
    assert random.getstate() == before
    code = "import sys; from spryfl import data; data.load(sys.argv[1]); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
