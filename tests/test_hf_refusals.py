"""What cannot be accelerated runs its original code, to the bit, and says so once; or raises."""

import functools
import warnings

import pytest
import torch
import transformers
from hf_cases import BASES, LAYERS, V5, at_real_tokens, form, packed, plain, register
from torch import nn

import bert_fast

every_base = pytest.mark.parametrize("name", BASES)


def tensors(output):
    return at_real_tokens(output, torch.ones(0, 0))


def said(caught):
    """The reasons that were given."""
    return [str(w.message) for w in caught if "bert_fast" in str(w.message)]


def refuses(model, inputs, reason, *, at_once=False):
    """A model runs its original code on these inputs, and says why once; with strict it raises.

    Args:
        model: not accelerated yet.
        inputs: of a call.
        reason: part of what it says.
        at_once: whether `accelerate` knows.
    """
    expected = tensors(model(**inputs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert bert_fast.accelerate(model) is model
        assert len(said(caught)) == at_once
        with packed() as rows:
            for _ in range(3):
                found = tensors(model(**inputs))
                assert [*found] == [*expected]
                assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not rows
    (message,) = said(caught)
    assert reason in message and type(model).__name__.split("For")[0] in message
    assert issubclass(
        next(w.category for w in caught if "bert_fast" in str(w.message)), UserWarning
    )
    bert_fast.restore(model)
    if at_once:
        with pytest.raises(NotImplementedError, match=reason):
            bert_fast.accelerate(model, strict=True)
    else:
        bert_fast.accelerate(model, strict=True)
        for _ in range(2):
            with pytest.raises(NotImplementedError, match=reason):
                model(**inputs)
    bert_fast.restore(model)
    assert torch.equal(next(iter(tensors(model(**inputs)).values())), next(iter(expected.values())))


def still_fast(model, inputs, real):
    """On other inputs the model is accelerated."""
    bert_fast.accelerate(model, strict=True)
    with packed() as rows:
        model(**inputs)
    assert rows == [int(real.sum())] * LAYERS
    bert_fast.restore(model)


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "XLMRobertaModel", "ElectraModel"])
def test_decoder(name):
    model = plain(name, is_decoder=True)
    inputs, _ = form(name, model)
    refuses(model, inputs | {"use_cache": False}, "decoder", at_once=True)


def test_cross_attention():
    model = plain(is_decoder=True, add_cross_attention=True)
    inputs, _ = form("BertModel", model)
    states = {"encoder_hidden_states": torch.randn(4, 3, 32), "use_cache": False}
    refuses(model, inputs | states, "decoder", at_once=True)


@pytest.mark.skipif(V5, reason="transformers 5 has absolute positions only")
@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
@pytest.mark.parametrize("name", ["BertModel", "ElectraModel"])
def test_relative_positions(name, kind):
    model = plain(name, position_embedding_type=kind)
    inputs, _ = form(name, model)
    refuses(model, inputs, "relative_key", at_once=True)


def test_encoder_in_a_model_with_a_decoder():
    """The encoder is accelerated, its decoder is not, and says so."""
    encoder, decoder = plain(), plain("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    inputs, real = form("BertModel", encoder)
    inputs.pop("token_type_ids")
    inputs["decoder_input_ids"] = torch.randint(2, 101, (4, 3))
    expected = model(**inputs).logits
    with pytest.warns(UserWarning, match="decoder"):
        bert_fast.accelerate(model)
    with packed() as rows:
        found = model(**inputs).logits
    assert rows == [int(real.sum())] * LAYERS
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Halved(nn.Module):
    """Attention of somebody else's."""

    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, *args, **kwargs):
        first, *rest = self.original(*args, **kwargs)
        return 0.5 * first, *rest


@every_base
def test_replaced_attention(name):
    model = plain(name)
    layers = model.transformer.layer if name == "DistilBertModel" else model.encoder.layer
    if name == "DistilBertModel":
        layers[1].attention = Halved(layers[1].attention)
    else:
        layers[1].attention.self = Halved(layers[1].attention.self)
    inputs, _ = form(name, model)
    refuses(model, inputs, "Halved", at_once=True)


def test_attention_of_the_same_name():
    model = plain()
    own = model.encoder.layer[0].attention.self
    own.__class__ = type("BertSelfAttention", (type(own),), {"forward": Halved.forward})
    own.original = functools.partial(type(own).__mro__[1].forward, own)
    inputs, _ = form("BertModel", model)
    refuses(model, inputs, "BertSelfAttention", at_once=True)


@pytest.mark.skipif(not V5, reason="transformers 4 has no such attention of BERT")
def test_attention_by_a_name_of_ones_own():
    """An attention that somebody registered computes something else."""

    def halved(module, query, key, value, mask, **options):
        return 0.5 * value.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("halved", halved)
    model = plain()
    model.set_attn_implementation("halved")
    inputs, _ = form("BertModel", model, padding="none")
    refuses(model, inputs, "halved", at_once=True)


def test_forward_of_a_class_replaced(monkeypatch):
    """By a program that patches transformers too."""
    model = plain()
    inputs, _ = form("BertModel", model)
    cls = type(model.encoder.layer[0].intermediate)
    original = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: 0.5 * original(self, x))
    refuses(model, inputs, "forward", at_once=True)


INNER = {
    "bert": ["embeddings", "encoder", *(f"encoder.layer.1{part}" for part in (
        "", ".attention", ".attention.self", ".attention.output", ".intermediate", ".output"
    ))],
    "distilbert": ["embeddings", "transformer", *(f"transformer.layer.1{part}" for part in (
        "", ".attention", ".ffn"
    ))],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["pre", "forward", "backward", "instance"])
@pytest.mark.parametrize("family", INNER)
def test_hooks_on_what_is_not_called(family, kind):
    """Of each module between the model and its leaves; without the hook the model is fast again."""
    name = {"bert": "BertModel", "distilbert": "DistilBertModel"}[family]
    model = plain(name)
    inputs, real = form(name, model)
    for path in INNER[family]:
        fired = []
        remove = register(model.get_submodule(path), kind, fired)
        refuses(model, inputs, "hooks", at_once=True)
        assert fired or kind == "backward"
        remove()
        still_fast(model, inputs, real)


def test_hook_that_comes_later():
    """A hook is seen at the next call, and only as long as it is there."""
    model = plain()
    inputs, real = form("BertModel", model)
    still_fast(model, inputs, real)
    bert_fast.accelerate(model)
    fired = []
    hook = model.encoder.layer[0].register_forward_hook(lambda *_: fired.append(1))
    with pytest.warns(UserWarning, match="hooks"), packed() as rows:
        model(**inputs)
    assert fired and not rows
    hook.remove()
    with packed() as rows:
        model(**inputs)
    assert len(rows) == LAYERS


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_of_all_modules(kind):
    model, fired = plain(), []
    inputs, real = form("BertModel", model)
    hook = getattr(nn.modules.module, f"register_module_{kind}")(lambda m, *_: fired.append(m))
    try:
        refuses(model, inputs, "all modules", at_once=True)
        assert model.encoder.layer[0].attention.self.query in fired or "backward" in kind
    finally:
        hook.remove()
    still_fast(model, inputs, real)


# --- what it is given ----------------------------------------------------------------------------

_mask = torch.ones(4, 11).tril(7).bool()
GIVEN = {
    "4-D mask": ({"attention_mask": _mask[:, None, None].expand(4, 1, 11, 11)}, "attention_mask"),
    "starts with padding": ({"attention_mask": _mask.flip(1).long()}, "begins with padding"),
    "another argument": ({"purpose": 3}, "purpose"),
    "another tensor": ({"purpose": torch.ones(3)}, "purpose"),
    "encoder's states": (
        {"encoder_hidden_states": torch.randn(4, 11, 32)}, "encoder_hidden_states"
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", GIVEN)
@pytest.mark.parametrize("name", ["BertModel", "BertForTokenClassification", "RobertaModel"])
def test_what_it_is_given(name, key):
    if not V5 and key in ("4-D mask", "another argument", "another tensor"):
        pytest.skip("transformers 4 refuses it")
    if not V5 and key == "encoder's states" and "For" in name:
        pytest.skip("the original's head does not hand them on")
    model = plain(name)
    inputs, real = form(name, model)
    given, reason = GIVEN[key]
    refuses(model, inputs | given, reason)
    still_fast(model, inputs, real)


@pytest.mark.skipif(V5, reason="transformers 5 takes no mask (B, L, L)")
def test_mask_by_query_and_key():
    model = plain()
    inputs, _ = form("BertModel", model)
    refuses(model, inputs | {"attention_mask": _mask[:, None].expand(4, 11, 11)}, "attention_mask")


def test_past_keys():
    """A cache without a place for it: what the original makes of it, if it takes it."""
    model = plain()
    inputs, _ = form("BertModel", model, padding="none")
    bert_fast.accelerate(model, strict=True)
    with pytest.raises(NotImplementedError, match="past_key_values"):
        model(**inputs, past_key_values=transformers.DynamicCache())


def test_two_reasons():
    """Each is said once."""
    model = bert_fast.accelerate(plain())
    inputs, _ = form("BertModel", model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for key in ("starts with padding", "another argument"):
                model(**inputs | GIVEN[key][0])
    assert len(said(caught)) == 2


def test_what_the_original_refuses():
    """Neither of two inputs, or both: its own error."""
    model = bert_fast.accelerate(plain())
    inputs, _ = form("BertModel", model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="input_ids"):
            model(**inputs, inputs_embeds=torch.randn(4, 11, 32))
        with pytest.raises(ValueError, match="input_ids"):
            model()


def test_meta_device():
    model = plain().to("meta")
    ids = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    mask = None if V5 else torch.ones_like(ids)  # each looks for padding where the other does not
    bert_fast.accelerate(model)
    with pytest.warns(UserWarning, match="meta"):
        assert model(ids, mask).last_hidden_state.shape == (2, 3, 32)
    bert_fast.accelerate(model, strict=True)
    with pytest.raises(NotImplementedError, match="meta"):
        model(ids, mask)


def test_export():
    """What is exported is the original, without an op of ours in it."""
    model = plain()
    inputs, _ = form("BertModel", model, padding="none")
    expected = model(**inputs).last_hidden_state
    bert_fast.accelerate(model)
    exported = torch.export.export(model, (), inputs)
    assert not [node for node in exported.graph.nodes if "bert_fast" in str(node.target)]
    torch.testing.assert_close(exported.module()(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_export_of_a_head(name):
    model = plain(name)
    inputs, _ = form(name, model, padding="none")
    bert_fast.accelerate(model)
    exported = torch.export.export(model, (), inputs)
    assert not [node for node in exported.graph.nodes if "bert_fast" in str(node.target)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing():
    model = plain(return_dict=False)
    ids = torch.randint(2, 101, (2, 5))
    expected = model(ids)[0]
    bert_fast.accelerate(model)
    with packed() as rows, pytest.warns(UserWarning, match="exported"):
        traced = torch.jit.trace(model, ids, check_trace=False, strict=False)
    assert not rows
    torch.testing.assert_close(traced(ids)[0], expected)


# --- nothing to accelerate -----------------------------------------------------------------------


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.ReLU()], ids=lambda m: type(m).__name__)
def test_nothing_to_accelerate(model):
    before = dict(vars(model))
    with pytest.warns(UserWarning, match="nothing is accelerated"):
        assert bert_fast.accelerate(model) is model
    with pytest.raises(NotImplementedError, match="nothing is accelerated"):
        bert_fast.accelerate(model, strict=True)
    assert bert_fast.restore(model) is model and vars(model) == before


@pytest.mark.parametrize("model", [None, "BertModel", transformers.BertModel])
def test_no_module(model):
    with pytest.raises(TypeError, match="Module"):
        bert_fast.accelerate(model)


def test_a_refused_model_is_left_alone():
    """`accelerate` that raises has changed nothing: the model still runs."""
    model = plain(is_decoder=True)
    inputs, _ = form("BertModel", model)
    with pytest.raises(NotImplementedError):
        bert_fast.accelerate(model, strict=True)
    model(**inputs)
