"""`register_attention`: the same answers as eager attention, and never without the padding mask."""

import pytest
import torch
import transformers
from against_transformers import (
    at_real_tokens,
    batch,
    hf_config,
    outside,
    perturb,
    run,
)
from transformers import AttentionInterface, AttentionMaskInterface

import bert_fast
from bert_fast import ops
from bert_fast.hf.attention import _layouts, attention, padding_mask

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5,
    reason="BERT takes an attention by name from transformers 5 on",
)


@pytest.fixture(autouse=True)
def name():
    assert bert_fast.register_attention() == bert_fast.register_attention() == "bert_fast"
    return "bert_fast"


def pair(cls="BertModel", dtype=torch.float32, **fields):
    """The same weights with eager attention and with ours."""
    make = getattr(transformers, cls)._from_config
    eager = perturb(make(hf_config(**fields), attn_implementation="eager")).to(dtype).eval()
    ours = make(hf_config(**fields), attn_implementation="bert_fast").to(dtype).eval()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM"])
def test_the_same_answers(cls, padding, dtype, monkeypatch):
    """Outputs at real tokens and all gradients; the padding is masked wherever it is."""
    calls = []
    plain = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **k: calls.append(1) or plain(*a, **k))
    eager, ours = pair(cls, dtype)
    inputs, real = batch(eager.config, padding=padding)
    only = ("last_hidden_state",) if cls == "BertModel" else ("logits",)
    expected, found = run(eager, inputs, real, only), run(ours, inputs, real, only)
    assert outside(found, expected) == {} and len(calls) == 2


def test_without_the_mask_the_answer_is_another(monkeypatch):
    """What registering the attention alone leads to, and that the test above would see it."""
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, "bert_fast")
    eager, ours = pair()
    inputs, real = batch(eager.config, padding="holes")
    assert not real.all()
    expected, found = run(eager, inputs, real), run(ours, inputs, real)
    assert "last_hidden_state" in outside(found, expected)
    bert_fast.register_attention()
    assert AttentionMaskInterface._global_mapping["bert_fast"] is padding_mask
    assert AttentionInterface._global_mapping["bert_fast"] is attention


def test_attentions_and_dropout():
    eager, ours = pair(attention_probs_dropout_prob=0.5)
    inputs, real = batch(eager.config)
    inputs["output_attentions"] = True
    expected, found = (at_real_tokens(m(**inputs), real) for m in (eager, ours))
    assert {n for n in found if n.startswith("attentions")} == {"attentions.0", "attentions.1"}
    assert outside(found, expected) == {}
    ours.train()
    torch.manual_seed(0)
    first, second = (ours(**inputs) for _ in range(2))
    torch.manual_seed(0)
    again = ours(**inputs)
    assert torch.equal(again[0], first[0]) and not torch.equal(second[0], first[0])
    for probs in first.attentions:  # of a dropout of a half: zeros, and twice the others
        kept = probs.transpose(1, 2)[real] > 0
        assert 0.3 < kept.float().mean() < 0.7


def test_packed_texts():
    """With the borders of the sequences nobody attends to another's."""
    eager, ours = pair()
    texts = [torch.randint(5, 101, (1, n)) for n in (4, 1, 7)]
    borders = torch.tensor([0, 4, 5, 12], dtype=torch.int32)
    positions = torch.cat([torch.arange(t.shape[1]) for t in texts])[None]
    with torch.no_grad():
        expected = torch.cat([eager(t).last_hidden_state for t in texts], 1)
        found = ours(
            torch.cat(texts, 1), position_ids=positions, cu_seq_lens_q=borders, max_length_q=7
        ).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layers_share_a_layout(monkeypatch):
    """It is found once for a mask, anew for one that was written to, and gone with it."""
    _, ours = pair()
    inputs, _ = batch(ours.config)
    found = []
    plain = ops.unpad
    monkeypatch.setattr(ops, "unpad", lambda mask: found.append(1) or plain(mask))
    for _ in range(2):
        ours(**inputs)
    assert len(found) == 2 and len(_layouts) == 0
    q, mask = torch.randn(2, 1, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    call = lambda: attention(torch.nn.Module(), q, q, q, mask)[0]  # noqa: E731
    assert torch.equal(call(), call()) and len(found) == 3
    mask[1, 1:] = False
    assert (call()[1, 1:] == 0).all() and len(found) == 4


def test_scaling():
    q, k, v = torch.randn(3, 2, 2, 5, 8).double()
    found = attention(torch.nn.Module(), q, k, v, None, scaling=0.7)[0]
    expected = ((0.7 * q @ k.mT).softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


CAUSAL = torch.nn.Module()
CAUSAL.is_causal = True
Q = torch.randn(1, 2, 3, 8)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((CAUSAL, Q, Q, Q, None), {}, "causal"),
        ((torch.nn.Module(), Q, Q, Q, None), {"is_causal": True}, "causal"),
        ((torch.nn.Module(), Q, Q[:, :1], Q[:, :1], None), {}, "one shape"),
        ((torch.nn.Module(), Q[:, :, :1], Q, Q, None), {}, "one shape"),
        ((torch.nn.Module(), Q, Q, Q, torch.zeros(1, 1, 3, 3)), {}, "want a mask"),
        ((torch.nn.Module(), Q, Q, Q, None), {"sliding_window": 4}, "sliding_window"),
        ((torch.nn.Module(), Q, Q, Q, None), {"softcap": 3.0}, "softcap"),
    ],
)
def test_refusals(args, options, message):
    with pytest.raises(NotImplementedError, match=message):
        attention(*args, **options)


def test_a_decoder_is_refused():
    """Its mask says so before its attention is asked."""
    config = hf_config(is_decoder=True)
    model = transformers.BertLMHeadModel._from_config(config, attn_implementation="bert_fast")
    with pytest.raises(NotImplementedError, match="want attention to all tokens"):
        model(torch.ones(1, 4, dtype=torch.int64), use_cache=False)
