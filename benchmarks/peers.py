"""What bert_fast is measured beside, each peer at its best setting, every one in every list.

A peer whose needs are absent, or that crashes, says so when it is prepared: it is never left out.
Packages other than PyTorch are imported only then.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import nested_bert
import onnx_bert
import stock_bert
import torch
import varlen_bert
from gate import AbsentError, Candidate, Outputs, Prepared
from torch import Tensor
from workload import Batch, Texts

from bert_fast import BertConfig, reference_model
from bert_fast.accuracy import short

State = Mapping[str, Tensor]


def _varlen_attention(device: torch.device, dtype: torch.dtype) -> varlen_bert.Attention:
    """Return PyTorch's attention over packed rows.

    Raises:
        AbsentError: device, dtype or PyTorch have none.
    """
    varlen_bert.needs_flash(device, dtype)
    try:
        return varlen_bert.varlen_attention()
    except ImportError as error:
        raise AbsentError(f"torch {torch.__version__} has no torch.nn.attention.varlen") from error


# --- encoder -------------------------------------------------------------------------------------


def encoder_peers(
    state: State, config: BertConfig, device: torch.device, dtype: torch.dtype, *, full: bool
) -> list[Candidate]:
    """Return the peers for a padded batch; they give hidden states (B, L, D).

    Args:
        state: fp32 state dict of a BertForPreTraining, on the CPU.
        config: of the weights.
        device: where they run.
        dtype: what they compute in, their weights too.
        full: every peer and mode, not only transformers' SDPA and the unpadded BERT.
    """
    what = state, config, device, dtype
    sdpa = Candidate("transformers sdpa", partial(_stock, *what, "sdpa"))
    varlen = Candidate("varlen_attn", partial(_varlen, *what))
    if not full:
        return [sdpa, varlen]
    nested = Candidate("nn.TransformerEncoder", partial(_nested, *what))
    peers = [Candidate("transformers eager", partial(_stock, *what, "eager")), sdpa, nested]
    for backend in stock_bert.BACKENDS:
        prepare = partial(_stock, *what, "sdpa", backend=backend)
        peers.append(Candidate(f"transformers sdpa {backend}", prepare))
    peers += [varlen, Candidate("onnxruntime", partial(_onnx, *what))]
    peers.append(Candidate("onnxruntime plain", partial(_onnx, *what, fused=False)))
    peers.append(Candidate("varlen_attn compile", partial(_varlen, *what, compiled=True)))
    for mode in stock_bert.MODES:  # those that compile longest come last: time may be over
        for attention in ("sdpa", "eager"):
            prepare = partial(_stock, *what, attention, mode=mode)
            peers.append(Candidate(f"transformers {attention} compile {mode}", prepare))
    return peers


def _encoder_prepared(
    call: Callable[[Batch], Tensor], notes: dict[str, Any], cuda_graphs: bool = False
) -> Prepared:
    def run(batch: Batch) -> Tensor:
        if cuda_graphs:  # what the last call returned may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode():
            return call(batch)

    def check(batch: Batch) -> Outputs:
        hidden = run(batch)
        return {"hidden": batch.real(hidden).clone()}

    return Prepared(run, check, notes=notes)


def _stock(
    state: State,
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    backend: str | None = None,
    mode: str | None = None,
) -> Prepared:
    context = stock_bert.forced(backend, device)
    model = stock_bert.encoder(state, config, device, dtype, attention)

    def forward(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return model(input_ids, attention_mask).last_hidden_state

    if mode is not None:
        forward = stock_bert.compiled(forward, mode, dynamic=False, device=device)

    def call(batch: Batch) -> Tensor:
        with context():
            return forward(batch.input_ids, batch.attention_mask)

    notes = {"attention": attention, "weights": short(dtype)}
    notes |= {"backend": backend or "PyTorch's choice"} if attention == "sdpa" else {}
    notes |= {"compile": mode} if mode else {}
    return _encoder_prepared(call, notes, cuda_graphs=mode not in (None, "default"))


def _varlen(
    state: State,
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: varlen_bert.Attention | None = None,
    compiled: bool = False,
) -> Prepared:
    """Prepare the unpadded BERT; `attention` None: PyTorch's `varlen_attn`."""
    attention = attention or _varlen_attention(device, dtype)
    model = varlen_bert.VarlenBert(config, attention).load(state).to(device, dtype).eval()
    encode = _encode_function(model, device, compiled)

    def call(batch: Batch) -> Tensor:
        B, L = batch.input_ids.shape
        at = varlen_bert.places(batch.lengths, device, width=L)
        tokens = at.take(batch.input_ids)
        x = encode(tokens, at.positions, None, at.cu_seqlens, at.max_len)
        return at.unpack(x, (B, L))

    return _encoder_prepared(call, _varlen_notes(dtype, compiled))


def _encode_function(
    model: varlen_bert.VarlenBert, device: torch.device, compiled: bool
) -> Callable[..., Tensor]:
    def encode(
        tokens: Tensor, positions: Tensor, types: None, cu_seqlens: Tensor, max_len: int
    ) -> Tensor:
        return model.encode(tokens, positions, types, cu_seqlens, max_len)

    return (
        stock_bert.compiled(encode, "default", dynamic=True, device=device) if compiled else encode
    )


def _varlen_notes(dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    notes = {"attention": "torch.nn.attention.varlen", "weights": short(dtype)}
    notes |= {"qkv": "one product", "padding": "none"}
    return notes | ({"compile": "default, dynamic"} if compiled else {})


def _nested(state: State, config: BertConfig, device: torch.device, dtype: torch.dtype) -> Prepared:
    """Prepare PyTorch's encoder; rows at the padding are no answers."""
    model = nested_bert.NestedBert(config, state).to(device, dtype)
    notes = {"attention": "nn.TransformerEncoder's fast path", "weights": short(dtype)}
    notes["padding"] = "none in the layers: nested tensors"
    return _encoder_prepared(lambda b: model(b.input_ids, b.attention_mask), notes)


def _onnx(
    state: State,
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    fused: bool = True,
) -> Prepared:
    forward, notes = onnx_bert.session(state, config, device, dtype, fused)
    return _encoder_prepared(lambda b: forward(b.input_ids, b.attention_mask), notes)


def baseline_encoder(
    state: State, config: BertConfig, device: torch.device, dtype: torch.dtype
) -> tuple[str, Callable[[Batch], Outputs]]:
    """Return the name of the baseline in that dtype, and its function: batch to "hidden" (T, D).

    It is transformers with eager attention, or `reference_model` where that is not installed.
    """
    try:
        return "transformers eager", _stock(state, config, device, dtype, "eager").check
    except AbsentError:
        params = {name: t.to(device, dtype) for name, t in state.items()}

    @torch.inference_mode()
    def call(batch: Batch) -> Outputs:
        ids, mask = batch.input_ids, batch.attention_mask
        encoded = reference_model.encoder(params, config, ids, mask, prefix="bert.")
        return {"hidden": batch.real(encoded.last_hidden_state)}

    return "reference_model", call


# --- texts ---------------------------------------------------------------------------------------


def text_peers(
    state: State,
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch_size: int = 128,
    token_budget: int = 32768,
    full: bool,
) -> list[Candidate]:
    """Return the peers for texts of any length; they give the embeddings (N, D), [CLS] rows.

    Args:
        state: fp32 state dict of a BertForPreTraining, on the CPU.
        config: of the weights.
        device: where they run.
        dtype: what they compute in, their weights too.
        batch_size: texts in a padded batch.
        token_budget: tokens in a packed batch.
        full: torch.compile too.
    """
    what = state, config, device, dtype
    padded = partial(_stock_texts, *what, batch_size)
    peers = [
        Candidate("transformers sdpa padded", partial(padded, by_length=False)),
        Candidate("transformers sdpa sorted", partial(padded, by_length=True)),
        Candidate("varlen_attn", partial(_varlen_texts, *what, token_budget)),
    ]
    if full:
        prepare = partial(padded, by_length=True, compiled=True)
        peers.append(Candidate("transformers sdpa compile default sorted", prepare))
    return peers


def _texts_prepared(
    embed: Callable[[Texts], Tensor], device: torch.device, notes: dict[str, Any]
) -> Prepared:
    def run(texts: Texts) -> Tensor:
        with torch.inference_mode():
            embedding = embed(texts)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return embedding

    def check(texts: Texts) -> Outputs:
        return {"embedding": run(texts)[list(texts.sample)].clone()}

    return Prepared(run, check, notes=notes)


def _to(device: torch.device, on_host: Tensor) -> Tensor:
    """Return the tensor on the device, without waiting where that is a GPU."""
    if device.type != "cuda":
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)  # no copy where it is pinned


def _stock_texts(
    state: State,
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    by_length: bool,
    compiled: bool = False,
) -> Prepared:
    model = stock_bert.encoder(state, config, device, dtype, "sdpa")
    pad_id = config.pad_token_id or 0

    def forward(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return model(input_ids, attention_mask).last_hidden_state

    if compiled:
        forward = stock_bert.compiled(forward, "default", dynamic=True, device=device)

    notes: dict[str, Any] = {"attention": "sdpa", "weights": short(dtype)}
    notes |= {"batch_size": batch_size} | ({"compile": "default, dynamic"} if compiled else {})

    def embed(texts: Texts) -> Tensor:
        lengths, parts = texts.lengths, texts.ids.split(texts.lengths)
        order = list(range(len(lengths)))
        if by_length:
            order.sort(key=lengths.__getitem__, reverse=True)
        firsts, slots = [], 0
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids = torch.nn.utils.rnn.pad_sequence(
                [parts[i] for i in chosen], batch_first=True, padding_value=pad_id
            )
            counts, mask = [lengths[i] for i in chosen], None
            slots += ids.numel()
            if min(counts) < max(counts):
                columns = torch.arange(max(counts), device=device)
                mask = (columns < _to(device, torch.tensor(counts))[:, None]).long()
            firsts.append(forward(_to(device, ids), mask)[:, 0])
        notes["fill"] = round(sum(lengths) / slots, 4)
        rows = torch.cat(firsts)
        if not by_length:
            return rows
        return torch.empty_like(rows).index_copy_(0, _to(device, torch.tensor(order)), rows)

    return _texts_prepared(embed, device, notes)


def _varlen_texts(
    state: State,
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    token_budget: int,
    attention: varlen_bert.Attention | None = None,
) -> Prepared:
    """Prepare the unpadded BERT for texts; `attention` as in `_varlen`."""
    attention = attention or _varlen_attention(device, dtype)
    model = varlen_bert.VarlenBert(config, attention).load(state).to(device, dtype).eval()

    def embed(texts: Texts) -> Tensor:
        firsts, row = [], 0
        for lengths in budgeted(texts.lengths, token_budget):
            T = sum(lengths)
            tokens = _to(device, texts.ids[row : row + T])
            row += T
            at = varlen_bert.places(lengths, device)
            x = model.encode(tokens, at.positions, None, at.cu_seqlens, at.max_len)
            firsts.append(x.index_select(0, at.cu_seqlens[:-1]))
        return torch.cat(firsts)

    notes = _varlen_notes(dtype, compiled=False) | {"token_budget": token_budget, "fill": 1.0}
    return _texts_prepared(embed, device, notes)


def budgeted(lengths: tuple[int, ...], token_budget: int) -> list[tuple[int, ...]]:
    """Return the lengths in order, cut into runs of at most `token_budget` tokens.

    A length above the budget stands alone.
    """
    cuts, total = [0], 0
    for i, length in enumerate(lengths):
        if total and total + length > token_budget:
            cuts.append(i)
            total = 0
        total += length
    return [lengths[a:b] for a, b in zip(cuts, [*cuts[1:], len(lengths)], strict=True)]
