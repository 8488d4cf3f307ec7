"""Models: find, load and share them. No engine is known here, and only ``loading`` needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchbench.batching.models.source import (
    KNOWN,
    MADE_UP,
    ModelSpec,
    Source,
    Tokenizer,
    encoder,
    find_model,
    find_tokenizer,
)

if TYPE_CHECKING:
    from batchbench.batching.models.loading import LoadedModel

__all__ = [
    "KNOWN",
    "MADE_UP",
    "ModelCache",
    "ModelSpec",
    "Source",
    "Tokenizer",
    "encoder",
    "find_model",
    "find_tokenizer",
]


class ModelCache:
    """The last model of several experiments; it is freed before another one is loaded."""

    def __init__(self) -> None:
        self._sources: dict[tuple[ModelSpec, bool], Source] = {}
        self._key: object = None
        self._loaded: LoadedModel | None = None

    def find(self, spec: ModelSpec, *, weights: bool) -> Source:
        """Find a model as :func:`find_model` does; try an unreachable hub only once."""
        if (spec, weights) not in self._sources:
            self._sources[spec, weights] = find_model(spec, weights=weights)
        return self._sources[spec, weights]

    def load(self, source: Source, spec: ModelSpec, seed: int) -> LoadedModel:
        """Load a model as ``load_model`` does, with the CPU threads of ``spec``.

        Experiments share a model if its weights, number format, device and threads are the same;
        the seed matters for dummy weights only.
        """
        from batchbench.batching.models.loading import give_back_memory, load_model, set_threads

        set_threads(spec)
        key = (spec, source.load_format, seed if source.load_format == "dummy" else None)
        if key != self._key:
            self._loaded = None
        give_back_memory()
        if self._loaded is None:
            self._loaded, self._key = load_model(source, spec, seed), key
        return self._loaded
