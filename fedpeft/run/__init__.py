"""One run, simulated or over real sites: what it is made of, its rounds, its results, and its audit."""
