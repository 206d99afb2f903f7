"""Hooks on what an accelerated model calls: they fire, with rows, and the rest stays fused."""

import warnings

import pytest
import torch
from hf_cases import check, form, plain, register
from torch import nn

import bert_fast

LEAVES = {
    "BertForMaskedLM": ["embeddings.word_embeddings", "embeddings.position_embeddings",
        "embeddings.token_type_embeddings", "embeddings.LayerNorm", "embeddings.dropout",
        *(f"encoder.layer.1.{leaf}" for leaf in ("attention.self.query", "attention.self.value",
          "attention.output.dense", "attention.output.LayerNorm", "attention.output.dropout",
          "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense",
          "output.dropout", "output.LayerNorm")),
    ],
    "DistilBertForMaskedLM": ["embeddings.word_embeddings", "embeddings.LayerNorm",
        *(f"transformer.layer.1.{leaf}" for leaf in ("attention.q_lin", "attention.out_lin",
          "sa_layer_norm", "ffn.lin1", "ffn.activation", "ffn.lin2", "ffn.dropout",
          "output_layer_norm")),
    ],
    "ElectraForMaskedLM": ["embeddings_project", "encoder.layer.0.attention.self.key"],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["pre", "forward", "backward"])
@pytest.mark.parametrize("name", LEAVES)
def test_hooks_on_leaves(name, kind):
    """They do not stop acceleration: they fire, with rows (T, ...), and may change them."""
    model = plain(name)
    inputs, real = form(name, model, padding="holes")
    T = int(real.sum())
    for path in LEAVES[name]:
        leaf, shapes = model.base_model.get_submodule(path), []
        if kind == "pre":
            hook = leaf.register_forward_pre_hook(lambda m, args, s=shapes: s.append(args[0].shape))
        elif kind == "forward":
            hook = leaf.register_forward_hook(lambda m, args, out: 1.1 * out)
            seen = leaf.register_forward_hook(lambda m, args, out, s=shapes: s.append(out.shape))
        elif "embeddings" in path.rpartition(".")[2]:
            continue  # its input has no gradient
        else:
            hook = leaf.register_full_backward_hook(lambda m, i, o, s=shapes: s.append(o[0].shape))
        check(model, inputs, real)
        (_, packed_shape) = shapes
        assert T in packed_shape[:2] and packed_shape.numel() // packed_shape[-1] in (T, 1, 4 * 11)
        hook.remove()
        if kind == "forward":
            seen.remove()


HEAD = {
    "BertForMaskedLM": ("cls.predictions", ["transform", "transform.dense", "transform.LayerNorm",
        "transform.transform_act_fn", "decoder"]),
    "RobertaForMaskedLM": ("lm_head", ["dense", "layer_norm", "decoder"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["forward", "instance"])
@pytest.mark.parametrize("name", HEAD)
def test_hooks_in_the_head(name, kind):
    """Wherever they are in a masked-LM head, they fire."""
    model = plain(name)
    inputs, real = form(name, model)
    path, parts = HEAD[name]
    silent = []
    for part in ["", *parts]:
        fired = []
        module = model.get_submodule(f"{path}.{part}".rstrip("."))
        remove = register(module, kind, fired)
        expected = model(**inputs).logits
        assert fired
        del fired[:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bert_fast.accelerate(model)
            found = model(**inputs).logits
        torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
        if not fired:
            silent.append(part)
        bert_fast.restore(model)
        remove()
    assert not silent


def test_replaced_transform_of_the_head():
    model = plain("BertForMaskedLM")
    model.cls.predictions.transform = nn.Linear(32, 32)
    inputs, real = form("BertForMaskedLM", model)
    expected = model(**inputs).logits
    bert_fast.accelerate(model)
    torch.testing.assert_close(model(**inputs).logits[real], expected[real], rtol=1e-5, atol=1e-5)


def test_pooler_of_the_same_name():
    """A pooler of somebody else's gets padded states, as its original does."""

    class BertPooler(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.activation = nn.Linear(32, 32), nn.Tanh()

        def forward(self, hidden):
            return self.activation(self.dense(hidden.mean(1)))

    model = plain()
    model.pooler = BertPooler()
    check(model, *form("BertModel", model, padding="none"))


@pytest.mark.parametrize("path", ["pooler", "pooler.dense", "pooler.activation"])
def test_hooks_on_the_pooler(path):
    model, fired = plain(), []
    module = model.get_submodule(path)
    module.register_forward_hook(lambda m, args, out: fired.append(1) or 1.1 * out)
    check(model, *form("BertModel", model))
    assert len(fired) == 2


@pytest.mark.parametrize("how", ["written", "replaced"])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "BertForPreTraining"])
def test_output_changed_on_its_way_to_the_head(name, how):
    """A hook on the base model, which writes into its hidden states or returns others."""
    if (name, how) == ("BertForPreTraining", "written"):
        pytest.skip("the original's pooler needs what is written to for its gradient")
    model = plain(name)

    def change(module, args, output):
        hidden = output[0]
        if how == "written":
            hidden.mul_(2)
        else:
            output["last_hidden_state"] = 2 * hidden

    without = model(**(inputs := form(name, model)[0]))[0]
    model.base_model.register_forward_hook(change)
    real = inputs["attention_mask"].bool()
    found = check(model, inputs, real)
    assert not torch.allclose(next(iter(found.values())), without[real], atol=1e-2)
