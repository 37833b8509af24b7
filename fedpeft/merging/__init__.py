"""Merging over time: adapters that were trained one after another become one.

`base` is the contract, `methods/` has one file a method, `arithmetic` adds and subtracts single adapters.
"""
