"""Aggregation rules: how the updates of a round become the next adapter, one file each."""
