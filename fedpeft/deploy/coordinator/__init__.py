"""The side that coordinates: `fedpeft server`, its SuperLink, the runs and the roster of sites."""
