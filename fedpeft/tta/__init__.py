"""Test-time adaptation: a deployed model, an unlabelled stream, and methods that adapt the one to the other.

`model` is what a method sees of the deployed model, `base` the contract, `run` plays a stream and scores it, `monitor`
raises the alarm before a collapse. Every other module is one method, or a part that several methods share
(`gradient`, `teacher`, `scores`, `optim`, `augment`).
"""
