"""Server strategies: `base` holds the round, `rules/` one file an aggregation rule, `wrappers/` what goes around it.

`from fedpeft.strategies import FedSVD` works for every registered class, and imports that one only; `prepare_client` is
for clients of a stock Flower app.
"""

from typing import Any

if __name__ != "fedpeft.strategies":
    raise ImportError(
        "import fedpeft.strategies, not the bare folder 'strategies': install the checkout with `pip install -e .`"
    )


def __getattr__(name: str) -> Any:
    from fedpeft import registry

    if name == "prepare_client":
        from fedpeft.strategies.stock_client import prepare_client

        return prepare_client
    for entry in registry.names("strategies"):
        if registry.table("strategies")[entry].endswith(f":{name}"):
            return registry.load("strategies", entry)
    raise AttributeError(f"module 'fedpeft.strategies' has no attribute '{name}'")
