"""What a run begins with: new weights, the padding of a vocabulary, a model that pairs fit into."""

import math
from collections import Counter

import pytest
import torch
import transformers
from training_cases import SIZES, VOCABULARY, checkpoints, corpus, folder, run, settings

from bert_fast.train.build import Texts, build_model


@pytest.fixture(scope="module")
def memory():
    with folder() as path:
        corpus(path / "corpus", documents=200)
        yield path


@pytest.fixture
def output():
    with folder() as path:
        yield path / "run"


def begun(memory, **model):
    """New weights by name, and the run's texts."""
    given = settings(memory / "corpus", "none", **{f"model__{k}": v for k, v in model.items()})
    texts = Texts(given)
    return build_model(given, given.model.bert_config(texts.vocab_size), texts).state_dict(), texts


def changed(weights, usual):
    return {name for name in usual if not torch.equal(weights[name], usual[name])}


def test_output_bias(memory):
    """Without what the model adds, a token is as likely as it is frequent."""
    (usual, texts), (weights, _) = begun(memory), begun(memory, output_bias="unigram")
    bias = "cls.predictions.bias", "cls.predictions.decoder.bias"
    assert changed(weights, usual) <= {*bias} and not usual[bias[0]].any()
    seen = Counter(id for s in texts.corpus.split("train").shards for id in s.tokens.tolist())
    expected = torch.tensor([seen[i] + 1 for i in range(len(VOCABULARY))], dtype=torch.float64)
    torch.testing.assert_close(
        weights[bias[0]].double().softmax(0), expected / expected.sum(), rtol=1e-5, atol=1e-8
    )
    entropy = -(expected / expected.sum() * weights[bias[0]].double().log_softmax(0)).sum()
    assert entropy == pytest.approx(texts.corpus.manifest["unigram_entropy"], abs=0.02)


def test_sinusoidal_positions(memory):
    """As large as random ones; alike by their distance alone, and the more the nearer they are."""
    (usual, _), (weights, _) = begun(memory), begun(memory, positions="sinusoidal")
    name = "bert.embeddings.position_embeddings.weight"
    assert changed(weights, usual) == {name}
    w = weights[name].double()
    P, D = w.shape
    assert w.square().mean().sqrt() == pytest.approx(0.02, rel=1e-5)  # of initializer_range
    alike = (w @ w.T) / (D * 0.02**2)
    for k in range(P):
        torch.testing.assert_close(alike.diagonal(k), alike[0, k].expand(P - k), rtol=0, atol=1e-5)
    expected = [
        sum(math.cos(k / 10000 ** (2 * i / D)) for i in range(D // 2)) / (D // 2) for k in range(P)
    ]
    torch.testing.assert_close(alike[0], torch.tensor(expected).double(), rtol=0, atol=1e-5)
    assert 1 == pytest.approx(alike[0, 0].item()) and (alike[0, :2].diff() < 0).all()


def test_padding_is_the_tokenizer_s(output):
    """[PAD] is the last word here: the word with id 0 learns, and files say so."""
    words = ["first", *VOCABULARY[1:], "[PAD]"]
    with folder() as path:
        corpus(path / "corpus", vocabulary=words)
        given = settings(path / "corpus", output)
        assert run(given) == 0
        texts = Texts(given)
        config = given.bert_config(texts.vocab_size, texts.pad_token_id)
        start = build_model(given, config, texts).bert.embeddings.word_embeddings.weight
    model = transformers.BertForPreTraining.from_pretrained(checkpoints(output)[-1])
    assert model.config.pad_token_id == len(words) - 1
    assert start[0].any() and not start[-1].any()
    assert (model.bert.embeddings.word_embeddings.weight[0] != start[0]).all()


def test_a_model_into_which_pairs_do_not_fit(memory, output):
    """It is told before the first step, also of the last phase."""
    texts, init = memory / "corpus", str(memory / "model")
    made = settings(texts, "none")
    build_model(made, made.bert_config(len(VOCABULARY)), Texts(made)).save_pretrained(init)
    short = {"steps": 1, "max_length": 8, "sequences": 2}
    changes = {"model": {"init": init}, "phases": [short, {**short, "max_length": 64}]}
    given = settings(texts, output, **changes)
    with pytest.raises(ValueError, match=r"phases\.1\.max_length: want at most 32, .* got 64"):
        run(given)
    with pytest.raises(ValueError, match="want type_vocab_size 2 for pairs, got 1"):
        settings(texts, output, model__config={**SIZES, "type_vocab_size": 1})
