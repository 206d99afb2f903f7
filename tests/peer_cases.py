"""What the tests of the benchmarks' peers share: a small model, inputs, bert_fast's answers."""

from itertools import pairwise

import gate
import torch
import training_peers
import workload
from torch import Tensor

import bert_fast

CPU, FP32 = torch.device("cpu"), torch.float32
CONFIG = bert_fast.BertConfig.named("tiny", vocab_size=600)
LENGTHS = {"padded": (9, 1, 17), "full": (12, 12)}
TOLERANCE = 1e-5  # of the largest true value, at least 1


def state() -> dict[str, Tensor]:
    """Weights of a BertForPreTraining."""
    return workload.weights(CONFIG)


def ours(state: dict[str, Tensor]) -> bert_fast.BertForPreTraining:
    """bert_fast's model with those weights."""
    model = bert_fast.BertForPreTraining(CONFIG).eval()
    model.load_state_dict(state)
    return model


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, p: float
) -> Tensor:
    """Attention of each sequence by itself; q, k, v (T, H, K)."""
    assert int(cu_seqlens.diff().max()) == max_len
    parts = []
    for a, b in pairwise(cu_seqlens.tolist()):
        scores = torch.einsum("qhk,shk->hqs", q[a:b], k[a:b]) * q.shape[2] ** -0.5
        probs = torch.nn.functional.dropout(scores.softmax(-1), p)
        parts.append(torch.einsum("hqs,shk->qhk", probs, v[a:b]))
    return torch.cat(parts)


def outside(found: gate.Outputs, want: gate.Outputs) -> dict[str, float]:
    """The tensors farther from those wanted than allowed, with the error."""
    assert set(found) == set(want)
    errors = {name: (found[name] - t).abs().max().item() for name, t in want.items()}
    allowed = {name: TOLERANCE * max(1.0, t.abs().max().item()) for name, t in want.items()}
    return {name: e for name, e in errors.items() if not e <= allowed[name]}


def hidden(ours: bert_fast.BertForPreTraining, batch: workload.Batch) -> gate.Outputs:
    """bert_fast's hidden states of real tokens."""
    with torch.inference_mode():
        found = ours.bert(batch.input_ids, batch.attention_mask).last_hidden_state
    return {"hidden": batch.real(found)}


def training_answers(
    ours: bert_fast.BertForPreTraining, batch: workload.PretrainingBatch
) -> gate.Outputs:
    """bert_fast's loss and gradients without dropout."""
    ours.zero_grad(set_to_none=True)
    loss = ours(
        batch.input_ids,
        batch.attention_mask,
        batch.token_type_ids,
        labels=batch.labels,
        next_sentence_label=batch.next_sentence_label,
    ).loss
    loss.backward()
    names = training_peers.gradient_names(CONFIG)
    return {"loss": loss.detach()} | {n: ours.get_parameter(n).grad.clone() for n in names}


def prepared_here(candidates: list[gate.Candidate]) -> dict[str, gate.Prepared]:
    """The candidates that are not absent, ready; no compiled one is prepared."""
    found = {}
    for candidate in candidates:
        if "compile" in candidate.name:
            continue
        try:
            found[candidate.name] = candidate.prepare()
        except gate.AbsentError:
            continue
    return found


def by_name(candidates: list[gate.Candidate], name: str) -> gate.Candidate:
    """The candidate of that name."""
    (found,) = (candidate for candidate in candidates if candidate.name == name)
    return found
