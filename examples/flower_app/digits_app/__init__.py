"""Digits, learned by a small vision transformer whose adapter alone travels."""
