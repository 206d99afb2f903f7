"""BertConfig: transformers' fields and files, what is refused, what is not read."""

import copy
import dataclasses
import json
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from torch import nn

from bert_fast.config import ACTIVATIONS, BertConfig, read_config

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 52,
    "max_position_embeddings": 40,
}
OTHER = SIZES | {
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.25,
    "attention_probs_dropout_prob": 0,
    "type_vocab_size": 3,
    "initializer_range": 0.5,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 7,
    "use_cache": False,
    "classifier_dropout": 0.5,
    "bos_token_id": 5,
    "eos_token_id": 6,
    "tie_word_embeddings": False,
    "architectures": ["BertForMaskedLM"],
    "output_hidden_states": True,
    "return_dict": False,
    "dtype": "bfloat16",
    "chunk_size_feed_forward": 2,
    "id2label": {0: "no", 1: "yes", 2: "maybe"},
    "label2id": {"no": 0, "yes": 1, "maybe": 2},
    "problem_type": "multi_label_classification",
}


def write(directory, values):
    text = values if isinstance(values, str | bytes) else json.dumps(values)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    return directory


def test_defaults_are_those_of_transformers():
    theirs = transformers.BertConfig().to_dict()
    ours = BertConfig().to_dict()
    assert ours.pop("transformers_version") is None
    del theirs["transformers_version"]
    assert ours == theirs


def test_both_ways_through_transformers(tmp_path):
    """Every field away from its default: dict and file mean the same on both sides."""
    ours = BertConfig(**OTHER)
    theirs = transformers.BertConfig.from_dict(ours.to_dict())
    for name, value in OTHER.items():
        assert getattr(theirs, name) == getattr(ours, name), name
        assert getattr(BertConfig(), name) != getattr(ours, name), name
        assert name == "dtype" or getattr(ours, name) == value, name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert BertConfig.from_dict(theirs.to_dict()) == ours
        ours.save_pretrained(tmp_path / "ours")
        opened = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
        assert type(opened) is transformers.BertConfig
        opened.save_pretrained(tmp_path / "theirs")
        assert BertConfig.from_pretrained(tmp_path / "theirs") == ours
        assert BertConfig.from_pretrained(tmp_path / "ours") == ours


def test_file_says_nothing_of_where_it_was_read(tmp_path):
    BertConfig().save_pretrained(tmp_path / "a")
    config = BertConfig.from_pretrained(tmp_path / "a")
    assert config.name_or_path == config._name_or_path == str(tmp_path / "a")
    assert config == BertConfig()
    config.save_pretrained(tmp_path / "b")
    texts = [(tmp_path / d / "config.json").read_text() for d in "ab"]
    assert texts[0] == texts[1] and str(tmp_path) not in texts[0]
    assert [p.name for p in tmp_path.glob("*/*")] == ["config.json"] * 2


def test_named():
    for name, layers, hidden, heads in zip(
        ("tiny", "mini", "small", "medium", "base", "large"),
        (2, 4, 4, 8, 12, 24),
        (128, 256, 512, 512, 768, 1024),
        (2, 4, 8, 8, 12, 16),
        strict=True,
    ):
        config = BertConfig.named(name, vocab_size=50)
        config.validate()
        assert (config.num_hidden_layers, config.hidden_size) == (layers, hidden), name
        assert (config.num_attention_heads, config.intermediate_size) == (heads, 4 * hidden), name
        assert config.vocab_size == 50
    assert BertConfig.named("base") == BertConfig()


def test_unknown_names_are_refused():
    with pytest.raises(TypeError, match="hiden_size"):
        BertConfig(hiden_size=3)
    with pytest.raises(TypeError, match="hiden_size"):
        BertConfig.named("tiny", hiden_size=3)
    with pytest.raises(TypeError, match="hiden_size"):
        BertConfig.from_dict({}, hiden_size=3)
    with pytest.raises(ValueError, match=r"tiny, mini.*'huge'"):
        BertConfig.named("huge")
    config = BertConfig()
    with pytest.raises(TypeError, match="hiden_size"):
        config.update({"vocab_size": 3, "hiden_size": 3})
    assert config == BertConfig()


def test_labels():
    three = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config = BertConfig(num_labels=3)
    assert config.num_labels == 3 and config.id2label == three
    assert config.label2id == {label: i for i, label in three.items()}
    config.id2label = {"0": "a", "1": "b"}  # as JSON has it
    assert config.id2label == {0: "a", 1: "b"} and config.label2id == {"a": 0, "b": 1}
    assert config.num_labels == 2
    config.num_labels = 2
    assert config.id2label == {0: "a", 1: "b"}
    config.num_labels = 1
    assert config.id2label == {0: "LABEL_0"} and config.label2id == {"LABEL_0": 0}
    config.update({"label2id": {"x": 0}, "id2label": {0: "y"}, "num_labels": 4})
    assert config.id2label == {0: "y"} and config.label2id == {"x": 0}
    with pytest.raises(ValueError, match="num_labels: want 2 as in id2label, got 3"):
        BertConfig(num_labels=3, id2label={0: "a", 1: "b"})
    with pytest.raises(ValueError, match="num_labels: want an int >= 1, got 0"):
        config.num_labels = 0


@pytest.mark.parametrize(
    ("file", "overrides", "labels"),
    [
        ({}, {}, ["LABEL_0", "LABEL_1"]),
        ({"num_labels": 3}, {}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"id2label": None, "num_labels": 1}, {}, ["LABEL_0"]),
        ({"id2label": {"0": "a"}, "label2id": {"a": 0}}, {}, ["a"]),
        ({"id2label": {"0": "a"}, "num_labels": 5}, {}, ["a"]),
        ({"id2label": {"0": "a"}, "label2id": {"a": 0}}, {"num_labels": 1}, ["a"]),
        ({"id2label": {"0": "a"}, "label2id": {"a": 0}}, {"num_labels": 2}, ["LABEL_0", "LABEL_1"]),
        ({"num_labels": 3}, {"num_labels": 2}, ["LABEL_0", "LABEL_1"]),
        (
            {"id2label": {"0": "a"}, "label2id": {"a": 0}},
            {"id2label": {0: "x", 1: "y"}},
            ["x", "y"],
        ),
        ({"num_labels": 7}, {"id2label": {0: "x"}, "num_labels": 1}, ["x"]),
    ],
)
def test_labels_of_file_and_caller(tmp_path, file, overrides, labels):
    config = BertConfig.from_pretrained(write(tmp_path, file), **overrides)
    assert config.id2label == dict(enumerate(labels))
    assert config.label2id == {label: i for i, label in enumerate(labels)}


@pytest.mark.parametrize("given", ["float16", "torch.float16", torch.float16])
def test_dtype(given, tmp_path):
    for config in (
        BertConfig(dtype=given),
        BertConfig.from_dict({"dtype": given}),
        BertConfig.from_dict({"torch_dtype": given}),
        BertConfig.from_dict({"torch_dtype": "float64", "dtype": given}),
        BertConfig.from_dict({"torch_dtype": "float64"}, dtype=given),
    ):
        assert config.dtype is config.torch_dtype is torch.float16
        config.validate()
        assert config.to_dict()["dtype"] == "float16"
    config.dtype = "bfloat16"
    assert config.dtype is torch.bfloat16
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


SIZE_FIELDS = [*SIZES, "type_vocab_size"]
BAD = [
    *((name, bad) for name in SIZE_FIELDS for bad in (0, -1, 2.0, "8", True, None, 2**31)),
    *((name, bad) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")
      for bad in (-0.1, 1.5, float("nan"), "0.1", None, True)),
    *(("classifier_dropout", bad) for bad in (-1, 2, "0")),
    *(("hidden_act", bad) for bad in ("silu", "GELU", "", None, nn.GELU(), ["gelu"])),
    *(("layer_norm_eps", bad) for bad in (0, -1e-12, float("inf"), float("nan"), "1e-12", 10**400)),
    *(("initializer_range", bad) for bad in (-1, None)),
    *(("pad_token_id", bad) for bad in (-1, 101, 1.0, "0", True)),
    *(("dtype", bad) for bad in ("int8", "load", torch.int64, 3)),
    *(("id2label", bad) for bad in (None, {}, [], ["a"], {"a": 1}, {0: []})),
    ("label2id", ["a"]),
    ("problem_type", "classification"),
    ("tie_word_embeddings", 1),
    ("is_decoder", "no"),
    ("num_hidden_layers", 1025),
    ("chunk_size_feed_forward", -1),
    ("architectures", "BertModel"),
    ("position_embedding_type", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bad"), BAD)
def test_validate(name, bad):
    config = BertConfig(**SIZES)
    config.validate()
    setattr(config, name, bad)  # mutable: nothing is checked here
    with pytest.raises(ValueError, match=f"^{name}: want .*, got {re.escape(repr(bad)[:60])}"):
        config.validate()


def test_validate_checks_fields_against_each_other():
    with pytest.raises(ValueError, match=r"num_attention_heads: want a divisor of .* 32, got 5"):
        BertConfig(**SIZES | {"num_attention_heads": 5}).validate()
    with pytest.raises(ValueError, match="num_labels: want 2 or more"):
        BertConfig(problem_type="single_label_classification", num_labels=1).validate()
    BertConfig(problem_type="regression", num_labels=1, pad_token_id=None).validate()


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_are_accepted_and_known_to_transformers(act):
    BertConfig(hidden_act=act).validate()
    assert act in transformers.activations.ACT2FN


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({"is_decoder": True}, ["causal"]),
        ({"is_decoder": True, "add_cross_attention": True}, ["causal", "cross attention"]),
        ({"is_encoder_decoder": True}, ["decoder"]),
        ({"position_embedding_type": "relative_key"}, ["relative positions"]),
        ({"position_embedding_type": "relative_key_query"}, ["relative positions"]),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path, fields, reasons):
    config = BertConfig.from_pretrained(write(tmp_path, SIZES | fields))
    with pytest.raises(NotImplementedError) as error:
        config.validate()
    for text in (*fields, *reasons):
        assert text in str(error.value)
    again = BertConfig.from_dict(config.to_dict())  # saving and loading does not lose it
    with pytest.raises(NotImplementedError):
        again.validate()
    with pytest.raises(NotImplementedError):
        config.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"vocab_size": "30522"}, ["vocab_size", "want an int", "'30522'"]),
        ({"hidden_size": 32.0}, ["hidden_size", "32.0"]),
        ({"num_attention_heads": None}, ["num_attention_heads", "None"]),
        ({"layer_norm_eps": "1e-12"}, ["layer_norm_eps", "'1e-12'"]),
        ({"hidden_act": "silu"}, ["hidden_act", "gelu_new", "'silu'"]),
        ({"id2label": ["a", "b"]}, ["id2label", "['a', 'b']"]),
        ({"id2label": {"first": "a"}}, ["id2label", "first"]),
        ({"num_labels": 10**9}, ["num_labels", "1000000000"]),
        ({"torch_dtype": "load"}, ["torch_dtype", "float32", "'load'"]),
        ({"is_decoder": "false"}, ["is_decoder", "'false'"]),
        ({"model_type": "roberta"}, ["model_type", "'bert'", "'roberta'"]),
        ("[1, 2]", ["want a JSON object", "list"]),
        ("null", ["want a JSON object", "NoneType"]),
        ("", ["want a JSON object"]),
        ('{"vocab_size": 5', ["want a JSON object"]),
        ('{"vocab_size": 5, "vocab_size": 6}', ["'vocab_size' twice"]),
        ('{"layer_norm_eps": NaN}', ["NaN"]),
        (b'{"name": "\xff"}', ["want a JSON object", "utf-8"]),
        ("[" * 100_000, ["want a JSON object", "recursion"]),
    ],
)
def test_bad_file(tmp_path, values, fragments):
    with pytest.raises(ValueError) as error:
        BertConfig.from_pretrained(write(tmp_path, values))
    for fragment in (str(tmp_path / "config.json"), *fragments):
        assert fragment in str(error.value)
    assert len(str(error.value)) < 1000


def test_override_of_a_bad_value(tmp_path):
    config = BertConfig.from_pretrained(write(tmp_path, {"hidden_act": "silu"}), hidden_act="gelu")
    assert config.hidden_act == "gelu"


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: want a plain file, got nothing"):
        BertConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        BertConfig.from_pretrained(tmp_path / "nowhere")


UNKNOWN = (
    "auto_map trust_remote_code _attn_implementation _attn_implementation_internal __class__ "
    "attn_implementation quantization_config custom_pipelines to_dict validate"
).split()


def test_unknown_keys_are_named_once_and_ignored(tmp_path):
    write(tmp_path, SIZES | {key: {"evil": "evil.Evil"} for key in UNKNOWN})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        config = BertConfig.from_pretrained(tmp_path)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert str(tmp_path / "config.json") in str(seen[0].message)
    assert sorted(UNKNOWN) == str(seen[0].message).partition("keys ")[2].split(", ")
    assert config == BertConfig(**SIZES) and vars(config).keys() == vars(BertConfig()).keys()
    assert config.to_dict() and config.validate() is None
    assert read_config(tmp_path)[1] == sorted(UNKNOWN)


def test_known_harmless_keys_are_silent(tmp_path):
    """What transformers 2 to 5 and Google wrote, of no effect in an encoder."""
    old = {"_name_or_path": "/somewhere/else", "model_type": "bert", "gradient_checkpointing": True}
    old |= {
        "position_embedding_type": "absolute",
        "_num_labels": 3,
        "transformers_version": "4.57.6",
    }
    old |= {
        "finetuning_task": None,
        "directionality": "bidi",
        "pooler_type": "first_token_transform",
    }
    old |= {"output_past": True, "do_sample": False, "max_length": 20, "pruned_heads": {}}
    write(tmp_path, SIZES | old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = BertConfig.from_pretrained(tmp_path)
    assert config == BertConfig(**SIZES)
    assert config.name_or_path == str(tmp_path) and config.transformers_version == "4.57.6"


@pytest.mark.parametrize("folder", ["", "qa", "seqcls", "tokcls"])
def test_real_files(shared, folder):
    directory = shared / "data/ckpt/hf_tiny_generated" / folder
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = BertConfig.from_pretrained(directory)
    config.validate()
    theirs = transformers.BertConfig.from_pretrained(directory)
    for f in dataclasses.fields(config):
        if f.name not in ("label2id", "name_or_path", "position_embedding_type"):
            assert getattr(config, f.name) == getattr(theirs, f.name), f.name


def test_google_file(shared):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = (shared / "data/ckpt/tf_google_tiny/bert_config.json").read_text()
        BertConfig.from_dict(json.loads(text)).validate()


NUMERIC = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id",
    "tie_word_embeddings",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OTHER))
def test_fingerprint(name):
    changed = BertConfig(**{name: OTHER[name]})
    assert (changed.fingerprint() != BertConfig().fingerprint()) == (name in NUMERIC)


def test_fingerprint_is_the_number_not_its_type():
    assert (
        BertConfig(layer_norm_eps=1).fingerprint() == BertConfig(layer_norm_eps=1.0).fingerprint()
    )
    assert re.fullmatch("[0-9a-f]{64}", BertConfig().fingerprint())


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        dataclasses.replace,
        lambda c: pickle.loads(pickle.dumps(c)),
        lambda c: BertConfig.from_dict(c.to_dict()),
        lambda c: BertConfig.from_dict(json.loads(c.to_json_string())),
    ],
)
def test_copies(copied):
    config = BertConfig(**OTHER)
    twin = copied(config)
    assert twin == config and twin is not config
    twin.vocab_size = 5
    assert twin != config and config.vocab_size == 101
    twin.to_dict()["id2label"][0] = "changed"
    assert twin.id2label[0] == "no"


def test_dict_like_reading():
    config = BertConfig(num_labels=3)
    assert config.get("vocab_size") == 30522 and config.get("num_labels") == 3
    assert config.get("text_config") is None and config.get("to_dict", 5) == 5
    assert "vocab_size" in config and "model_type" in config and "text_config" not in config
    assert config.get_text_config(decoder=True) is config
    assert config.prefix is None and config.task_specific_params is None
    assert config.use_return_dict is True
    assert BertConfig.field_names() >= {"num_labels", "vocab_size", "dtype", "id2label"}
    assert repr(config).startswith("BertConfig {'vocab_size': 30522")


def test_peft_reads_it():
    peft = pytest.importorskip("peft", reason="peft is not installed")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = BertConfig(**SIZES)
            self.query = nn.Linear(4, 4)

        def forward(self, x):
            return self.query(x)

    model = peft.get_peft_model(Model(), peft.LoraConfig())  # BERT's targets by model_type
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 and all("query.lora" in name for name in names)


def test_validate_inside_compile():
    config = BertConfig(**OTHER)

    def run(x):
        config.validate()
        return x + config.vocab_size

    assert torch.compile(run, fullgraph=True, backend="eager")(torch.ones(1)) == 102


def test_import_is_light():
    heavy = {"transformers", "huggingface_hub"}
    code = f"import sys, bert_fast.checkpoint; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
