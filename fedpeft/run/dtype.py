"""`model.dtype=auto`: what a run holds its base in, and computes attention by, is found out once, ahead of its first
round, and written down."""

from __future__ import annotations

import logging

import torch

from fedpeft import config as configs
from fedpeft.config import Config
from fedpeft.errors import InputError
from fedpeft.models import attention, loading, rates
from fedpeft.run.world import find_device

log = logging.getLogger("fedpeft")


def settle_dtype(config: Config) -> str:
    """Where `model.dtype` is auto, set it to float32, or to bfloat16 if this machine multiplies so much faster in it;
    then set `model.batched_attention`, where it is null, to where this processor is faster with it.

    A run that goes on, its workers and its actors take what is set here, on whatever machine they are: with another
    base in the middle a run would be two.

    Returns:
        What was found; empty where the config names a dtype: then nothing is timed, and runs of one config are equal.

    Raises:
        InputError: the model cannot be loaded, or the device is not there.
    """
    if config.model.dtype != "auto":
        return ""
    said = _settle_dtype(config) + _settle_attention(config)
    if config.model.dtype == "float32":
        config.model.batched_attention = None
    log.info("%s", said)
    return said


def _settle_dtype(config: Config) -> str:
    # Tried on the config itself: what refuses bfloat16 is spread over many checks.
    config.model.dtype = "bfloat16"
    try:
        configs.check(config)
    except InputError as error:
        config.model.dtype = "float32"
        return f"model.dtype=auto: float32, as in bfloat16 this config would be refused ({error})"
    # Those of the run: with more of them another dtype may be the faster one.
    torch.set_num_threads(config.run.threads)
    where = find_device(config.run.device)
    shapes = loading.product_shapes(config.model)
    if not shapes:
        config.model.dtype = "float32"
        return "model.dtype=auto: float32, as the base has no linear layers."
    found = rates.measure(shapes, where)
    config.model.dtype = rates.choose(found)
    return (
        f"model.dtype=auto: {config.model.dtype}. The base's products run at {found['float32']:.3g} GFLOP/s in float32 "
        f"and at {found['bfloat16']:.3g} in bfloat16, which is taken from {rates.FASTER:g} times as fast on."
    )


def _settle_attention(config: Config) -> str:
    if config.model.dtype != "bfloat16" or config.model.batched_attention is not None:
        return ""
    if find_device(config.run.device).type != "cpu":
        return ""
    longest = config.model.batched_attention = attention.longest_faster()
    until = f"up to {longest} tokens" if longest else "at no length that was tried"
    return f" model.batched_attention={longest}: attention is faster as batched products {until}."
