"""Google's TensorFlow checkpoints: loaded as they are, and converted for transformers."""

import json
import os
import shutil
import warnings

import pytest
import torch
import transformers
from against_transformers import pair
from bundle_writer import google_state, write_bundle
from convert_cases import NAME, WORDS, contents, google, opened, same_outputs

import bert_fast
from bert_fast.config import BertConfig
from bert_fast.convert import HEADS, from_tf

TINY = "data/ckpt/tf_google_tiny"


def expected(source):
    kept = json.loads((source / "expected_outputs.json").read_text())
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: torch.tensor(kept.pop(name)) for name in names}
    return inputs, {
        key: torch.tensor(value)
        for key, value in kept.items()
        if "logits" in key or "output" in key
    }


def outputs(model, inputs):
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
        return {
            "sequence_output": out.hidden_states[-1],
            "pooled_output": model.bert(**inputs).pooler_output,
            "mlm_logits": out.prediction_logits,
            "nsp_logits": out.seq_relationship_logits,
        }


def at_real_tokens(found, inputs):
    real = inputs["attention_mask"].bool()
    return {key: t[real] if t.shape[:2] == real.shape else t for key, t in found.items()}


# --- loaded as they are --------------------------------------------------------------------------


def test_real_file(shared):
    """Google's own training code wrote it; what it computes is known from elsewhere."""
    source = shared / TINY
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = bert_fast.BertForPreTraining.from_pretrained(
            source, strict=True, output_loading_info=True
        )
    assert not any(info.values()) and model.config.hidden_size == 4
    inputs, want = expected(source)
    found, want = (at_real_tokens(each, inputs) for each in (outputs(model, inputs), want))
    assert found.keys() == want.keys()
    for key, tensor in want.items():
        assert (found[key] - tensor).abs().max() <= 1e-6, key


FINE_TUNED = {
    "BertForSequenceClassification": {"num_labels": 3},
    "BertForTokenClassification": {"num_labels": 5},
    "BertForQuestionAnswering": {},
}
PRETRAINED = ("BertModel", "BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction")


@pytest.mark.parametrize("name", [*PRETRAINED, *FINE_TUNED])
def test_loaded_as_they_are(tmp_path, name):
    """Each kernel is transposed and nothing else is, also where a matrix is square."""
    fields = FINE_TUNED.get(name, {})
    theirs = google(tmp_path, name, **fields)
    pooler = name in ("BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = getattr(bert_fast, name).from_pretrained(tmp_path, **fields)
    said = [str(w.message) for w in caught]
    assert len(said) == pooler and all("not used by" in s and "pooler" in s for s in said), said
    assert not ours.training
    want = theirs.state_dict()
    assert all(torch.equal(tensor, want[key]) for key, tensor in ours.state_dict().items())
    same_outputs(theirs, ours, theirs.config)


def test_base_model_and_new_heads(tmp_path):
    """As with other formats: unused tensors and new heads are named, in a warning each."""
    theirs = google(tmp_path)
    with pytest.warns(UserWarning, match=r"not used by BertModel: cls\.predictions\.bias, cls"):
        ours = bert_fast.BertModel.from_pretrained(tmp_path)
    same_outputs(theirs.bert, ours, theirs.config)
    with pytest.warns(UserWarning) as caught:
        bert_fast.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    assert any("initialised, not in the files: classifier.weight" in str(w.message) for w in caught)
    with pytest.raises(ValueError, match=r"strict.*classifier\.weight"):
        bert_fast.BertForSequenceClassification.from_pretrained(tmp_path, strict=True)
    assert not any("adam" in str(w.message) or "global" in str(w.message) for w in caught)


QUERY = "bert/encoder/layer_0/attention/self/query/kernel"


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def put(name, tensor):
    return lambda tensors: tensors | {name: tensor}


BAD = {
    "missing": (without(QUERY), "bert.encoder.layer.0.attention.self.query.weight"),
    "shape": (put(QUERY, torch.ones(32, 31)), "query.weight: want [32, 32], got [31, 32]"),
    "vector": (put(QUERY, torch.ones(32)), f"{QUERY}: want two dimensions, got [32]"),
    "rows": (
        put("bert/embeddings/word_embeddings", torch.ones(7, 32)),
        "vocab_size: the configuration says 101, the file has 7",
    ),
    "nan": (put("bert/pooler/dense/bias", torch.full((32,), torch.nan)), "NaN or infinity in bert"),
    "twice": (put("bert.pooler.dense.bias", torch.ones(32)), "want each weight once"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("load", ["from_pretrained", "from_tf"])
def test_what_does_not_fit(tmp_path, case, load):
    change, text = BAD[case]
    google(tmp_path / "src", change=change)
    with pytest.raises(ValueError) as error:
        if load == "from_tf":
            from_tf(tmp_path / "src", tmp_path / "dst")
        else:
            bert_fast.BertForPreTraining.from_pretrained(tmp_path / "src")
    for word in (str(tmp_path / "src"), text, "want", "got"):
        assert word in str(error.value)
    assert not (tmp_path / "dst").exists()


def test_configuration_of_google(tmp_path):
    """bert_config.json is read where there is no config.json, and named in what is said of it."""
    google(tmp_path)
    config = BertConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.layer_norm_eps, config.hidden_act) == (32, 1e-12, "gelu")
    path = tmp_path / "bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"more": 1}))
    with pytest.warns(UserWarning, match=r"bert_config\.json: ignored the keys more"):
        BertConfig.from_pretrained(tmp_path)
    path.write_text('{"hidden_size": "x"}')
    with pytest.raises(ValueError, match=r"bert_config\.json: hidden_size: want an int"):
        BertConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert BertConfig.from_pretrained(tmp_path).hidden_size == 32
    for file in ("config.json", "bert_config.json"):
        (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=r"/config\.json: want a plain file, got nothing"):
        BertConfig.from_pretrained(tmp_path)


def test_which_checkpoint(tmp_path):
    """bert_model.ckpt, else the only one; weights in Hugging Face's formats come first."""
    theirs = google(tmp_path, "BertModel", prefix="model.ckpt-5")
    ours = bert_fast.BertModel.from_pretrained(tmp_path)
    same_outputs(theirs, ours, theirs.config)
    write_bundle(tmp_path / "model.ckpt-9", {"a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"want one checkpoint .*ckpt-5\.index, model\.ckpt-9"):
        bert_fast.BertModel.from_pretrained(tmp_path)
    write_bundle(tmp_path / "a.ckpt-1", {"a": torch.ones(1)})
    other = google(tmp_path, "BertModel", hidden_act="relu")
    ours = bert_fast.BertModel.from_pretrained(tmp_path)
    same_outputs(other, ours, other.config)
    done = from_tf(tmp_path / "model.ckpt-5", tmp_path / "five")
    assert done.source == tmp_path / "model.ckpt-5"
    ours = bert_fast.BertModel.from_pretrained(tmp_path / "five")
    assert torch.equal(ours.pooler.dense.weight, theirs.pooler.dense.weight)
    ours.save_pretrained(tmp_path)
    assert bert_fast.BertModel.from_pretrained(tmp_path, strict=True)


# --- converted -----------------------------------------------------------------------------------


def test_real_file_converted(shared, tmp_path):
    done = from_tf(shared / TINY, tmp_path / "hf")
    inputs, want = expected(shared / TINY)
    model = opened(tmp_path / "hf", "BertForPreTraining")
    found, want = (at_real_tokens(each, inputs) for each in (outputs(model, inputs), want))
    for key, tensor in want.items():
        assert (found[key] - tensor).abs().max() <= 1e-6, key
    base = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        hidden = base(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    assert (hidden[real] - want["sequence_output"]).abs().max() <= 1e-6
    assert done.architecture == "BertForPreTraining" and done.missing == []
    assert len(done.written) == 46 and len(done.ignored) == 93
    assert done.written["bert.pooler.dense.weight"] == "bert/pooler/dense/kernel"
    assert done.ignored["global_step"] == "the optimizer's"
    assert set(done.files) == {p.name for p in (tmp_path / "hf").iterdir()} == FILES


FILES = {"model.safetensors", "config.json", "vocab.txt", "tokenizer_config.json"}


@pytest.mark.parametrize("name", [*PRETRAINED, *FINE_TUNED])
def test_heads(tmp_path, name):
    """Known by their tensors, but for the ones that look alike."""
    fields = FINE_TUNED.get(name, {})
    theirs = google(tmp_path / "src", name, adam=name == "BertModel", **fields)
    alike = {"BertForTokenClassification": "token-classification"}
    done = from_tf(tmp_path / "src", tmp_path / "dst", head=alike.get(name))
    assert done.architecture == name
    model = opened(tmp_path / "dst", name)
    assert model.config.num_labels == fields.get("num_labels", 2)
    assert model.config.architectures == [name]
    same_outputs(theirs, model, theirs.config)
    ours = getattr(bert_fast, name).from_pretrained(tmp_path / "dst", strict=True)
    same_outputs(theirs, ours, theirs.config)


@pytest.mark.parametrize("head", HEADS)
def test_chosen_head(tmp_path, head):
    """A part of what there is; all of it must be there."""
    google(tmp_path / "src")
    name = HEADS[head].__name__
    if head not in ("none", "pretraining", "masked-lm", "next-sentence"):
        text = f"want all of {name}, got none for (classifier|qa_outputs)"
        with pytest.raises(ValueError, match=text):
            from_tf(tmp_path / "src", tmp_path / "dst", head=head)
        assert not (tmp_path / "dst").exists()
        return
    done = from_tf(tmp_path / "src", tmp_path / "dst", head=head)
    opened(tmp_path / "dst", name)
    unused = {n for n, why in done.ignored.items() if why == f"not of {name}"}
    assert bool(unused) == (head != "pretraining")
    assert ("bert/pooler/dense/kernel" in unused) == (head == "masked-lm")


def test_what_is_no_weight(tmp_path):
    change = put("good_steps", torch.tensor(3))
    google(tmp_path / "src", change=change)
    done = from_tf(tmp_path / "src", tmp_path / "dst")
    assert done.ignored["good_steps"] == "no weight of BERT"
    assert {why for n, why in done.ignored.items() if n != "good_steps"} == {"the optimizer's"}
    opened(tmp_path / "dst", "BertForPreTraining")


def test_labels_of_the_configuration(tmp_path):
    google(tmp_path, "BertForSequenceClassification", num_labels=3)
    path = tmp_path / "bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_labels": 4}))
    with pytest.raises(ValueError, match=r"classifier\.weight: want \[4, 32\], got \[3, 32\]"):
        from_tf(tmp_path, tmp_path / "dst")


@pytest.mark.parametrize(
    ("words", "lower"), [([], True), (["##\u211d", "\u00df"], True), (["Paris"], False)]
)
def test_tokenizer(tmp_path, words, lower):
    """What transformers opens lower-cases unless the vocabulary has capitals, or is told."""
    google(tmp_path / "src")
    (tmp_path / "src/vocab.txt").write_text("\n".join([*WORDS, *words]) + "\n", "utf-8")
    from_tf(tmp_path / "src", tmp_path / "dst")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "dst")
    assert tokenizer.tokenize("w1 W2") == ["w1", "w2" if lower else "[UNK]"]
    assert tokenizer.model_max_length == 40 and tokenizer.mask_token_id == 4
    from_tf(tmp_path / "src", tmp_path / "told", do_lower_case=not lower)
    told = json.loads((tmp_path / "told/tokenizer_config.json").read_text())
    assert told["do_lower_case"] is not lower
    assert (tmp_path / "dst/vocab.txt").read_bytes() == (tmp_path / "src/vocab.txt").read_bytes()


def test_vocabulary_that_does_not_fit(tmp_path):
    google(tmp_path / "src")
    vocab = tmp_path / "src/vocab.txt"
    for raw, text in ((b"a\n" * 102, "want at most 101 lines.*got 102"), (b"\xff", "want UTF-8")):
        vocab.write_bytes(raw)
        with pytest.raises(ValueError, match=f"vocab.txt: {text}"):
            from_tf(tmp_path / "src", tmp_path / "dst")
    vocab.unlink()
    with pytest.raises(ValueError, match=r"do_lower_case: want vocab\.txt"):
        from_tf(tmp_path / "src", tmp_path / "dst", do_lower_case=True)
    done = from_tf(tmp_path / "src", tmp_path / "dst")
    assert set(done.files) == {"config.json", "model.safetensors"}


def test_paths(tmp_path):
    google(tmp_path / "src", "BertModel")
    want = contents(tmp_path / "src")
    for number, src in enumerate(
        (tmp_path / "src", tmp_path / "src" / NAME, f"{tmp_path}/src/{NAME}.index")
    ):
        done = from_tf(src, tmp_path / "to" / str(number))
        assert done.source == tmp_path / "src" / NAME and done.architecture == "BertModel"
        opened(tmp_path / "to" / str(number), "BertModel")
    assert contents(tmp_path / "src") == want
    for src in (tmp_path / "no", tmp_path / "src/other.ckpt", tmp_path / "to"):
        with pytest.raises(FileNotFoundError, match=r"want .*got"):
            from_tf(src, tmp_path / "dst")
    with pytest.raises(ValueError, match=r"head: want one of none, pretraining.*got 'mlm'"):
        from_tf(tmp_path / "src", tmp_path / "dst", head="mlm")
    (tmp_path / "src/bert_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: want a plain file"):
        from_tf(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_large_shapes_and_several_shards(tmp_path):
    """A checkpoint of several data files, with tensors longer than a row of the CRC."""
    theirs, _ = pair("BertModel", vocab_size=9000)
    state = {f"bert.{key}": tensor for key, tensor in theirs.state_dict().items()}
    write_bundle(tmp_path / "src" / NAME, google_state(state), shards=3)
    (tmp_path / "src/bert_config.json").write_text(json.dumps(theirs.config.to_dict()))
    from_tf(tmp_path / "src", tmp_path / "dst")
    same_outputs(theirs, opened(tmp_path / "dst", "BertModel"), theirs.config)


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.long)])
def test_a_flipped_bit_is_not_converted(shared, tmp_path, count):
    source = tmp_path / "src"
    shutil.copytree(shared / TINY, source)
    path = source / f"{NAME}.data-00000-of-00001"
    os.chmod(source, 0o755)
    os.chmod(path, 0o644)
    raw, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for bit in torch.randint(8 * len(raw), (count,), generator=generator).tolist():
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=rf"{path.name}: \S+: damaged: want the CRC"):
            from_tf(source, tmp_path / "dst")
        assert not (tmp_path / "dst").exists()


def test_configuration_is_checked(tmp_path):
    google(tmp_path / "src")
    path = tmp_path / "src/bert_config.json"
    values = json.loads(path.read_text())
    for change, text in (
        ({"num_hidden_layers": 3}, r"bert_model\.ckpt: want every encoder weight.*layer\.2"),
        ({"num_attention_heads": 5}, "num_attention_heads: want a divisor"),
        ({"hidden_size": 48}, r"word_embeddings\.weight: want \[101, 48\], got \[101, 32\]"),
    ):
        path.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=text):
            from_tf(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
