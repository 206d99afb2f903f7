"""Whole steps of pre-training by peers: forward, backward, AdamW; every one in every list.

PyTorch has no LAMB: where this project's steps are LAMB's, theirs are AdamW's, which does less.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import stock_bert
import torch
import torch.nn.functional as F  # noqa: N812
import varlen_bert
from gate import AbsentError, Candidate, Outputs, Prepared
from torch import Tensor, nn
from workload import PretrainingBatch

from bert_fast import BertConfig, reference_model
from bert_fast.accuracy import short

State = Mapping[str, Tensor]
LossOf = Callable[[PretrainingBatch], Tensor]

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
GRADIENTS = (  # what is compared: the first, a middle and the last layer, embeddings and heads
    "bert.embeddings.word_embeddings.weight",
    "bert.encoder.layer.0.attention.self.query.weight",
    "bert.encoder.layer.0.attention.self.query.bias",
    "bert.encoder.layer.{middle}.intermediate.dense.weight",
    "bert.encoder.layer.{last}.output.LayerNorm.weight",
    "cls.predictions.bias",
    "cls.seq_relationship.weight",
)


def gradient_names(config: BertConfig) -> tuple[str, ...]:
    """Return the names of the parameters whose gradients are compared."""
    layers = config.num_hidden_layers
    return tuple(name.format(middle=layers // 2, last=layers - 1) for name in GRADIENTS)


def pretraining_peers(
    state: State, config: BertConfig, device: torch.device, dtype: torch.dtype, *, full: bool
) -> list[Candidate]:
    """Return the peers that train; a call is one step, its answers are loss and gradients.

    The weights are fp32; 16 bits are autocast's. Dropout is the configuration's, 0 in `check`.

    Args:
        state: fp32 state dict of a BertForPreTraining, on the CPU.
        config: of the weights.
        device: where they run.
        dtype: of autocast; float32 or float64: no autocast, weights of that dtype.
        full: every peer, not only transformers' SDPA and the unpadded BERT.
    """
    what = state, config, device, dtype
    sdpa = Candidate("transformers sdpa", partial(_stock, *what, "sdpa"))
    varlen = Candidate("flash varlen", partial(_varlen, *what))
    if not full:
        return [sdpa, varlen]
    peers = [Candidate("transformers eager", partial(_stock, *what, "eager")), sdpa, varlen]
    for backend in stock_bert.BACKENDS:
        prepare = partial(_stock, *what, "sdpa", backend=backend)
        peers.append(Candidate(f"transformers sdpa {backend}", prepare))
    for mode in stock_bert.MODES:  # those that compile longest come last: time may be over
        for attention in ("sdpa", "eager"):
            prepare = partial(_stock, *what, attention, mode=mode)
            peers.append(Candidate(f"transformers {attention} compile {mode}", prepare))
    return peers


def precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return autocast's context for 16 bits, and for more an empty one."""
    if dtype in (torch.float16, torch.bfloat16):
        return torch.autocast(device.type, dtype)
    return nullcontext()


def _answers(
    model: nn.Module,
    loss_of: LossOf,
    gradient: Callable[[str], Tensor],
    names: Sequence[str],
    batch: PretrainingBatch,
) -> Outputs:
    """Return loss and gradients of the model without dropout; leaves no gradient behind."""
    training = model.training
    model.eval()
    try:
        loss = loss_of(batch)
        loss.backward()
        return {"loss": loss.detach().clone()} | {name: gradient(name) for name in names}
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)


def prepared(
    model: nn.Module,
    loss_of: LossOf,
    gradient: Callable[[str], Tensor],
    config: BertConfig,
    device: torch.device,
    notes: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> Prepared:
    """Return a model in train mode as a candidate whose call is one step with AdamW.

    Args:
        model: with fp32 parameters.
        loss_of: gives the loss of a batch, in autocast's context if there is one.
        gradient: gives a copy of the gradient of a parameter by Hugging Face's name.
        config: of the model.
        device: where it is.
        notes: what its row should say.
        optimizer: of the model's parameters; None: PyTorch's fused AdamW.
    """
    if optimizer is None:
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        notes = {**notes, "optimizer": "torch.optim.AdamW, fused"}

    def run(batch: PretrainingBatch) -> Tensor:
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    check = partial(_answers, model, loss_of, gradient, gradient_names(config))
    return Prepared(run, check, changes_state=True, notes=notes)


def _notes(device: torch.device, dtype: torch.dtype, config: BertConfig) -> dict[str, Any]:
    held = torch.promote_types(dtype, torch.float32)
    notes = {"weights": short(held), "dropout": config.hidden_dropout_prob}
    notes["attention dropout"] = config.attention_probs_dropout_prob
    return notes | ({"autocast": short(dtype)} if held != dtype else {})


def _stock_loss(
    state: State,
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    backend: str | None = None,
    mode: str | None = None,
) -> tuple[nn.Module, LossOf, Callable[[str], Tensor]]:
    """Return transformers' model, its loss, and its gradients by name."""
    context = stock_bert.forced(backend, device)
    held = torch.promote_types(dtype, torch.float32)
    model = stock_bert.pretraining(state, config, device, held, attention)

    def forward(
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor,
        labels: Tensor,
        next_sentence_label: Tensor,
    ) -> Tensor:
        return model(
            input_ids,
            attention_mask,
            token_type_ids,
            labels=labels,
            next_sentence_label=next_sentence_label,
        ).loss

    if mode is not None:
        forward = stock_bert.compiled(forward, mode, dynamic=False, device=device)

    def loss_of(batch: PretrainingBatch) -> Tensor:
        with context(), precision(device, dtype):
            return forward(
                batch.input_ids,
                batch.attention_mask,
                batch.token_type_ids,
                batch.labels,
                batch.next_sentence_label,
            )

    return model, loss_of, lambda name: model.get_parameter(name).grad.clone()


def _stock(
    state: State,
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    backend: str | None = None,
    mode: str | None = None,
) -> Prepared:
    model, loss_of, gradient = _stock_loss(state, config, device, dtype, attention, backend, mode)
    notes = _notes(device, dtype, config) | {"attention": attention, "head": "every slot"}
    notes |= {"backend": backend or "PyTorch's choice"} if attention == "sdpa" else {}
    notes |= {"compile": mode} if mode else {}
    return prepared(model, loss_of, gradient, config, device, notes)


def _varlen(
    state: State,
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: varlen_bert.Attention | None = None,
) -> Prepared:
    """Prepare the unpadded BERT; `attention` None: PyTorch's FlashAttention with dropout."""
    if attention is None:
        varlen_bert.needs_flash(device, dtype)
        attention = varlen_bert.flash_attention
    held = torch.promote_types(dtype, torch.float32)
    model = varlen_bert.VarlenBert(config, attention, heads=True).load(state)
    model = model.to(device, held).train()

    def loss_of(batch: PretrainingBatch) -> Tensor:
        at = varlen_bert.places(batch.lengths, device, width=batch.input_ids.shape[1])
        tokens, types = at.take(batch.input_ids), at.take(batch.token_type_ids)
        with precision(device, dtype):
            x = model.encode(tokens, at.positions, types, at.cu_seqlens, at.max_len)
            labels, follows = at.take(batch.labels), batch.next_sentence_label
            return model.loss(x, labels, at.cu_seqlens, follows)

    notes = _notes(device, dtype, config) | {"attention": "aten::_flash_attention_forward"}
    notes |= {"qkv": "one product", "padding": "none", "head": "labelled rows"}
    return prepared(model, loss_of, model.gradient, config, device, notes)


def baseline_pretraining(
    state: State, config: BertConfig, device: torch.device, dtype: torch.dtype
) -> tuple[str, Callable[[PretrainingBatch], Outputs]]:
    """Return the name of the baseline, and its function: batch to "loss" and gradients, no dropout.

    It is transformers with eager attention, or `reference_model` where that is not installed; the
    precision is the peers'.
    """
    names = gradient_names(config)
    try:
        model, loss_of, gradient = _stock_loss(state, config, device, dtype, "eager")
    except AbsentError:
        return "reference_model", _reference(state, config, device, dtype, names)
    return "transformers eager", partial(_answers, model, loss_of, gradient, names)


def _reference(
    state: State,
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    names: Sequence[str],
) -> Callable[[PretrainingBatch], Outputs]:
    """Return what gives loss and gradients of `reference_model`; the decoder is tied."""
    held = torch.promote_types(dtype, torch.float32)
    params = {name: t.to(device, held, copy=True) for name, t in state.items()}
    decoder = "cls.predictions.decoder."
    params[f"{decoder}weight"] = params["bert.embeddings.word_embeddings.weight"]
    params[f"{decoder}bias"] = params["cls.predictions.bias"]
    wanted = [params[name].requires_grad_() for name in names]

    def call(batch: PretrainingBatch) -> Outputs:
        ids, mask, kinds = batch.input_ids, batch.attention_mask, batch.token_type_ids
        with precision(device, dtype):
            encoded = reference_model.encoder(params, config, ids, mask, kinds, prefix="bert.")
            x = encoded.last_hidden_state
            pooled = reference_model.pooled(params, x[:, 0], prefix="bert.")
            follows = reference_model.next_sentence_logits(params, pooled)
            words = reference_model.masked_lm_logits(params, config, x)
            loss = F.cross_entropy(words.flatten(0, 1), batch.labels.flatten())
            loss = loss + F.cross_entropy(follows, batch.next_sentence_label)
        gradients = torch.autograd.grad(loss, wanted)
        return {"loss": loss.detach()} | dict(zip(names, gradients, strict=True))

    return call
