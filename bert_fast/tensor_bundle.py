"""TensorFlow's checkpoints (TensorBundle, what tf.train.Saver writes) -> tensors.

    PREFIX.index                  a table: name -> dtype, shape, shard, offset, size, CRC
    PREFIX.data-00000-of-00001    the bytes of the tensors; there may be several such shards

The table has LevelDB's form. Everything in it stands without gaps:

    table   data blocks, an empty metaindex block, an index block, a footer of 48 bytes
    block   entries, uint32 places of those that repeat no key, uint32 count of these; after the
            block a byte of compression and the CRC of all that
    entry   varints (shared, fresh, size), `fresh` bytes that follow the first `shared` ones of
            the key before, the value; in the index block a value says where a data block is
    footer  varints (offset, size) of metaindex and index block, zeros to 40 bytes, a magic number

The values are protocol buffers: BundleHeaderProto under the empty key, else BundleEntryProto. The
CRCs are CRC-32C, masked as in LevelDB. All of them are checked, so no flipped bit goes unseen.
"""

import math
import os
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bert_fast.files import plain_file

MAX_INDEX_BYTES = 1_000_000  # a thousand tensors take 60 kB
MAX_NAME_BYTES = 256  # a short entry can stand for a long name: it repeats the one before
DTYPES = {  # TensorFlow's DataType
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    5: torch.int16,
    6: torch.int8,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    19: torch.float16,
}
_FOOTER, _TRAILER, _MAGIC = 48, 5, 0xDB4775248B80FB57
_OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VARINT, _BYTES = 0, 2  # wire types of protocol buffers
_FIXED = {1: 8, 5: 4}  # and those of a fixed length


def read_bundle(prefix: str | os.PathLike) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under the names and in the layout that the files have.

    Args:
        prefix: the path without `.index` and `.data-...`.

    Raises:
        FileNotFoundError: the index or a shard is missing.
        ValueError: a file is damaged, malformed or of a kind that is not read (compressed blocks,
            sliced variables, TensorFlow 2's objects). The message names file and tensor.
    """
    return dict(bundle_items(prefix))


def bundle_items(prefix: str | os.PathLike) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) as `read_bundle` has them, in the order of the bytes."""
    prefix = Path(prefix)
    index = plain_file(prefix.parent, f"{prefix.name}.index")
    table = _read_table(index)
    if not table or table[0][0]:
        raise ValueError(f"{index}: want a header under the empty name, got none")
    count = _shard_count(table[0][1], f"{index}: header")
    shards: list[list[_Entry]] = [[] for _ in _data_files(prefix, count)]
    if any(key == _OBJECTS for key, _ in table):
        want = "a checkpoint of tf.train.Saver"
        raise ValueError(f"{index}: {_OBJECTS}: want {want}, got objects of TensorFlow 2")
    for name, value in table[1:]:
        entry = _entry(name, value, f"{index}: {name}")
        if entry.shard >= count:
            raise ValueError(f"{index}: {name}: shard: want one of {count}, got {entry.shard}")
        shards[entry.shard].append(entry)
    for path, entries in zip(_data_files(prefix, count), shards, strict=True):
        yield from _read_shard(path, entries)


class _Entry(NamedTuple):
    offset: int
    size: int
    name: str
    dtype: torch.dtype
    shape: list[int]
    shard: int
    crc: int


def _data_files(prefix: Path, count: int) -> Iterator[Path]:
    for i in range(count):
        yield plain_file(prefix.parent, f"{prefix.name}.data-{i:05}-of-{count:05}")


def _read_shard(path: Path, entries: list[_Entry]) -> Iterator[tuple[str, Tensor]]:
    entries.sort()
    size, end = path.stat().st_size, 0
    for entry in entries:
        # Shared bytes would make many tensors out of a small file.
        if entry.offset < end:
            got = f"{entry.offset}, inside another tensor"
            raise ValueError(f"{path}: {entry.name}: want data from byte {end}, got {got}")
        end = entry.offset + entry.size
        if end > size:
            raise ValueError(
                f"{path}: {entry.name}: truncated: want at least {end} bytes, got {size}"
            )
    with open(path, "rb") as file:
        for entry in entries:
            tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
            raw = tensor.view(-1).view(torch.uint8).numpy()
            file.seek(entry.offset)
            if (got := file.readinto(raw)) != entry.size:
                raise ValueError(f"{path}: {entry.name}: want {entry.size} bytes, got {got}")
            if (found := _mask(crc32c(raw))) != entry.crc:
                want = f"the CRC {entry.crc:08x} of the index"
                raise ValueError(f"{path}: {entry.name}: damaged: want {want}, got {found:08x}")
            yield entry.name, tensor


# --- the table -----------------------------------------------------------------------------------


class _Cursor:
    """A place in some bytes; reading past their end is a ValueError."""

    def __init__(self, raw: bytes, where: str):
        self.raw, self.at, self.where = raw, 0, where

    def more(self) -> bool:
        return self.at < len(self.raw)

    def take(self, count: int) -> bytes:
        if (left := len(self.raw) - self.at) < count:
            raise ValueError(f"{self.where}: truncated: want {count} more bytes, got {left}")
        self.at += count
        return self.raw[self.at - count : self.at]

    def varint(self) -> int:
        value = 0
        for place in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << place
            # There is one way to write a number: the last byte is not 0.
            if byte < 128 and (byte or not place) and value < 2**64:
                return value
            if byte < 128:
                break
        raise ValueError(f"{self.where}: want a varint of 64 bits, got another at byte {self.at}")


def _read_table(path: Path) -> list[tuple[str, bytes]]:
    """Return the names and values of a table, which are in order."""
    size = path.stat().st_size
    if not _FOOTER <= size <= MAX_INDEX_BYTES:
        raise ValueError(f"{path}: want {_FOOTER} .. {MAX_INDEX_BYTES} bytes, got {size}")
    with open(path, "rb") as file:
        raw = file.read(size)
    if (magic := int.from_bytes(raw[-8:], "little")) != _MAGIC:
        want = f"{_MAGIC:016x} at the end"
        raise ValueError(f"{path}: truncated or no table: want {want}, got {magic:016x}")
    footer = _Cursor(raw[-_FOOTER:-8], f"{path}: footer")
    handles = [(footer.varint(), footer.varint()) for _ in range(2)]
    if any(rest := footer.raw[footer.at :]):
        raise ValueError(f"{path}: footer: want zeros after the handles, got {rest.hex()}")
    index = _block(raw, *handles[1], str(path))
    table: list[tuple[bytes, bytes]] = []
    end, before = 0, []
    for key, value in index:
        cursor = _Cursor(value, f"{path}: index block")
        offset, length = cursor.varint(), cursor.varint()
        if offset != end or cursor.more():
            raise ValueError(f"{path}: index block: want a block at byte {end}, got {offset}")
        entries = _block(raw, offset, length, str(path))
        names = [name for name, _ in entries]
        # The key in the index block is the last of the block, or one between it and the next.
        if any(a >= b for a, b in pairwise([*before, *names])) or not names or names[-1] > key:
            got = f"{[*before, *names, key]!r:.200}"
            raise ValueError(f"{path}: block at byte {offset}: want rising names, got {got}")
        before = [key]
        table += entries
        end = offset + length + _TRAILER
    stop = end + handles[0][1] + _TRAILER
    want = [(end, handles[0][1]), (stop, size - _FOOTER - _TRAILER - stop)]
    if handles != want:
        raise ValueError(f"{path}: footer: want {want} for the last blocks, got {handles}")
    if _block(raw, *handles[0], str(path)):
        raise ValueError(f"{path}: metaindex block: want no entries, got some")
    try:
        return [(key.decode(), value) for key, value in table]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: want names in UTF-8, got {error.object!r:.80}") from error


def _block(raw: bytes, offset: int, size: int, path: str) -> list[tuple[bytes, bytes]]:
    """Return the keys and values of the block in raw[offset : offset + size]."""
    where = f"{path}: block at byte {offset}"
    if offset + size + _TRAILER > len(raw) - _FOOTER or size < 4:
        raise ValueError(f"{where}: want 4 bytes at least before the footer, got {size}")
    end = offset + size
    stored = int.from_bytes(raw[end + 1 : end + _TRAILER], "little")
    if (found := _mask(crc32c(raw[offset : end + 1]))) != stored:
        raise ValueError(f"{where}: damaged: want the CRC {stored:08x}, got {found:08x}")
    if kind := raw[end]:
        kind = {1: "snappy"}.get(kind, f"kind {kind}")
        raise ValueError(f"{where}: want no compression, got {kind}")
    count = int.from_bytes(raw[end - 4 : end], "little")
    limit = end - 4 - 4 * count
    if not count or limit < offset:
        raise ValueError(f"{where}: want 1 .. {size // 4 - 1} restarts, got {count}")
    cursor = _Cursor(raw[offset:limit], where)
    entries, whole, key = [], {0}, b""
    while cursor.more():
        start = cursor.at
        shared, fresh, length = cursor.varint(), cursor.varint(), cursor.varint()
        if shared > len(key) or shared + fresh > MAX_NAME_BYTES:
            got = f"{shared} of {len(key)} and {fresh} more"
            raise ValueError(f"{where}: want a name of at most {MAX_NAME_BYTES} bytes, got {got}")
        key = key[:shared] + cursor.take(fresh)
        entries.append((key, cursor.take(length)))
        if not shared:
            whole.add(start)
    restarts = np.frombuffer(raw, "<u4", count, limit).tolist()
    if restarts[0] or any(a >= b for a, b in pairwise(restarts)) or not whole.issuperset(restarts):
        raise ValueError(f"{where}: want restarts at whole names, got {restarts!r:.80}")
    return entries


# --- the values ----------------------------------------------------------------------------------


def _fields(raw: bytes, where: str) -> dict[tuple[int, int], list]:
    """Return the fields of a protocol buffer: (number, wire type) -> its values in order."""
    cursor = _Cursor(raw, where)
    fields: dict[tuple[int, int], list] = {}
    while cursor.more():
        number, wire = divmod(cursor.varint(), 8)
        if wire == _VARINT:
            value = cursor.varint()
        elif wire == _BYTES:
            value = cursor.take(cursor.varint())
        elif wire in _FIXED:
            value = int.from_bytes(cursor.take(_FIXED[wire]), "little")
        else:
            raise ValueError(f"{where}: want a protocol buffer, got wire type {wire}")
        fields.setdefault((number, wire), []).append(value)
    return fields


def _shard_count(raw: bytes, where: str) -> int:
    """Check a BundleHeaderProto: num_shards = 1, endianness = 2, version = 3."""
    fields = _fields(raw, where)
    count = fields.get((1, _VARINT), [0])[-1]
    if not 1 <= count <= 99_999:
        raise ValueError(f"{where}: num_shards: want 1 .. 99999, got {count}")
    if fields.get((2, _VARINT), [0])[-1]:
        raise ValueError(f"{where}: endianness: want little, got big")
    version = _fields(fields.get((3, _BYTES), [b""])[-1], where)
    if (consumer := version.get((2, _VARINT), [0])[-1]) > 1:
        raise ValueError(f"{where}: min_consumer: want 1 at most, got {consumer}")
    return count


def _entry(name: str, raw: bytes, where: str) -> _Entry:
    """Check a BundleEntryProto: dtype, shape, shard_id, offset, size, crc32c, slices = 1 .. 7."""
    fields = _fields(raw, where)
    code, shard, offset, size = (fields.get((n, _VARINT), [0])[-1] for n in (1, 3, 4, 5))
    if (7, _BYTES) in fields:
        raise ValueError(f"{where}: want a whole tensor, got slices of a partitioned variable")
    if code not in DTYPES:
        known = ", ".join(f"{n} ({str(d).removeprefix('torch.')})" for n, d in DTYPES.items())
        raise ValueError(f"{where}: dtype: want one of {known}, got {code}")
    shape_fields = _fields(fields.get((2, _BYTES), [b""])[-1], where)
    if any(shape_fields.pop((3, _VARINT), [0])):
        raise ValueError(f"{where}: shape: want a known one, got unknown_rank")
    shape = [
        _fields(dim, where).get((1, _VARINT), [0])[-1] for dim in shape_fields.get((2, _BYTES), [])
    ]
    # torch multiplies the sizes in 64 bits, also where one of them is 0.
    if len(shape) > 8 or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise ValueError(f"{where}: want a shape in memory, got {shape!r:.80}")
    if (want := math.prod(shape) * DTYPES[code].itemsize) != size:
        raise ValueError(f"{where}: want {want} bytes for {shape}, got {size}")
    crc = fields.get((6, 5), [0])[-1]
    return _Entry(offset, size, name, DTYPES[code], shape, shard, crc)


# --- CRC-32C -------------------------------------------------------------------------------------
#
# Bits are the coefficients of a polynomial over GF(2), the first bit of the data the highest power;
# in a word of 32 bits the lowest bit is x^31. The CRC of a message M is M x^32 modulo _POLY.

_POLY = 0x82F63B78  # x^32 + ... + 1 without x^32
_ROW = 16  # words are taken 2^16 at a time: state and tables stay in the cache


def crc32c(data: bytes | np.ndarray) -> int:
    """Return the CRC-32C (Castagnoli) of bytes, or of an array of uint8."""
    raw = np.frombuffer(data, np.uint8)
    count = len(raw)
    width = min(_ROW, ((count - 1) // 4).bit_length() if count else 0)
    row = 4 << width
    head = count % row
    # A message of rows, the first filled up with zeros in front: they do not change a polynomial.
    state = np.zeros(row, np.uint8)
    state[row - head :] = raw[:head]
    state = state.view("<u4")
    for words in raw[head:].view("<u4").reshape(-1, 1 << width):
        state = _shifted(state, width) ^ words
    while width:  # the sum over the row: its first half is that many powers above the second
        width -= 1
        state = _shifted(state[: 1 << width], width) ^ state[1 << width :]
    # The register begins with ones, as if they had been added to the first 32 bits.
    ones = _product(2**32 - 1, _power(8 * count))
    return _product(int(state[0]), _power(32)) ^ ones ^ (2**32 - 1)


def _mask(crc: int) -> int:
    """A CRC as it is stored: one of bytes that hold their own CRC would say little."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def _product(a: int, b: int) -> int:
    """Return a b modulo _POLY."""
    total = 0
    for bit in range(31, -1, -1):
        total ^= b if a >> bit & 1 else 0
        b = b >> 1 ^ (_POLY if b & 1 else 0)
    return total


@cache
def _square(k: int) -> int:
    """Return x^(2^k) modulo _POLY."""
    return _product(_square(k - 1), _square(k - 1)) if k else 1 << 30


def _power(n: int) -> int:
    """Return x^n modulo _POLY."""
    total = 1 << 31
    for k in range(n.bit_length()):
        total = _product(total, _square(k)) if n >> k & 1 else total
    return total


@cache
def _tables(k: int) -> np.ndarray:
    """Return the products of x^(32 2^k) with each lower and each upper half of a word."""
    tables = np.zeros((2, 2**16), np.uint32)
    for half in range(2):
        for bit in range(16):
            row = np.uint32(_product(1 << (16 * half + bit), _square(k + 5)))
            tables[half, 1 << bit : 2 << bit] = tables[half, : 1 << bit] ^ row
    return tables


def _shifted(words: np.ndarray, k: int) -> np.ndarray:
    """Return the words times x^(32 2^k)."""
    low, high = _tables(k)
    return low.take(words & 0xFFFF) ^ high.take(words >> 16)
