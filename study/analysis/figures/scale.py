"""Hours against queries: what base, SFT and TT-SI would cost at scale, by source of the rates."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.analysis.figures.curves import DASHES
from study.analysis.figures.style import COLOURS, apart, notice, panels, style
from study.analysis.look import label

TITLES = {
    "machine": "This machine, measured",
    "paper": "The paper's A40",
    "estimate": "{gpu}, estimated",
    "gpu": "A GPU, measured",
}


def figure_scale(lines: pd.DataFrame, gpu: str = "GPU") -> Figure:
    """Hours on one device against queries, both logarithmic: a panel per source of rates, a line per method.

    `lines`: from `tables.scale_lines`; `gpu`: what the estimate is for.
    """
    drawn = [s for s in TITLES if (lines["source"] == s).any()]
    absent = [TITLES[s].format(gpu=gpu) for s in TITLES if s not in drawn]
    caption = (
        "Machine-hours (left) and GPU-hours on one device; n devices take an n-th of the time if sharing "
        "costs nothing. Blue: TT-SI. SFT: its training once, then base answers; it meets base where the "
        "training no longer counts. No interval: each line is arithmetic on means; its assumptions stand "
        "under the table."
    )
    caption += f" No line without rates: {', '.join(absent)}." if absent else ""
    if not drawn:
        return notice("Nothing was timed", caption)
    bottom, top = np.log10(lines["hours"].min()) - 0.3, np.log10(lines["hours"].max()) + 0.5
    with style():
        figure, (row,) = panels(1, [1] * len(drawn), 2.4, caption, between=0.48, right=0.75)
        for axes, source in zip(row, drawn, strict=True):
            rows = lines[lines["source"] == source]
            ends = []
            for (arm, mode), line in rows.groupby(["arm", "mode"], sort=False):
                colour = COLOURS[str(arm)]
                axes.plot(line["queries"], line["hours"], color=colour, ls=DASHES.get(str(mode), "-"), lw=1.5)
                name = str(mode) if arm == "tt_si" else {"sft": "SFT"}.get(str(arm), str(arm))
                ends.append((name, float(np.log10(line["hours"].iloc[-1])), colour))
            axes.set(xscale="log", yscale="log", ylim=(10**bottom, 10**top), xlabel="queries")
            axes.set_title(TITLES[source].format(gpu=gpu))
            heights = apart([height for _, height, _ in ends], 0.06 * (top - bottom), top)
            for (name, value, colour), height in zip(ends, heights, strict=True):
                leader = {"arrowstyle": "-", "lw": 0.5, "color": colour, "relpos": (0, 0.5), "shrinkB": 0}
                end = (lines["queries"].max(), 10**value)
                axes.annotate(name, end, xytext=(lines["queries"].max() * 2.2, 10**height), color=colour,
                              va="center", weight="bold", fontsize=7, annotation_clip=False,
                              arrowprops=leader)  # fmt: skip
            axes.tick_params(labelleft=axes is row[0])
        row[0].set_ylabel(f"hours, {label(lines['benchmark'].iloc[0])}")
    return figure
