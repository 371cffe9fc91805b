"""Results that the backward recomputes instead of having them saved.

Inside `recomputing`, a function called through `recomputable` leaves a note of its inputs. Where autograd would save
the result, or a view of it, for the backward, the note is saved instead, and the backward computes the result from its
inputs when it is first needed, once for all uses. Inputs that are noted results are recomputed in turn. The tensors
that autograd saves are replaced through `torch.autograd.graph.saved_tensors_hooks`, so this works with any function
that saves its inputs, and a layer's code runs once and unchanged.

Unlike recomputing a whole layer, this costs only the noted operations: norms and activations take no matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

ELEMENTWISE, PRODUCT = 1, 2  # the cost of recomputing a result: an elementwise pass, or a matrix product


class _Note:
    """A result as a function of its inputs; once recomputed, it holds the result until nothing needs it.

    Attributes:
        version: torch's count of in-place changes to the result's memory at the time of the note.
    """

    def __init__(self, make: Callable[..., Tensor], inputs: list[_Saved], result: Tensor) -> None:
        self.make, self.inputs = make, inputs
        self.version, self.numel, self.dtype = result._version, result.numel(), result.dtype
        kind = result.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.result: Tensor | None = None

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor in the result's memory covers all of it."""
        return tensor.numel() == self.numel and tensor.dtype == self.dtype and tensor.is_contiguous()

    def value(self) -> Tensor:
        if self.result is None:
            kind, dtype, enabled = self.autocast
            with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
                made = self.make(*(_unpack(each) for each in self.inputs))
            assert made.numel() == self.numel and made.dtype == self.dtype, "the recomputed result differs"
            self.result, self.inputs = made, []  # the inputs are no longer needed
        return self.result


@dataclass(frozen=True)
class _View:
    """A noted result, in the shape that autograd saved."""

    note: _Note
    shape: torch.Size


@dataclass(frozen=True)
class _SavedTensor:
    """A saved tensor and torch's count of in-place changes to it, which torch does not check under hooks."""

    tensor: Tensor
    version: int


_Saved = _SavedTensor | _View


class _Scope:
    """The notes of one layer's forward; results are held until it ends, so that no address is reused meanwhile."""

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
        # detached, because a function's own result would otherwise form a reference cycle with what the function saves
        return _SavedTensor(tensor.detach(), tensor._version)


_scope: ContextVar[_Scope | None] = ContextVar("scope", default=None)


@contextmanager
def recomputing(most: int) -> Iterator[None]:
    """Within it, results that cost `most` or less are recomputed in the backward instead of saved.

    Args:
        most: `ELEMENTWISE` or `PRODUCT`.
    """
    scope = _Scope(most)
    token = _scope.set(scope)
    try:
        with saved_tensors_hooks(scope.pack, _unpack):
            yield
    finally:
        _scope.reset(token)
        scope.notes.clear()  # what autograd saved refers to the hook, and so to this scope, until the backward


def recomputable(make: Callable[..., Tensor], *inputs: Tensor, cost: int = ELEMENTWISE) -> Tensor:
    """`make(*inputs)`, which may be recomputed in the backward.

    Args:
        make: a deterministic function of these tensors and of weights that do not change before the backward. Its
            result must be contiguous and must not be one of the inputs.
        cost: `ELEMENTWISE` or `PRODUCT`.
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
