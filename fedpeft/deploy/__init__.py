"""Real clients over gRPC: Flower's SuperLink at the coordinator, a SuperNode and a resident worker at each site."""
