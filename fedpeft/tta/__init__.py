"""Test-time adaptation: a deployed model, an unlabelled stream, and methods that adapt the one to the other.

`deployed` is what a method sees of the deployed model, `method` the contract, `play` plays a stream and scores it,
`monitor` raises the alarm before a collapse. `methods/` has one file a method, `parts/` what several methods share.
"""
