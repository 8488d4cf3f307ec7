"""A shelf for one model: experiments on the same one find it and load it once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchbench.batching.models.source import ModelSpec, Source, find_model

if TYPE_CHECKING:
    from batchbench.batching.models.loading import LoadedModel


class Shelf:
    """Holds what was asked for last; a model that is not asked for again makes room first."""

    def __init__(self) -> None:
        self._sources: dict[tuple[ModelSpec, bool], Source] = {}
        self._key: object = None
        self._loaded: LoadedModel | None = None

    def find(self, spec: ModelSpec, *, weights: bool) -> Source:
        """As :func:`find_model`; a host without network is asked once."""
        key = (spec, weights)
        if key not in self._sources:
            self._sources[key] = find_model(spec, weights=weights)
        return self._sources[key]

    def load(self, source: Source, spec: ModelSpec, seed: int) -> LoadedModel:
        """As ``load_model``, with the CPU threads that ``spec`` asks for.

        Two experiments share a model when its weights, its number format, its device and its
        threads are the same; a seed makes a difference to made-up weights only.
        """
        from batchbench.batching.models.loading import give_back_memory, load_model, set_threads

        set_threads(spec)
        key = (spec, source.load_format, seed if source.load_format == "dummy" else None)
        if self._loaded is None or key != self._key:
            self._loaded = None
            give_back_memory()
            self._loaded, self._key = load_model(source, spec, seed), key
        else:
            give_back_memory()
        return self._loaded
