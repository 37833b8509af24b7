"""Server strategies: one file per aggregation rule, `base.py` holds the round."""

if __name__ != "fedpeft.strategies":
    raise ImportError("import fedpeft.strategies, not the bare folder 'strategies': install the checkout with `pip install -e .`")
