"""Results that the backward makes anew instead of keeping them.

Inside `keeping_less` a function called through `remake` leaves a note: which function of which tensors its result is.
Where autograd would save that result, or a view of it, for the backward, it saves the note, and the backward makes the
result from its inputs when it is first asked for it, once for all who ask. Inputs that are results themselves are made
in turn. What autograd saves is replaced through `torch.autograd.graph.saved_tensors_hooks`, so any function that saves
its inputs takes part; a layer's code runs once, as it is.

Compared with recomputing a whole layer this costs only what is noted: for norms and activations a pass over memory, no
matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

CHEAP, PRODUCT = 1, 2  # what a result costs to make again: a pass over memory, or a matrix product


class _Note:
    """A result as a function of others; holds the result from the first time it is made, until nobody needs it.

    Attributes:
        version: torch's count of changes in place of the result's memory, when it was noted.
    """

    def __init__(self, make: Callable[..., Tensor], inputs: list[_Saved], result: Tensor) -> None:
        self.make, self.inputs = make, inputs
        self.version, self.numel, self.dtype = result._version, result.numel(), result.dtype
        kind = result.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.result: Tensor | None = None

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor of the result's memory is all of it."""
        return tensor.numel() == self.numel and tensor.dtype == self.dtype and tensor.is_contiguous()

    def value(self) -> Tensor:
        if self.result is None:
            kind, dtype, enabled = self.autocast
            with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
                made = self.make(*(_unpack(each) for each in self.inputs))
            assert made.numel() == self.numel and made.dtype == self.dtype, "a result came out otherwise"
            self.result, self.inputs = made, []  # what it was made from is no longer needed
        return self.result


@dataclass(frozen=True)
class _View:
    """A noted result in the shape in which it was saved."""

    note: _Note
    shape: torch.Size


@dataclass(frozen=True)
class _Kept:
    """A tensor that is kept, and torch's count of changes in place of its memory: under hooks torch does not look."""

    tensor: Tensor
    version: int


_Saved = _Kept | _View


class _Scope:
    """The notes of one layer's forward; results are held until it ends, so that their addresses stay their own."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.notes: dict[int, tuple[_Note, Tensor]] = {}

    def note(self, make: Callable[..., Tensor], inputs: tuple[Tensor, ...], result: Tensor) -> None:
        saved = [self.pack(each.detach()) for each in inputs]
        self.notes[result.untyped_storage().data_ptr()] = _Note(make, saved, result), result

    def pack(self, tensor: Tensor) -> _Saved:
        note, result = self.notes.get(tensor.untyped_storage().data_ptr(), (None, None))
        if note is not None and result is not None and result._version == note.version and note.is_of(tensor):
            return _View(note, tensor.shape)
        # detached: a function's own result would else hold the function, and the function what it has saved
        return _Kept(tensor.detach(), tensor._version)


_scope: ContextVar[_Scope | None] = ContextVar("scope", default=None)


@contextmanager
def keeping_less(most: int) -> Iterator[None]:
    """Within it, results that cost `most` or less are not kept for the backward.

    Args:
        most: `CHEAP` or `PRODUCT`.
    """
    scope = _Scope(most)
    token = _scope.set(scope)
    try:
        with saved_tensors_hooks(scope.pack, _unpack):
            yield
    finally:
        _scope.reset(token)
        scope.notes.clear()  # what autograd saved holds the hook, and by it this scope, until the backward


def remake(make: Callable[..., Tensor], *inputs: Tensor, cost: int = CHEAP) -> Tensor:
    """`make(*inputs)`, which may be computed again in the backward.

    Args:
        make: a function of these tensors and of weights that do not change before the backward. Called again, it must
            give the same numbers: nothing random. Its result must be contiguous, and no input.
        cost: `CHEAP` or `PRODUCT`.
    """
    result = make(*inputs)
    scope = _scope.get()
    if scope is not None and cost <= scope.most and torch.is_grad_enabled() and result.is_contiguous():
        scope.note(make, inputs, result)
    return result


def _unpack(saved: _Saved) -> Tensor:
    if isinstance(saved, _View):
        return saved.note.value().view(saved.shape)
    if saved.tensor._version != saved.version:
        raise RuntimeError("a tensor that the backward needs was changed in place after the forward")
    return saved.tensor
