"""Differential privacy: plan, noise, per-sample gradients, accounting, ledger and audit."""
