"""Engines that run strategies and clients on one machine, shipped configs and benchmarks."""

if __name__ != "fedpeft.simulations":
    raise ImportError(
        "import fedpeft.simulations, not the bare folder 'simulations': install the checkout with `pip install -e .`"
    )
