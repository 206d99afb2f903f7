"""TensorFlow's checkpoints are read to the bit, and damaged or hostile ones refused by name."""

import os
import random
import shutil
import struct
import sys

import pytest
import torch
from bundle_writer import (
    DTYPES,
    block,
    closed,
    crc32c,
    entry,
    field,
    finished,
    header,
    masked,
    table,
    varint,
    write_bundle,
)

from bert_fast import tensor_bundle
from bert_fast.checkpoint import read_tensors
from bert_fast.tensor_bundle import read_bundle

NAME = "bert_model.ckpt"
INDEX, DATA = f"{NAME}.index", f"{NAME}.data-00000-of-00001"


def tensors():
    torch.manual_seed(0)
    found = {f"some/{str(d)[6:]}": (5 * torch.randn(3, 5)).to(d) for d in DTYPES}
    return found | {
        "a/scalar": torch.tensor(7),
        "a/empty": torch.empty(0, 4),
        "a/row": torch.randn(1, 9),
        "b\u00e9/name": torch.randn(2, 2, 2),
    }


def equal(found, want):
    return found.keys() == want.keys() and all(
        torch.equal(found[n], want[n]) and found[n].dtype == want[n].dtype for n in want
    )


def refused(prefix, *words, kinds=(ValueError,)):
    """The message names the file, what was wanted, what was found, and `words`."""
    with pytest.raises(kinds) as error:
        read_bundle(prefix)
    for text in (str(prefix), "want", "got", *words):
        assert text in str(error.value), (text, str(error.value))
    assert len(str(error.value)) < 1000
    return str(error.value)


# --- sound ones ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "crc"),
    [  # RFC 3720, B.4; the check value of the catalogues
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_known_crcs(data, crc):
    assert tensor_bundle.crc32c(data) == crc == crc32c(data)


@pytest.mark.parametrize("at", [0, 2**7, 2**18, 2**19, 5 * 2**18])
def test_crc_of_any_length(at):
    """Around the lengths at which one more row is begun."""
    rng = random.Random(at)
    for count in (*range(max(at - 5, 0), at + 6), at + 1000):
        data = rng.randbytes(count)
        assert tensor_bundle.crc32c(data) == crc32c(data), count


def test_real_file(shared):
    found = read_bundle(shared / "data/ckpt/tf_google_tiny" / NAME)
    assert len(found) == 3 * 46 + 1 and found["global_step"].shape == ()
    assert found["bert/encoder/layer_1/intermediate/dense/kernel"].shape == (4, 16)
    assert {t.dtype for n, t in found.items() if n != "global_step"} == {torch.float32}
    assert {n.rsplit("/", 1)[-1] for n in found} >= {"adam_m", "adam_v", "output_weights"}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("block_size", [1, 100, 4096])
@pytest.mark.parametrize("restart", [1, 16])
def test_round_trip(tmp_path, shards, block_size, restart):
    """Every dtype; a scalar, an empty tensor; one block and many, with and without prefixes."""
    want = tensors()
    prefix = write_bundle(
        tmp_path / "model.ckpt-12", want, shards, block_size=block_size, restart=restart
    )
    assert equal(read_bundle(prefix), want) and equal(read_bundle(str(prefix)), want)


def test_large_tensor(tmp_path):
    want = {"a": torch.randn(1000, 101), "b": torch.randn(3)}
    prefix = write_bundle(tmp_path / NAME, want, shards=2)
    assert equal(read_bundle(prefix), want)
    path = tmp_path / f"{NAME}.data-00000-of-00002"
    raw = bytearray(path.read_bytes())
    for at in (0, 3, 2**18 - 1, 2**18, len(raw) - 1):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1 :])
        refused(prefix, "a: damaged", path.name)


def test_tensors_are_memory_of_their_own(tmp_path):
    prefix = write_bundle(tmp_path / NAME, tensors())
    found = read_bundle(prefix)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in found.values())


def test_space_between_tensors_is_allowed(tmp_path):
    """TensorFlow can align them; the bytes between are nobody's."""
    raw = torch.ones(2).numpy().tobytes()
    pairs = [(b"", header()), *((n, entry(1, [2], o, 8, masked(raw))) for n, o in SPACED)]
    (tmp_path / INDEX).write_bytes(table(pairs))
    (tmp_path / DATA).write_bytes(raw.ljust(64, b"\1") + raw + bytes(9))
    assert equal(read_bundle(tmp_path / NAME), {"a": torch.ones(2), "b": torch.ones(2)})


SPACED = ((b"a", 0), (b"b", 64))


# --- damage --------------------------------------------------------------------------------------


def bits(prefix, name, count):
    """Flip `count` bits of a file, one after another (0: each bit there is)."""
    path = prefix.parent / name
    raw = path.read_bytes()
    every = range(8 * len(raw))
    for bit in random.Random(0).sample(every, count) if count else every:
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        yield bit
    path.write_bytes(raw)


@pytest.mark.parametrize("count", [300, pytest.param(0, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", [INDEX, DATA])
def test_flipped_bits(tmp_path, name, count):
    """Each is seen, also in the index's footer; of data the tensor is named."""
    want = {"aa/bias": torch.randn(13), "aa/kernel": torch.randn(4, 5), "step": torch.tensor(3)}
    prefix = write_bundle(tmp_path / NAME, want, block_size=40, restart=2)
    places = [("aa/bias", 52), ("aa/kernel", 132), ("step", 140)]
    for bit in bits(prefix, name, count):
        if name == DATA:
            tensor = next(n for n, end in places if bit // 8 < end)
            refused(prefix, DATA, f"{tensor}: damaged")
        else:
            refused(prefix, INDEX)
    assert equal(read_bundle(prefix), want)


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", [INDEX, DATA])
def test_flipped_bits_of_a_real_file(shared, tmp_path, name, count):
    """The optimizer's tensors are checked as well."""
    for file in (INDEX, DATA):
        shutil.copyfile(shared / "data/ckpt/tf_google_tiny" / file, tmp_path / file)
    for _ in bits(tmp_path / NAME, name, count):
        with pytest.raises(ValueError, match=name):
            read_tensors(tmp_path)


@pytest.mark.parametrize("name", [INDEX, DATA])
def test_truncation_to_every_length(tmp_path, name):
    prefix = write_bundle(tmp_path / NAME, {"a": torch.randn(5), "b/c": torch.randn(7)})
    raw = (tmp_path / name).read_bytes()
    for length in range(len(raw)):
        (tmp_path / name).write_bytes(raw[:length])
        text = refused(prefix, name)
        if name == DATA:
            tensor, end = ("a", 20) if length < 20 else ("b/c", 48)
            assert f"{tensor}: truncated: want at least {end} bytes, got {length}" in text
    if name == INDEX:
        (tmp_path / name).write_bytes(raw + b"\0")
        refused(prefix, name)


def test_missing_files(tmp_path):
    prefix = write_bundle(tmp_path / NAME, tensors(), shards=3)
    second = tmp_path / f"{NAME}.data-00001-of-00003"
    raw = second.read_bytes()
    second.unlink()
    refused(prefix, second.name, kinds=FileNotFoundError)
    second.write_bytes(raw)
    (tmp_path / f"{NAME}.data-00002-of-00003").write_bytes(raw)  # one shard twice
    refused(prefix, "data-00002-of-00003")
    (tmp_path / INDEX).unlink()
    refused(prefix, INDEX, kinds=FileNotFoundError)


def test_nothing_outside_is_opened(tmp_path):
    """Links, folders and devices in the place of either file."""
    opened, home = [], [None]

    def hook(event, args):
        if home[0] and event == "open" and isinstance(args[0], str):
            opened.append(os.path.realpath(args[0]).startswith(f"{home[0]}/"))

    sys.addaudithook(hook)
    elsewhere = write_bundle(tmp_path / "elsewhere" / NAME, tensors()).parent
    for name in (INDEX, DATA):
        for kind in ("link", "folder", "device", "loop"):
            prefix = write_bundle(tmp_path / f"{kind}_{name}" / NAME, tensors())
            path = prefix.parent / name
            path.unlink()
            if kind == "folder":
                path.mkdir()
            else:
                target = {"link": elsewhere / name, "device": "/dev/zero", "loop": name}[kind]
                path.symlink_to(target)
            home[0] = str(prefix.parent)
            refused(prefix, name, kinds=(ValueError, FileNotFoundError))
            home[0] = None
    assert opened and all(opened)
    for name in ("../../elsewhere/bert_model.ckpt", "a\nb", "", ".."):
        with pytest.raises((ValueError, FileNotFoundError)):
            read_bundle(f"{tmp_path}/link_{INDEX}/x/{name}")


# --- hostile indexes, every CRC in order ---------------------------------------------------------

RAW = torch.ones(2).numpy().tobytes()
GOOD = entry(1, [2], 0, 8, masked(RAW))


def values(**cases):
    """Cases with another entry for the tensor `x/y` (bytes), or all the entries (a list)."""
    return {
        n: c if isinstance(c, list) else [(b"", header()), (b"x/y", c)] for n, c in cases.items()
    }


ENTRIES = values(
    no_header=[(b"a", GOOD)],
    empty_header=[(b"", b"")],
    no_shards=[(b"", header(0))],
    many_shards=[(b"", header(100_000))],
    big_endian=[(b"", header(1, 1))],
    later_version=[(b"", header(1, 0, 2))],
    objects=[(b"", header()), (b"_CHECKPOINTABLE_OBJECT_GRAPH", entry(7, [], 0, 8, b"1234"))],
    nothing=b"",
    text_dtype=entry(7, [2], 0, 8, masked(RAW)),
    complex_dtype=entry(8, [1], 0, 8, masked(RAW)),
    quantized=entry(11, [8], 0, 8, masked(RAW)),
    reference=entry(101, [2], 0, 8, masked(RAW)),
    no_such_dtype=entry(2**31, [2], 0, 8, masked(RAW)),
    sliced=entry(1, [2], 0, 8, masked(RAW), more=field(7, field(1, b""))),
    unknown_rank=field(1, 1) + field(2, field(3, 1)) + field(5, 8),
    outside=entry(1, [2], 1, 8, masked(RAW)),
    far_outside=entry(1, [2], 2**62, 8, masked(RAW)),
    negative_offset=entry(1, [2], 2**64 - 8, 8, masked(RAW)),
    negative_size=entry(1, [2], 0, 2**64 - 8, masked(RAW)),
    smaller=entry(1, [2], 0, 4, masked(RAW[:4])),
    larger=entry(1, [1], 0, 8, masked(RAW)),
    huge=entry(1, [2**40, 2**40], 0, 8, masked(RAW)),
    huge_and_empty=entry(1, [0, 2**40, 2**40], 0, 0, masked(b"")),
    negative_dimension=entry(1, [2**64 - 2], 0, 8, masked(RAW)),
    dimensions=entry(1, [2] + [1] * 8, 0, 8, masked(RAW)),
    no_crc=field(1, 1) + field(2, field(2, field(1, 2))) + field(5, 8),
    other_shard=entry(1, [2], 0, 8, masked(RAW), shard=1),
    negative_shard=entry(1, [2], 0, 8, masked(RAW), shard=2**64 - 1),
    overlap=[(b"", header()), (b"a", GOOD), (b"b", GOOD)],
    overlap_in_part=[(b"", header()), (b"a", GOOD), (b"b", entry(1, [1], 4, 4, masked(RAW[4:])))],
    not_rising=[(b"", header()), (b"b", GOOD), (b"a", GOOD)],
    twice=[(b"", header()), (b"a", GOOD), (b"a", GOOD)],
    header_twice=[(b"", header()), (b"", header())],
    latin=[(b"", header()), (b"\xe9", GOOD)],
    long_name=[(b"", header()), (b"a" * 257, GOOD)],
    group=b"\x0b\x0c",
    endless=b"\x08" + b"\xff" * 9 + b"\x7f",
    overlong=GOOD.replace(b"\x08\x01", b"\x08\x81\x00", 1),
    short_message=b"\x12\x7f",
    short_fixed=b"\x35\x01",
)


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("block_size", [1, 4096])
def test_entries(tmp_path, name, block_size):
    pairs = ENTRIES[name]
    (tmp_path / INDEX).write_bytes(table(pairs, block_size))
    (tmp_path / DATA).write_bytes(RAW)
    text = refused(tmp_path / NAME)
    if pairs[-1][0] == b"x/y":
        assert ": x/y: " in text
    (tmp_path / INDEX).write_bytes(table([(b"", header()), (b"x/y", GOOD)], block_size))
    assert equal(read_bundle(tmp_path / NAME), {"x/y": torch.ones(2)})


HEADER = block([(b"", header())])
BODY = HEADER[:-5]
LATER = block([(b"", header()), (b"b", entry(1, [0], 0, 0, masked(b"")))])
META = block([])


def handle_of(made):
    """Of a block at the beginning."""
    return varint(0) + varint(len(made) - 5)


def handle(offset, size):
    return block([(b"", varint(offset) + varint(size))], 1)


def footer(offset, size):
    """A sound table whose footer says that the index block is there."""
    raw = finished(HEADER, META, handle(0, len(BODY)))
    handles = varint(len(HEADER)) + varint(len(META) - 5) + varint(offset) + varint(size)
    return raw[:-48] + handles.ljust(40, b"\0") + raw[-8:]


def overlong():
    """The last number of the footer with a byte more, which is a zero of the padding."""
    handles = SOUND[-48:-8].rstrip(b"\0")
    raw = handles[:-1] + bytes([handles[-1] | 128])
    return SOUND[:-48] + raw.ljust(40, b"\0") + SOUND[-8:]


def tail(*restarts, count=None):
    """The header's block with other restarts."""
    count = len(restarts) if count is None else count
    body = BODY[:-8] + struct.pack(f"<{len(restarts)}I", *restarts) + struct.pack("<I", count)
    return one_block(closed(body))


def one_block(made):
    return finished(made, META, handle(0, len(made) - 5))


SOUND = one_block(HEADER)
TABLES = {
    "empty": b"",
    "zeros": bytes(100),
    "magic_only": SOUND[-8:].rjust(48, b"\0"),
    "pickle": b"\x80\x04}.".ljust(100),
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 440449768\n",
    "padding": SOUND[:-9] + b"\1" + SOUND[-8:],
    "overlong": overlong(),
    "snappy": one_block(block([(b"", header())], kind=1)),
    "zlib": one_block(block([(b"", header())], kind=2)),
    "snappy_index": finished(HEADER, META, block([(b"", handle_of(HEADER))], 1, kind=1)),
    "itself": footer(len(HEADER) + len(META), 2**20),
    "cyclic": footer(0, len(BODY)),
    "metaindex_as_index": footer(len(HEADER), len(META) - 5),
    "beyond": footer(2**40, 8),
    "far_beyond": footer(2**63, 2**63),
    "in_footer": footer(len(SOUND) - 48, 8),
    "block_beyond": finished(HEADER, META, handle(0, 2**40)),
    "block_twice": finished(
        HEADER, META, block([(b"", handle_of(HEADER)), (b"a", handle_of(HEADER))], 1)
    ),
    "block_is_index": finished(HEADER, META, handle(len(HEADER), len(BODY))),
    "block_unused": finished(HEADER + HEADER, META, handle(0, len(BODY))),
    "key_in_index_too_small": finished(LATER, META, block([(b"a", handle_of(LATER))], 1)),
    "gap": finished(HEADER + b"\0", META, handle(0, len(BODY))),
    "no_blocks": finished(b"", META, META),
    "empty_block": one_block(META),
    "full_metaindex": finished(HEADER, HEADER, handle(0, len(BODY))),
    "long_handle": finished(HEADER, META, block([(b"", handle_of(HEADER) + b"\0")], 1)),
    "short_handle": finished(HEADER, META, block([(b"", varint(0))], 1)),
    "too_short": one_block(closed(b"\0\0\0")),
    "no_restarts": tail(count=0),
    "many_restarts": tail(0, count=2**32 - 1),
    "restart_inside": tail(0, 1),
    "restart_beyond": tail(0, 2**31),
    "restart_not_first": tail(1),
    "restart_twice": tail(0, 0),
    "key_shares_too_much": one_block(closed(b"\5\0\0" + struct.pack("<II", 0, 1))),
    "key_too_long": one_block(closed(b"\0\x7f\0" + struct.pack("<II", 0, 1))),
    "value_too_long": one_block(closed(b"\0\0\x7f" + struct.pack("<II", 0, 1))),
    "key_overlong": one_block(closed(b"\x80\0\0\0" + struct.pack("<II", 0, 1))),
    "large": bytes(tensor_bundle.MAX_INDEX_BYTES + 1),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name):
    (tmp_path / DATA).write_bytes(b"")
    (tmp_path / INDEX).write_bytes(SOUND)
    assert read_bundle(tmp_path / NAME) == {}
    (tmp_path / INDEX).write_bytes(TABLES[name])
    refused(tmp_path / NAME, INDEX, *(["snappy"] if "snappy" in name else []))


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.long)])
def test_mutated_indexes(tmp_path, count):
    """With CRCs made to fit: refused, or no more is read than there is."""
    want = {f"{'layer' * i}/{i}": torch.randn(i, 3) for i in range(5)}
    prefix = write_bundle(tmp_path / NAME, want)
    raw, rng, loaded = (tmp_path / INDEX).read_bytes(), random.Random(0), 0
    meta = raw.index(META, 1)
    spans = [(0, meta - 5), (meta + len(META), len(raw) - 48 - 5), (len(raw) - 48, len(raw))]
    for _ in range(count):
        mutated = bytearray(raw)
        start, end = spans[rng.choice([0, 0, 0, 1, 2])]
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(start, end)
            mutated[at] = rng.choice([0, 1, 127, 128, 255, mutated[at] ^ 1 << rng.randrange(8)])
        for first, last in spans[:2]:
            mutated[last : last + 5] = closed(bytes(mutated[first:last]))[-5:]
        (tmp_path / INDEX).write_bytes(mutated)
        try:
            found = read_bundle(prefix)
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path) in str(error)
        else:
            loaded += 1
            assert sum(t.nbytes for t in found.values()) <= (tmp_path / DATA).stat().st_size
    assert loaded < count / 2  # another letter in a name, say
