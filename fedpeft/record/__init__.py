"""The record that a run leaves: events, checkpoints, summaries, reports and figures."""
