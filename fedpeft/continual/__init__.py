"""Continual learning: streams of tasks, bodies (how parameters move), heads (how features become class scores)."""
