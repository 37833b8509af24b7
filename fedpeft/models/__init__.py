"""The one view of a frozen base model, how it is loaded, and what is read off it."""

from fedpeft.models.base import Base
from fedpeft.models.embedded import byte_tokenizer
from fedpeft.models.loading import load

__all__ = ["Base", "byte_tokenizer", "load"]
