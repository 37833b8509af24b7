"""A device that is none: tensors on it hold their values on the CPU, and an operation that mixes both is an error.

For code that has to run on a GPU, on machines without one. What torch allows on a GPU is allowed: scalars of no
dimension and indices from the CPU, copies between devices, and nothing that reads values without moving them first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("xla", 0)
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
# What makes tensors of its own inside of torch, where nobody can tell it that the device is another.
MADE_INSIDE = (Tensor.new_tensor, Tensor.quantile, nn.functional.one_hot)


class There(Tensor):
    """A tensor on the device; `here` holds its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls, here.shape, dtype=here.dtype, strides=here.stride(), storage_offset=here.storage_offset()
        )
        made.here = here
        return made

    @property
    def device(self) -> torch.device:
        return ELSEWHERE

    def __repr__(self) -> str:
        return f"There({self.here!r})"

    def __deepcopy__(self, memo: Any) -> There:
        return There(self.here.detach().clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.here.detach().__reduce_ex__(protocol)  # as if it were loaded with map_location="cpu"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation on the values; its result lies there too."""
        kwargs, name = kwargs or {}, func.__name__.split(".")[0]
        asked = args[:1] + args[2:3] if name in INDEXED else (args, kwargs)
        strangers = [
            value
            for value in tree_leaves(asked)
            if isinstance(value, Tensor) and not isinstance(value, There) and value.ndim
        ]
        if name == "copy_":
            (args[0].here if isinstance(args[0], There) else args[0]).copy_(_here(args[1]))
            return args[0]
        if strangers:
            raise RuntimeError(f"{name}: tensors are on {ELSEWHERE} and on the CPU")
        result = func(*tree_map(_here, args), **tree_map(_here, kwargs))
        if name.endswith("_") and not name.endswith("__"):
            return args[0]
        return tree_map(lambda value: There(value) if isinstance(value, Tensor) else value, result)


def _here(value: Any) -> Any:
    return value.here if isinstance(value, There) else value


class Away(torch.autograd.Function):
    """To the device, or back; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.here.clone() if isinstance(x, There) else There(x.clone())

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope.here if isinstance(slope, There) else There(slope)


class Pretend(TorchFunctionMode):
    """Moves to the device and back, and tensors that are made on it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.numpy and isinstance(args[0], There):
            raise TypeError("a tensor on a device cannot become an array; use Tensor.cpu() first")
        if func == Tensor.data.__set__ and isinstance(args[0], There):
            args[0].here = args[1].here
        if func is Tensor.tolist and isinstance(args[0], There):
            return args[0].here.tolist()
        if func in MADE_INSIDE and isinstance(args[0], There):
            return There(func(args[0].here, *args[1:], **kwargs))
        if func is Tensor.cpu:
            return Away.apply(args[0]) if isinstance(args[0], There) else args[0]
        if func is Tensor.to:
            device, dtype = _asked(args[1:], kwargs)
            moved = args[0] if dtype in (None, args[0].dtype) else args[0].type(dtype)
            away = device is not None and (device.type == ELSEWHERE.type) != isinstance(args[0], There)
            return Away.apply(moved) if away else moved
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == ELSEWHERE.type:
            if any(isinstance(value, There) for value in tree_leaves(args)):
                return func(*args, **{**kwargs, "device": None})
            return There(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def _asked(args: Any, kwargs: Any) -> tuple[torch.device | None, torch.dtype | None]:
    device = dtype = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, torch.device | str):
            device = torch.device(value)
    return device, dtype


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """While this is active there is another device, and modules can be moved to it."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the objects that they are
    try:
        with Pretend():
            yield ELSEWHERE
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
