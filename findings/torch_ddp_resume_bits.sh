#!/usr/bin/env bash
# torch 2.14.1 (CPU, gloo): DistributedDataParallel sums the first step of a process in other buckets than
# all later ones, since it rebuilds its buckets after step 1. With three ranks a sum depends on its order,
# so a run that stops after two steps and goes on, from the very same weights, differs in bits from one that
# runs through; find_unused_parameters=True, which never rebuilds, keeps them the same.
# Seen: "rebuilt: differ; find_unused_parameters=True: same".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.2
cd "$folder"
cat > run.py <<'P'
import os, sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel


def work(rank, unused, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=3)
    torch.set_num_threads(1)

    def trained(state, steps):
        torch.manual_seed(0)
        net = torch.nn.Sequential(*[torch.nn.Linear(257, 257) for _ in range(6)])
        if state is not None:
            net.load_state_dict(state)
        ddp = DistributedDataParallel(net, bucket_cap_mb=0.5, find_unused_parameters=unused)
        for step in steps:
            x = torch.randn(16, 257, generator=torch.Generator().manual_seed(100 * step + rank))
            ddp(x).square().mean().backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
        return {k: v.clone() for k, v in net.state_dict().items()}

    whole = trained(None, range(4))
    resumed = trained(trained(None, range(2)), range(2, 4))
    if rank == 0:
        same = all(torch.equal(whole[k], resumed[k]) for k in whole)
        open(folder, "w").write("same" if same else "differ")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    answers = []
    for number, unused in enumerate((False, True)):
        mp.spawn(work, (unused, 29611 + number, f"answer{number}"), nprocs=3)
        answers.append(open(f"answer{number}").read())
    print(f"rebuilt: {answers[0]}; find_unused_parameters=True: {answers[1]}")
    assert answers == ["differ", "same"], answers
P
venv/bin/python run.py
