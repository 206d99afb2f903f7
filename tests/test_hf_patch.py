"""`patch_transformers` accelerates whatever is made inside; and SentenceTransformers."""

import copy
import threading
import warnings

import numpy as np
import pytest
import torch
import transformers
from against_transformers import outside
from encoder_models import TEXTS, minilm
from hf_cases import BASES, LAYERS, at_real_tokens, config, form, packed, plain
from toy_text import VOCABULARY, sentences, tokenizer

import bert_fast

SENTENCES = "sentence_transformers"


def runs_packed(model, name="BertModel"):
    inputs, real = form(name, model)
    with packed() as rows:
        model(**inputs)
    assert rows in ([], [int(real.sum())] * LAYERS)
    return bool(rows)


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_from_pretrained(name, tmp_path):
    """By AutoModel, with the weights of the file; nothing outside of the block."""
    saved = plain(name)
    saved.save_pretrained(tmp_path)
    inputs, real = form(name, saved)
    expected = at_real_tokens(saved(**inputs), real)
    with bert_fast.patch_transformers():
        made = transformers.AutoModel.from_pretrained(tmp_path)
        assert not runs_packed(saved, name)
    later = transformers.AutoModel.from_pretrained(tmp_path)
    assert not runs_packed(later, name)
    assert runs_packed(made, name)
    assert outside(at_real_tokens(made.eval()(**inputs), real), expected) == {}
    bert_fast.restore(made)
    assert not runs_packed(made, name)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM"])
def test_from_config(name):
    with bert_fast.patch_transformers(strict=True):
        made = transformers.AutoModelForMaskedLM.from_config(config(name))
    assert type(made).__name__ == name and runs_packed(made, name)
    assert not runs_packed(bert_fast.restore(made), name)


@pytest.mark.parametrize(
    "name", ["BertForQuestionAnswering", "ElectraForTokenClassification", "XLMRobertaModel"]
)
def test_by_the_class(name):
    with bert_fast.patch_transformers():
        made = getattr(transformers, name)(config(name)).eval()
        assert runs_packed(made, name)
    assert runs_packed(made, name) and runs_packed(copy.deepcopy(made), name)


def test_fill_mask():
    """A pipeline's answers, in batches."""
    torch.manual_seed(0)
    saved = plain("BertForMaskedLM", vocab_size=len(VOCABULARY), pad_token_id=0)
    texts = ["the cat saw a [MASK].", "the [MASK] met a quick dog on the mat under the tree."]
    answers, runs = [], []
    for fast in (False, True):
        model = bert_fast.accelerate(copy.deepcopy(saved), strict=True) if fast else saved
        made = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer())
        with packed() as rows:
            answers.append(made(texts, batch_size=2))
        runs.append(len(rows))
    assert runs == [0, LAYERS]
    for one, two in zip(*answers, strict=True):
        assert [a["token_str"] for a in one] == [a["token_str"] for a in two]
        np.testing.assert_allclose([a["score"] for a in one], [a["score"] for a in two], rtol=1e-4)


def test_pipeline_that_loads_its_model(tmp_path):
    plain("BertForMaskedLM", vocab_size=len(VOCABULARY), pad_token_id=0).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with bert_fast.patch_transformers():
        made = transformers.pipeline("fill-mask", model=str(tmp_path))
    with packed() as rows:
        answers = made("the [MASK] saw a cat.")
    assert len(rows) == LAYERS and len(answers) == 5


@pytest.mark.parametrize("task", ["text-classification", "token-classification",
    "feature-extraction"])  # fmt: skip
def test_pipelines(task):
    name = {"text-classification": "BertForSequenceClassification",
        "token-classification": "DistilBertForTokenClassification",
        "feature-extraction": "RobertaModel"}[task]  # fmt: skip
    model = plain(name, vocab_size=len(VOCABULARY), pad_token_id=0)
    words, texts, answers = tokenizer(), sentences(5), []
    if not name.startswith("Bert"):
        words.model_input_names = ["input_ids", "attention_mask"]
    for fast in (False, True):
        if fast:
            bert_fast.accelerate(model, strict=True)
        made = transformers.pipeline(task, model=model, tokenizer=words)
        with packed() as rows:
            answers.append(made(texts, batch_size=3 if task != "feature-extraction" else 1))
        assert bool(rows) == fast
    assert close(*answers)


def close(one, two):
    if isinstance(one, dict):
        return [*one] == [*two] and all(close(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(close, one, two))
    return one == two or one == pytest.approx(two, rel=1e-4, abs=1e-5)


def test_decoder_made_inside():
    """It says at its first call that it is not accelerated, or with strict raises there."""
    inputs, _ = form("BertModel", plain())
    for strict in (False, True):
        with bert_fast.patch_transformers(strict=strict):
            made = transformers.BertModel(config("BertModel", is_decoder=True)).eval()
        if strict:
            with pytest.raises(NotImplementedError, match="decoder"):
                made(**inputs)
        else:
            with pytest.warns(UserWarning, match="decoder"):
                made(**inputs)


def test_other_models_are_left_alone():
    with bert_fast.patch_transformers(), warnings.catch_warnings():
        warnings.simplefilter("error")
        made = transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=5)
        )
        made(torch.arange(4)[None])


# --- the block -----------------------------------------------------------------------------------


def make():
    return transformers.BertModel(config("BertModel")).eval()


def test_nested_blocks():
    original = transformers.PreTrainedModel.post_init
    with bert_fast.patch_transformers():
        with bert_fast.patch_transformers():
            inner = make()
        between = make()
    after = make()
    assert [runs_packed(m) for m in (inner, between, after)] == [True, True, False]
    assert transformers.PreTrainedModel.post_init is original


def test_exception_inside():
    original = transformers.PreTrainedModel.post_init
    with pytest.raises(KeyError), bert_fast.patch_transformers():
        inside = make()
        raise KeyError
    assert transformers.PreTrainedModel.post_init is original
    assert runs_packed(inside) and not runs_packed(make())


def test_as_decorator_and_again():
    """A context manager of contextlib's is a decorator too."""
    patched = bert_fast.patch_transformers()(make)
    assert runs_packed(patched()) and runs_packed(patched()) and not runs_packed(make())


def test_blocks_of_two_threads():
    """A block that ends in one thread does not leave the other's behind."""
    original = transformers.PreTrainedModel.post_init
    entered, left = threading.Event(), threading.Event()

    def other():
        with bert_fast.patch_transformers():
            entered.set()
            left.wait(30)

    with bert_fast.patch_transformers():
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(30)
    left.set()
    thread.join(30)
    found = transformers.PreTrainedModel.post_init
    transformers.PreTrainedModel.post_init = original
    assert found is original


# --- SentenceTransformer -------------------------------------------------------------------------

REPEATED = [TEXTS[0], TEXTS[3], TEXTS[0], "", TEXTS[1], TEXTS[3], TEXTS[0]]


@pytest.fixture(scope="module")
def models():
    """A real model as it is, and accelerated."""
    transformer = pytest.importorskip(SENTENCES).SentenceTransformer
    original = transformer(str(minilm()), device="cpu")
    return original, bert_fast.accelerate(copy.deepcopy(original), strict=True)


def same(found, expected):
    """The same types, lengths and, within 1e-5, numbers."""
    assert type(found) is type(expected)
    if isinstance(found, list):
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            same(one, two)
    elif isinstance(found, dict):
        assert [*found] == [*expected]
        for key in found:
            same(found[key], expected[key])
    elif isinstance(found, np.ndarray | torch.Tensor):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        torch.testing.assert_close(
            torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-5, atol=1e-5
        )
    else:
        assert found == expected


OPTIONS = {
    "plain": {},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "token embeddings": {"output_value": "token_embeddings"},
    "everything": {"output_value": None},
    "prompt": {"prompt": "query: "},
    "normalised": {"normalize_embeddings": True},
    "small batches": {"batch_size": 2},
    "int8": {"precision": "int8"},
    "truncated": {"truncate_dim": 32},
}
GIVEN = {
    "repeated": REPEATED,
    "once each": TEXTS,
    "tuple": tuple(REPEATED),
    "one": TEXTS[0],
    "one in a list": TEXTS[:1],
    "array": np.array(REPEATED),
    "nothing": [],
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*calibration")
@pytest.mark.parametrize("key", OPTIONS)
def test_encode(models, key):
    """For whatever is given, the original's answers in the original's types."""
    original, fast = models
    options = OPTIONS[key]
    for name, texts in GIVEN.items():
        if key == "int8" and name != "repeated":
            continue
        expected = original.encode(texts, **options)
        with packed() as rows:
            found = fast.encode(texts, **options)
        assert rows or name == "nothing", name
        if key == "int8":
            assert found.dtype == expected.dtype
            assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
        elif key == "everything":  # ids and masks of a batch are as wide as its longest text
            compare_everything(found, expected)
        else:
            same(found, expected)


def compare_everything(found, expected):
    if isinstance(expected, dict):
        found, expected = [found], [expected]
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert {*one} == {*two}
        same(one["sentence_embedding"], two["sentence_embedding"])
        tokens, mask = two["token_embeddings"], two["attention_mask"].bool()
        same(one["token_embeddings"][one["attention_mask"].bool()], tokens[mask])


def test_equal_texts_are_encoded_once(models):
    original, fast = models
    counts = []
    for model in (original, fast):
        seen = []
        hook = model[0].register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(len(args[0]["input_ids"]))
        )
        model.encode(REPEATED)
        hook.remove()
        counts.append(sum(seen))
    assert counts == [len(REPEATED), len({*REPEATED})]


@pytest.mark.parametrize("options", [{"convert_to_tensor": True}, {"convert_to_numpy": False}, {},
    {"output_value": "token_embeddings"}, {"output_value": None}], ids=str)  # fmt: skip
def test_places_of_a_text_share_no_memory(models, options):
    found = models[1].encode([TEXTS[0], TEXTS[0]], **options)
    if isinstance(found[0], dict):
        found = [row["token_embeddings"] for row in found]
    kept = copy.deepcopy(found[1])
    found[0][:] = 7
    assert (found[1] == kept).all()


def test_by_keyword(models):
    original, fast = models
    (name, *_) = __import__("inspect").signature(original.encode).parameters
    same(fast.encode(**{name: REPEATED}), original.encode(**{name: REPEATED}))


def test_prompts_by_name(models):
    for model in models:
        model.prompts["query"] = "query: "
    original, fast = models
    same(fast.encode(REPEATED, prompt_name="query"), original.encode(REPEATED, prompt_name="query"))
    for method in ("encode_query", "encode_document"):
        if hasattr(original, method):
            same(getattr(fast, method)(REPEATED), getattr(original, method)(REPEATED))


def test_pairs(models):
    """A text may be a pair of texts: the original decides what to make of it."""
    original, fast = models
    pairs = [[TEXTS[0], TEXTS[1]], [TEXTS[0], TEXTS[1]]]
    same(fast.encode(pairs), original.encode(pairs))


def test_restored(models):
    original, fast = models
    method = type(original).encode
    plain_again = bert_fast.restore(copy.deepcopy(fast))
    with packed() as rows:
        same(plain_again.encode(REPEATED), original.encode(REPEATED))
    assert not rows and type(original).encode is method  # the other is still accelerated
    assert [*map(type, plain_again.modules())] == [*map(type, original.modules())]


def test_made_inside_the_block():
    transformer = pytest.importorskip(SENTENCES).SentenceTransformer
    original = transformer(str(minilm()), device="cpu")
    with bert_fast.patch_transformers():
        fast = transformer(str(minilm()), device="cpu")
    with packed() as rows:
        found = fast.encode(REPEATED)
    assert rows
    same(found, original.encode(REPEATED))


def test_training_of_sentences(models):
    """Gradients through pooling and normalisation."""
    original, fast = (copy.deepcopy(model) for model in models)
    grads = []
    for model in (original, fast):
        features = model.tokenize(TEXTS[:3])
        out = model(features)["sentence_embedding"]
        (out[0] @ out[1] - out[1] @ out[2]).backward()
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert [*grads[0]] == [*grads[1]] and outside(grads[1], grads[0]) == {}
