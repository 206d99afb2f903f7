"""The files of a model's directory, read without trust and written without half-done states.

Nothing in a file runs, nothing outside its directory is opened, and no more memory is taken than
the file is long. Readers raise ValueError with the file's name, what was wanted and what was found.
"""

import json
import math
import os
import re
import secrets
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAX_JSON_BYTES = 100_000_000
CODES = {  # the dtypes of safetensors that are read and written
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODE_OF = {dtype: code for code, dtype in CODES.items()}
# How the files of torch.save begin: zip archives, and before torch 1.6 a pickled magic number.
_ZIP, _MAGIC = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def parse_json(raw: bytes, what: str, kind: type = dict) -> Any:
    """Parse a JSON object strictly: UTF-8, no key twice, no NaN or Infinity.

    Args:
        raw: the text.
        what: the name of its file, for errors.
        kind: dict for an object, list for an array.

    Raises:
        ValueError: anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = set()
        for key, _ in pairs:
            if key in keys:
                raise ValueError(f"the key {key!r:.200} twice")
            keys.add(key)
        return dict(pairs)

    def constant(text: str) -> None:
        raise ValueError(f"the number {text}")

    want = "a JSON object" if kind is dict else "a JSON array"
    try:
        got = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: want {want}, got {error}") from error
    if not isinstance(got, kind):
        raise ValueError(f"{what}: want {want}, got {type(got).__name__}")
    return got


def plain_file(directory: str | os.PathLike, name: str) -> Path:
    """Return the path of the file `name` that lies in `directory`.

    A symbolic link may point only to a file in the same directory or, where the directory is a
    snapshot in a Hugging Face cache, to the blobs of that cache.

    Raises:
        FileNotFoundError: there is no such plain file.
        ValueError: name is not a bare file name, or the file is elsewhere.
    """
    if not re.fullmatch(r"\w[\w.-]{0,199}", name, re.ASCII):
        raise ValueError(f"{directory}: want a bare file name, got {name!r:.200}")
    path = Path(directory) / name
    if not path.is_file():
        got = "something else" if os.path.lexists(path) else "nothing"
        raise FileNotFoundError(f"{path}: want a plain file, got {got}")
    home, real = Path(directory).resolve(), path.resolve()
    allowed = [home]
    for repo in home.parents:  # <cache>/models--<id>/snapshots/<revision>/...
        if repo.name.startswith("models--") and home.relative_to(repo).parts[0] == "snapshots":
            allowed.append(repo / "blobs")
            if re.fullmatch("[0-9a-f]{64}", real.name):  # the store that all models share
                allowed.append(repo.parent / "blobs" / real.name[:2])
    if real.parent not in allowed:
        raise ValueError(f"{path}: want a file inside {home}, got a link to {real}")
    return path


def read_json(directory: str | os.PathLike, name: str, kind: type = dict) -> Any:
    """Return the JSON in the file `name` of `directory`; see the two functions above."""
    path = plain_file(directory, name)
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path}: want at most {MAX_JSON_BYTES} bytes, got {size}")
    return parse_json(path.read_bytes(), str(path), kind)


@contextmanager
def staged(directory: Path) -> Iterator[Callable[[str, Iterable[bytes | memoryview]], None]]:
    """Write files under other names, and give them their own when the block ends.

    Yields `write(name, chunks)`. When anything in the block fails (a full disk, say), the old
    files are untouched and nothing is left behind. All files are on the disk before the first
    takes its place; they do so in the order they were written.
    """
    written: list[tuple[Path, Path]] = []

    def write(name: str, chunks: Iterable[bytes | memoryview]) -> None:
        # A random name: several processes may save the same model into one directory.
        temporary = directory / f".{name}.{secrets.token_hex(8)}.tmp"
        written.append((temporary, directory / name))
        with open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    try:
        yield write
        for temporary, final in written:
            os.replace(temporary, final)
        with suppress(OSError):  # not every system and file system can do this to a directory
            handle = os.open(directory, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)


def hold(path: Path) -> BinaryIO | None:
    """Hold a file, made if need be, so that no other process can while this one lives.

    Returns:
        The file: close it to let it go. None where the system or file system knows no such locks.

    Raises:
        OSError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = open(path, "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise OSError(f"{path.parent}: another run is working there") from None
    except OSError:
        file.close()
        return None
    _held.add(file)
    return file


def _let_go() -> None:
    """In a forked process, which would hold a file for longer than its parent lives."""
    for file in _held:
        file.close()


_held: weakref.WeakSet[BinaryIO] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def find_directory(
    name_or_path: str | os.PathLike,
    patterns: Iterable[str],
    *,
    subfolder: str = "",
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return the local directory of a model; files of a model on the hub are downloaded.

    Args:
        name_or_path: a directory, or the id of a model on the Hugging Face hub.
        patterns: names of the files to download, with `*`.
        subfolder: of the directory or repository.
        revision: branch, tag or commit on the hub.
        cache_dir: the hub's cache; None: its default.
        token: for private models on the hub.
        local_files_only: take what the cache has, ask nobody.
        force_download: download again what the cache has.

    Raises:
        FileNotFoundError: a path that does not exist.
        NotADirectoryError: a path to a file.
        ImportError: an id, and huggingface_hub is not installed.
        OSError: an id, and the hub cannot be reached or does not have it.
    """
    path = Path(name_or_path, subfolder)
    named = os.fspath(name_or_path) != ""  # Path("") is the current directory
    if named and path.is_dir():
        return path
    if named and path.exists():
        raise NotADirectoryError(f"{path}: want a directory, got a file")
    is_id = isinstance(name_or_path, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name_or_path)
    if not is_id or Path(name_or_path).exists():
        raise FileNotFoundError(f"{path if named else repr('')}: want a directory, got nothing")
    message = f"{name_or_path}: want a directory or the id of a model on the hub; no such directory"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(f"{message}, and ids need `pip install huggingface_hub`") from error
    try:
        found = snapshot_download(
            name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=[f"{subfolder}/{p}" if subfolder else p for p in patterns],
        )
    except Exception as error:  # of the hub's own classes, and of its HTTP library's
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise OSError(f"{message}, and the hub gives {reason}") from error
    return Path(found, subfolder)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, which is 8 bytes of length, a JSON header, data without gaps.

    The tensors are ordinary memory of their own. A mapped file would come cheaper, but a model
    would change, or die of SIGBUS, when another program writes to the file later.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < (need := start if size >= 8 else 8):
            raise ValueError(f"{path}: truncated: want at least {need} bytes, got {size}")
        if start - 8 > MAX_JSON_BYTES:
            raise ValueError(f"{path}: want a header below {MAX_JSON_BYTES} bytes, got {start - 8}")
        raw = file.read(start - 8)
        if raw[:1] != b"{":
            raise ValueError(f"{path}: header: want a JSON object, got {raw[:20]!r}")
        header = parse_json(raw, f"{path}: header")
        header.pop("__metadata__", None)
        entries = [_entry(f"{path}: {name:.200}", entry) for name, entry in header.items()]
        order = sorted(zip(entries, header, strict=True), key=lambda e: e[0][:2])
        end = 0
        for (first, last, _, _), name in order:
            if first != end:
                raise ValueError(f"{path}: {name:.200}: want data from byte {end}, got {first}")
            end = last
        if start + end != size:
            kind = "truncated: " if start + end > size else ""
            raise ValueError(f"{path}: {kind}want {start + end} bytes, got {size}")
        tensors = {}
        for (first, last, dtype, shape), name in order:
            tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
            if (got := file.readinto(_bytes(tensors[name]))) != last - first:
                raise ValueError(f"{path}: {name:.200}: want {last - first} bytes, got {got}")
    return tensors


def safetensors_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file; one tensor at a time is copied to main memory."""
    # The widest first, so that each is aligned to its own size.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        t, first = tensors[name], end
        end += t.numel() * t.dtype.itemsize
        header[name] = {
            "dtype": CODE_OF[t.dtype],
            "shape": [*t.shape],
            "data_offsets": [first, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield _bytes(tensors[name].detach().cpu().contiguous())


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of torch.save that holds nothing but a dict of them.

    Raises:
        NotImplementedError: torch is older than 2.10.
    """
    if torch.__version__ < (2, 10):
        raise NotImplementedError(
            f"{path}: want torch >= 2.10 to read pickled weights safely (CVE-2026-24747), got "
            f"{torch.__version__}; convert the file to safetensors"
        )
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(len(_MAGIC))
    if not head.startswith(_ZIP) and head != _MAGIC:
        raise ValueError(f"{path}: want a file of torch.save, got one that begins with {head!r}")
    try:
        if head.startswith(_ZIP):
            with zipfile.ZipFile(path) as archive:
                records = archive.infolist()
            # torch.save compresses nothing: a compressed or repeated record would be a bomb.
            if any(r.compress_type for r in records) or sum(r.file_size for r in records) > size:
                raise ValueError("a zip archive with compressed or overlapping records")
        # Not mapped, for the reason given in read_safetensors.
        got = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader has no class of its own for what it refuses
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.500}"
        raise ValueError(f"{path}: want tensors in a safe pickle, got {reason}") from error
    if not isinstance(got, dict):
        raise ValueError(f"{path}: want a dict of tensors, got {type(got).__name__}")
    tensors = {}
    for name, value in got.items():
        if (
            not isinstance(name, str)
            or type(value) not in (Tensor, torch.nn.Parameter)
            or value.device.type != "cpu"
            or value.layout != torch.strided
            or value.dtype not in CODE_OF
            # Strides of 0 would make a tensor of any size out of a few bytes.
            or value.nbytes > value.untyped_storage().nbytes()
        ):
            kind = f"{type(value).__name__} {getattr(value, 'dtype', '')}"
            raise ValueError(f"{path}: want dense tensors by name, got {name!r:.200}: {kind}")
        tensors[name] = value.detach()
    return tensors


def _entry(where: str, entry: Any) -> tuple[int, int, torch.dtype, list[int]]:
    """Check the header of one tensor: first byte, end, dtype, shape."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        want = "an object with dtype, shape and data_offsets"
        raise ValueError(f"{where}: want {want}, got {entry!r:.200}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in CODES:
        raise ValueError(f"{where}: dtype: want one of {', '.join(CODES)}, got {code!r:.200}")
    for what, ints, most in (("shape", shape, 8), ("data_offsets", offsets, 2)):
        fits = isinstance(ints, list) and len(ints) <= most
        if not fits or any(type(n) is not int or not 0 <= n < 2**60 for n in ints):
            raise ValueError(f"{where}: {what}: want {most} ints at most, got {ints!r:.200}")
    # torch multiplies the sizes in 64 bits, also where one of them is 0.
    if math.prod(max(n, 1) for n in shape) >= 2**60 or len(offsets) != 2:
        raise ValueError(f"{where}: want a shape in memory, 2 offsets, got {shape}, {offsets}")
    want, got = math.prod(shape) * CODES[code].itemsize, offsets[1] - offsets[0]
    if want != got:
        raise ValueError(f"{where}: want {want} bytes for {code} {shape}, got {got}")
    return *offsets, CODES[code], shape


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
