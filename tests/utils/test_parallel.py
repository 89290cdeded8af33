"""The collectives, with the ranks as threads of one process."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nanovllm.utils.parallel import TensorParallel, connect

CPU = torch.device("cpu")


@pytest.fixture(params=[2, 3])
def on_ranks(request, tmp_path):
    """Calls a function with each rank's `TensorParallel`, and returns what the ranks returned."""
    size = request.param
    with ThreadPoolExecutor(size) as pool:
        ranks = list(pool.map(lambda rank: connect(rank, size, CPU, tmp_path / "rendezvous"), range(size)))

        def run(function):
            return list(pool.map(torch.inference_mode()(function), ranks))

        yield run
        for tp in ranks:
            tp.disconnect()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_reduce_adds_up_and_gather_columns_concatenates_on_rank_0(on_ranks, dtype):
    sums = on_ranks(lambda tp: tp.all_reduce(torch.full((2, 3), tp.rank + 1.0, dtype=dtype)))
    total = sum(range(1, len(sums) + 1))
    assert all(torch.equal(x, torch.full((2, 3), total, dtype=dtype)) for x in sums)
    first, *others = on_ranks(lambda tp: tp.gather_columns(torch.full((2, 1), tp.rank, dtype=dtype)))
    assert first.tolist() == [list(range(len(sums)))] * 2
    assert others == [None] * (len(sums) - 1)


def test_the_rank_with_the_least_decides(on_ranks):
    assert set(on_ranks(lambda tp: tp.minimum(2**40 - tp.rank, CPU))) <= {2**40 - 1, 2**40 - 2}
    assert len(set(on_ranks(lambda tp: tp.minimum(10 - tp.rank, CPU)))) == 1


def test_one_rank_needs_no_group():
    tp, x = TensorParallel(), torch.ones(2, 3)
    assert tp.group is None
    assert tp.all_reduce(x) is tp.gather_columns(x) is x
    assert tp.minimum(7, CPU) == 7
