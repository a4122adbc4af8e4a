"""The page: what stands in it is what the records say, whatever they say, and nothing in it is run or fetched."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from folders import HOSTILE, record, rounds, write

from spryfl import page, report
from spryfl.page import clients, lines, parts
from spryfl.report import Foretold

VOID = {"meta", "link", "input", "br", "wbr", "img", "path"}


class Reader(HTMLParser):
    """The page as a reader sees it: text by section, tables as rows of cells, tags; and whether all are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.tables, self.scripts = [], [], [], [], []
        self._cell = None
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self._cell = ""

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("th", "td"):
            self.tables[-1][-1].append(self._cell.strip())
            self._cell = None

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self.open[-1:] != ["style"]:
            self.text.append(data)
            if self._cell is not None:
                self._cell += data

    def table(self, *head):
        """The table whose head begins with these cells."""
        return next(one for one in self.tables if one[0][: len(head)] == list(head))

    @property
    def data(self):
        return json.loads(self.scripts[0])


def shown(*folders, **more):
    return page.gather(list(folders))._replace(**more)


def read(*folders, **more):
    return Reader(page.render(shown(*folders, **more)))


@pytest.fixture
def two(tmp_path):
    first = write(tmp_path / "a", rounds(12, every=3), {"method": "spry"})
    second = write(tmp_path / "b", rounds(8, wave=0.01, every=2), {"method": "fedavg", "train": {"rounds": 8}})
    return first, second


class TestNumbers:
    def test_curves_are_the_records(self, two):
        made = read(*two).data
        for line, folder in zip(made["lines"], two, strict=True):
            run = report.read(folder)
            assert line["label"] == run.name
            for axis, of in report.ALONG.items():
                assert line["x"][axis] == pytest.approx([of(one) for one in run.records], rel=1e-5)
            for chart, key in (("metric-0", "accuracy"), ("loss", "loss"), ("test-loss", "test_loss")):
                assert line["y"][chart] == [
                    None if one.get(key) is None else pytest.approx(one[key], rel=1e-5) for one in run.records
                ]
        assert made["charts"]["metric-0"] == {"title": "accuracy", "log": False}
        assert made["charts"]["scalar-rms"]["log"]

    def test_results_are_the_reports(self, two):
        head, rows = report.rows([report.read(one) for one in two])
        found = read(*two).table("run", "state")
        said = [i for i, name in enumerate(head) if any(row[i] != "-" for row in rows)]
        assert found == [[head[i] for i in said], *([row[i] for i in said] for row in rows)]

    def test_differences_come_first(self, two):
        made = read(*two)
        table = made.table("setting")
        expected = report.differences([report.read(one) for one in two])
        rows = [row for one in made.tables if one[0] == ["setting", "a", "b"] for row in one[1:]]
        assert made.tables[0] is table
        assert sorted(rows) == sorted([list(row) for row in expected])
        assert ["train.rounds", "24", "8"] in rows

    def test_settings_that_some_have_stand_apart_when_they_are_many(self, two):
        groups = shown(*two).groups
        all_, some = parts.differing(groups)
        assert all("-" not in row for row in all_.rows)
        assert all("-" in row for row in some.rows)
        assert len(some.rows) > parts.FEW
        few = [one for one in parts.differing({"a": groups["a"], "c": groups["a"]}) if one.rows]
        assert few == []

    def test_settings_are_all_there(self, two):
        made = read(*two)
        flat = report.flat(report.read(two[0]).config)
        found = next(one for one in made.tables if one[0] == ["setting", "value"])
        assert dict(found[1:]) == {key: str(value) for key, value in flat.items()}

    def test_bytes_beside_flowers(self, tmp_path):
        carried = {"engine": {"flower_bytes_down": 60_000, "flower_bytes_up": 50_000}}
        with_flower = write(tmp_path / "a", [record(1, accuracy=0.5, **carried), record(2, accuracy=0.5, **carried)])
        table = read(with_flower).table("MB", "down")
        assert table[0] == ["MB", "down", "up", "together", "Flower, down", "Flower, up", "Flower above ours"]
        assert table[1] == ["a", "0.0600", "0.0400", "0.100", "0.120", "0.100", "+120.0 %"]
        without = write(tmp_path / "b", rounds(2))
        assert read(without).table("MB", "down") == [
            ["MB", "down", "up", "together"],
            ["b", "0.0600", "0.0400", "0.100"],
        ]

    def test_memory_foretold_and_measured(self, two):
        sizes = dict.fromkeys((*parts.HELD, *parts.STEP), 1_000_000) | {"tangents": 500_000}
        made = read(*two, foretold={"a": Foretold({"": sizes}, ""), "b": Foretold({}, "no such model")})
        head, first, second = made.table("MB", "foretold", "measured")
        one = dict(zip(head, first, strict=True))
        assert (one["foretold"], one["measured"], one["ratio"]) == ("3.50", "2.00", "1.75")
        assert (one["tangents"], one["backbone"]) == ("0.500", "1.00")
        assert dict(zip(head, second, strict=True))["foretold"] == "-"
        assert "No prediction for b: no such model" in " ".join(made.text)

    def test_bars_are_as_wide_as_their_numbers(self, two):
        held = [
            parts.Held("a", {"activations": 3_000_000, "tangents": 1_000_000}, 2_000_000),
            parts.Held("b", {}, 1_000_000),
        ]
        bars, _ = parts.memory(held)
        assert [[(kind, width) for kind, width, _ in bar.parts] for bar in bars] == [
            [("activations", 75.0), ("tangents", 25.0)],
            [("measured", 50.0)],
            [("measured", 25.0)],
        ]
        assert [bar.label for bar in bars] == ["a", "", "b"]

    def test_memory_of_classes_of_clients(self, tmp_path):
        own = {"class_peak_bytes": {"phones": 1_000_000, "rest": 4_000_000}}
        folder = write(tmp_path / "a", [record(1, accuracy=0.5, **own), record(2, accuracy=0.5, **own)])
        said = {"phones": {"activations": 2_000_000}}
        table = read(folder, foretold={"a": Foretold(said, "")}).table("MB", "foretold")
        rows = {row[0]: row[1:3] for row in table[1:]}
        assert rows == {"a, phones": ["2.00", "1.00"], "a, rest": ["-", "4.00"]}


class TestSeeds:
    @pytest.fixture
    def seeds(self, tmp_path):
        return [write(tmp_path / f"a-{seed}", rounds(9, wave=0.02 * seed), {"seed": seed}) for seed in (0, 1, 2)]

    def test_mean_and_spread(self, seeds):
        made = read(*seeds)
        (line,) = made.data["lines"]
        assert (line["label"], line["seeds"]) == ("a", 3)
        runs = [report.read(one) for one in seeds]
        band = line["bands"]["metric-0"]["rounds"]
        for i, round_ in enumerate(band["x"]):
            found = [run.records[int(round_)]["accuracy"] for run in runs]
            assert band["mean"][i] == pytest.approx(mean(found), rel=1e-5)
            assert (band["low"][i], band["high"][i]) == pytest.approx((min(found), max(found)), rel=1e-5)
        assert made.table("runs", "seeds")[1][0] == "a"
        assert "±" in made.table("runs", "seeds")[1][4]
        assert [row[0] for row in made.table("run", "state")[1:]] == ["a-0", "a-1", "a-2"]

    def test_a_mean_goes_as_far_as_all_runs(self, tmp_path):
        """And between two records along a straight line."""
        one = write(tmp_path / "a-0", [record(r, accuracy=r / 10, seconds=2.0 * r) for r in range(6)], {"seed": 0})
        two = write(tmp_path / "a-1", [record(r, accuracy=r / 10, seconds=3.0 * r) for r in range(4)], {"seed": 1})
        (line,) = read(one, two).data["lines"]
        band = line["bands"]["metric-0"]["seconds"]
        assert band["x"] == [0, 2, 3, 4, 6, 8, 9]
        both = [np.interp(band["x"], [0, step * 5], [0, 0.5]) for step in (2.0, 3.0)]
        assert band["mean"] == pytest.approx(np.mean(both, 0), rel=1e-5)
        assert band["high"] == pytest.approx(np.max(both, 0), rel=1e-5)

    def test_a_comparison(self, tmp_path):
        for label in ("spry", "fedavg"):
            for seed in (0, 1):
                write(tmp_path / "c" / f"{label}-seed{seed}", rounds(4), {"method": label, "seed": seed})
        (tmp_path / "c" / "compare.toml").write_text(
            '[compare]\nmethods = ["spry", "fedavg", "late"]\nseeds = [0, 1]\n'
        )
        made = read(tmp_path / "c")
        assert [line["label"] for line in made.data["lines"]] == ["spry", "fedavg"]
        assert [line["seeds"] for line in made.data["lines"]] == [2, 2]


class TestWhatIsThere:
    def test_clients_that_failed(self, tmp_path):
        records = [
            record(1, accuracy=0.5, cohort=[3, 4], failed={"3": "lost"}),
            record(
                2, cohort=[3, 5], failed={"3": "lost"}, repeated=[{"cohort": [4, 3], "failed": {"4": "late", "3": "x"}}]
            ),
        ]
        made = read(write(tmp_path / "a", records))
        assert made.table("run", "client")[1:] == [
            ["a", "3", "3", "3", "1, 2", "lost (2 times); x"],
            ["a", "4", "1", "2", "2", "late"],
        ]
        assert "2 of 6 answers came." in " ".join(made.text)

    def test_the_clients_that_failed_most_are_listed(self, tmp_path):
        often = [{str(i): "lost" for i in range(100)}, {"70": "lost"}, {"70": "lost", "9": "lost"}]
        made = read(write(tmp_path / "a", [record(i + 1, accuracy=0.5, failed=one) for i, one in enumerate(often)]))
        table = made.table("run", "client")
        assert [row[1:3] for row in table[1:4]] == [["70", "3"], ["9", "2"], ["0", "1"]]
        assert len(table) == 1 + parts.LISTED
        assert "40 more failed" in " ".join(made.text)

    def test_classes_and_clients(self, tmp_path):
        made = read(write(tmp_path / "a", rounds(2)))
        assert made.table("client", "bad") == [
            ["client", "bad", "good", "together"],
            ["0", "10", "0", "10"],
            ["1", "3", "9", "12"],
            ["2", "0", "4", "4"],
        ]
        assert "3 clients hold 4 to 12 rows each" in " ".join(made.text)

    def test_the_distance_is_the_partitions(self):
        """Against the package's own statistics."""
        from spryfl import partition

        of = [[10, 0], [3, 9], [0, 4]]
        labels, rows, at = [], [], 0
        for one in of:
            labels += [0] * one[0] + [1] * one[1]
            rows.append(tuple(range(at, at + sum(one))))
            at += sum(one)
        assert clients.distance(of) == pytest.approx(partition.statistics(tuple(rows), labels, 2).distance)
        assert partition.written(tuple(rows), labels, ["bad", "good"]) == {
            "labels": ["bad", "good"],
            "rows": ["10 0", "3 9", "0 4"],
        }

    def test_a_disc_is_as_large_as_its_rows(self, tmp_path):
        """Area by rows: the width of the stroke goes with the root."""
        facts = {"clients": {"labels": ["a", "b"], "rows": ["16 4", "1 0"]}}
        ((one,), beyond) = clients.dealt(shown(write(tmp_path / "a", rounds(1), **facts)).groups)
        widths = {points: float(width) for width, points in one.paths}
        places = {(0, 0): 16, (0, 1): 4, (1, 0): 1}
        for (client, row), n in places.items():
            (width,) = [
                w
                for points, w in widths.items()
                if f"M{one.cell * (client + 0.5):g} {one.cell * (row + 0.5):g}h0" in points
            ]
            assert width == pytest.approx((one.cell - 1) * (n / 16) ** 0.5, abs=(one.cell - 1) / clients.STEPS)
        assert (len(widths), beyond) == (3, 0)

    def test_many_clients_and_classes_are_cut_and_it_is_said(self, tmp_path):
        rows = [" ".join("1" for _ in range(50)) for _ in range(500)]
        facts = {"clients": {"labels": [f"c{i}" for i in range(50)], "rows": rows}}
        ((one,), _) = clients.dealt(shown(write(tmp_path / "a", rounds(1), **facts)).groups)
        assert (len(one.labels), len(one.table.rows)) == (clients.CLASSES, clients.MOST // clients.CLASSES)
        assert "The first 75 are drawn. Of 50 classes the 40 largest are drawn." in one.words

    def test_alignment_where_records_have_it(self, tmp_path):
        unit = {"cos": 0.5, "energy": 0.75, "gradient": 0.25, "step": None}
        more = {"alignment": {"cos": 0.125, "law": 0.25, "units": {"unit.0": unit, "unit.1": {"cos": 0.1}}}}
        made = read(write(tmp_path / "a", [record(1, accuracy=0.5), record(2, **more)]))
        assert made.data["lines"][0]["y"]["align-cos"] == [None, 0.125]
        assert made.data["lines"][0]["y"]["align-law"] == [None, 0.25]
        assert "align-round_cos" not in made.data["charts"]
        assert made.table("run", "unit")[1:] == [
            ["a", "unit.0", "0.5", "0.75", "0.25", "-"],
            ["a", "unit.1", "0.1", "-", "-", "-"],
        ]
        assert "align-cos" not in read(write(tmp_path / "b", rounds(2))).data["charts"]

    @pytest.mark.parametrize(
        "strange", [None, 3, "x", {"cos": None}, {"cos": "nan"}, {"units": [1]}, {"units": {"u": 1}}]
    )
    def test_alignment_of_another_shape_is_left_out(self, tmp_path, strange):
        made = read(write(tmp_path / "a", [record(1, accuracy=0.5, alignment=strange)]))
        assert not [chart for chart in made.data["charts"] if chart.startswith("align")]
        assert "By unit" not in made.text

    def test_classes_of_clients(self, tmp_path):
        one = {"asked": 2, "answered": 1, "loss": 0.5, "passes": 12}
        made = read(write(tmp_path / "a", [record(r, accuracy=0.5, classes={"phones": one}) for r in (1, 2)]))
        assert made.table("run", "class")[1:] == [["a", "phones", "4", "2", "24", "0.5000"]]


class TestAnyFolder:
    def test_hostile_names(self, tmp_path):
        """In a run's name, a setting, a class, a reason, a fact: all of it is text."""
        name = HOSTILE.replace("/", "|")
        folder = write(
            tmp_path / name,
            [record(1, accuracy=0.5, failed={"0": HOSTILE}), record(2, accuracy=0.5)],
            {"data": {"name": HOSTILE}, "name": "x"},
            clients={"labels": [HOSTILE, "b"], "rows": ["1 2"]},
            state=HOSTILE,
        )
        other = write(tmp_path / "b", rounds(2))
        made = read(folder, other)
        assert made.data["lines"][0]["label"] == name
        assert len(made.scripts) == 2  # the data and the page's own
        assert not [tag for tag, _ in made.tags if tag == "img"]
        assert not [key for _, attrs in made.tags for key in attrs if key.startswith("on")]
        assert (
            HOSTILE
            in made.table("setting", "value")[[row[0] for row in made.table("setting", "value")].index("data.name")][1]
        )

    def test_nothing_is_fetched(self, two):
        text = page.render(shown(*two))
        made = Reader(text)
        assert not [attrs for _, attrs in made.tags if "src" in attrs]
        assert {attrs["href"][:1] for tag, attrs in made.tags if tag == "a"} == {"#"}
        (policy,) = [attrs["content"] for _, attrs in made.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "connect-src 'none'" in policy
        assert "@import" not in text
        assert not re.search(r"url\((?!data:)", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))

    def test_losses_that_are_no_numbers(self, tmp_path):
        losses = [0.5, float("nan"), float("inf"), None]
        records = [record(i + 1, accuracy=0.5, loss=value) for i, value in enumerate(losses)]
        made = read(write(tmp_path / "a", records))
        assert made.data["lines"][0]["y"]["loss"] == [0.5, None, None, None]
        assert "a: the training loss was no finite number in 2 rounds, first in round 2." in " ".join(made.text)

    @pytest.mark.parametrize("count", [0, 1])
    def test_a_run_that_has_hardly_begun(self, tmp_path, count):
        records = rounds(3)[:count]
        folder = write(tmp_path / "a", records, state="running")
        made = read(folder)
        assert len(made.data["lines"][0]["x"]["rounds"]) == count
        assert ("There are no records yet." in made.text) == (count == 0)
        (folder / "records.jsonl").unlink()
        assert read(folder).data["lines"][0]["y"] == {}

    def test_a_line_that_was_cut_short(self, tmp_path):
        folder = write(tmp_path / "a", rounds(3), state="running")
        with open(folder / "records.jsonl", "a", encoding="utf-8") as file:
            file.write('{"round": 4, "lo')
        assert read(folder).data["lines"][0]["x"]["rounds"] == [0, 1, 2, 3]

    def test_an_old_folder(self, tmp_path):
        """Of a version that wrote fewer facts, and other settings."""
        folder = write(tmp_path / "a", rounds(3))
        facts = json.loads((folder / "run.json").read_text())
        for key in ("clients", "data", "hardware", "versions", "ended", "threads", "commit", "metric"):
            del facts[key]
        (folder / "run.json").write_text(json.dumps(facts))
        (folder / "config.toml").write_text("[old]\nkey = 1\n[train]\nrounds = 3\n")
        made = read(folder)
        assert "These runs did not record it." in " ".join(made.text)
        assert made.table("setting", "value")[1:] == [["old.key", "1"], ["train.rounds", "3"]]

    def test_equal_names_are_told_apart(self, tmp_path):
        folders = [
            write(tmp_path / above / "a", rounds(2), {"train": {"rounds": i + 1}}) for i, above in enumerate("xy")
        ]
        assert [line["label"] for line in read(*folders).data["lines"]] == ["x/a", "y/a"]

    def test_no_run(self, tmp_path):
        with pytest.raises(ValueError, match="is not a run folder"):
            page.gather([tmp_path])

    def test_size(self, tmp_path):
        """Ten runs of 500 rounds stay below 2 MB, all points drawn; of more rounds every n-th is, and that is said."""
        folders = [write(tmp_path / f"r{i}", rounds(500), {"train": {"cohort": i + 1}}) for i in range(10)]
        text = page.render(shown(*folders))
        assert len(text.encode()) < 2_000_000
        assert [len(line["x"]["rounds"]) for line in Reader(text).data["lines"]] == [501] * 10
        (tmp_path / "r0" / "records.jsonl").write_text(
            "".join(json.dumps(one) + "\n" for one in rounds(9000, every=75))
        )
        made = read(*folders)
        own = made.data["lines"][0]
        assert "one in 2 is drawn" in " ".join(made.text)
        assert own["x"]["rounds"][-1] == 9000
        scored = [round_ for round_, y in zip(own["x"]["rounds"], own["y"]["metric-0"], strict=True) if y is not None]
        assert scored == list(range(0, 9001, 75))

    def test_looks_are_told_apart_without_colour(self):
        looks = [page._look(i) for i in range(24)]
        assert len({tuple(one.values()) for one in looks}) == 24
        assert len({(one["dash"], one["mark"]) for one in looks[:8]}) == 8


def test_assets_are_in_the_package():
    files = Path(page.__file__).parent / "files"
    assert {one.name for one in files.iterdir()} == {
        "report.html",
        "report.css",
        "report.js",
        "uplot.js",
        "uplot.css",
        "uplot.LICENSE",
    }
    assert "Permission is hereby granted, free of charge" in (files / "uplot.LICENSE").read_text()


def test_places_of_a_mean_are_few(tmp_path):
    seeds = [write(tmp_path / f"a-{seed}", rounds(400), {"seed": seed}) for seed in (0, 1)]
    band = read(*seeds).data["lines"][0]["bands"]["loss"]["rounds"]
    assert len(band["x"]) == lines.PLACES
    assert (band["x"][0], band["x"][-1]) == (1, 400)
