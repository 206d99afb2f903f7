"""TensorFlow's checkpoints for tests, sound ones and others; nothing is shared with the reader."""

import re
import struct
from pathlib import Path

import torch

MAGIC = bytes.fromhex("57fb808b247547db")
DTYPES = {
    torch.float32: 1,
    torch.float64: 2,
    torch.int32: 3,
    torch.uint8: 4,
    torch.int16: 5,
    torch.int8: 6,
    torch.int64: 9,
    torch.bool: 10,
    torch.bfloat16: 14,
    torch.float16: 19,
}


def crc32c(data):
    """Bit by bit, as the standard has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def entry_of_table(byte):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


TABLE = [entry_of_table(byte) for byte in range(256)]


def masked(data):
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number, value):
    """A field of a protocol buffer: of an int a varint, of bytes a fixed32 or a message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value) if value else b""
    if isinstance(value, tuple):  # fixed32
        return varint(number << 3 | 5) + value[0]
    return varint(number << 3 | 2) + varint(len(value)) + value


def header(shards=1, endianness=0, consumer=0):
    return field(1, shards) + field(2, endianness) + field(3, field(1, 1) + field(2, consumer))


def entry(dtype, shape, offset, size, crc, shard=0, more=b""):
    dims = b"".join(field(2, field(1, n)) for n in shape)
    fields = [(1, dtype), (2, dims), (3, shard), (4, offset), (5, size), (6, (crc,))]
    return b"".join(field(number, value) for number, value in fields) + more


def block(pairs, restart=16, kind=0):
    body, restarts, before = bytearray(), [], b""
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % restart == 0:
            restarts.append(len(body))
        else:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        body += varint(shared) + varint(len(key) - shared) + varint(len(value))
        body += key[shared:] + value
        before = key
    restarts = restarts or [0]
    body += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    return closed(bytes(body), kind)


def closed(body, kind=0):
    body += bytes([kind])
    return body + masked(body)


def table(pairs, block_size=4096, restart=16, kind=0):
    """Data blocks, metaindex block, index block, footer."""
    blocks, group, size = [], [], 0
    for key, value in pairs:
        group.append((key, value))
        size += len(key) + len(value)
        if size >= block_size:
            blocks, group, size = [*blocks, group], [], 0
    if group:
        blocks.append(group)
    raw, index = b"", []
    for group in blocks:
        made = block(group, restart, kind)
        index.append((group[-1][0], varint(len(raw)) + varint(len(made) - 5)))
        raw += made
    return finished(raw, block([]), block(index, 1))


def finished(raw, metaindex, index):
    handles = b""
    for made in (metaindex, index):
        handles += varint(len(raw)) + varint(len(made) - 5)
        raw += made
    return raw + handles.ljust(40, b"\0") + MAGIC


def write_bundle(prefix, tensors, shards=1, **options):
    """A checkpoint whose tensors are dealt out to several shards in turn."""
    data, pairs = [b""] * shards, [(b"", header(shards))]
    for number, name in enumerate(sorted(tensors, key=str.encode)):
        tensor, shard = tensors[name].contiguous(), number % shards
        raw = tensor.view(-1).view(torch.uint8).numpy().tobytes()
        made = entry(
            *(DTYPES[tensor.dtype], tensor.shape, len(data[shard]), len(raw), masked(raw), shard)
        )
        pairs.append((name.encode(), made))
        data[shard] += raw
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for shard, raw in enumerate(data):
        Path(f"{prefix}.data-{shard:05}-of-{shards:05}").write_bytes(raw)
    Path(f"{prefix}.index").write_bytes(table(pairs, **options))
    return prefix


def google_state(state):
    """A state dict under the names and in the layout of Google's TensorFlow code."""
    tensors = {}
    for name, tensor in state.items():
        if name.startswith("cls.predictions.decoder."):
            continue
        name = re.sub(r"\.layer\.(\d+)\.", r".layer_\1.", name).replace(".", "/")
        if re.search(r"_embeddings/weight$", name):
            name = name.removesuffix("/weight")
        elif "LayerNorm" in name:
            name = name.replace("/weight", "/gamma").replace("/bias", "/beta")
        elif re.match(r"classifier|qa_outputs|cls/seq_relationship|cls/predictions/bias", name):
            name = re.sub(r"/(weight|bias)$", lambda m: f"/output_{m[1]}", name)
            name = name.replace("output_weight", "output_weights")
            name = name.replace("qa_outputs", "cls/squad").removeprefix("classifier/")
        elif name.endswith("/weight"):
            name, tensor = name.replace("/weight", "/kernel"), tensor.T
        tensors[name] = tensor.detach().clone().contiguous()
    return tensors


def with_adam(tensors):
    """The same with what run_pretraining.py saves beside the weights."""
    slots = {
        f"{name}/{slot}": torch.full_like(tensor, 3)
        for name, tensor in tensors.items()
        for slot in ("adam_m", "adam_v")
    }
    rest = {"global_step": torch.tensor(7), "beta1_power": torch.tensor(0.9)}
    return tensors | slots | rest
