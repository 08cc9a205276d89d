"""Figures: the same values give the same bytes, nothing absent is drawn, and every arm has its colour."""

from __future__ import annotations

import io
from functools import cache

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from cells import played
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from test_tables import PCS, arm, arms, costed, curves_of, embedded, judged, samples_frame, scores, timed

from study.analysis import figures, look, statistics, synthetic
from study.analysis.answers import Answers, compare, differences


def several_arms(n=24, seed=0):
    """Records of the profile's arms and of one variant, with margins and uncertain samples."""
    rng = np.random.default_rng(seed)
    margins = list(rng.random(n))
    asked = {"margins": margins, "uncertain": True, "adapted": True}
    parts = [arm("base", (rng.random(n) < 0.5).astype(int), code="ok")]
    for name in ("tt_si", "tt_si_all", "generic", "donor"):
        parts.append(arm(name, (rng.random(n) < 0.6).astype(int), code="ok", **asked))
    parts += [
        arm("sft_ood", (rng.random(n) < 0.6).astype(int), pool_n=float(k), margin=np.nan) for k in (1, 2, 4)
    ]
    return pd.concat([p.assign(variant="") for p in parts] + [parts[0].assign(variant="again", seed=1)])


def main_results():
    return played("02", arms([0] * 12, [1] * 3 + [0] * 9), "view")["table"]


def controls(records):
    return played("09", records, "view", {"variants": {"again": {"seeds": [1]}}})["table"]


def beside_grammar(benchmark="fixture"):
    """Notebook 11's last table of one benchmark: a grammar mends three answers, spoils one."""
    verdicts = {"base": [0] * 11 + [1], "constrained": [1] * 3 + [0] * 9, "tt_si": [0] * 11 + [1]}
    rows = pd.concat([arm(name, right, code="ok") for name, right in verdicts.items()])
    found = {name: Answers(rows, name) for name in verdicts}
    against = [None if name == "constrained" else found["constrained"] for name in found]
    scored = compare(found, against="base").assign(model="qwen2.5-coder-0.5b", benchmark=benchmark)
    return scored.join(differences(found.values(), against, "grammar_"))


@cache
def values():
    """What each figure draws: its function and its table."""
    records = several_arms()
    return {
        "estimator": (figures.figure4_estimator, curves_of(scores())),
        "rivals": (
            figures.figure4_rivals,
            judged(scores().assign(rss=lambda d: d["margin"]), "table")["table"],
        ),
        "margins": (figures.margins_figure, scores()),
        "main": (
            figures.main_results_figure,
            main_results(),
        ),
        "methods": (figures.figure2_methods, played("03", records, "view")["table"]),
        "sizes": (figures.figure3_model_size, played("06", records, "view")["table"]),
        "gold": (
            figures.gold_first_figure,
            played("00", pd.DataFrame(), "positions", {"samples": samples_frame()})["positions"],
        ),
        "threshold": (figures.figure_threshold, played("04", records, "curve")["curve"]),
        "scaling": (figures.figure2_scaling, played("05", records, "figure")["table"]),
        "embeddings": (figures.figure5_embeddings, synthetic.laid_out(embedded())),
        "break_even": (
            figures.figure_break_even,
            costed(timed(), until="curves")["curves"],
        ),
        "costs": (figures.figure_costs, costed(timed(), until="figure")["cost"]),
        "controls": (figures.figure_controls, controls(records)),
        "grammar": (figures.figure_grammar, beside_grammar()),
    }


def words(figure):
    """Every text of a figure, its captions and tick labels included."""
    texts = [t.get_text() for t in figure.texts]
    for axes in figure.axes:
        texts += [t.get_text() for t in (*axes.texts, *axes.get_yticklabels(), axes.title)]
    return " ".join(texts).replace("\n", " ")


def test_a_picture_in_256_colours_looks_as_it_was_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSI_FIGURES", str(tmp_path))
    draw, table = values()["controls"]
    drawn = draw(table)
    with figures.style():
        drawn.savefig(buffer := io.BytesIO())
    kept = Image.open(figures.save_figure(drawn, table, "controls", "full"))
    shown, wanted = (np.asarray(i.convert("RGB")).astype(int) for i in (kept, Image.open(buffer)))
    assert kept.mode == "P"
    assert abs(shown - wanted).max() <= 16  # of 255


def test_figures_are_the_same_bytes_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSI_FIGURES", str(tmp_path))
    drawn = ("estimator", "scaling", "embeddings", "costs", "controls")  # every way of drawing
    for turn in ("one", "two"):
        for name in drawn:
            draw, table = values()[name]
            figures.save_figure(draw(table), table, name, turn)
    one = sorted((tmp_path / "one").iterdir())
    assert {p.suffix for p in one} == {".csv", ".pdf", ".png"}
    assert len(one) == 3 * len(drawn)
    for path in one:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        assert path.stat().st_size > 50


def test_figures_leave_the_callers_style_alone():
    before = dict(mpl.rcParams)
    for draw, table in values().values():
        draw(table)
    assert dict(mpl.rcParams) == before


def test_every_arm_has_its_own_colour():
    assert len(set(figures.COLOURS.values())) == len(figures.COLOURS)
    assert set(look.ARMS) <= set(figures.COLOURS)


def test_no_text_leaves_the_page():
    """Long names widen their column; nothing is cut off at an edge."""
    for name in ("methods", "controls", "grammar", "rivals", "scaling"):
        draw, table = values()[name]
        figure = draw(table)
        renderer = FigureCanvasAgg(figure).get_renderer()
        width = figure.get_size_inches()[0] * figure.dpi
        for axes in figure.axes:
            for text in (*axes.get_yticklabels(), *axes.texts, *figure.texts):
                box = text.get_window_extent(renderer)
                assert box.x0 >= -1 and box.x1 <= width + 1, (name, text.get_text())


def test_each_benchmark_stands_beside_its_own_grammar():
    drawn = figures.figure_grammar(pd.concat([beside_grammar("sealtool"), beside_grammar("bfcl")]))
    shown = words(drawn)
    assert "SealTool, 0.5B, n = 12" in shown and "BFCL, 0.5B, n = 12" in shown
    assert shown.count("+1 −3") == 4  # base and tt_si, twice; the grammar isn't held against itself
    assert shown.count("+") == 4


def test_what_was_not_run_is_named_and_not_drawn():
    run = {"lacking": {("sealtool", "sft"): "no training split"}}
    methods = played("03", several_arms(), "view", run)["table"]
    shown = words(figures.figure2_methods(methods))
    assert "No training split: sft." in shown
    assert "Not run in this profile:" in shown
    assert "oracle" not in [t.get_text() for t in figures.figure2_methods(methods).axes[0].get_yticklabels()]
    assert "Not run in this profile: sft, tt_d, tt_si_and_icl" in words(
        figures.figure2_scaling(played("05", several_arms(), "figure")["table"])
    )


@pytest.mark.parametrize(
    ("draw", "table"),
    [
        (figures.figure4_rivals, lambda: judged(scores(6).assign(rss=0.5), "table")["table"]),
        (figures.figure2_methods, lambda: played("03", pd.DataFrame(), "view")["table"]),
        (figures.figure3_model_size, lambda: played("06", pd.DataFrame(), "view", benchmark="bfcl")["table"]),
        (figures.figure_threshold, lambda: played("04", pd.DataFrame(), "curve")["curve"]),
        (figures.figure2_scaling, lambda: played("05", pd.DataFrame(), "figure")["table"]),
        (figures.figure5_embeddings, lambda: synthetic.laid_out(pd.DataFrame(columns=list(PCS)))),
        (figures.figure_costs, lambda: costed(pd.DataFrame(), until="figure")["cost"]),
        (figures.figure_controls, lambda: played("09", pd.DataFrame(), "view")["table"]),
        (figures.figure_grammar, lambda: beside_grammar().iloc[:0]),
    ],
)
def test_nothing_run_is_a_figure_that_says_so(draw, table):
    figure = draw(table())
    assert any(word in words(figure) for word in ("No ", "Too few"))


def test_seeds_make_no_more_samples_of_margins():
    """The interval beside each row: three seeds that agree are one; of one seed it is the plain Wilson."""
    one = scores()
    three = pd.concat([one.assign(seed=s) for s in range(3)], ignore_index=True)
    texts = [[t.get_text() for t in figures.margins_figure(d).axes[0].texts] for d in (one, three)]
    assert texts[0] == texts[1]
    right = one[(one["n_tools"] > 1) & one["base_correct"]]
    share = statistics.wilson(int((right["margin"] < 0.95).sum()), len(right))
    percent = [100 * x for x in (share.value, share.low, share.high)]
    assert "{:.0f} % [{:.0f}, {:.0f}]  n = {}".format(*percent, len(right)) in texts[0]


def test_rebuilt_margins_never_move():
    one, two = (figures.margins_figure(scores()).axes[0].lines[0].get_xydata() for _ in range(2))
    np.testing.assert_array_equal(one, two)
