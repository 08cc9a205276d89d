"""The paper's numbers, to stand beside ours: arXiv 2510.07841; 'certain only', 'oracle': its first version.

paper.csv: accuracies in %, rates as shares, runtime in seconds per sample on one A40. For the example in the
prompt Figure 2's text gives 66.38, the figure 68.36.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

MODEL, SEEDS = "qwen2.5-1.5b", 5
N = {"nexusraven": 318, "sealtool": 294, "apibank": 316}
SFT_SAMPLES, SFT_SECONDS = 13_000, 7966.6
UNCERTAIN_SHARE = 190 / 294
NUMBERS = pd.read_csv(Path(__file__).with_suffix(".csv"))


def numbers(source: str) -> pd.DataFrame:
    """The numbers of one table or figure, a row each, with the columns that it uses."""
    mine = NUMBERS[NUMBERS["source"] == source].drop(columns="source")
    return mine.dropna(axis=1, how="all").reset_index(drop=True)


SECONDS = {str(arm): float(x) for arm, x in numbers("runtime").set_index("arm")["paper"].items()}
