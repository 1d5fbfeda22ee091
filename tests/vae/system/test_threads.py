"""Results in order, each computed on one core, and torch's threads as they were."""

import threading
from collections.abc import Iterator

import pytest
import torch

from vae.system import in_threads


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_results_come_in_order_from_several_threads_at_once():
    together = threading.Barrier(3)

    def work(item: int) -> tuple[int, int]:
        together.wait(timeout=60)
        return item, threading.get_ident()

    found = list(in_threads(work, range(30)))
    assert [item for item, _ in found] == list(range(30))
    assert threading.get_ident() not in {thread for _, thread in found}


def test_each_has_one_core_and_nobody_else_is_changed():
    meanwhile: list[int] = []
    for found in in_threads(lambda _: torch.get_num_threads(), range(20)):
        assert found == 1
        meanwhile += [torch.get_num_threads(), of_a_new_thread()]
    assert meanwhile == [1, 3] * 20
    assert torch.get_num_threads() == 3
    assert of_a_new_thread() == 3


def test_the_caller_may_keep_its_cores():
    found = in_threads(lambda _: torch.get_num_threads(), range(20), with_caller=False)
    assert [(number, torch.get_num_threads()) for number in found] == [(1, 3)] * 20
    assert torch.get_num_threads() == 3


def test_with_one_core_the_caller_does_it():
    torch.set_num_threads(1)
    assert set(in_threads(lambda _: threading.get_ident(), range(5))) == {threading.get_ident()}


def test_within_a_thread_it_is_done_there():
    def outer(_: int) -> set[int]:
        return {threading.get_ident(), *in_threads(lambda _: threading.get_ident(), range(5))}

    assert all(len(found) == 1 for found in in_threads(outer, range(9)))


def test_items_are_taken_a_few_ahead():
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    results = in_threads(lambda item: item, items())
    assert next(results) == 0
    assert len(taken) <= 8
    del results
    assert torch.get_num_threads() == 3


def test_an_error_ends_it():
    def work(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item

    found: list[int] = []
    with pytest.raises(ValueError, match="five"):
        found.extend(in_threads(work, range(100)))
    assert found == [0, 1, 2, 3, 4]
    assert torch.get_num_threads() == 3
