"""Checkpoints of every age into today's files; what is there is not lost on the way."""

import builtins
import errno
import json
import os
import re

import pytest
import torch
import transformers
from against_transformers import CLASSES, pair
from convert_cases import contents, google, opened, same_outputs

import bert_fast
from bert_fast.checkpoint import read_tensors, save_tensors
from bert_fast.config import BertConfig
from bert_fast.convert import legacy_names, to_hf
from bert_fast.names import as_saved, bare, from_google, is_buffer, is_optimizer, present

AGES = {"weight": "gamma", "bias": "beta"}
CONVERSIONS = {"to_hf": to_hf, "legacy_names": legacy_names}


def older(state, module="module.", prefix=None):
    """The names of pytorch-pretrained-bert in DataParallel, with a buffer."""
    found = {
        re.sub(r"(?<=LayerNorm\.)\w+", lambda m: AGES[m[0]], name): t for name, t in state.items()
    }
    found["bert.embeddings.position_ids"] = torch.arange(40)[None]
    if prefix == "":
        found = {name.removeprefix("bert."): tensor for name, tensor in found.items()}
    return {module + name: tensor.clone() for name, tensor in found.items()}


def write(directory, name="BertForPreTraining", form="ours", **fields):
    """A source in one of the forms there are, and transformers' model with its weights."""
    theirs, ours = pair(name, **fields)
    directory.mkdir(parents=True)
    if form == "google":
        return google(directory, name)
    if form.startswith("ours"):
        ours.save_pretrained(directory, max_shard_size="20KB" if "sharded" in form else "5GB")
        assert (directory / "bert_fast.json").exists()
    elif form.startswith("theirs"):
        theirs.save_pretrained(directory, max_shard_size="20KB" if "sharded" in form else "5GB")
    else:
        state = theirs.state_dict()
        if "old" in form:
            state = older(state, prefix="" if "bare" in form else None)
        torch.save(state, directory / "pytorch_model.bin")
        (directory / "config.json").write_text(theirs.config.to_json_string())
    (directory / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nw\n")
    (directory / "README.md").write_text("not the model's")
    return theirs


FORMS = ["ours", "ours_sharded", "theirs", "theirs_sharded", "pickled", "pickled_old"]
FORMS += ["pickled_old_bare"]


@pytest.mark.parametrize("form", [*FORMS, "google"])
def test_to_hf_from_every_form(tmp_path, form):
    theirs = write(tmp_path / "src", form=form)
    before = contents(tmp_path / "src")
    done = to_hf(tmp_path / "src", tmp_path / "dst")
    assert contents(tmp_path / "src") == before
    model = opened(tmp_path / "dst", "BertForPreTraining")
    same_outputs(theirs, model, theirs.config)
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "dst")) is transformers.BertModel
    assert set(done.files) == {"model.safetensors", "config.json", "vocab.txt"}
    assert set(done.files) == contents(tmp_path / "dst").keys()
    assert done.written.keys() == read_tensors(tmp_path / "dst").keys()
    read = {*done.written.values(), *done.ignored}
    if form != "google":
        assert read == read_tensors(tmp_path / "src").keys() and done.missing == []
        ties = {n for n, why in done.ignored.items() if why == "tied to an equal one"}
        assert len(ties) == 2 * ("pickled" in form)
        assert len(done.ignored) == len(ties) + ("old" in form)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_every_class(tmp_path, convert, name):
    theirs = write(tmp_path / "src", name, form="pickled_old")
    done = CONVERSIONS[convert](tmp_path / "src", tmp_path / "dst")
    model = opened(tmp_path / "dst", name)
    same_outputs(theirs, model, theirs.config)
    assert done.written.keys() >= theirs.state_dict().keys() - model.all_tied_weights_keys.keys()
    ours = getattr(bert_fast, name).from_pretrained(tmp_path / "dst", strict=True)
    same_outputs(theirs, ours, theirs.config)
    if convert == "to_hf":
        assert model.config.architectures == [done.architecture]


def test_files_are_those_of_transformers(tmp_path):
    """The same names and bytes of tensors as in what transformers itself saves."""
    theirs = write(tmp_path / "src", form="theirs")
    to_hf(tmp_path / "src", tmp_path / "dst")
    found, want = (read_tensors(tmp_path / d) for d in ("dst", "src"))
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    config = json.loads((tmp_path / "dst/config.json").read_text())
    assert config["architectures"] == ["BertForPreTraining"] and config["dtype"] == "float32"
    assert config["model_type"] == theirs.config.model_type == "bert"


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, "float64"], ids=str)
def test_dtype_and_shards(tmp_path, dtype):
    theirs = write(tmp_path / "src")
    done = to_hf(tmp_path / "src", tmp_path / "dst", dtype=dtype, max_shard_size="30KB")
    assert len([f for f in done.files if f.startswith("model-")]) >= 2
    assert "model.safetensors.index.json" in done.files
    model = opened(tmp_path / "dst", "BertForPreTraining")
    assert f"{model.dtype}".endswith(str(dtype).removeprefix("torch."))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name].to(model.dtype)), name


def test_a_weight_too_large_for_the_dtype(tmp_path):
    source = write(tmp_path / "src", "BertModel", form="theirs")
    with torch.no_grad():
        source.pooler.dense.bias[3] = 1e6
    source.save_pretrained(tmp_path / "src")
    with pytest.raises(ValueError, match=r"src: want weights that torch.float16 .*pooler.dense.b"):
        to_hf(tmp_path / "src", tmp_path / "dst", dtype="float16")
    with pytest.raises(ValueError, match=r"dtype: want fp32, .*got 'int8'"):
        to_hf(tmp_path / "src", tmp_path / "dst", dtype="int8")
    assert not (tmp_path / "dst").exists()
    assert to_hf(tmp_path / "src", tmp_path / "dst", dtype="bfloat16")


def test_nothing_is_lost(tmp_path):
    """Tensors that the architecture has no use for stay, as in many a file on the hub."""
    theirs = write(tmp_path / "src", form="theirs")
    path = tmp_path / "src/config.json"
    values = json.loads(path.read_text()) | {"architectures": ["BertForMaskedLM"]}
    path.write_text(json.dumps(values))
    done = to_hf(tmp_path / "src", tmp_path / "dst")
    assert done.architecture == "BertForMaskedLM"
    same_outputs(theirs, opened(tmp_path / "dst", "BertForPreTraining"), theirs.config)
    opened(tmp_path / "dst", "BertForMaskedLM", strict=False)


def test_missing_parts_are_said(tmp_path):
    theirs = write(tmp_path / "src", "BertForMaskedLM", form="theirs")
    path = tmp_path / "src/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["BertModel"]}))
    done = to_hf(tmp_path / "src", tmp_path / "dst")
    assert done.missing == ["pooler.dense.weight", "pooler.dense.bias"]
    same_outputs(theirs, opened(tmp_path / "dst", "BertForMaskedLM"), theirs.config)


def test_untied(tmp_path):
    """A decoder of its own is kept, and the configuration says so."""
    theirs = write(tmp_path / "src", "BertForMaskedLM", form="pickled", tie_word_embeddings=False)
    path = tmp_path / "src/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    to_hf(tmp_path / "src", tmp_path / "dst")
    same_outputs(theirs, opened(tmp_path / "dst", "BertForMaskedLM"), theirs.config)
    assert json.loads((tmp_path / "dst/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("form", ["pickled_old", "pickled_old_bare", "theirs_sharded", "ours"])
def test_legacy_names_renames_and_nothing_else(tmp_path, form):
    """Values, dtypes, other tensors and config.json; a mixed file to make sure."""
    write(tmp_path / "src", form=form)
    found = read_tensors(tmp_path / "src")
    if form == "pickled_old":
        found["module.bert.pooler.dense.bias"] = torch.ones(32, dtype=torch.float16)
        found |= {"extra.steps": torch.tensor([3]), "extra.LayerNorm.gamma": torch.ones(2)}
        torch.save(found, tmp_path / "src/pytorch_model.bin")
    done = legacy_names(tmp_path / "src", tmp_path / "dst")
    after = read_tensors(tmp_path / "dst")
    assert after.keys() == done.written.keys()
    for name, old in done.written.items():
        assert torch.equal(after[name], found[old]) and after[name].dtype == found[old].dtype
    assert not any(re.search(r"gamma|beta|module", name) for name in after)
    assert "extra.steps" in after or form != "pickled_old"
    assert "bert.embeddings.LayerNorm.weight" in after and "bert.bert" not in str([*after])
    buffers = {name for name in found if name.endswith("position_ids")}
    assert done.ignored == dict.fromkeys(buffers, "a buffer") and len(buffers) == ("old" in form)
    config = (tmp_path / "src/config.json").read_bytes()
    assert (tmp_path / "dst/config.json").read_bytes() == config
    assert not (tmp_path / "dst/bert_fast.json").exists()


def test_files_of_the_first_age(tmp_path):
    """bert_config.json beside a pickle; transformers needs a model_type to open the result."""
    theirs = write(tmp_path / "src", form="pickled_old")
    values = json.loads((tmp_path / "src/config.json").read_text())
    (tmp_path / "src/config.json").unlink()
    del values["model_type"]
    (tmp_path / "src/bert_config.json").write_text(json.dumps(values))
    for convert in CONVERSIONS.values():
        done = convert(tmp_path / "src", tmp_path / convert.__name__)
        assert done.architecture == "BertForPreTraining"
        model = transformers.AutoModelForPreTraining.from_pretrained(
            tmp_path / convert.__name__, attn_implementation="eager"
        )
        same_outputs(theirs, model.eval(), theirs.config)


def test_legacy_names_is_not_for_google(tmp_path):
    google(tmp_path / "src")
    with pytest.raises(ValueError, match=r"want Hugging Face's files, got bert_model\.ckpt\.index"):
        legacy_names(tmp_path / "src", tmp_path / "dst")


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_two_names_for_one(tmp_path, convert):
    theirs = write(tmp_path / "src", form="pickled")
    state = theirs.state_dict()
    state["embeddings.LayerNorm.gamma"] = torch.ones(32)
    torch.save(state, tmp_path / "src/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"/src: want each weight once, got bert.*and embeddings"):
        CONVERSIONS[convert](tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


# --- the table of names --------------------------------------------------------------------------


def test_names():
    for name in (
        "bert.embeddings.LayerNorm.weight",
        "module.bert.embeddings.LayerNorm.gamma",
        "embeddings.LayerNorm.gamma",
    ):
        assert bare(name) == "embeddings.LayerNorm.weight"
    assert present("cls.predictions.transform.LayerNorm.beta").endswith("LayerNorm.bias")
    assert present("a.MyLayerNorm.gamma") == "a.MyLayerNorm.gamma"
    assert is_buffer("module.embeddings.position_ids") and not is_buffer("x.position_ids")
    encoder = ["module.bert.encoder.layer.0.output.LayerNorm.beta", "bert.pooler.dense.bias"]
    assert [*as_saved(encoder).values()] == [
        "encoder.layer.0.output.LayerNorm.bias",
        "pooler.dense.bias",
    ]
    assert as_saved(["embeddings.x", "qa_outputs.bias"])["embeddings.x"] == "bert.embeddings.x"
    assert as_saved(["bert.embeddings.x", "other"]) == {
        "bert.embeddings.x": "embeddings.x",
        "other": "other",
    }


def test_names_of_google():
    layer = "bert/encoder/layer_11/attention/output"
    there = "bert.encoder.layer.11.attention.output"
    assert from_google(f"{layer}/dense/kernel") == (f"{there}.dense.weight", True)
    assert from_google(f"{layer}/LayerNorm/gamma") == (f"{there}.LayerNorm.weight", False)
    assert from_google("output_weights") == ("classifier.weight", False)
    assert from_google("cls/squad/output_bias") == ("qa_outputs.bias", False)
    for name in (
        "bert/encoder/layer_01/output/dense/kernel",
        "bert/encoder/layer_/output/dense/kernel",
        "attention/self/query/kernel",
        "bert/pooler/dense/kernel/adam_m",
        "bert/pooler/dense",
        "Bert/pooler/dense/kernel",
        "",
    ):
        assert from_google(name) is None
    for name in ("a/adam_m", "a/adam_v", "global_step", "beta1_power", "x/beta2_power", "a/Adam_1"):
        assert is_optimizer(name)
    assert not any(map(is_optimizer, ("adam_mm", "bert/pooler/dense/bias", "my_global_step")))


# --- where it is written -------------------------------------------------------------------------


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_directory_that_holds_files(tmp_path, convert):
    """Refused; with overwrite the files of an earlier save do not stay beside the new ones."""
    call = CONVERSIONS[convert]
    theirs = write(tmp_path / "src", form="theirs")
    write(tmp_path / "dst", "BertModel", form="ours_sharded")
    before = contents(tmp_path / "dst")
    with pytest.raises(FileExistsError, match=r"want a new or empty .*overwrite.*got README\.md"):
        call(tmp_path / "src", tmp_path / "dst")
    assert contents(tmp_path / "dst") == before
    call(tmp_path / "src", tmp_path / "dst", overwrite=True)
    assert contents(tmp_path / "dst").keys() == {
        *("README.md", "vocab.txt", "config.json", "model.safetensors")
    }
    same_outputs(theirs, opened(tmp_path / "dst", "BertForPreTraining"), theirs.config)
    call(tmp_path / "dst", tmp_path / "dst", overwrite=True)  # onto itself
    same_outputs(theirs, opened(tmp_path / "dst", "BertForPreTraining"), theirs.config)
    with pytest.raises(NotADirectoryError, match="want a directory, got a file"):
        call(tmp_path / "src", tmp_path / "dst/config.json")
    (tmp_path / "empty").mkdir()
    call(tmp_path / "src", tmp_path / "empty")


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("there", [False, True])
def test_failure_leaves_nothing_new(tmp_path, monkeypatch, convert, at, there):
    """Weights in two files, index, configuration: each in turn cannot be written."""
    write(tmp_path / "src", form="theirs")
    before = {}
    if there:
        write(tmp_path / "dst", "BertModel", form="ours")
        before = contents(tmp_path / "dst")
    calls, original = iter(range(100)), builtins.open

    def fails(file, mode="r", *args, **kwargs):
        if "x" in mode and next(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", fails)
    with pytest.raises(OSError, match="No space left"):
        CONVERSIONS[convert](
            *(tmp_path / "src", tmp_path / "dst"), max_shard_size="50KB", overwrite=True
        )
    monkeypatch.undo()
    assert (contents(tmp_path / "dst") if there else {}) == before
    assert (tmp_path / "dst").exists() == there


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_damaged_sources(tmp_path, convert):
    """What loading refuses is not converted."""
    write(tmp_path / "src", form="ours")
    raw = (tmp_path / "src/model.safetensors").read_bytes()
    (tmp_path / "src/model.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model\.safetensors: want .*sha256"):
        CONVERSIONS[convert](tmp_path / "src", tmp_path / "dst")
    config = BertConfig(vocab_size=11, hidden_size=8, num_attention_heads=2)
    save_tensors(tmp_path / "nan", {"bert.x": torch.full((2,), torch.nan)}, config=config)
    with pytest.raises(ValueError, match=r"NaN or infinity in bert\.x"):
        CONVERSIONS[convert](tmp_path / "nan", tmp_path / "dst")
    with pytest.raises(FileNotFoundError, match="want a directory, got nothing"):
        CONVERSIONS[convert](tmp_path / "no", tmp_path / "dst")
    (tmp_path / "nan/model.safetensors").unlink()
    (tmp_path / "nan/bert_fast.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"want one of model\.safetensors.*ckpt\.index"):
        CONVERSIONS[convert](tmp_path / "nan", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
