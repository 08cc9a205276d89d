"""Figures of the study, drawn from the tables that hold their values.

One `style()`, one colour per arm wherever it appears, an interval on every estimate, n in the caption.
`save_figure` writes PDF, PNG and the plotted values as CSV; the same values give the same bytes.
"""

from study.analysis.figures.curves import (
    figure2_scaling,
    figure_break_even,
    figure_costs,
    figure_scale,
    figure_threshold,
)
from study.analysis.figures.data import gold_first_figure
from study.analysis.figures.estimator import figure4_estimator, figure4_rivals, margins_figure
from study.analysis.figures.results import (
    figure2_methods,
    figure3_model_size,
    figure_controls,
    figure_grammar,
    main_results_figure,
)
from study.analysis.figures.selective import figure_acceptance, figure_selective
from study.analysis.figures.style import COLOURS, save_figure, style
from study.analysis.figures.synthetic import figure5_embeddings

__all__ = [
    "COLOURS",
    "figure2_methods",
    "figure2_scaling",
    "figure3_model_size",
    "figure4_estimator",
    "figure4_rivals",
    "figure5_embeddings",
    "figure_acceptance",
    "figure_break_even",
    "figure_controls",
    "figure_costs",
    "figure_grammar",
    "figure_scale",
    "figure_selective",
    "figure_threshold",
    "gold_first_figure",
    "main_results_figure",
    "margins_figure",
    "save_figure",
    "style",
]
