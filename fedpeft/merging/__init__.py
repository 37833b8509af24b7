"""Merging over time: adapters that were trained one after another become one. `base` is the contract."""
