"""Recipes of `fedpeft data prepare`, one file each."""
