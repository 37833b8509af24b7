"""Sources, partitions, encoding and offline recipes of data."""
