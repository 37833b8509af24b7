"""Federated continual learning: what a server does for a body between and within tasks, one file each."""
