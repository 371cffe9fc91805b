"""How much memory a process holds, and at most held, and how much of it its tensors do.

Of a process only what is its own is counted: not mapped files, which it can give back.
"""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30


def anonymous() -> int:
    """Bytes of anonymous memory that this process holds."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 2**10 for line in status.splitlines() if line.startswith("RssAnon"))


class Watch:
    """Within it, watches this process: `peak` is the most bytes that it held beyond what it held at the beginning."""

    def __enter__(self) -> Watch:
        self.before, self.peak = anonymous(), 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, anonymous() - self.before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous() - self.before)


def held(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of a model by kind: `quantised` (4-bit or 8-bit, with what it takes to read them), `embeddings`, `trained`,
    `other`."""
    kinds = dict.fromkeys(("quantised", "embeddings", "trained", "other"), 0)
    for name, parameter in model.named_parameters():
        quantised = type(parameter).__name__ in ("Params4bit", "Int8Params")
        kind = "quantised" if quantised else "embeddings" if "embed_tokens" in name else "other"
        kinds["trained" if parameter.requires_grad else kind] += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            inner = [state.absmax, state.code, state.offset]
            inner += [state.state2.absmax, state.state2.code] if state.nested else []
            kinds["quantised"] += sum(each.numel() * each.element_size() for each in inner if each is not None)
    kinds["other"] += sum(each.numel() * each.element_size() for each in model.buffers())
    return kinds


class LiveTensors(TorchDispatchMode):
    """Within it, counts what tensors hold: `peak` is the most bytes at a time in those made since it began."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._key(each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        results = func(*args, **(kwargs or {}))
        for each in tree_leaves(results):
            if isinstance(each, torch.Tensor) and self._key(each) not in given | self._known:
                self._count(each.untyped_storage())
        return results

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = int(storage._cdata), storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
