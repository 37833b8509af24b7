"""Secure aggregation: `terms` has what a run agrees on, `stages` a round, `masking` the arithmetic."""
