"""One rank of test_hf_training.py: `python hf_distributed_worker.py RANK RENDEZVOUS RESULTS`."""

import sys

import torch
import torch.distributed as dist
from distributed_worker import RANKS, share
from hf_cases import packed, plain
from torch.nn.parallel import DistributedDataParallel

import bert_fast

STEPS = 3
SCENARIOS = {  # class, then options of DDP; checkpointing is ours
    "masked_lm": ("BertForMaskedLM", {}),
    "sequence": ("BertForSequenceClassification", {}),
    "static graph": ("BertForTokenClassification", {"static_graph": True}),
    "checkpointing": ("BertForMaskedLM", {"checkpointing": True}),
}


def train(scenario: str, rank: int, fast: bool) -> tuple[list[dict], list[int]]:
    """The weights after each step under DDP, and the rows of each packed attention."""
    name, options = SCENARIOS[scenario]
    options = dict(options)
    model = plain(name).train()
    if options.pop("checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if fast:
        bert_fast.accelerate(model, strict=True)
    call = DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    with packed() as rows:
        for step in range(STEPS):
            optimizer.zero_grad()
            inputs = share(name, step, rank)
            if step == rank == 1 and "labels" in inputs and inputs["labels"].dim() == 2:
                inputs["labels"][:, 0] = 3 % model.config.num_labels  # its own mean of none is NaN
            call(**inputs).loss.backward()
            optimizer.step()
            history.append({key: p.detach().clone() for key, p in model.named_parameters()})
    return history, rows


def main() -> None:
    rank, rendezvous, results = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=RANKS)
    found = {
        scenario: [train(scenario, rank, fast) for fast in (False, True)] for scenario in SCENARIOS
    }
    torch.save(found, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
