"""What goes around any rule: corrections, bounds, robust means, personal parts, client-level privacy."""
