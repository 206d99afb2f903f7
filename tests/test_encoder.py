"""Encoder: order, batches, arguments, and the vectors of sentence-transformers and transformers."""

import json
import shutil

import numpy as np
import pytest
import torch
from encoder_models import TEXTS, minilm, save_tiny

from bert_fast import BertForMaskedLM, BertModel, BertTokenizer, Encoder

MIXED = [
    "A man is playing a flute.",
    "",
    "  spaces\tand\nlines  ",
    "word " * 700,  # longer than is kept
    "naïve café — 東京 서울",
    "unaffable!",
    "x" * 150,
    "A man is playing a flute.",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def encoder(directory):
    return Encoder.from_pretrained(directory, device="cpu")


def with_modules(directory, tmp_path, pooling, *, normalize=True, old=True, **more):
    """Copy a model, and write sentence-transformers' files beside it."""
    copy = shutil.copytree(directory, tmp_path / "copy", dirs_exist_ok=True)
    package = "sentence_transformers.models." if old else "sentence_transformers.some.new.place."
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": package + kind}
        for i, kind in enumerate(kinds)
    ]
    (copy / "modules.json").write_text(json.dumps(modules))
    for name in paths[1:]:
        (copy / name).mkdir(exist_ok=True)
    (copy / "1_Pooling/config.json").write_text(json.dumps(pooling))
    for name, content in more.items():
        (copy / f"{name}.json").write_text(json.dumps(content))
    return copy


# --- the vectors ---------------------------------------------------------------------------------


def test_sentence_transformers_on_a_real_model():
    """The vectors of sentence-transformers' own loop, on texts of all kinds and lengths."""
    transformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    theirs = transformer(str(minilm()), device="cpu")
    ours = Encoder.from_pretrained(minilm(), device="cpu")
    texts = MIXED + TEXTS
    want, got = theirs.encode(texts), ours.encode(texts)
    assert got.dtype == np.float32 and got.shape == want.shape == (len(texts), 384)
    assert np.abs(got - want).max() < 1e-6
    assert ours.max_seq_length == theirs.max_seq_length == 256
    assert ours.get_sentence_embedding_dimension() == 384
    want = theirs.similarity(want[:3], want)
    assert torch.allclose(ours.similarity(got[:3], got), want, atol=1e-5)
    tokens = theirs.encode(texts[:3], output_value="token_embeddings")
    for one, other in zip(
        ours.encode(texts[:3], output_value="token_embeddings"), tokens, strict=True
    ):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("old", [True, False], ids=["old files", "new files"])
@pytest.mark.parametrize("modes", [("mean",), ("cls",), ("max",), ("cls", "mean")], ids="+".join)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "plain"])
def test_poolings_of_sentence_transformers(directory, tmp_path, modes, normalize, old):
    transformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    flags = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    pooling = {"embedding_dimension": 32, "pooling_mode": list(modes)}
    if old:
        pooling = {"word_embedding_dimension": 32}
        pooling |= {f"pooling_mode_{flag}": mode in modes for mode, flag in flags.items()}
    saved = with_modules(
        directory, tmp_path, pooling, normalize=normalize,
        sentence_bert_config={"max_seq_length": 24, "do_lower_case": False},
        config_sentence_transformers={"prompts": {"query": "the sea: "}},
    )  # fmt: skip
    ours = Encoder.from_pretrained(saved, device="cpu")
    theirs = transformer(str(saved), device="cpu").double()
    assert ours.max_seq_length == 24
    for prompt in ({}, {"prompt_name": "query"}, {"prompt": "of the whale "}):
        want, got = theirs.encode(MIXED, **prompt), ours.encode(MIXED, **prompt)
        assert got.dtype == np.float32 and np.abs(got - want).max() < 2e-6, prompt
    assert ours.get_sentence_embedding_dimension() == want.shape[1] == 32 * len(modes)


def test_transformers_with_mean_pooling(directory):
    """Without modules.json: the mean over the tokens of transformers' own model."""
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(MIXED, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        x = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None]
    want = (x * mask).sum(1) / mask.sum(1)
    got = Encoder.from_pretrained(directory, device="cpu").encode(MIXED, convert_to_tensor=True)
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes(directory, encoder, dtype):
    other = Encoder.from_pretrained(directory, device="cpu", dtype=dtype)
    got = other.encode(TEXTS, convert_to_tensor=True)
    assert got.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    bound = 1e-5 if dtype == "float64" else 0.1
    assert torch.allclose(got.float(), encoder.encode(TEXTS, convert_to_tensor=True), atol=bound)


# --- order, batches, kinds of result -------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_same_vector_in_any_batch(encoder, batch_size):
    """In the texts' order, whoever is beside them."""
    alone = np.stack([encoder.encode(text) for text in MIXED])
    assert np.abs(encoder.encode(MIXED, batch_size=batch_size) - alone).max() < 1e-5
    backwards = encoder.encode(MIXED[::-1], batch_size=batch_size)[::-1]
    assert np.abs(backwards - alone).max() < 1e-5
    assert np.abs(alone[0] - alone[-1]).max() == 0  # the same text
    assert np.abs(alone[0] - alone[1]).max() > 0.01


def test_equal_texts_are_computed_once(encoder, monkeypatch):
    """Each has its own vector and its own rows, all the same."""
    texts = [TEXTS[0], TEXTS[3], TEXTS[0], TEXTS[3], TEXTS[0]]
    expected = encoder.encode([TEXTS[0], TEXTS[3]])[[0, 1, 0, 1, 0]]
    seen, forward = [], encoder._forward
    monkeypatch.setattr(encoder, "_forward", lambda ids: seen.extend(ids) or forward(ids))
    assert (encoder.encode(texts) == expected).all() and len(seen) == 2
    rows = encoder.encode(texts, output_value="token_embeddings")
    assert len(seen) == 4 and torch.equal(rows[0], rows[4])
    rows[0].zero_()
    assert rows[2].any() and rows[4].any()


def test_batches_go_by_tokens(encoder, monkeypatch):
    """None holds more than its budget, each text is in one, like lengths are together."""
    seen = []
    forward = encoder._forward
    monkeypatch.setattr(encoder, "_forward", lambda ids: seen.append(ids) or forward(ids))
    words = ("sea", "the")  # of a token each, so that no two texts are equal
    texts = [" ".join([words[i // 50]] * (1 + i * 7 % 50)) for i in range(100)]
    encoder.encode(texts, batch_size=2)
    lengths = [len(row) for ids in seen for row in ids]
    assert lengths == sorted((3 + i * 7 % 50 for i in range(100)), reverse=True)
    budget = 2 * encoder.max_seq_length
    assert all(sum(map(len, ids)) <= budget for ids in seen)
    assert min(sum(map(len, ids)) for ids in seen[:-1]) > budget - max(lengths)


def test_kinds_of_result(encoder):
    D = encoder.get_sentence_embedding_dimension()
    array = encoder.encode(TEXTS)
    assert isinstance(array, np.ndarray) and array.shape == (len(TEXTS), D)
    tensor = encoder.encode(TEXTS, convert_to_tensor=True)
    assert torch.equal(tensor, torch.from_numpy(array)) and not tensor.requires_grad
    parts = encoder.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(parts, list) and torch.equal(torch.stack(parts), tensor)
    assert np.array_equal(encoder.encode(TEXTS[0]).shape, (D,))
    assert encoder.encode([]).shape == (0, D)
    assert encoder.encode([], convert_to_tensor=True).shape == (0, D)
    lengths = encoder.encode(TEXTS, normalize_embeddings=True)
    assert np.allclose(np.linalg.norm(lengths, axis=1), 1, atol=1e-6)
    assert not np.allclose(np.linalg.norm(array, axis=1), 1, atol=1e-3)
    assert encoder.encode(iter(TEXTS)).shape == array.shape


def test_specials_in_a_text_are_text(encoder):
    ids = encoder._tokenize(["[MASK] [SEP] sea"], "")[0]
    mask, sep = encoder.tokenizer.mask_token_id, encoder.tokenizer.sep_token_id
    assert mask not in ids and (ids == sep).sum() == 1


def test_a_progress_bar_when_asked(encoder, capsys):
    encoder.encode(TEXTS, show_progress_bar=True)
    shown = capsys.readouterr()
    assert f"{len(TEXTS)} of {len(TEXTS)} texts" in shown.err and not shown.out
    encoder.encode(TEXTS)
    assert capsys.readouterr().err == ""


def test_from_parts(directory, encoder):
    """An encoder made of a model and a tokenizer, told how to pool."""
    model, tokenizer = (
        BertModel.from_pretrained(directory),
        BertTokenizer.from_pretrained(directory),
    )
    made = Encoder(model, tokenizer)
    assert np.array_equal(made.encode(TEXTS), encoder.encode(TEXTS))
    made = Encoder(model, tokenizer, "cls", True, 8, {"query": "whale "}, "query")
    first = made.encode(TEXTS, output_value="token_embeddings")
    want = torch.stack([torch.nn.functional.normalize(rows[0], dim=0) for rows in first])
    assert torch.allclose(made.encode(TEXTS, convert_to_tensor=True), want, atol=1e-6)
    assert max(map(len, first)) == 8
    plain = Encoder(model, tokenizer, "cls", True, 8)
    given = plain.encode([f"whale {text}" for text in TEXTS])
    assert np.abs(made.encode(TEXTS) - given).max() < 1e-6
    assert "cls" in repr(made) and "32" in repr(made)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"sentences": ["a", None]}, TypeError, r"sentences\[1\]: want str, got NoneType"),
        ({"sentences": ["a", b"b"]}, TypeError, r"sentences\[1\]: want str, got bytes"),
        ({"sentences": ["a", "\ud800"]}, ValueError, "1"),
        ({"precision": "int8"}, ValueError, "precision: want float32, got 'int8'"),
        ({"output_value": "all"}, ValueError, "output_value: want sentence_embedding or"),
        ({"batch_size": 0}, ValueError, "batch_size: want 1 or more, got 0"),
        ({"prompt_name": "query"}, ValueError, "prompt_name: want none"),
    ],
    ids=str,
)
def test_refused_arguments(encoder, change, error, says):
    with pytest.raises(error, match=says):
        encoder.encode(**{"sentences": ["a"], **change})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pooling": "median"}, "pooling: want cls, mean, max"),
        ({"pooling": ()}, "pooling: want cls, mean, max"),
        ({"max_seq_length": 65}, "max_seq_length: want 3 to 64, got 65"),
        ({"max_seq_length": 2}, "max_seq_length: want 3 to 64, got 2"),
    ],
    ids=str,
)
def test_refused_options(directory, change, says):
    with pytest.raises(ValueError, match=says):
        Encoder.from_pretrained(directory, device="cpu", **change)


def test_a_tokenizer_of_another_model(directory):
    model = BertModel.from_pretrained(directory)
    tokenizer = BertTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<one>"])
    with pytest.raises(ValueError, match="tokenizer: want at most vocab_size"):
        Encoder(model, tokenizer)


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ({"modules": [*MODULES, DENSE]}, NotImplementedError, "got Transformer, Pooling, Dense"),
        ({"modules": MODULES[:1]}, NotImplementedError, "got Transformer"),
        ({"modules": {}}, ValueError, "modules.json: want a JSON array, got dict"),
        ({"modules": [1, 2]}, ValueError, "want a text at 'type'"),
        ({"modules": [MODULES[0], MODULES[1] | {"path": "../1_Pooling"}]}, ValueError, "folder"),
        ({"modules": [MODULES[0], MODULES[1] | {"path": "/tmp"}]}, ValueError, "want a folder"),
        ({"1_Pooling/config": {"pooling_mode": "lasttoken"}}, NotImplementedError, "lasttoken"),
        ({"1_Pooling/config": {}}, NotImplementedError, "want pooling by"),
        (
            {"1_Pooling/config": {"pooling_mode": "mean", "include_prompt": False}},
            NotImplementedError,
            "include_prompt: want true",
        ),
        ({"sentence_bert_config": {"max_seq_length": "9"}}, ValueError, "max_seq_length: want 3"),
        ({"config_sentence_transformers": {"prompts": ["a"]}}, ValueError, "prompts: want texts"),
        (
            {"config_sentence_transformers": {"default_prompt_name": "q"}},
            ValueError,
            "default_prompt_name: want one of prompts, got 'q'",
        ),
    ],
    ids=str,
)
def test_refused_files(directory, tmp_path, files, error, says):
    saved = with_modules(directory, tmp_path, {"pooling_mode": "mean"}, **files)
    with pytest.raises(error, match=says):
        Encoder.from_pretrained(saved, device="cpu")


def test_a_folder_that_is_a_link_elsewhere(directory, tmp_path):
    saved = with_modules(directory, tmp_path, {"pooling_mode": "mean"})
    shutil.move(saved / "1_Pooling", tmp_path / "elsewhere")
    (saved / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="want a folder beside it"):
        Encoder.from_pretrained(saved, device="cpu")


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["the [MASK] sea", "[MASK][MASK] whale.", f"[MASK] {'sea ' * 40}"], ids=len
)
@pytest.mark.parametrize("top_k", [1, 7])
def test_fill_mask_as_transformers(directory, encoder, text, top_k):
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForMaskedLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    pipeline = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    want, got = pipeline(text, top_k=top_k), encoder.fill_mask(text, top_k=top_k)
    flat = [x for row in want for x in row] if isinstance(want[0], list) else want
    ours = [x for row in got for x in row] if isinstance(got[0], list) else got
    assert [type(x) for x in want] == [type(x) for x in got]
    assert len(flat) == len(ours) == top_k * text.count("[MASK]")
    for one, other in zip(ours, flat, strict=True):
        assert one.pop("score") == pytest.approx(other.pop("score"), rel=1e-4)
        assert one == other


def test_fill_mask_of_several_texts(encoder):
    texts = ["the [MASK] sea", "a [MASK]"]
    assert encoder.fill_mask(texts, top_k=2) == [encoder.fill_mask(t, top_k=2) for t in texts]


def test_fill_mask_refused(directory, encoder, tmp_path):
    with pytest.raises(ValueError, match=r"want \[MASK\] in the text, got 'no mask'"):
        encoder.fill_mask("no mask")
    with pytest.raises(ValueError, match="want at most 64 tokens in the text, got 102"):
        encoder.fill_mask("sea " * 99 + "[MASK]")
    with pytest.raises(ValueError, match="top_k: want 1 to"):
        encoder.fill_mask("[MASK]", top_k=0)
    BertModel.from_pretrained(directory).save_pretrained(tmp_path)
    BertTokenizer.from_pretrained(directory).save_pretrained(tmp_path)
    headless = Encoder.from_pretrained(tmp_path, device="cpu")
    assert np.array_equal(headless.encode(TEXTS), encoder.encode(TEXTS))
    with pytest.raises(ValueError, match="want a model with a masked-LM head"):
        headless.fill_mask("[MASK]")


def test_no_warnings_of_heads(directory, recwarn):
    """What an encoder does not use is nobody's concern, and a missing weight raises."""
    Encoder.from_pretrained(directory, device="cpu")
    Encoder.from_pretrained(minilm(), device="cpu")
    assert not [w for w in recwarn if "the files" in str(w.message)]


def test_a_missing_weight_raises(directory, tmp_path):
    from bert_fast import checkpoint

    model = BertForMaskedLM.from_pretrained(directory)
    tensors = {n: t for n, t in model.state_dict().items() if "layer.1.output.dense" not in n}
    checkpoint.save_tensors(tmp_path, tensors, config=model.config)
    BertTokenizer.from_pretrained(directory).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="want every encoder weight"):
        Encoder.from_pretrained(tmp_path, device="cpu")
