"""Loading runs nothing and opens nothing outside the directory, whatever the files hold.

The corpus is loaded in a process of its own under an audit hook. The same hook must see what a
bare pickle does, or the test fails.
"""

import builtins
import copy
import io
import json
import os
import pickle
import random
import runpy
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile

import pytest
import safetensors.torch
import torch

from bert_fast.checkpoint import save_tensors
from bert_fast.config import BertConfig

GOOD = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.arange(5, dtype=torch.int64)}
WEIGHTS = safetensors.torch.save(GOOD)
CONFIG = b'{"model_type": "bert", "vocab_size": 11}'
REFUSALS = {"ValueError", "FileNotFoundError", "NotImplementedError"}

PROBE = """
import json, os, pickle, sys, warnings
from pathlib import Path
import torch
from bert_fast.checkpoint import locate, read_tensors
from bert_fast.config import BertConfig

root, directory, events = Path(sys.argv[1]), None, []
libraries = tuple({sys.prefix, sys.base_prefix, os.path.dirname(os.__file__)})
forbidden = (
    "exec compile import subprocess. os.system os.exec os.posix_spawn os.spawn os.fork pty. "
    "socket. urllib. http. pickle.find_class ctypes. code.__new__ marshal. shutil. tempfile. "
    "os.remove os.rename os.rmdir os.mkdir os.link os.symlink os.chmod os.chown os.truncate"
).split()

def hook(event, args):
    if directory is None:
        return
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if not path.startswith((str(directory) + "/", *libraries)):
            events.append(f"open {path}")
    elif event.startswith(tuple(forbidden)):
        events.append(f"{event} {args!r:.80}")

def load(path):
    BertConfig.from_pretrained(locate(path)).validate()
    return sum(t.nbytes for t in read_tensors(path).values())

def kilobytes(key):
    return int(Path("/proc/self/status").read_text().partition(key + ":")[2].split()[0])

warnings.simplefilter("ignore")
b"\\x80".decode("cp437")  # zipfile's; what is imported late is imported here
for path in (root / "sound").iterdir():
    load(path)
sys.addaudithook(hook)
before, cases = kilobytes("VmRSS"), {}
for path in sorted((root / "cases").iterdir()):
    events, directory = [], path
    try:
        outcome, message = "loaded", load(path)
    except Exception as error:
        outcome, message = type(error).__name__, str(error)
    directory = None
    cases[path.name] = [outcome, message, events]
grown = kilobytes("VmHWM") - before
events, directory = [], root / "cases"
pickle.loads((root / "control").read_bytes())
directory = None
print(json.dumps({"cases": cases, "grown": grown, "control": events}))
"""


def run_probe(root):
    """Load everything under root/cases; return name -> (outcome, message)."""
    canary, control = root / "canary", root / "control_canary"
    (root / "control").write_bytes(pickle.dumps(Does(os.system, f"touch {control}")))
    (root / "sound").mkdir()
    put(root / "sound/safetensors", {"model.safetensors": WEIGHTS})
    put(root / "sound/zip", {"pytorch_model.bin": zipped(GOOD)})
    put(root / "sound/legacy", {"pytorch_model.bin": legacy(GOOD)})
    save_tensors(root / "sound/ours", GOOD, config=BertConfig(vocab_size=11), max_shard_size=1)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, root], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert control.exists() and any("pickle.find_class" in e for e in report["control"])
    assert any(e.startswith("os.system") for e in report["control"])
    assert not canary.exists()
    assert {n: events for n, (_, _, events) in report["cases"].items() if events} == {}
    assert report["grown"] < 100 * 1024  # kB; the bombs would take more
    assert len(report["cases"]) == len(list((root / "cases").iterdir()))
    return {name: (outcome, message) for name, (outcome, message, _) in report["cases"].items()}


def put(directory, files):
    directory.mkdir()
    for name, raw in {"config.json": CONFIG, **files}.items():
        (directory / name).write_bytes(raw)
    return directory


def refused(root, results):
    for name, (outcome, message) in results.items():
        assert outcome in REFUSALS, (name, outcome, message)
        assert str(root / "cases" / name) in message and len(message) < 2000, name


# --- pickles -------------------------------------------------------------------------------------


class Does:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def zipped(value):
    torch.save(value, out := io.BytesIO())
    return out.getvalue()


def legacy(value):
    torch.save(value, out := io.BytesIO(), _use_new_zipfile_serialization=False)
    return out.getvalue()


def archive(records, **options):
    with zipfile.ZipFile(out := io.BytesIO(), "w", **options) as file:
        for name, raw in records.items():
            file.writestr(name, raw)
    return out.getvalue()


def rewritten(raw, change):
    """A zip archive with its records changed."""
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        return archive({name: change(file.read(name)) for name in file.namelist()})


def overlapping():
    """Ten thousand records of 1 MB, all of them the same bytes."""
    with zipfile.ZipFile(out := io.BytesIO(), "w") as file:
        file.writestr("archive/data/0", bytes(2**20))
        file.writestr("archive/data.pkl", pickle.dumps({}))
        for i in range(1, 10_000):
            again = copy.copy(file.filelist[0])
            again.filename = f"archive/data/{i}"
            file.filelist.append(again)
    return out.getvalue()


def tarred(value):
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            raw = pickle.dumps(value)
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            file.addfile(info, io.BytesIO(raw))
    return out.getvalue()


def claims(raw):
    """The same file with 80000 elements promised in place of 70000."""
    return raw.replace(struct.pack("<i", 70_000), struct.pack("<i", 80_000))


def pickles(root):
    canary, script = str(root / "canary"), root / "script.py"
    script.write_text(f"open({canary!r}, 'w')")
    calls = {
        "system": (os.system, f"touch {canary}"),
        "popen": (subprocess.Popen, ["touch", canary]),
        "exec": (builtins.exec, f"open({canary!r}, 'w')"),
        "eval": (builtins.eval, f"open({canary!r}, 'w')"),
        "open": (builtins.open, canary, "w"),
        "copy": (shutil.copy, str(script), canary),
        "import": (builtins.__import__, "antigravity"),
        "runpy": (runpy.run_path, str(script)),
        "socket": (socket.create_connection, ("127.0.0.1", 9)),
        "torch_save": (torch.save, [], canary),
        "torch_load": (torch.load, str(root / "control"), None, None),
    }
    cases = {}
    for name, call in calls.items():
        does = Does(*call)
        cases |= {
            f"{name}_raw0": pickle.dumps(does, protocol=0),
            f"{name}_raw4": pickle.dumps({"a": does}, protocol=4),
            f"{name}_zip": zipped({"a": torch.ones(2), "b": does}),
            f"{name}_legacy": legacy({"a": torch.ones(2), "b": does}),
            f"{name}_deep": zipped({"a": {"b": [(does,)]}}),
            f"{name}_top": zipped(does),
        }
    does, good = Does(*calls["system"]), zipped(GOOD)
    many = {"a": torch.zeros(70_000, dtype=torch.uint8)}
    with zipfile.ZipFile(io.BytesIO(good)) as file:
        records = {name: file.read(name) for name in file.namelist()}
    big = {name: bytes(3 * 10**8) if "/data/0" in name else r for name, r in records.items()}
    scripted = {"a/data.pkl": pickle.dumps(does), "a/constants.pkl": pickle.dumps(does)}
    quantized = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)
    cases |= {
        "tar": tarred(does),
        "script": archive(scripted | {"a/version": b"3\n"}),
        "bomb": archive(big, compression=zipfile.ZIP_DEFLATED),
        "overlapping": overlapping(),
        "no_data": archive({"archive/version": b"3\n"}),
        "claims_zip": rewritten(zipped(many), claims),
        "claims_legacy": claims(legacy(many)),
        "huge_view": zipped({"a": torch.ones(1).expand(2**40)}),
        "huge_view_legacy": legacy({"a": torch.ones(1).expand(2**40)}),
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "text": b"<!DOCTYPE html><html>Not found</html>",
        "safetensors": WEIGHTS,
        "tensor": zipped(torch.ones(2)),
        "list": zipped([torch.ones(2)]),
        "nested": zipped({"state_dict": {"a": torch.ones(2)}}),
        "text_value": zipped({"a": torch.ones(2), "b": "text"}),
        "number_key": zipped({0: torch.ones(2)}),
        "sparse": zipped({"a": torch.ones(2, 2).to_sparse()}),
        "complex": zipped({"a": torch.ones(2, dtype=torch.complex64)}),
        "float8": zipped({"a": torch.ones(2).to(torch.float8_e4m3fn)}),
        "quantized": zipped({"a": quantized}),
        "meta": zipped({"a": torch.ones(2, device="meta")}),
        "nonfinite": zipped({"a": torch.tensor([float("nan")])}),
    }
    return cases


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch calls some of these kinds deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pickles(tmp_path):
    (tmp_path / "cases").mkdir()
    for name, raw in pickles(tmp_path).items():
        put(tmp_path / "cases" / name, {"pytorch_model.bin": raw})
    results = run_probe(tmp_path)
    assert len(results) >= 65
    refused(tmp_path, results)
    for name, text in (("bomb", "compressed"), ("overlapping", "overlapping"), ("text", "DOCTYPE")):
        assert text in results[name][1]


# --- paths ---------------------------------------------------------------------------------------


def test_paths(tmp_path):
    """By an index, by links and by what is no file."""
    cases, outside = tmp_path / "cases", tmp_path / "outside"
    cases.mkdir()
    put(outside, {"model.safetensors": WEIGHTS, "pytorch_model.bin": zipped(GOOD)})
    names = [
        *("../../outside/model.safetensors", f"{outside}/model.safetensors", "~/a.safetensors"),
        *("..\\..\\outside\\model.safetensors", "sub/../../../outside/model.safetensors"),
        *("./model-x.safetensors", "sub/model.safetensors", "linked/model.safetensors"),
        *("link.safetensors", "folder.safetensors", "missing.safetensors", "file:///a.safetensors"),
        *("a\0.safetensors", "a.safetensors\n", "mod\u00e9l.safetensors", ".safetensors"),
        *("..", "", "x" * 300 + ".safetensors", None, ["model-x.safetensors"]),
    ]
    for number, name in enumerate(names):
        index = json.dumps({"weight_map": dict.fromkeys(GOOD, name)}).encode()
        directory = put(cases / f"index{number}", {"model.safetensors.index.json": index})
        put(directory / "sub", {"model.safetensors": WEIGHTS})
        (directory / "link.safetensors").symlink_to(outside / "model.safetensors")
        (directory / "linked").symlink_to(outside)
        (directory / "folder.safetensors").mkdir()
    for name in ("model.safetensors", "config.json", "pytorch_model.bin"):
        files = {} if name == "pytorch_model.bin" else {"model.safetensors": WEIGHTS}
        for kind in ("link", "pipe", "folder", "loop", "device"):
            directory = put(cases / f"{kind}_{name}", files)
            (directory / name).unlink(missing_ok=True)
            if kind == "pipe":
                os.mkfifo(directory / name)
            elif kind == "folder":
                (directory / name).mkdir()
            else:
                target = {"link": outside / name, "loop": name, "device": "/dev/zero"}[kind]
                (directory / name).symlink_to(target)
    for name in ("bert_fast.json", "model.safetensors.index.json"):
        directory = put(cases / f"link_{name}", {})
        (directory / name).symlink_to(outside / "config.json")
    results = run_probe(tmp_path)
    assert len(results) >= 12 + 3 * 5
    refused(tmp_path, results)


# --- configurations ------------------------------------------------------------------------------

IGNORED = (
    "auto_map trust_remote_code _attn_implementation _attn_implementation_internal "
    "attn_implementation _experts_implementation custom_pipelines quantization_config "
    "tokenizer_class __class__ __init__ _name_or_path"
).split()
WRONG = {
    "decoder": b'{"is_decoder": true}',
    "dtype": b'{"dtype": "load"}',
    "torch_dtype": b'{"torch_dtype": "hub.load"}',
    "act": b"{\"hidden_act\": \"__import__('os').system('true')\"}",
    "act_object": b'{"hidden_act": {"py/reduce": ["os.system"]}}',
    "model_type": b'{"model_type": "evil"}',
    "labels": b'{"num_labels": 1000000000000}',
    "label_map": b'{"id2label": {"0": {"a": 1}}}',
    "layers": b'{"num_hidden_layers": 1000000000}',
    "size": b'{"hidden_size": 9223372036854775808}',
    "digits": b'{"hidden_size": ' + b"9" * 5000 + b"}",
    "infinite": b'{"layer_norm_eps": 1e999}',
    "nan": b'{"layer_norm_eps": NaN}',
    "special": b'{"layer_norm_eps": {"__float__": "NaN"}}',
    "twice": b'{"vocab_size": 11, "vocab_size": 12}',
    "deep": b'{"a":' * 100_000,
    "list": b"[]",
    "empty": b"",
    "latin": b'{"a": "\xe9"}',
    "bom": b"\xef\xbb\xbf{}",
    "utf16": '{"vocab_size": 11}'.encode("utf-16"),
    "pickle": pickle.dumps({}),
    "yaml": b"!!python/object/apply:os.system ['true']",
}


def test_configurations(tmp_path):
    (tmp_path / "cases").mkdir()
    ignored = {
        f"ignored{key}": json.dumps({key: {"evil": "evil.Evil"}}).encode() for key in IGNORED
    }
    for name, raw in (ignored | WRONG).items():
        put(tmp_path / "cases" / name, {"model.safetensors": WEIGHTS, "config.json": raw})
    results = run_probe(tmp_path)
    assert len(results) >= 25
    for name in ignored:
        assert results.pop(name)[0] == "loaded", name
    refused(tmp_path, {name: result for name, result in results.items() if name != "decoder"})
    assert results["decoder"][0] == "NotImplementedError"


# --- headers of safetensors ----------------------------------------------------------------------


def framed(header, data=bytes(48)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(**fields):
    return {"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]} | fields}


HEADERS = {
    **{f"length{n}": struct.pack("<Q", n) + WEIGHTS[8:] for n in (0, 1, 10**6, 2**63, 2**64 - 1)},
    **{f"dtype{i}": framed(tensor(dtype=d)) for i, d in enumerate(("F4", "C64", None, ["F32"], 5))},
    **{
        f"shape{i}": framed(tensor(shape=s))
        for i, s in enumerate(
            ([3, -4], [-3, -4], [12.0], ["12"], [True, 12], 12, None, [2**62, 4], [1] * 9, [11])
        )
    },
    **{
        f"offsets{i}": framed(tensor(data_offsets=o))
        for i, o in enumerate(
            ([48, 0], [0, 49], [1, 49], [-48, 0], [0, 2**70], [0], [0, 48, 48], ["0", "48"], None)
        )
    },
    "zero": framed(tensor(shape=[0, 2**40, 2**40], data_offsets=[0, 0]), b""),
    "dimensions": framed(tensor(shape=[1] * 10**5, data_offsets=[0, 4]), bytes(4)),
    "overlap": framed(tensor() | {"b": tensor(data_offsets=[0, 48])["a"]}),
    "gap": framed(tensor() | {"b": tensor(data_offsets=[52, 100])["a"]}, bytes(100)),
    "after": framed(tensor(), bytes(49)),
    "before": framed(tensor(), bytes(47)),
    "fields": framed(tensor(more=1)),
    "less": framed({"a": {"dtype": "F32"}}),
    "flat": framed({"a": [0, 48]}),
    "list": framed([tensor()]),
    "twice": framed(json.dumps(tensor()).encode()[:-1] + b"," + json.dumps(tensor()).encode()[1:]),
    "space": framed(b" " + json.dumps(tensor()).encode()),
    "nan": framed(b'{"a": NaN}'),
    "deep": framed(b'{"a":' * 10**5),
    "latin": framed(b'{"\xe9": {}}'),
    "pickle": zipped(GOOD),
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 440449768\n",
}


def test_headers(tmp_path):
    (tmp_path / "cases").mkdir()
    for name, raw in HEADERS.items():
        put(tmp_path / "cases" / name, {"model.safetensors": raw})
    refused(tmp_path, run_probe(tmp_path))


def mutated(raw, rng):
    length = struct.unpack("<Q", raw[:8])[0]
    text, data = bytearray(raw[8 : 8 + length]), raw[8 + length :]
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(text))
        end = min(len(text), start + rng.randint(1, 12))
        kind = rng.randrange(5)
        if kind == 0:
            text[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del text[start:end]
        elif kind == 2:
            text[start:start] = text[start:end]
        elif kind == 3:
            text[start:end] = rng.choice(
                [b"-1", b"9" * 19, b"0", b"[]", b"{}", b"null", b'"', b"1e9"]
            )
        else:
            text[start:end] = rng.randbytes(end - start)
        text = text or bytearray(b"{")
    if rng.random() < 0.1:
        length = rng.choice([0, length, 2**40, 2**64 - 1])
        return struct.pack("<Q", length) + bytes(text) + data
    return framed(bytes(text), data)


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.long)])
def test_mutated_headers(tmp_path, count):
    rng = random.Random(0)
    (tmp_path / "cases").mkdir()
    for i in range(count):
        put(tmp_path / "cases" / f"{i:05}", {"model.safetensors": mutated(WEIGHTS, rng)})
    results = run_probe(tmp_path)
    loaded = {name: result for name, result in results.items() if result[0] == "loaded"}
    assert len(loaded) < count / 4  # another letter in a name, say
    assert all(size <= len(WEIGHTS) for _, size in loaded.values())
    refused(tmp_path, {name: result for name, result in results.items() if name not in loaded})
