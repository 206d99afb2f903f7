"""One rank of test_state.py: `python state_worker.py RANK RENDEZVOUS RESULTS`.

Saved is, in every rank: the state of a sharded run, that of another one to which the state of a
whole run was given, and that one itself.
"""

import dataclasses
import sys

import torch
import torch.distributed as dist
from checkpoint_cases import model, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bert_fast.train import AdamW, decay_groups
from bert_fast.train.state import capture, restore

RANKS = 2
OPTIONS = {"step": 2, "position": {"batch": 8}, "facts": {}}


def sharded(seed):
    """A model with FSDP2 and its optimizer, after a step."""
    made, mesh = model(seed=seed), init_device_mesh("cpu", (RANKS,))
    for layer in made.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    optimizer = torch.optim.AdamW(decay_groups(made), lr=1e-2)
    for p in made.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 0.1 + seed)
    optimizer.step()
    return made, optimizer


def main(rank, rendezvous, results):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    whole = model(seed=3)
    optimizer = AdamW(decay_groups(whole), lr=1e-2)
    train(whole, optimizer, 2)
    first, second = sharded(0), sharded(1)
    states = [capture(*first, **OPTIONS), None, capture(whole, optimizer, **OPTIONS)]
    restore(states[2], *second)
    parts = [p for p in second[0].parameters() if p.to_local().shape != p.shape]
    assert parts, "nothing is sharded"
    states[1] = capture(*second, **OPTIONS)
    torch.save([dataclasses.asdict(state) for state in states], results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
