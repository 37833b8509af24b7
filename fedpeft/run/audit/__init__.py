"""`fedpeft audit`: whole rounds watched from outside, and what their replies must be."""
