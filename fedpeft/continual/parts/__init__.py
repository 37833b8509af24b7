"""Parts that several bodies share: low-rank pairs, forms, subspaces, orthogonal steps, prefixes, replay."""
