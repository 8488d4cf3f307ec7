"""Find and load, or make up, a model; knows no engine. This file and the finding need no torch."""

from batchbench.batching.models.cache import Shelf
from batchbench.batching.models.source import KNOWN, MADE_UP, ModelSpec, Source, find_model
from batchbench.batching.models.tokenizer import Tokenizer, find_tokenizer

__all__ = [
    "KNOWN",
    "MADE_UP",
    "ModelSpec",
    "Shelf",
    "Source",
    "Tokenizer",
    "find_model",
    "find_tokenizer",
]
