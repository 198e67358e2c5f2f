import pytest
import torch
from torch import nn

from chatbind_cli.toy.fit import fit, repeatable


def test_threads_and_random_state_are_restored():
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    with repeatable(3) as generator:
        assert torch.get_num_threads() == 1
        first = torch.rand(2), torch.rand(2, generator=generator)
    with repeatable(3) as generator:
        second = torch.rand(2), torch.rand(2, generator=generator)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_threads_are_restored_after_a_failure():
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError), repeatable(0):
        raise RuntimeError
    assert torch.get_num_threads() == threads


def test_a_minimum_is_found_and_the_last_step_reported():
    x = nn.Parameter(torch.zeros(2))
    target = torch.tensor([1.0, -2.0])
    reports = []
    fit(
        [x],
        lambda: ((x - target) ** 2).sum(),
        steps=120,
        learning_rate=0.1,
        weight_decay=0.0,
        report=lambda step, loss: reports.append((step, loss)),
    )
    torch.testing.assert_close(x.detach(), target, atol=0.05, rtol=0)
    assert [step for step, _ in reports] == [50, 100, 120]
    assert reports[0][1] > reports[-1][1]
