"""Wrappers go around any rule: corrections, bounds, robust means, personal parts, client-level privacy."""
