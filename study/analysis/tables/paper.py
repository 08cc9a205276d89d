"""The paper's numbers, to stand beside ours (arXiv 2510.07841; v1: its first version). Accuracies in %."""

from __future__ import annotations

BENCHMARKS = ("nexusraven", "sealtool", "apibank")
N = {"nexusraven": 318, "sealtool": 294, "apibank": 316}
MODEL = "qwen2.5-1.5b"
SEEDS = 5

# Table 1, in the order NexusRaven, SealTool, API-Bank, average.
TABLE1 = {
    ("direct", "base"): (44.03, 66.67, 70.08, 60.26),
    ("direct", "tt_si"): (50.08, 72.43, 74.34, 65.62),
    ("direct", "tt_d"): (52.52, 75.17, 77.29, 68.33),
    ("majority", "base"): (46.56, 69.73, 73.96, 63.42),
    ("majority", "tt_si"): (52.20, 72.93, 75.68, 66.94),
    ("majority", "tt_d"): (54.53, 72.25, 77.56, 68.11),
}

# Figure 4 (NexusRaven) and Table 2 (SealTool): benchmark, tau, TPR, FPR.
RATES = (
    ("nexusraven", 0.95, 0.88, 0.17),
    ("sealtool", 0.35, 0.42, 0.09),
    ("sealtool", 0.95, 0.96, 0.53),
)
# Figure 4, right: F1 and J of the estimator on NexusRaven, beside random, trivial and perplexity.
ESTIMATOR = {"benchmark": "nexusraven", "f1": 0.6119, "j": 0.6329}

# Table 2, SealTool: accuracy and samples called uncertain. 'certain only' and 'oracle' are v1's.
TABLE2: dict[str, tuple[float, int | None]] = {
    "base": (66.37, None),
    "0.35": (68.10, 51),
    "0.95": (72.43, 190),
    "all": (73.47, 294),
    "certain only": (70.07, None),
    "oracle": (78.89, None),
}

# Figure 2, left, SealTool. The text gives 66.38 for the example in the prompt, the figure 68.36.
METHODS = {
    "base": 66.67,
    "icl_nearest": 67.74,
    "icl_random": 67.74,
    "tt_si_icl": 66.38,
    "sft": 70.20,
    "tt_si": 72.43,
    "tt_d": 75.17,
    "oracle": 78.89,
}

# Figure 3, SealTool: model, base, TT-SI.
SIZES = {"qwen2.5-1.5b": (66.67, 72.43), "qwen2.5-7b": (80.95, 83.97)}

# Runtime table: seconds per sample on one A40; training time in full, seconds.
SECONDS = {"h": 0.88, "g": 3.55, "t": 4.55, "answer": 1.26, "uncertain": 10.24, "certain": 2.14, "base": 1.26}
UPDATES, UPDATES_SECONDS = 190, 2168.2
SFT_SAMPLES, SFT_SECONDS = 13_000, 7966.6
UNCERTAIN_SHARE = 190 / 294
