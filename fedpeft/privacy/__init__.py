"""Differential privacy. So far the accounting; training under it is not here yet (`privacy.unit` takes only none)."""
