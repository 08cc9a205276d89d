"""The site: every page there and whole, nothing from elsewhere, no benchmark's text, the study's numbers."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import Page, chromium, needs_chromium
from test_no_benchmark_text import OURS, forbidden, quotations

from study.analysis import statistics
from study.analysis.answers import Answers, Key, column, compare
from study.run.results import Results
from study.run.study import Study
from study.site import front, markdown, records
from study.site.build import ROOT, Site, build, folders


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("site")
    build(to)
    return to


class Tags(HTMLParser):
    """The tags of a page, each with its attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {k: v or "" for k, v in attrs}))


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


# --- pages ----------------------------------------------------------------------------------------------


def test_every_notebook_and_document_is_there(site: Path) -> None:
    for source in [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        page = site / source.relative_to(ROOT).with_suffix(".html")
        assert page.exists(), source
        if source.suffix == ".ipynb":
            pictures = sum("image/png" in o.get("data", {}) for o in outputs(source))
            shown = [a["src"] for t, a in Tags(page).found if t == "img"]
            assert len(shown) == pictures and all(s.startswith("data:image/png;base64,") for s in shown)


def outputs(notebook: Path) -> Iterator[dict[str, Any]]:
    for cell in json.loads(notebook.read_text())["cells"]:
        yield from cell.get("outputs", [])


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    """Links may lead away; what a page is made of may not. Every link within leads to something."""
    for page in pages(site):
        for tag, attributes in Tags(page).found:
            for name in ("src", "href", "srcset", "data", "poster", "action"):
                url = attributes.get(name)
                if url is None or url.startswith(("data:image/", "data:,", "#")):
                    continue
                if tag == "a" and url.startswith(("https://", "http://")):
                    continue
                assert "//" not in url and ":" not in url, f"{page}: <{tag} {name}={url}>"
                assert (page.parent / url.partition("#")[0]).is_file(), f"{page}: {url}"
        assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", page.read_text()), page
    assert "url(" not in (site / "style.css").read_text()


def test_scripts_run_on_one_page_only(site: Path) -> None:
    for page in pages(site):
        tags = Tags(page).found
        forbids = any("script-src 'none'" in a.get("content", "") for t, a in tags if t == "meta")
        assert forbids == (page.name != "explore.html")
        assert not [a for _, a in tags if any(k.startswith("on") for k in a)], page


@pytest.mark.parametrize("name", OURS)
def test_no_page_quotes_a_benchmark(site: Path, name: str) -> None:
    runs = forbidden(name)
    for path in (p for p in site.rglob("*") if p.suffix in {".html", ".js", ".css", ".csv"}):
        text = html.unescape(re.sub(r"data:image/png;base64,[^\"]*", "", path.read_text()))
        found = (quotations(text) | quotations(re.sub(r"<[^>]*>", "", text))) & runs
        assert not found, f"{path.name} quotes {name}: {len(found)} times"


HOSTILE = """# A <b>title</b>

<script>alert(1)</script>

[run](javascript:alert(1)) [out](../../etc/passwd) [folder](docs/) ![far](https://example.org/x.png)
[doc](docs/a.md#b)
"""


def test_a_checkout_without_runs_and_with_hostile_text(tmp_path: Path) -> None:
    root, to = tmp_path / "root", tmp_path / "to"
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text(HOSTILE)
    (root / "docs" / "a.md").write_text("back to [it](../README.md)")
    assert len(build(to, root)) == 4
    tags = Tags(to / "README.html").found
    assert not [t for t, _ in tags if t in ("script", "img", "b")]
    away = [a["href"] for t, a in tags if t == "a" and a["href"][0] != "#"]
    assert away[4:] == ["docs/a.html#b"]  # the first four are the site's own
    assert "<script>alert" in html.unescape((to / "README.html").read_text())
    assert [a["href"] for t, a in Tags(to / "docs" / "a.html").found if t == "a"][-1] == "../README.html"
    assert (to / "index.html").read_text().count("No committed run answers this yet.") == len(front.ASKED)


# --- the front page -------------------------------------------------------------------------------------


def test_every_sentence_is_read_from_the_tables(tmp_path: Path) -> None:
    """Other tables, other numbers; no table, no number."""
    assert not [t for t in front.tell([tmp_path]) if re.search(r"\d", t.sentence) or t.folder or t.intervals]
    source = ROOT / "figures"
    folders = [source, *(source / p.parent.name for p in sorted(ROOT.glob("results/*/header.json")))]
    told = {t.asked.table: t for t in front.tell(folders)}
    assert all(re.search(r"\d", t.sentence) for t in told.values())
    for name, t in told.items():
        assert t.folder
        shutil.copytree(t.folder, to := tmp_path / name, ignore=shutil.ignore_patterns("full", "*.p*"))
        for path in to.glob("*.csv"):
            table = pd.read_csv(path)
            numbers = table.select_dtypes("number")
            table[numbers.columns] = numbers + 200
            table.to_csv(path, index=False)
        (to / "bench.md").write_text(re.sub(r"\d", "3", (source / "bench.md").read_text()))
        other = {o.asked.table: o for o in front.tell([to])}[name]
        assert (other.sentence, other.intervals) != (t.sentence, t.intervals), name


def test_the_headline_is_the_tables(site: Path) -> None:
    text = html.unescape((site / "index.html").read_text())
    run = re.search(r"Run <code>(.+?)</code>", text)
    assert run
    table = pd.read_csv(ROOT / "figures" / run[1] / "table1_main.csv")
    rows = table[table["difference"].notna() & (table["arm"] == "tt_si") & (table["benchmark"] != "avg")]
    assert len(rows)
    for _, row in rows.iterrows():
        shown = (
            f"{row['difference']:+.1f} [{row['difference_low']:+.1f}, {row['difference_high']:+.1f}] points"
        )
        assert f"{shown.replace('-', '−')}, n = {row['n']:.0f}, {row['gained']:.0f} gained" in text


def test_the_page_of_results_is_the_tables() -> None:
    """docs/results.md is written, never typed: `make site` writes it anew where this fails."""
    told = front.tell(folders(ROOT))
    text = markdown.results(told, ROOT)
    assert (ROOT / "docs" / "results.md").read_text() == text
    assert text.count("\n## ") == len(told) and text.count("![") >= len(told) - 2
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link


def test_what_tells_better_from_worse() -> None:
    def row(low: float, high: float) -> dict[str, float]:
        return {"difference": (low + high) / 2, "difference_low": low, "difference_high": high}

    said = front.told_from_zero
    assert said([]) == said([{"difference": math.nan}]) == ""
    assert said([row(-1, 1)]) == "the difference can't be told from zero"
    assert said([row(-1, 1), row(0, 2)]) == "none of the 2 differences can be told from zero"
    assert said([row(1, 2)]) == "of 1 difference 1 better"
    assert (
        said([row(1, 2), row(-2, -1), row(-1, 1)])
        == "of 3 differences 1 better, 1 worse, 1 not told from zero"
    )


# --- records, and what the sliders make of them ------------------------------------------------------------

TAUS = [0.0, 0.2, 0.35, 0.5, 0.9, 0.95, 1.0, 1.01]


ADAPTED = ("tt_si", "tt_si_likelihood")
"""Arms that adapt some, in the order in which an entry looks for an adapted answer."""


def committed() -> Iterator[tuple[dict[str, Any], Answers, Answers, pd.DataFrame, pd.DataFrame]]:
    """Each entry of the committed runs without variants, with what it should be made of.

    Base's answers, adapted ones, margins, and the records of what was adapted at the run's own τ.
    """
    run = Results(ROOT / "results" / "full")
    table, scores = run.records().query("inference == 'direct'"), run.scores()
    for e in records.entries(run.folder, "full"):
        if e["variant"]:
            continue
        own, asked = (
            t[[front.look.label(b) == e["benchmark"] for b in t["benchmark"]]] for t in (table, scores)
        )
        unsure = own[own["uncertain"].astype(bool)]
        adapted = Answers(own, "tt_si_all", e["mode"])
        for arm in ADAPTED:
            adapted |= Answers(unsure, arm, e["mode"])
        made = pd.concat([own[own["arm"] == "tt_si_all"], *(unsure[unsure["arm"] == a] for a in ADAPTED)])
        made = made[made["mode"] == e["mode"]].drop_duplicates("sample")
        paid = made[made["sample"].map(asked.set_index("sample")["margin"]) < e["tau"]]
        yield e, Answers(own, "base"), adapted, column(asked, "margin"), paid


def drawn(lacking: int = 0) -> tuple[dict[str, Any], Answers, Answers, dict[str, pd.DataFrame]]:
    """An entry of two seeds with failures of the machine, unknown scores and likelihoods; drawn, not run.

    lacking: so many adapted answers were never made.
    """
    seeds, n = 2, 40
    draw = np.random.default_rng(3)
    keys = [(f"s{i:02}", seed) for i in range(n) for seed in range(seeds)]
    blank = pd.DataFrame(keys, columns=["sample", "seed"]).assign(uncertain=False, margin=np.nan)
    blank = blank.assign(
        **dict.fromkeys(Key._fields, "drawn") | {"pool_n": 0, "source": "computed"}, tokens_g=7, tokens_t=100
    )
    base, made = (
        blank.assign(
            arm=arm,
            correct=draw.random(len(keys)) < 0.5,
            status=np.where(draw.random(len(keys)) < 0.05, "error", "ok"),
            tokens_answer=draw.integers(1, 50, len(keys)),
        )
        for arm in ("base", "tt_si_all")
    )
    margin, before, after = (draw.random(len(keys)) for _ in range(3))
    made["margin"] = np.where(draw.random(len(keys)) < 0.1, np.nan, margin)
    base["likelihood"], made["likelihood"] = before, np.where(after < 0.1, np.nan, after)
    one, other = Answers(base), Answers(made.iloc[lacking:])
    scores = base[["sample", "seed", "likelihood"]].assign(
        trivial=0.0, margin=made["margin"], rss=made["margin"]
    )
    frames = {
        "margin": column(made, "margin"),
        "likelihood": column(base, "likelihood"),
        "after": column(made, "likelihood"),
    }
    return records.entry(one, [other], scores), one, other, frames


def expected(
    base: Answers, adapted: Answers, h: pd.DataFrame, tau: float, accept: Any = None
) -> dict[str, Any]:
    """What the sliders must show, by study.analysis."""
    flags = h.reindex_like(base.correct) < tau
    chosen = adapted.where(flags, base)
    known = flags.notna() & base.correct.notna()
    out: dict[str, Any] = {
        "needed": chosen.needed,
        "missing": chosen.missing,
        "rows": int(known.to_numpy().sum()),
        "before": (base.accuracy.value, base.accuracy.low, base.accuracy.high, base.accuracy.n),
    }
    if chosen.missing:
        tried = adapted.tried.reindex_like(base.correct).astype("boolean").fillna(False).astype(bool)
        lost = flags.fillna(False).astype(bool) & known & ~tried
        ends = [chosen.correct.mask(lost, x).mean(axis=1).dropna() for x in (0.0, 1.0)]
        return out | {"bounds": [e.mean() for e in ends]}
    if accept is not None:
        stands = accept.reindex_like(base.correct).fillna(False).astype(bool)
        chosen = adapted.where((flags & stands).where(flags.notna()), base)
    row = compare({"base": base, "rule": chosen}, against="base").iloc[1]
    # The tables' own interval is a bootstrap where there are enough samples; the page has Bonett and Price's.
    differences = (chosen.correct - base.correct).mean(axis=1).dropna()
    interval = statistics.bonett_price(differences)
    assert row["difference"] == pytest.approx(100 * interval.value)
    return out | {
        "accuracy": [row[c] / 100 for c in ("accuracy", "low", "high")] + [row["n"]],
        "difference": [interval.value, interval.low, interval.high, row["pairs"]],
        "changed": [row["gained"], row["lost"]],
    }


def agrees(shown: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in ("needed", "missing", "rows"):
        assert shown[name] == wanted[name], name
    if "bounds" in wanted:
        assert shown["bounds"] == pytest.approx(wanted["bounds"]) and "accuracy" not in shown
        return
    accuracy, difference = shown["accuracy"], shown["difference"]
    assert [accuracy[k] for k in ("value", "low", "high")] + [shown["n"]] == pytest.approx(wanted["accuracy"])
    assert [difference[k] for k in ("value", "low", "high", "n")] == pytest.approx(wanted["difference"])
    assert [shown["gained"], shown["lost"]] == wanted["changed"]
    assert [shown["before"][k] for k in ("value", "low", "high", "n")] == pytest.approx(wanted["before"])


def test_an_entry_holds_what_the_records_hold() -> None:
    met = 0
    for e, base, adapted, margin, _ in committed():
        assert len(e["base"]) == base.correct.size == len(e["h"]["margin"]["values"])
        right = base.correct.to_numpy().ravel()
        assert [c == "1" for c in e["base"]] == list(right == 1)
        assert e["adapted"].count("-") == base.correct.size - int(adapted.tried.to_numpy().sum())
        values = margin.reindex_like(base.correct).to_numpy(float).ravel()
        assert [x or math.nan for x in e["h"]["margin"]["values"]] == pytest.approx(list(values), nan_ok=True)
        assert e["tau"] == 0.95 and (e["accept"] is None) == ("likelihood" not in e["h"])
        assert not {"rss", "trivial"} & set(e["h"])  # the margin again, and what tells nothing apart
        met += 1
    assert met >= 5


def test_the_data_says_no_sample_and_no_reply(site: Path) -> None:
    shown = re.search(r'id="data">(.*?)</script>', (site / "explore.html").read_text(), re.S)
    assert shown and json.loads(shown[1]) == json.loads(json.dumps(records.data(ROOT / "results")))
    assert not re.search(r"sealtool-\d|function|tool_call", shown[1])
    e, *_ = drawn()
    assert {"1", "0", "x"} == set(e["base"]) and e["accept"] and e["h"].keys() == {"margin", "likelihood"}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@needs_chromium
def test_the_sliders_numbers_are_the_studys(site: Path, tab: Page) -> None:
    tab.open((site / "explore.html").as_uri())
    z = tab.run("JSON.parse(document.getElementById('data').textContent).z")

    def evaluate(e: dict[str, Any], h: str, tau: float, accept: bool = False) -> dict[str, Any]:
        rule = json.dumps({"h": h, "tau": tau, "accept": accept})
        return json.loads(tab.run(f"JSON.stringify(evaluate({json.dumps(e)}, {rule}, {z}))"))

    for e, base, adapted, margin, paid in committed():
        own = evaluate(e, "margin", e["tau"])
        assert own["written"] == paid["tokens_g"].sum() + paid["tokens_answer"].sum()
        assert own["trained"] == paid["tokens_t"].sum() and own["base"] == base.rows["tokens_answer"].sum()
        for tau in TAUS:
            agrees(evaluate(e, "margin", tau), expected(base, adapted, margin, tau))
    e, base, adapted, frames = drawn()
    stands = frames["after"].reindex_like(frames["likelihood"]) > frames["likelihood"]
    for tau in TAUS:
        for h in ("margin", "likelihood"):
            agrees(evaluate(e, h, tau), expected(base, adapted, frames[h], tau))
            agrees(evaluate(e, h, tau, accept=True), expected(base, adapted, frames[h], tau, stands))
    e, base, adapted, frames = drawn(lacking=9)
    wanted = [expected(base, adapted, frames["margin"], tau) for tau in TAUS]
    for tau, each in zip(TAUS, wanted, strict=True):
        agrees(evaluate(e, "margin", tau), each)
    assert wanted[0]["missing"] == 0 < wanted[2]["missing"] < wanted[-1]["missing"]


@needs_chromium
def test_the_sliders_reach_the_arms_that_were_run(
    site: Path, tab: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Margin or likelihood as H, each adapted reply or the surer one: what was run, the page selects."""
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    study = Study("smoke", benchmarks={"fixture": 24}, modes={"default": ["activated"]})
    arms = {
        "tt_si": ("margin", 0.95, False),
        "tt_si_surer": ("margin", 0.95, True),
        "tt_si_likelihood": ("likelihood", 0.5, False),
        "tt_si_selective": ("likelihood", 0.5, True),
    }
    study.run(["base", "tt_si_all", *arms], ["fixture"])
    study.score(["fixture"])
    rows = study.records().query("inference == 'direct'")
    e = records.entry(Answers(rows, "base"), [Answers(rows, "tt_si_all")], study.scores())
    tab.open((site / "explore.html").as_uri())
    taken = []
    for arm, (h, tau, accept) in arms.items():
        rule = json.dumps({"h": h, "tau": tau, "accept": accept})
        shown = json.loads(tab.run(f"JSON.stringify(evaluate({json.dumps(e)}, {rule}, 1.96))"))
        own = Answers(rows, arm)
        assert shown["n"] == own.accuracy.n and shown["missing"] == 0
        assert shown["accuracy"]["value"] == pytest.approx(own.accuracy.value), arm
        assert shown["needed"] == own.rows["uncertain"].sum(), arm
        taken.append(shown["taken"])
    assert taken[0] > taken[1] > 0 and taken[2] > taken[3], "some are refused"


@needs_chromium
def test_the_sliders_move(site: Path, tab: Page) -> None:
    entries = records.data(ROOT / "results")["entries"]
    moves = ("SealTool", "")  # where differences move
    index = next(i for i, e in enumerate(entries) if (e["benchmark"], e["variant"]) == moves)
    first = entries[index]
    n, lacking = len(first["base"]), "-" in first["adapted"]
    tab.open((site / "explore.html").as_uri())
    tab.run("document.getElementById('entry').focus()")
    for _ in range(index):
        tab.press("ArrowDown", 40)

    def said(name: str) -> str:
        return str(tab.run(f"document.getElementById('{name}').textContent"))

    before = {name: said(name) for name in ("tau-value", "adapted", "difference", "cost")}
    assert before["tau-value"] == "0.95" and f"n = {n}" in said("accuracy") and tab.run("'accept' in window")
    tab.run("document.getElementById('tau').focus()")
    for _ in range(10):
        tab.press("ArrowLeft", 37)
    after = {name: said(name) for name in before}
    assert after["tau-value"] == "0.85" and all(before[k] != after[k] for k in before)
    tab.press("End", 35)
    assert said("tau-value") == "above 1: everyone" and said("adapted").startswith(f"{n} of {n}")
    assert ("never made" in said("note")) == lacking
    tab.press("Home", 36)
    assert (
        said("tau-value") == "0.00"
        and said("adapted").startswith(f"0 of {n}")
        and "0 gained" in said("changed")
    )
    for name in ("entry", "h"):
        tab.run(f"document.getElementById('{name}').focus()")
        old = said("difference"), said("adapted"), said("base")
        tab.press("ArrowDown", 40)
        assert tab.run(f"document.getElementById('{name}').value") not in ("0", "margin")
        assert name == "h" or (said("difference"), said("adapted"), said("base")) != old
    labelled = "[...document.querySelectorAll('select, input')].every(x => x.labels.length)"
    assert tab.run(labelled) and tab.run("document.getElementById('accepting').hidden") == (
        first["accept"] is None
    )
    assert tab.complaints == []


@needs_chromium
def test_pages_load_and_fit_a_phone(site: Path, tab: Page) -> None:
    tab.complaints.clear()
    tab.send("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    for page in pages(site):
        tab.open(page.as_uri())
        assert tab.run("document.querySelectorAll('h1').length"), page
        assert tab.run("document.documentElement.scrollWidth") <= 390, page
        broken = "[...document.images].filter(x => x.complete && !x.naturalWidth).length"
        assert tab.run(broken) == 0, page
    assert tab.complaints == []


def test_a_page_is_made_of_what_it_links_to(site: Path) -> None:
    """Nothing is there that no page leads to, but for the two files that pages load."""
    linked = {site / "index.html", site / "style.css", site / "explore.js"}
    for page in pages(site):
        for _, a in Tags(page).found:
            url = a.get("href") or a.get("src") or "#"
            if not url.startswith(("#", "data:", "http")):
                linked.add((page.parent / url.partition("#")[0]).resolve())
    assert {p for p in site.rglob("*") if p.is_file()} == linked
    assert Site(site, ROOT).href("figures/../README.md#x", ROOT / "README.md") == "README.html#x"
