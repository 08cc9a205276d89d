"""Names that moved to `look`, for the bench, which still imports them from here."""

from study.analysis.look import label, markdown, write

__all__ = ["label", "markdown", "write"]
