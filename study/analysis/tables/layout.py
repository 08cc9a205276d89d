"""See `study.analysis.tables`."""

from study.analysis.look import bracket

__all__ = ["bracket"]
