"""Trackers show a run's events elsewhere: one file each, named by `run.trackers`."""
