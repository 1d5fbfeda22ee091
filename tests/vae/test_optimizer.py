"""AdamW by name: torch's own, to the bit, also when it goes on from its tensors."""

import pytest
import torch
from torch import nn

from vae.optimizer import AdamW


def parameters():
    torch.manual_seed(0)
    unused = nn.Parameter(torch.ones(2))
    return {"a": nn.Parameter(torch.randn(7, 3)), "b": nn.Parameter(torch.randn(40))} | {
        "unused": unused
    }


def gradient(named, step):
    generator = torch.Generator().manual_seed(step)
    for name in ("a", "b"):
        named[name].grad = torch.randn(named[name].shape, generator=generator)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_torchs(weight_decay):
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(ours, weight_decay=weight_decay)
    expected = torch.optim.AdamW(theirs.values(), weight_decay=weight_decay, fused=True)
    for step in range(6):
        for named in (ours, theirs):
            gradient(named, step)
        expected.param_groups[0]["lr"] = rate = 0.1 / (step + 1)
        expected.step()
        if step == 3:  # as a checkpoint does
            optimizer = AdamW(ours, weight_decay=weight_decay, tensors=optimizer.tensors)
        optimizer.step(rate)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in ours.values())


def test_tensors_given_are_copied():
    named = parameters()
    gradient(named, 0)
    first = AdamW(named)
    first.step(0.1)
    before = {key: value.clone() for key, value in first.tensors.items()}
    AdamW(named, tensors=first.tensors).step(0.1)
    assert before.keys() == first.tensors.keys()
    assert all(torch.equal(before[key], first.tensors[key]) for key in before)
