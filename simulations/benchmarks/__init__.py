"""Public benchmarks: each module is one `fedpeft bench` command."""
