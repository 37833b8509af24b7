"""The side that has the data: `fedpeft site`, its SuperNode, a proxy and a resident worker."""
