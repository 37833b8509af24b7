"""A config is checked with torch named and not imported, which takes a second off.

Checks ask methods for their options and for what they declare. The files of methods import torch for all else that they
do, so that `try_without` calls a check while stand-ins have the places of torch and of what imports it. A stand-in can
be named, be in annotations and be a base of a class. Whatever uses one in another way ends the call, which begins anew
with the packages themselves. Modules that have seen stand-ins are forgotten afterwards.

    >>> import string
    >>> try_without(lambda: len(string.digits), packages=("torch",))
    10
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from abc import ABCMeta
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from fedpeft import registry
from fedpeft.errors import InputError

PACKAGES = ("torch", "flwr", "safetensors", "transformers", "peft", "torchmetrics", "opacus")
DECORATORS = ("torch.no_grad", "torch.enable_grad")  # called where a function is defined; it is as good without

Found = TypeVar("Found")


class Used(BaseException):
    """What a stand-in is for is needed. No `except Exception` on the way may take it for a failure of its own."""


def try_without(function: Callable[[], Found], packages: Sequence[str] = PACKAGES) -> Found:
    """What a function gives or refuses, with the packages imported only where it uses them.

    Args:
        function: can be called twice; must keep no class that it imports.

    Raises:
        InputError: the function's own.
    """
    # Methods of other packages would have to be imported anew, and may do at import whatever they like.
    if registry.is_extended() or any(name in sys.modules for name in packages):
        return function()
    with _stand_ins(packages):
        try:
            return function()
        except InputError:
            raise
        except (Used, Exception):  # a stand-in was used, or taken for what it is not: the second call says
            pass
    return function()


@contextmanager
def _stand_ins(packages: Sequence[str]) -> Iterator[None]:
    before, finder = set(sys.modules), _Finder(packages)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("fedpeft", *packages):
                del sys.modules[name]
                parent, _, child = name.rpartition(".")
                if parent in before:
                    delattr(sys.modules[parent], child)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a stand-in for every module of the packages."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        ours = name.partition(".")[0] in self.packages
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        parent, _, name = spec.name.rpartition(".")
        module: ModuleType = getattr(sys.modules[parent], name) if parent else _StandIn(spec.name)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def _missing(name: str, whole: str) -> BaseException:
    """What is raised where a stand-in would have to know an attribute; Python itself looks for `__many__` in vain."""
    return AttributeError(whole) if name.startswith("__") and name != "__version__" else Used(whole)


class _Bases(ABCMeta):
    """Of a class whose base is a stand-in: what the class does not have itself, its base may have."""

    def __getattr__(cls, name: str) -> NoReturn:
        raise _missing(name, f"{cls.__name__}.{name}")


class _Base(metaclass=_Bases):
    def __getattr__(self, name: str) -> NoReturn:
        raise _missing(name, f"{type(self).__name__}().{name}")


class _StandIn(ModuleType):
    """A module, class, function or value of a package, by its name."""

    def __getattr__(self, name: str) -> _StandIn:
        if name.startswith("__"):
            raise _missing(name, f"{self.__name__}.{name}")
        child = _StandIn(f"{self.__name__}.{name}")
        setattr(self, name, child)
        return child

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (_Base,)

    def __or__(self, other: object) -> _StandIn:  # in an annotation
        return self

    __ror__ = __or__

    def __call__(self, *arguments: Any, **named: Any) -> Callable[[Found], Found]:
        if self.__name__ in DECORATORS and not arguments and not named:
            return lambda function: function
        raise Used(self.__name__)

    def _use(self, *arguments: Any) -> NoReturn:
        raise Used(self.__name__)

    __instancecheck__ = __subclasscheck__ = __bool__ = __iter__ = __len__ = __repr__ = __str__ = __format__ = _use
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __getitem__ = _use
    __hash__ = ModuleType.__hash__  # lost with `__eq__`; a table may have dtypes as its keys
