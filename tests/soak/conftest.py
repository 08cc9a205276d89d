"""The soak test reports where the fault suite does."""

from ledger import ledger

__all__ = ["ledger"]
