"""Names that moved to `look` and `paper`, for those who still import them from here."""

from study.analysis import paper
from study.analysis.look import label, markdown, write

__all__ = ["label", "markdown", "paper", "write"]
