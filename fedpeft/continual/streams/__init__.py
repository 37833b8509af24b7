"""Streams: embedded and prepared sequences of tasks, one file each."""
