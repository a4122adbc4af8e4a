"""The page in a real browser: opened, clicked through, moved through by keyboard, held against axe's rules.

It needs Chromium (Debian: apt-get install chromium). Without it these tests fail where CI is set, elsewhere they are
skipped. A picture of each page is left in the folder that SPRYFL_SCREENSHOTS names, if it names one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from folders import HOSTILE, record, rounds, write

from spryfl import page
from spryfl.page.live import Live
from spryfl.report import Foretold

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
PARTS = {"process": 4e8, "backbone": 9e7, "adapters": 1e6, "activations": 1.2e6, "tangents": 9e5, "gradients": 1e4}


@pytest.fixture(scope="module")
def chromium():
    """A headless browser, its process shared by the tests of this file."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if not found:
        said = f"no browser: none of {', '.join(NAMES)} is installed. Debian: apt-get install -y chromium"
        if os.environ.get("CI"):
            pytest.fail(said)
        pytest.skip(said)
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield made
        made.close()


@pytest.fixture
def opened(chromium):
    """`opened(file or address, size, scheme)` -> a page that must not say a word nor ask for anything but itself."""
    contexts = []

    def go(where, size=DESK, scheme="light"):
        context = chromium.new_context(viewport=size, color_scheme=scheme)
        made, words, asked = context.new_page(), [], []
        made.on("console", lambda message: words.append(message.text))
        made.on("pageerror", lambda error: words.append(str(error)))
        made.on("request", lambda request: asked.append(request.url))
        contexts.append((context, words, asked, str(where)))
        made.goto(where if isinstance(where, str) else where.resolve().as_uri())
        made.locator(".plot canvas").first.wait_for()
        return made

    yield go
    for context, words, asked, where in contexts:
        context.close()
        address = where if "://" in where else Path(where).resolve().as_uri()
        assert words == []
        assert [url for url in asked if url != address and not url.startswith("data:")] == []


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of two runs with everything that a page can show, and one of seeds."""
    folder = tmp_path_factory.mktemp("pages")
    full = rounds(30, every=3)
    full[4] |= {
        "failed": {"1": "gave no answer in time"},
        "alignment": {"cos": 0.25, "law": 0.2, "units": {"a": {"cos": 0.5}}},
    }
    full[5] |= {"engine": {"flower_bytes_down": 160_000, "flower_bytes_up": 90_000}, "variance": {"0": 0.2, "1": 0.4}}
    full[6] |= {"classes": {"phones": {"asked": 1, "answered": 1, "loss": 0.7, "passes": 12}}}
    runs = [
        write(folder / "spry", full, {"method": "spry"}),
        write(folder / "fedavg", rounds(20, wave=0.02, every=2), {"method": "fedavg"}),
    ]
    shown = page.gather(runs)
    page.write(
        shown._replace(foretold={"spry": Foretold({"": {**PARTS, "prefix": 0, "buffers": 0}}, "")}), folder / "two.html"
    )
    seeds = [write(folder / f"s-{seed}", rounds(20, wave=0.02 * seed), {"seed": seed}) for seed in (0, 1, 2)]
    page.write(page.gather([*seeds, runs[1]]), folder / "seeds.html")
    return folder


def violations(view):
    """What axe finds wrong, in words."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(view).response["violations"]
    return [f"{one['id']}: {node['html'][:160]}" for one in found for node in one["nodes"]]


def wide(view):
    """How many pixels the page is wider than its window."""
    return view.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def keep(view, name):
    folder = Path(os.environ["SPRYFL_SCREENSHOTS"]) if os.environ.get("SPRYFL_SCREENSHOTS") else None
    picture = view.screenshot(full_page=True)
    assert picture.startswith(b"\x89PNG")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(picture)


def said(view, chart="metric-0"):
    return view.locator(f"#plot-{chart}").get_attribute("aria-valuetext")


@pytest.mark.parametrize("which", ["two", "seeds"])
@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (DESK, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_no_rule_is_broken(opened, made, which, size, scheme):
    view = opened(made / f"{which}.html", size, scheme)
    assert violations(view) == []
    assert wide(view) == 0
    keep(view, f"{which}-{size['width']}-{scheme}")
    for summary in view.locator("summary").all():
        summary.click()
    assert view.locator("details:not([open])").count() == 0
    assert violations(view) == []
    assert wide(view) == 0


def test_axes_are_switched(opened, made):
    view = opened(made / "two.html")
    assert said(view) == "Rounds 30: spry 0.7500"
    last = {"Passes": "360", "Megabytes": "1.5", "Seconds": "45"}
    for words, x in last.items():
        view.get_by_role("radio", name=words).check()
        assert said(view).startswith(f"{words} {x}: spry 0.7500")


def test_values_by_keyboard(opened, made):
    """Every point of every line, by the arrow keys alone; the pointer's words are the same."""
    view = opened(made / "two.html")
    plot = view.locator("#plot-metric-0")
    plot.focus()
    assert view.evaluate("document.activeElement.id") == "plot-metric-0"
    view.keyboard.press("Home")
    assert said(view) == "Rounds 0: spry 0.2500, fedavg 0.2500"
    view.keyboard.press("ArrowRight")
    first = json.loads((made / "fedavg" / "records.jsonl").read_text().splitlines()[2])["accuracy"]
    assert said(view) == f"Rounds 2: spry 0.4125 at 3, fedavg {first:.4f}"
    assert view.locator("#plot-metric-0 .tip").is_visible()
    assert f"{first:.4f}" in view.locator("#plot-metric-0 .tip").inner_text()
    view.keyboard.press("End")
    assert said(view) == "Rounds 30: spry 0.7500"
    view.keyboard.press("ArrowRight")
    assert plot.get_attribute("aria-valuenow") == plot.get_attribute("aria-valuemax")
    view.keyboard.press("Escape")
    assert view.locator("#plot-metric-0 .tip").is_hidden()


def test_values_by_pointer(opened, made):
    view = opened(made / "seeds.html")
    view.locator("#plot-metric-0").hover()
    tip = view.locator("#plot-metric-0 .tip").inner_text()
    assert tip.startswith("rounds 9")
    assert "s" in tip.split()
    assert "–" in tip  # lowest and highest of the seeds


def test_every_control_is_reached_by_tab(opened, made):
    view = opened(made / "two.html")
    seen = []
    for _ in range(60):
        view.keyboard.press("Tab")
        seen.append(view.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert seen[0] == "To the content"
    wanted = ["spry", "fedavg", "plot-metric-0", "plot-loss", "accuracy as numbers", "plot-align-cos"]
    assert [one for one in wanted if one not in seen] == []
    for _ in range(3):
        view.keyboard.press("Shift+Tab")
    assert view.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_lines_are_hidden_and_shown(opened, made):
    view = opened(made / "two.html")
    button = view.get_by_role("button", name="spry")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert said(view).startswith("Rounds 20: fedavg ")
    view.get_by_role("button", name="fedavg").click()
    assert "No line is shown here." in view.locator("#plot-metric-0").inner_text()
    button.click()
    assert said(view) == "Rounds 30: spry 0.7500"


def test_numbers_as_a_table(opened, made):
    view = opened(made / "two.html")
    view.locator("#numbers-metric-0 summary").click()
    view.locator("#numbers-metric-0 td").first.wait_for()  # the table is made when the browser says that it is open
    rows = [row.inner_text().split("\t") for row in view.locator("#numbers-metric-0 tr").all()]
    assert rows[0] == ["Rounds", "spry", "fedavg"]
    assert [row[0] for row in rows[1:]] == [str(i) for i in range(31) if i % 3 == 0 or (i % 2 == 0 and i <= 20)]
    assert rows[1] == ["0", "0.2500", "0.2500"]
    view.get_by_role("radio", name="Passes").check()
    assert view.locator("#numbers-metric-0 th").first.inner_text() == "Passes"


def test_colours_are_switched_and_remembered(opened, made):
    """Also against what the system prefers; the charts follow."""
    view = opened(made / "two.html", scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    pixel = """(() => {
        const one = document.querySelector('.plot canvas');
        return [...one.getContext('2d').getImageData(0, 0, one.width, one.height).data].join();
    })()"""
    dark, drawn = view.evaluate(paper), view.evaluate(pixel)
    view.get_by_role("radio", name="light").check()
    assert view.evaluate(paper) != dark
    assert view.evaluate(pixel) != drawn
    view.reload()
    view.locator(".plot canvas").first.wait_for()
    assert view.get_by_role("radio", name="light").is_checked()
    view.get_by_role("radio", name="auto").check()
    assert view.evaluate(paper) == dark


def test_hostile_names_do_nothing(opened, tmp_path):
    name = HOSTILE.replace("/", "|")
    records = [record(r, accuracy=0.5, failed={"0": HOSTILE}) for r in (1, 2)]
    facts = {"clients": {"labels": [HOSTILE, "b"], "rows": ["1 2"]}}
    runs = [write(tmp_path / name, records, {"data": {"name": HOSTILE}}, **facts), write(tmp_path / "b", rounds(2))]
    page.write(page.gather(runs), tmp_path / "page.html")
    view = opened(tmp_path / "page.html", PHONE)
    view.on("dialog", lambda dialog: pytest.fail(dialog.message))
    assert view.locator("h1").inner_text().startswith(name)
    view.locator("#plot-metric-0").focus()
    view.keyboard.press("ArrowLeft")
    assert name in said(view)
    assert wide(view) == 0
    assert view.locator("img").count() == 0


def test_a_live_page_draws_itself_anew(opened, tmp_path):
    """New records, a new kind of chart and the end come by themselves; what was opened and chosen stays."""
    folder = write(tmp_path / "a", [record(1, accuracy=0.25), record(2, accuracy=0.5)], state="running")
    with Live([folder], every=0.2, kept="a/report.html") as live:
        view = opened(live.address)
        view.locator("#settings-1 summary").click()
        view.get_by_role("radio", name="Seconds").check()
        view.locator("#plot-metric-0").focus()
        with open(folder / "records.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record(3, accuracy=0.75, alignment={"cos": 0.5})) + "\n")
        view.locator("#plot-align-cos canvas").wait_for()
        assert "round 3 of" in view.locator("#part-state").inner_text()
        view.keyboard.press("End")
        assert said(view) == "Seconds 4.5: a 0.7500"
        view.keyboard.press("Home")
        view.keyboard.press("ArrowRight")
        assert said(view) == "Seconds 3: a 0.5000"
        view.locator("#numbers-align-cos summary").click()
        assert "0.5000" in view.locator("#numbers-align-cos table").inner_text()
        assert view.locator("#settings-1").get_attribute("open") is not None
        assert violations(view) == []
        facts = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**facts, "state": "complete"}))
        view.locator("#live", has_text="has ended").wait_for()
        assert "a/report.html" in view.locator("#live").inner_text()
        assert view.locator(".state").inner_text() == "complete"
