"""Heads: how features become class scores, one file each."""
