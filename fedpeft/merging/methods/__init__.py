"""Mergers, one file each."""
