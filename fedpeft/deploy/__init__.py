"""Real clients over gRPC: Flower's SuperLink at the coordinator, a node and a resident worker at each site."""
