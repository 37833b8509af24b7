"""The side that has the data: `fedpeft site`, its node and its resident worker."""
