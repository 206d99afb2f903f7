"""In the batch-invariant mode a text has the same bits alone and in any batch, whole models too."""

import random
from collections.abc import Iterator

import pytest
import torch
from against_transformers import CLASSES, pair
from encoder_models import TEXTS, save_tiny
from interpreter_tools import in_long
from padded_texts import LAYOUTS, Text, lay_out, make_text, padded

from bert_fast import Encoder, batch_invariant
from bert_fast.encode.pooling import pool
from bert_fast.ops import invariant, products

ON_GPU = torch.cuda.is_available()
FP32, BF16 = torch.float32, torch.bfloat16
MOST = 24  # tokens of a text
Parts = list[dict[str, torch.Tensor]]  # what a model gives for each text

needs_onednn = pytest.mark.skipif(not products._has_onednn(), reason="PyTorch without oneDNN")
each_library = pytest.mark.parametrize(
    ("library", "dtype"),
    [
        ("blas", FP32),
        pytest.param("onednn", FP32, marks=needs_onednn),
        pytest.param("onednn", BF16, marks=needs_onednn),
        pytest.param("blas", BF16, marks=pytest.mark.long),
        pytest.param("blas", torch.float64, marks=pytest.mark.long),
        pytest.param("blas", torch.float16, marks=pytest.mark.long),
    ],
    indirect=["library"],
    ids=str,
)


@pytest.fixture
def library(request, compiled, monkeypatch) -> Iterator[str]:
    """The one that multiplies, 16 bits too; between the products runs the extension."""
    if request.param == "blas":
        monkeypatch.setattr(products, "_has_bf16", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with products.fixed_cpu_library(request.param):
        yield request.param
    torch.set_num_threads(threads)


def texts_of(seed: int, count: int) -> list[Text]:
    """The first of one token: a matrix times a vector, for which libraries have other kernels."""
    torch.manual_seed(seed)
    return [make_text(n) for n in (1, MOST, *torch.randint(1, MOST + 1, (count - 2,)).tolist())]


def split(found: dict[str, torch.Tensor], texts: list[Text]) -> Parts:
    """What was found of each text: its row of "pooled", and its tokens' rows of all else."""
    lengths = [text.length for text in texts]
    by_text = {n: t if n == "pooled" else t.split(lengths) for n, t in found.items()}
    return [{name: by_text[name][i] for name in by_text} for i in range(len(texts))]


def forward(model, texts: list[Text], layout: str) -> Parts:
    inputs, real = lay_out(texts, layout, None if layout == "packed" else MOST + 3)
    inputs = {n: t.to(model.device) if torch.is_tensor(t) else t for n, t in inputs.items()}
    with torch.no_grad():
        out = model(**inputs)
    hidden = out.last_hidden_state[real.to(model.device)]
    return split({"hidden": hidden, "pooled": out.pooler_output}, texts)


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    assert got.keys() == expected.keys()
    return all(torch.equal(got[name], expected[name]) for name in got)


def differing(model, batches: int, seed: int = 0, most: int = 64, count: int = 40) -> int:
    """In how many batches of 2 to `most` of `count` texts some text is not as it is alone."""
    rng, texts = random.Random(seed), texts_of(seed, count)
    alone = [forward(model, [text], "right")[0] for text in texts]
    found = 0
    for _ in range(batches):
        chosen = rng.choices(range(len(texts)), k=rng.randrange(2, most + 1))
        got = forward(model, [texts[i] for i in chosen], rng.choice(LAYOUTS))
        found += not all(same(part, alone[i]) for i, part in zip(chosen, got, strict=True))
    return found


# --- a text alone, and in a batch ----------------------------------------------------------------


@each_library
@pytest.mark.parametrize("batches", [30, *in_long(200)])
def test_a_text_in_any_batch(library, dtype, batches):
    model = pair(dtype=dtype)[1]
    with batch_invariant():
        assert differing(model, batches) == 0


@pytest.mark.long
@each_library
@pytest.mark.parametrize("threads", [2, 3])
def test_by_any_number_of_threads(library, dtype, threads):
    torch.set_num_threads(threads)
    with batch_invariant():
        assert differing(pair(dtype=dtype)[1], 40, seed=threads) == 0


def by_halves(rows, multiply, x, w, b):
    """A product whose sums depend on the batch: of many rows each is made in two halves."""
    if len(x) < 2 * MOST:
        return multiply(x, w, b)
    first, half = x.clone(), x.shape[1] // 2
    first[:, half:] = 0
    return multiply(first, w, b) + multiply(x - first, w, None)


@each_library
def test_a_product_that_depends_on_the_batch_shows(library, dtype, monkeypatch):
    monkeypatch.setattr(invariant, "in_calls", by_halves)
    model = pair(dtype=dtype)[1]
    with batch_invariant():
        assert differing(model, 6) >= 4


@each_library
def test_without_the_mode(library, dtype):
    """What it is for."""
    with batch_invariant(False):
        if not differing(pair(dtype=dtype)[1], 12):
            pytest.skip(f"{library} gives {dtype} rows of these sizes the same bits by itself here")


@each_library
def test_heads(library, dtype):
    for name in CLASSES[1:-1]:
        model = pair(name, dtype=dtype, **({"num_labels": 3} if "Class" in name else {}))[1]
        texts = texts_of(1, 12)
        with batch_invariant(), torch.no_grad():
            alone = [head_outputs(model, [text], "right")[0] for text in texts]
            for layout in LAYOUTS[:-1]:
                order = torch.randperm(len(texts)).tolist()
                got = head_outputs(model, [texts[i] for i in order], layout)
                for i, part in zip(order, got, strict=True):
                    assert same(part, alone[i]), (name, layout)


def head_outputs(model, texts: list[Text], layout: str) -> Parts:
    """The logits of each text, those of tokens where they are."""
    inputs, real = padded(texts, layout, MOST + 3)
    out = {n: t for n, t in model(**inputs).items() if t.is_floating_point()}
    assert out
    return [
        {n: t[i, real[i]] if t.shape[:2] == real.shape else t[i] for n, t in out.items()}
        for i in range(len(texts))
    ]


@each_library
@pytest.mark.parametrize("pooling", ["mean", ("cls", "max")], ids=str)
def test_vectors(library, dtype, pooling, tmp_path):
    """Of an Encoder, pooled and of length 1."""
    if dtype == torch.float16:
        pytest.skip("segment_reduce has no fp16")
    save_tiny(tmp_path)
    encoder = Encoder.from_pretrained(
        tmp_path, device="cpu", dtype=dtype, pooling=pooling, normalize=True
    )
    texts = [" ".join(TEXTS[i % 6 :])[: 5 * i + 2] for i in range(18)]
    rng = random.Random(0)
    with batch_invariant():
        alone = [encoder.encode(text, convert_to_tensor=True) for text in texts]
        for batch_size in (1, 3, 32, 32):
            chosen = rng.choices(range(len(texts)), k=rng.randrange(2, 65))
            got = encoder.encode(
                [texts[i] for i in chosen], batch_size=batch_size, convert_to_tensor=True
            )
            assert torch.equal(got, torch.stack([alone[i] for i in chosen]))


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_lengths_of_vectors(rows, kernel_device):
    """Zeros stay zeros."""
    pytest.importorskip("triton")
    x = torch.randn(rows, 40, device=kernel_device) + 0.5
    x[0] = 0
    with batch_invariant(), torch.autocast(kernel_device, BF16):
        got = pool(x, torch.ones(rows, dtype=torch.int64, device=kernel_device), ["cls"], True)
    torch.testing.assert_close(got, torch.nn.functional.normalize(x, dim=1))


# --- padded, unpadded and packed, forward and backward -------------------------------------------


def backward(model, texts: list[Text], given: Parts, layout: str) -> Parts:
    """Outputs, and gradients of the embeddings; embeddings and gradients of outputs are given."""
    inputs, real = lay_out(texts, layout, None if layout == "packed" else MOST + 3)
    values = {name: torch.cat([part[name] for part in given]) for name in given[0]}
    embeds = torch.zeros(*inputs.pop("input_ids").shape, 32, dtype=model.dtype)
    embeds[real] = values["embeds"]
    out = model(**inputs, inputs_embeds=embeds.requires_grad_())
    hidden = out.last_hidden_state
    d_hidden = torch.zeros_like(hidden)
    d_hidden[real] = values["d_hidden"]
    grads = [d_hidden, values["d_pooled"]]
    (d_embeds,) = torch.autograd.grad([hidden, out.pooler_output], embeds, grads)
    assert not d_embeds[~real].any()
    found = {"hidden": hidden[real], "pooled": out.pooler_output, "d_embeds": d_embeds[real]}
    return split({name: t.detach() for name, t in found.items()}, texts)


@each_library
@pytest.mark.parametrize("batches", [10, *in_long(300)])
def test_layouts_and_gradients(library, dtype, batches):
    """Alone, and padded on the right, on the left, in holes, and packed: the same bits."""
    model, rng = pair(dtype=dtype)[1].train(), random.Random(0)
    texts = texts_of(2, 24)
    given = [
        {
            "embeds": torch.randn(text.length, 32).to(dtype),
            "d_hidden": torch.randn(text.length, 32).to(dtype),
            "d_pooled": torch.randn(1, 32).to(dtype),
        }
        for text in texts
    ]
    with batch_invariant():
        alone = [backward(model, [t], [g], "right")[0] for t, g in zip(texts, given, strict=True)]
        for _ in range(batches):
            chosen = rng.choices(range(len(texts)), k=rng.randrange(2, 33))
            for layout in LAYOUTS:
                some = [texts[i] for i in chosen], [given[i] for i in chosen]
                for i, part in zip(chosen, backward(model, *some, layout), strict=True):
                    assert same(part, alone[i]), layout


# --- by the kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16 if ON_GPU else FP32], ids=str)
def test_kernels(dtype, kernel_device):
    """By our products on a GPU 500 batches; elsewhere two small ones, in Triton's interpreter."""
    pytest.importorskip("triton")
    model = pair(dtype=dtype)[1].to(kernel_device)
    sizes = {"batches": 500} if ON_GPU else {"batches": 2, "most": 3, "count": 3}
    with batch_invariant():
        assert differing(model, **sizes) == 0
