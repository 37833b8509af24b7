"""A client's optimizer: the contract in `base`, one file each."""
