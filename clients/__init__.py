"""The side where the data are: the Flower ClientApp, the local step loop, the client store."""

if __name__ != "fedpeft.clients":
    raise ImportError(
        "import fedpeft.clients, not the bare folder 'clients': install the checkout with `pip install -e .`"
    )
