"""One rank of test_distributed.py: `python distributed_worker.py RANK RENDEZVOUS RESULTS`."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import bert_fast

RANKS, STEPS = 2, 3
SCENARIOS = {  # class of the model, then options of DDP; checkpointing, parts, sharded are ours
    "masked_lm": ("BertForMaskedLM", {}),
    "pretraining": ("BertForPreTraining", {}),
    "sequence": ("BertForSequenceClassification", {}),
    "tokens": ("BertForTokenClassification", {"gradient_as_bucket_view": True}),
    "questions": ("BertForQuestionAnswering", {"bucket_cap_mb": 0.01}),
    "static graph": ("BertForMaskedLM", {"static_graph": True}),
    "checkpointing": ("BertForMaskedLM", {"checkpointing": True}),
    "accumulation": ("BertForMaskedLM", {"parts": 2}),
    "sharded": ("BertForMaskedLM", {"sharded": True}),
}


def build(name: str) -> bert_fast.BertPreTrainedModel:
    torch.manual_seed(0)
    config = bert_fast.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        problem_type="single_label_classification",
        initializer_range=0.2,
    )
    return getattr(bert_fast, name)(config).train()


def share(name: str, step: int, rank: int, part: int = 0) -> dict:
    """A rank's part of a step's batch; in one step a rank has no label at all."""
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + part)
    ids = torch.randint(5, 60, (3, 9), generator=generator)
    real = torch.arange(9) < torch.randint(3, 10, (3, 1), generator=generator)
    chosen = (torch.rand(3, 9, generator=generator) < (0.2, 0.8)[rank]) & real
    if step == rank == 1:
        chosen[:] = False
    inputs = {"input_ids": ids, "attention_mask": real}
    classes = torch.arange(3) % 2
    if name in ("BertForMaskedLM", "BertForPreTraining"):
        inputs["labels"] = ids.masked_fill(~chosen, -100)
    elif name == "BertForTokenClassification":
        inputs["labels"] = (ids % 2).masked_fill(~chosen, -100)
    elif name == "BertForSequenceClassification":
        inputs["labels"] = classes
    else:
        inputs["start_positions"] = inputs["end_positions"] = classes
    if name == "BertForPreTraining":
        inputs["next_sentence_label"] = classes
    return inputs


def count(name: str, step: int, parts: int) -> dict:
    """What the summed loss is divided by on each rank, for the mean over all labels of all."""
    if name not in ("BertForMaskedLM", "BertForTokenClassification"):
        return {}
    shares = [share(name, step, rank, part) for rank in range(RANKS) for part in range(parts)]
    labels = sum(int((one["labels"] != -100).sum()) for one in shares)
    return {"num_items_in_batch": torch.tensor(labels / RANKS)}


def train(scenario: str, rank: int | None) -> list[dict[str, torch.Tensor]]:
    """The weights after each step: of one rank under DDP, or of one process that does all."""
    name, options = SCENARIOS[scenario]
    options = dict(options)
    parts = options.pop("parts", 1)
    model = build(name)
    if options.pop("checkpointing", False):
        model.gradient_checkpointing_enable()
    sharded = options.pop("sharded", False)
    call = model
    if rank is not None and sharded:
        for module in (*model.bert.encoder.layer, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (RANKS,)))
    elif rank is not None:
        call = DistributedDataParallel(model, **options)
    ranks = range(RANKS) if rank is None else [rank]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(parts):
            if parts > 1 and rank is not None:
                call.require_backward_grad_sync = part == parts - 1
            for one in ranks:
                loss = call(**share(name, step, one, part), **count(name, step, parts)).loss
                (loss / len(ranks)).backward()
        optimizer.step()
        weights = {key: p.detach() for key, p in model.named_parameters()}
        if sharded and rank is not None:
            weights = {key: p.full_tensor() for key, p in weights.items()}
        history.append({key: p.clone() for key, p in weights.items()})
    return history


def main() -> None:
    rank, rendezvous, results = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=RANKS)
    found = {}
    for scenario in SCENARIOS:
        try:
            found[scenario] = train(scenario, rank)
        except RuntimeError as error:  # both ranks raise it: the next scenario goes on
            found[scenario] = repr(error)
    torch.save(found, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
