"""Tokenises rows once and caches them as memory-mapped Arrow, by a fingerprint of what they are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from cachetools import LRUCache

from arena.background import ahead
from arena.data.dataset import Rows, reading_cached
from arena.data.task import Encoded, Encoder
from arena.data.text_encoder import control_ids
from arena.progress import progress
from arena.settings import PromptSettings
from arena.storage.files import atomic_write, fingerprint

FORMAT = 3  # increase it when the layout of the file or of the prompt changes
ROWS_AT_ONCE = 512  # rows tokenised at once, and in one Arrow record batch

REMEMBERED_TOKENS = 2**25  # 128 MiB of token ids

_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "turns_dropped": pa.int32(), "tokens_cut": pa.int32()})


@dataclass(frozen=True)
class TokenStore:
    """The token ids of many examples, read in place from memory-mapped files.

    Example `row * orders + order` is row `row` in one of its orders; order 0 is as given.

    Attributes:
        orders: examples of each row.
        lengths: int64 (n,), tokens of each example.
        turns_dropped: int32 (n,), turns omitted from each example.
        tokens_cut: int32 (n,), tokens omitted from each example.
        fingerprint: changes when any token or any of the above changes; suitable for a file name.
    """

    orders: int
    lengths: np.ndarray
    turns_dropped: np.ndarray
    tokens_cut: np.ndarray
    fingerprint: str
    _flat: tuple[np.ndarray, ...]
    _offsets: tuple[np.ndarray, ...]
    _starts: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """The token ids of one example: a read-only int32 view of shape (lengths[index],)."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.take(np.array([index]))[0]

    def largest_id(self) -> int:
        """The largest token id of all examples; -1 if there is none."""
        return max((int(flat.max()) for flat in self._flat if len(flat)), default=-1)

    def take(self, indices: np.ndarray) -> list[np.ndarray]:
        """The token ids of many examples, each a view like `store[index]`."""
        chunks = np.searchsorted(self._starts, indices, side="right") - 1
        places = indices - self._starts[chunks]
        views = []
        for chunk, place in zip(chunks.tolist(), places.tolist(), strict=True):
            offsets = self._offsets[chunk]
            views.append(self._flat[chunk][offsets[place] : offsets[place + 1]])
        return views


class TextMemo(LRUCache[bytes, np.ndarray]):
    """A least-recently-used cache of int32 (n,) token ids by a digest of their text, with at most `limit` tokens."""

    def __init__(self, limit: int = REMEMBERED_TOKENS) -> None:
        super().__init__(limit, getsizeof=len)

    def __setitem__(self, key: bytes, ids: np.ndarray) -> None:
        if len(ids) <= self.maxsize:
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
    if table.schema != _SCHEMA:
        raise ValueError(f"{path} has the columns {', '.join(table.column_names)}, not those of tokens")
    chunks = [chunk for chunk in table["input_ids"].chunks if len(chunk)]
    offsets = tuple(chunk.offsets.to_numpy() for chunk in chunks)
    lengths = [np.diff(each) for each in offsets]
    starts = np.cumsum([0, *map(len, lengths)])[:-1] if chunks else np.zeros(0, dtype=np.int64)
    return TokenStore(
        orders=orders,
        lengths=np.concatenate([*lengths, np.zeros(0, dtype=np.int64)]).astype(np.int64),
        turns_dropped=table["turns_dropped"].to_numpy(),
        tokens_cut=table["tokens_cut"].to_numpy(),
        fingerprint=path.stem.removeprefix("tokens-"),
        _flat=tuple(chunk.values.to_numpy() for chunk in chunks),
        _offsets=offsets,
        _starts=starts,
    )


def join(stores: Sequence[TokenStore]) -> TokenStore:
    """The concatenation of several stores; a single store is returned as it is."""
    if len(stores) == 1:
        return stores[0]
    assert len({store.orders for store in stores}) == 1, "stores with different orders cannot be joined"
    shifts = np.cumsum([0, *(len(store) for store in stores)])
    return TokenStore(
        orders=stores[0].orders,
        lengths=np.concatenate([store.lengths for store in stores]),
        turns_dropped=np.concatenate([store.turns_dropped for store in stores]),
        tokens_cut=np.concatenate([store.tokens_cut for store in stores]),
        fingerprint=fingerprint(*(store.fingerprint for store in stores)),
        _flat=tuple(flat for store in stores for flat in store._flat),
        _offsets=tuple(offsets for store in stores for offsets in store._offsets),
        _starts=np.concatenate([store._starts + shift for store, shift in zip(stores, shifts, strict=False)]),
    )


def _write(path: Path, rows: Rows, encoder: Encoder, orders: int) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        columns = rows.table.select_columns(list(rows.task.texts)).iter(batch_size=ROWS_AT_ONCE)
        with progress("tokenising", len(rows), "rows") as advance:
            for batch in ahead(map(encoder.tokenise, columns), depth=1):
                writer.write_batch(_record_batch(encoder.lay_out(batch, orders=orders)))
                advance(len(batch))


def _record_batch(encoded: Encoded) -> pa.RecordBatch:
    ids = pa.ListArray.from_arrays(encoded.offsets, encoded.input_ids)
    return pa.record_batch([ids, pa.array(encoded.turns_dropped), pa.array(encoded.tokens_cut)], schema=_SCHEMA)
