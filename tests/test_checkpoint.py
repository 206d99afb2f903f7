"""Reading, matching and writing weights; what lies in a directory is checked before it is used."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from bert_fast.checkpoint import checkpoint_dtype, locate, match, read_tensors, save_tensors
from bert_fast.config import BertConfig

SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 6,
}
WORDS, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
BIAS, DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"
TIED = {DECODER: WORDS, DECODER_BIAS: BIAS}


def is_head(name):
    return not name.removeprefix("bert.").startswith(("embeddings.", "encoder."))


def state(name="BertForPreTraining", **fields):
    """A state dict of transformers with every tensor random; tied names share theirs."""
    model = getattr(transformers, name)(transformers.BertConfig(**SIZES | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3)
    return model.state_dict()


def plain(tensors):
    """The same without the second names of shared tensors, as files have it."""
    return {name: t.clone() for name, t in tensors.items() if name not in TIED}


def save(directory, tensors=None, **options):
    config = BertConfig(**SIZES | options.pop("fields", {}))
    tensors = state() if tensors is None else tensors
    save_tensors(directory, tensors, config=config, **options)
    return tensors


def equal(found, want):
    return found.keys() == want.keys() and all(torch.equal(found[n], want[n]) for n in want)


def contents(directory):
    return {p.name: p.read_bytes() for p in Path(directory).iterdir()}


# --- reading -------------------------------------------------------------------------------------

HEADS = {
    "": "BertForPreTraining",
    "qa": "BertForQuestionAnswering",
    "seqcls": "BertForSequenceClassification",
    "tokcls": "BertForTokenClassification",
}


@pytest.mark.parametrize(("folder", "name"), HEADS.items())
def test_real_safetensors(shared, folder, name):
    directory = locate(shared / "data/ckpt/hf_tiny_generated", subfolder=folder)
    config = transformers.BertConfig.from_pretrained(directory)
    found = read_tensors(directory)
    assert equal(found, safetensors.torch.load_file(directory / "model.safetensors"))
    assert checkpoint_dtype(found) == torch.float32
    wanted = getattr(transformers, name)(config).state_dict()
    tied = TIED if folder == "" else {}
    got = match(found, wanted, tied=tied, new_allowed=lambda name: False, strict=True)
    assert got.tensors.keys() | got.tied.keys() == wanted.keys()
    assert got.new == got.unexpected == got.untied == [] and got.tied == tied


def test_real_pickle(shared, tmp_path):
    source = shared / "data/ckpt/hf_tiny_generated"
    shutil.copy(source / "pytorch_model.bin", tmp_path)
    found, want = read_tensors(tmp_path), read_tensors(source)
    assert found.keys() - want.keys() == TIED.keys() and equal({n: found[n] for n in want}, want)
    got = match(found, found, tied=TIED, new_allowed=is_head, strict=True)
    assert got.tied == TIED and got.tensors.keys() == want.keys()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_both_forms(tmp_path, zipped):
    want = state()
    torch.save(want, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert equal(read_tensors(tmp_path), want)
    torch.save([*want.values()], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: want a dict of tensors, got list"):
        read_tensors(tmp_path)


def test_old_torch_reads_no_pickles(tmp_path, monkeypatch):
    torch.save(state(), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    with pytest.raises(NotImplementedError, match=r"torch >= 2\.10 .* got 2\.9\.1"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_kept(tmp_path, dtype):
    want = {name: t.to(dtype) for name, t in plain(state()).items()}
    mixed = {"bert.embeddings.position_ids": torch.arange(6)[None], **want}
    safetensors.torch.save_file(mixed, tmp_path / "model.safetensors")
    found = read_tensors(tmp_path)
    assert equal(found, mixed) and checkpoint_dtype(found) == dtype
    save(tmp_path / "new", want)
    assert equal(read_tensors(tmp_path / "new"), want)
    with pytest.raises(ValueError, match="want a floating dtype, got none in 1"):
        checkpoint_dtype({"a": torch.arange(3)})


def test_order_of_preference(tmp_path):
    """Each kind alone is read; added to those before it, it is preferred."""
    writers = {".bin": torch.save, ".safetensors": safetensors.torch.save_file}
    for number, (stem, kind, indexed) in enumerate(
        (
            ("pytorch_model", ".bin", True),
            ("pytorch_model", ".bin", False),
            ("model", ".safetensors", True),
            ("model", ".safetensors", False),
        )
    ):
        folder, want = tmp_path / str(number), {"a": torch.full((2,), float(number))}
        folder.mkdir()
        file = f"{stem}-00001-of-00001{kind}" if indexed else stem + kind
        writers[kind](want, folder / file)
        if indexed:
            index = json.dumps({"metadata": {}, "weight_map": {"a": file}})
            (folder / f"{stem}{kind}.index.json").write_text(index)
        assert equal(read_tensors(folder), want)
        shutil.copytree(folder, tmp_path / "all", dirs_exist_ok=True)
        assert equal(read_tensors(tmp_path / "all"), want)


def test_nothing_there(tmp_path):
    (tmp_path / "flax_model.msgpack").touch()
    with pytest.raises(FileNotFoundError) as error:
        read_tensors(tmp_path)
    for text in (
        "model.safetensors,",
        "model.safetensors.index.json",
        "pytorch_model.bin,",
        "flax",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nonfinite(tmp_path, bad, dtype):
    want = {name: t.to(dtype) for name, t in plain(state()).items()}
    names = [WORDS, "cls.seq_relationship.bias"]
    for name in names:
        want[name].view(-1)[-1] = bad
    save(tmp_path, want)
    with pytest.raises(ValueError) as error:
        read_tensors(tmp_path)
    for text in (str(tmp_path / "model.safetensors"), "allow_nonfinite", *names):
        assert text in str(error.value)
    assert "pooler" not in str(error.value)
    found = read_tensors(tmp_path, allow_nonfinite=True)
    assert found[WORDS].isfinite().sum() == want[WORDS].numel() - 1
    got = match(found | {DECODER: found[WORDS].clone()}, state(), tied=TIED, new_allowed=is_head)
    assert got.untied == []  # NaN is the same NaN


def test_tensors_outlive_and_leave_the_file(tmp_path):
    """Loaded weights do not change with the file, nor the file with them."""
    want = save(tmp_path)
    found = read_tensors(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    found[BIAS].add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * len(before))
    os.truncate(tmp_path / "model.safetensors", 0)
    assert torch.equal(found[WORDS], want[WORDS])
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in found.values())


# --- the index -----------------------------------------------------------------------------------


def sharded(directory):
    """Three shards as others write them: no manifest."""
    want = plain(state())
    save(directory, want, max_shard_size=1500)
    (directory / "bert_fast.json").unlink()
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 3
    return want, index


def put(directory, index):
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_index_lists_what_is_not_there(tmp_path):
    want, index = sharded(tmp_path)
    assert equal(read_tensors(tmp_path), want)
    first, *_, last = sorted(p.name for p in tmp_path.glob("model-*"))
    wrong = index["weight_map"] | {WORDS: last}
    put(tmp_path, {"weight_map": wrong})
    with pytest.raises(ValueError, match=rf"{first}.*beside them {WORDS}"):
        read_tensors(tmp_path)
    put(tmp_path, {"weight_map": index["weight_map"] | {"more": first}})
    with pytest.raises(ValueError, match=rf"{first}.*got none for more, beside them nothing"):
        read_tensors(tmp_path)
    del index["weight_map"][WORDS]
    put(tmp_path, index)
    with pytest.raises(ValueError, match=f"beside them {WORDS}"):
        read_tensors(tmp_path)
    put(tmp_path, {"weight_map": wrong | {"x": "model-00009-of-00009.safetensors"}})
    with pytest.raises(FileNotFoundError, match=r"model-00009-of-00009\.safetensors"):
        read_tensors(tmp_path)
    for bad in ({}, [], None, "model.safetensors"):
        put(tmp_path, {"weight_map": bad})
        with pytest.raises(ValueError, match="weight_map: want a map"):
            read_tensors(tmp_path)


def test_index_does_not_lead_to_a_pickle(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    put(tmp_path, {"weight_map": {"a": "pytorch_model.bin"}})
    with pytest.raises(ValueError, match=r"name of a \.safetensors file, got 'pytorch_model\.bin'"):
        read_tensors(tmp_path)


# --- matching ------------------------------------------------------------------------------------


def fit(found, wanted=None, **options):
    wanted = state() if wanted is None else wanted
    return match(found, wanted, **{"tied": TIED, "new_allowed": is_head} | options)


AGES = {"weight": "gamma", "bias": "beta"}


def test_names_of_all_ages():
    """LayerNorm's gamma and beta, buffers, and `bert.` or not, in either direction."""
    want = plain(state())
    old = {
        re.sub(r"(?<=LayerNorm\.)\w+", lambda m: AGES[m[0]], name): t for name, t in want.items()
    }
    assert sum("gamma" in name for name in old) == 4
    old["bert.embeddings.position_ids"] = torch.arange(6)
    got = fit(old, strict=True)
    assert equal(got.tensors, want) and list(got.tensors) == [n for n in state() if n not in TIED]
    bare = {name.removeprefix("bert."): t for name, t in old.items()}
    assert equal(fit(bare, strict=True).tensors, want)
    encoder = {n.removeprefix("bert."): t for n, t in want.items() if n.startswith("bert.")}
    for file in (old, bare, encoder):
        got = fit(file, encoder, tied={})
        assert equal(got.tensors, encoder) and got.new == []
        assert {n.split(".")[0] for n in got.unexpected} == (
            {"cls"} if file is not encoder else set()
        )
    with pytest.raises(ValueError, match=f"{WORDS} and embeddings.word_embeddings.weight"):
        fit(want | {"embeddings.word_embeddings.weight": want[WORDS]})


def test_missing_new_and_unexpected():
    want, encoder = plain(state()), "bert.encoder.layer.0.attention.self.query.weight"
    part = {n: t for n, t in want.items() if "pooler" not in n and n != BIAS}
    got = fit(part | {"qa_outputs.weight": torch.ones(2, 8)})
    assert got.new == ["bert.pooler.dense.weight", "bert.pooler.dense.bias", BIAS]
    assert got.unexpected == ["qa_outputs.weight"] and equal(got.tensors, part)
    with pytest.raises(ValueError, match=r"strict.*none for bert.pooler.dense.bias.*nothing"):
        fit({n: t for n, t in want.items() if "pooler" not in n}, strict=True)
    with pytest.raises(ValueError, match=r"here: strict.*none for nothing, beside them more"):
        fit(want | {"more": torch.ones(1)}, strict=True, source="here")
    with pytest.raises(ValueError, match=rf"want every encoder weight.*{encoder}"):
        fit({n: t for n, t in want.items() if n not in (encoder, BIAS)})
    deeper = state(num_hidden_layers=2)
    with pytest.raises(ValueError) as error:
        fit(want, deeper)
    assert all(name in str(error.value) for name in deeper if "layer.1." in name)
    with pytest.raises(TypeError, match=f"{WORDS}: want a floating dtype, got torch.int8"):
        fit(want | {WORDS: torch.ones(11, 8, dtype=torch.int8)})


def test_tied_and_untied():
    want = plain(state())
    other = torch.randn_like(want[WORDS])
    for more in ({}, {DECODER: want[WORDS].clone(), DECODER_BIAS: want[BIAS]}):
        got = fit(want | more)
        assert got.tied == TIED and got.untied == [] and equal(got.tensors, want)
    got = fit(want | {DECODER: other})
    assert got.untied == [DECODER] and got.tied == {DECODER_BIAS: BIAS}
    assert equal(got.tensors, want | {DECODER: other})
    second = want | {DECODER: want[WORDS], DECODER_BIAS: want[BIAS]}
    del second[WORDS], second[BIAS]  # the file kept the other name
    assert equal(fit(second, strict=True).tensors, want)
    got = fit(want, tied={})  # the configuration ties nothing
    assert got.new == [DECODER, DECODER_BIAS] and got.tied == {}


def test_other_shapes():
    want = plain(state())
    for field, name in (
        ("vocab_size", "word"),
        ("max_position_embeddings", "position"),
        ("type_vocab_size", "token_type"),
    ):
        with pytest.raises(ValueError) as error:
            fit(want, state(**{field: 20}), source="/some/where")
        rows = want[f"bert.embeddings.{name}_embeddings.weight"].shape[0]
        for text in (
            "/some/where",
            "config.json",
            f"bert.embeddings.{name}_embeddings.weight: want [20, 8], got [{rows}, 8]",
            f"{field}: the configuration says 20, the file has {rows}",
        ):
            assert text in str(error.value)
    with pytest.raises(ValueError, match=r"query\.weight: want \[12, 12\], got \[8, 8\]"):
        fit(want, state(hidden_size=12))
    head = state("BertForSequenceClassification", num_labels=3)
    found = head | {"classifier.weight": torch.ones(2, 8), "classifier.bias": torch.ones(2)}
    with pytest.raises(ValueError, match=r"classifier\.weight: want \[3, 8\], got \[2, 8\]"):
        fit(found, head, tied={})
    got = fit(found, head, tied={}, ignore_mismatched_sizes=True)
    assert got.new == ["classifier.weight", "classifier.bias"]
    assert got.mismatched == {
        "classifier.weight": ((2, 8), (3, 8)),
        "classifier.bias": ((2,), (3,)),
    }
    assert got.tensors.keys() == head.keys() - got.mismatched.keys()
    with pytest.raises(ValueError, match="vocab_size: the configuration says 20"):
        fit(want, state(vocab_size=20), ignore_mismatched_sizes=True)  # heads only


def test_shapes_and_meta_tensors_will_do():
    tensors = plain(state())
    shapes = {name: tuple(t.shape) for name, t in state().items()}
    with torch.device("meta"):
        meta = transformers.BertForPreTraining(transformers.BertConfig(**SIZES)).state_dict()
    assert equal(fit(tensors, shapes).tensors, tensors)
    assert equal(fit(tensors, meta).tensors, tensors)


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", 1500, "2KB", 1])
def test_round_trip(tmp_path, shard):
    want = save(tmp_path, max_shard_size=shard)
    found = read_tensors(tmp_path)
    assert equal(found, plain(want))
    weights = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert (weights == ["model.safetensors"]) == (shard == "5GB")
    for name in weights:
        with safetensors.safe_open(tmp_path / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        raw = (tmp_path / name).read_bytes()
        data = len(raw) - 8 - int.from_bytes(raw[:8], "little")
        assert data <= {"5GB": 10**6, 1500: 1500, "2KB": 2000, 1: 12 * 8 * 4}[shard]
    theirs, info = transformers.BertForPreTraining.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()) and equal(theirs.state_dict(), want)
    assert BertConfig.from_pretrained(tmp_path) == BertConfig(**SIZES)


def test_same_bytes_as_the_library(tmp_path):
    """One dtype in name order: what safetensors writes."""
    tensors = dict(sorted(plain(state()).items()))
    save(tmp_path, tensors)
    expected = safetensors.torch.save(tensors, metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == expected


def test_any_layout_and_shape(tmp_path):
    base = torch.randn(6, 8)
    want = {
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(5, 8),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "byte": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(3).half(),
        "flag": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(base),
    }
    save(tmp_path, want)
    found = read_tensors(tmp_path)
    assert equal(found, want)
    assert equal(safetensors.torch.load_file(tmp_path / "model.safetensors"), want)
    raw = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8:start]).items():
        if name in want:  # aligned, for readers that map the file
            assert (start + entry["data_offsets"][0]) % want[name].itemsize == 0, name
    with pytest.raises(TypeError, match=r"c: want one of F64.*got torch\.complex64"):
        save(tmp_path, {"c": torch.ones(2, dtype=torch.complex64)})
    assert equal(read_tensors(tmp_path), want)


def test_untied_weights_are_all_written(tmp_path):
    shared_tensor = torch.randn(3, 4)
    two = {"a": shared_tensor, "b": shared_tensor, "c": shared_tensor[:2]}
    save(tmp_path, two)
    assert read_tensors(tmp_path).keys() == {"a", "c"}
    save(tmp_path, two, fields={"tie_word_embeddings": False})
    assert read_tensors(tmp_path).keys() == {"a", "b", "c"}


@pytest.mark.parametrize("bad", [0, -5, "5 XB", "", "GB", 1.5, None])
def test_bad_shard_size(tmp_path, bad):
    with pytest.raises(ValueError, match=r"max_shard_size: want bytes .*got"):
        save(tmp_path, max_shard_size=bad)
    assert contents(tmp_path) == {}


def test_refused_saves_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="tensors: want at least one"):
        save(tmp_path / "a", {})
    with pytest.raises(ValueError, match="hidden_size"):
        save(tmp_path / "b", fields={"hidden_size": 0})
    with pytest.raises(NotImplementedError, match="is_decoder"):
        save(tmp_path / "c", fields={"is_decoder": True})
    assert list(tmp_path.iterdir()) == []
