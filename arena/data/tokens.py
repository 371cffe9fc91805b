"""Tokenises rows once and caches them as memory-mapped Arrow, by a fingerprint of what they are made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from cachetools import LRUCache

from arena.data.dataset import Rows, reading_cached
from arena.data.encoder import Encoded, Encoder
from arena.data.text_encoder import control_ids
from arena.progress import ahead, progress
from arena.prompt_settings import PromptSettings
from arena.storage.files import atomic_write, fingerprint

FORMAT = 3  # increase it when the layout of the file or of the prompt changes
ROWS_AT_ONCE = 512  # rows tokenised at once, and in one Arrow record batch

REMEMBERED_TOKENS = 2**25  # 128 MiB of token ids, and
TOKENS_OF_A_TEXT = 96  # as many count for each text besides its own: what Python needs to remember it

_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "turns_dropped": pa.int32(), "tokens_cut": pa.int32()})
_TARGETS = {"places": pa.list_(pa.int32()), "targets_cut": pa.int32()}  # further columns for token targets
_SCHEMA_WITH_TARGETS = pa.schema([*_SCHEMA, *pa.schema(_TARGETS)])


@dataclass(frozen=True)
class Lists:
    """Many lists of int32 numbers, in memory-mapped chunks.

    Attributes:
        lengths: int64 (n,).
    """

    lengths: np.ndarray
    _flat: tuple[np.ndarray, ...]
    _offsets: tuple[np.ndarray, ...]
    _starts: np.ndarray  # of the chunks, among the lists

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Lists:
        """The lists of an Arrow column, read in place."""
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        offsets = tuple(chunk.offsets.to_numpy() for chunk in chunks)
        lengths = [np.diff(each) for each in offsets]
        starts = np.cumsum([0, *map(len, lengths)])[:-1] if chunks else np.zeros(0, dtype=np.int64)
        every = np.concatenate([*lengths, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        return cls(every, tuple(chunk.values.to_numpy() for chunk in chunks), offsets, starts)

    @classmethod
    def joined(cls, several: Sequence[Lists]) -> Lists:
        shifts = np.cumsum([0, *(len(each.lengths) for each in several)])
        return cls(
            np.concatenate([each.lengths for each in several]),
            tuple(flat for each in several for flat in each._flat),
            tuple(offsets for each in several for offsets in each._offsets),
            np.concatenate([each._starts + shift for each, shift in zip(several, shifts, strict=False)]),
        )

    def take(self, indices: np.ndarray) -> list[np.ndarray]:
        """Some of the lists, each a read-only view."""
        chunks = np.searchsorted(self._starts, indices, side="right") - 1
        places = indices - self._starts[chunks]
        views = []
        for chunk, place in zip(chunks.tolist(), places.tolist(), strict=True):
            offsets = self._offsets[chunk]
            views.append(self._flat[chunk][offsets[place] : offsets[place + 1]])
        return views

    def window(self, indices: np.ndarray, start: int, width: int) -> np.ndarray:
        """int32 (len(indices), width): the numbers from `start` on of some lists, given in ascending order.

        Where a list has ended, -1 stands.
        """
        found = np.full((len(indices), width), -1, dtype=np.int32)
        chunks = np.searchsorted(self._starts, indices, side="right") - 1
        edges = [0, *(np.flatnonzero(np.diff(chunks)) + 1).tolist(), len(chunks)] if len(chunks) else []
        for first, last in pairwise(edges):
            chunk = chunks[first]
            places = indices[first:last] - self._starts[chunk]
            at = (self._offsets[chunk][places].astype(np.int64) + start)[:, None] + np.arange(width)
            inside = at < self._offsets[chunk][places + 1][:, None]
            found[first:last][inside] = self._flat[chunk][at[inside]]
        return found

    def largest(self) -> int:
        """The largest number of all lists; -1 if there is none."""
        return max((int(flat.max()) for flat in self._flat if len(flat)), default=-1)


@dataclass(frozen=True)
class TokenStore:
    """The token ids of many examples, read in place from memory-mapped files.

    Example `row * orders + order` is row `row` in one of its orders; order 0 is as given.

    Attributes:
        orders: examples of each row.
        ids: the token ids of each example.
        turns_dropped: int32 (n,), turns omitted from each example.
        tokens_cut: int32 (n,), tokens omitted from each example.
        fingerprint: changes when any token or any of the above changes; suitable for a file name.
        places: the places of each example, as in `TokenTargets`; None if the task has classes.
        targets_cut: int32 (n,), `TokenTargets.cut` of each example; None if the task has classes.
    """

    orders: int
    ids: Lists
    turns_dropped: np.ndarray
    tokens_cut: np.ndarray
    fingerprint: str
    places: Lists | None = None
    targets_cut: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """int64 (n,), tokens of each example."""
        return self.ids.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """The token ids of one example: a read-only int32 view of shape (lengths[index],)."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.ids.take(np.array([index]))[0]

    def largest_id(self) -> int:
        """The largest token id of all examples; -1 if there is none."""
        return self.ids.largest()


class TextMemo(LRUCache[bytes, np.ndarray]):
    """A least-recently-used cache of int32 (n,) token ids by a digest of their text, with at most `limit` tokens.

    Each text counts as `TOKENS_OF_A_TEXT` more, else millions of short ones would take gigabytes.
    """

    def __init__(self, limit: int = REMEMBERED_TOKENS) -> None:
        super().__init__(limit, getsizeof=lambda ids: len(ids) + TOKENS_OF_A_TEXT)

    def __setitem__(self, key: bytes, ids: np.ndarray) -> None:
        if self.getsizeof(ids) <= self.maxsize:
            super().__setitem__(key, ids.copy())  # a view would keep the ids of a whole batch alive


def tokenise(rows: Rows, tokenizer: Any, settings: PromptSettings, cache: Path, *, orders: int) -> TokenStore:
    """Encodes rows into a file under `cache`, or opens the file of an earlier call.

    Tokenizers are distinguished by their whole state in memory. An interrupted call leaves nothing behind: the file
    gets its name only when it is complete.

    Args:
        orders: in how many of its orders each row is stored.
    """
    encoder = rows.task.encoder(tokenizer, settings, TextMemo())
    # as bytes, because JSON within JSON takes three times as long
    state = tokenizer.backend_tokenizer.to_str().encode()
    made_from = [FORMAT, rows.task.name, rows.fingerprint, settings.identity(), orders, state]
    made_from += [encoder.constant_ids, sorted(control_ids(tokenizer))]
    path = cache / f"tokens-{fingerprint(*made_from)}.arrow"
    if not path.is_file():
        with atomic_write(path) as draft:
            _write(draft, rows, encoder, orders)
    with reading_cached(path):
        store = open_tokens(path, orders)
        if len(store) != orders * len(rows):
            raise ValueError(f"it has {len(store):,} examples, not {orders * len(rows):,}")
    return store


def open_tokens(path: Path, orders: int) -> TokenStore:
    """Opens a token file as a memory map. Its name must identify its content, as for files of `tokenise`."""
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    if table.schema not in (_SCHEMA, _SCHEMA_WITH_TARGETS):
        raise ValueError(f"{path} has the columns {', '.join(table.column_names)}, not those of tokens")
    return _store(table, orders, path.stem.removeprefix("tokens-"))


def encode_in_memory(rows: Rows, encoder: Encoder, *, orders: int) -> TokenStore:
    """The token ids of rows as of `tokenise`, kept in memory."""
    table = pa.Table.from_batches(_record_batches(rows, encoder, orders), _schema(rows))
    return _store(table, orders, fingerprint(rows.fingerprint, orders))


def _store(table: pa.Table, orders: int, name: str) -> TokenStore:
    with_targets = table.schema == _SCHEMA_WITH_TARGETS
    return TokenStore(
        orders=orders,
        ids=Lists.of(table["input_ids"]),
        turns_dropped=table["turns_dropped"].to_numpy(),
        tokens_cut=table["tokens_cut"].to_numpy(),
        fingerprint=name,
        places=Lists.of(table["places"]) if with_targets else None,
        targets_cut=table["targets_cut"].to_numpy() if with_targets else None,
    )


def join(stores: Sequence[TokenStore]) -> TokenStore:
    """The concatenation of several stores; a single store is returned as it is."""
    if len(stores) == 1:
        return stores[0]
    assert len({store.orders for store in stores}) == 1, "stores with different orders cannot be joined"
    places = [store.places for store in stores if store.places is not None]
    targets_cut = [store.targets_cut for store in stores if store.targets_cut is not None]
    return TokenStore(
        orders=stores[0].orders,
        ids=Lists.joined([store.ids for store in stores]),
        turns_dropped=np.concatenate([store.turns_dropped for store in stores]),
        tokens_cut=np.concatenate([store.tokens_cut for store in stores]),
        fingerprint=fingerprint(*(store.fingerprint for store in stores)),
        places=Lists.joined(places) if places else None,
        targets_cut=np.concatenate(targets_cut) if targets_cut else None,
    )


def _write(path: Path, rows: Rows, encoder: Encoder, orders: int) -> None:
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, _schema(rows)) as writer,
        progress("tokenising", len(rows), "rows") as advance,
    ):
        for batch in _record_batches(rows, encoder, orders):
            writer.write_batch(batch)
            advance(len(batch) // orders)


def _schema(rows: Rows) -> pa.Schema:
    return _SCHEMA if rows.task.classes else _SCHEMA_WITH_TARGETS


def _record_batches(rows: Rows, encoder: Encoder, orders: int) -> Iterator[pa.RecordBatch]:
    columns = rows.columns(*rows.task.texts).iter(batch_size=ROWS_AT_ONCE)
    for batch in ahead(map(encoder.tokenise, columns), depth=1):
        yield _record_batch(encoder.lay_out(batch, orders=orders))


def _record_batch(encoded: Encoded) -> pa.RecordBatch:
    ids = pa.ListArray.from_arrays(encoded.offsets, encoded.input_ids)
    columns = [ids, pa.array(encoded.turns_dropped), pa.array(encoded.tokens_cut)]
    if (targets := encoded.targets) is None:
        return pa.record_batch(columns, schema=_SCHEMA)
    columns += [pa.ListArray.from_arrays(targets.offsets, targets.places), pa.array(targets.cut)]
    return pa.record_batch(columns, schema=_SCHEMA_WITH_TARGETS)
