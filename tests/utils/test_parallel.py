"""The collectives, with the ranks as threads of one process."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from nanovllm.layers.parallel_sampler import sample_on_ranks
from nanovllm.layers.sampler import sample
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


def test_a_rank_gives_up_joining_when_the_others_have_gone_and_removed_the_rendezvous(tmp_path):
    directory = tmp_path / "engine"
    directory.mkdir()
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(connect, 0, 2, CPU, directory / "rendezvous")
        time.sleep(0.5)
        shutil.rmtree(directory)
        assert isinstance(joining.exception(timeout=20), RuntimeError)


def test_every_collective_is_counted_before_it_waits(on_ranks):
    counts = []

    def collectives(tp):
        tp.count = lambda: counts.append(tp.rank)
        tp.all_reduce(torch.ones(2))
        tp.gather_columns(torch.ones(2, 1))
        tp.minimum(1, CPU)
        return tp.rank

    ranks = on_ranks(collectives)
    assert sorted(counts) == sorted(ranks * 3)


def test_disconnecting_aborts_communicators_of_nccl_which_may_be_waiting(monkeypatch):
    class Group:
        num_aborts = 0

        def abort(self):
            self.num_aborts += 1

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Group, raising=False)
    group = Group()
    tp = TensorParallel(0, 2, group)
    tp.disconnect()
    tp.disconnect()
    assert group.num_aborts == 1 and tp.group is None


@pytest.mark.parametrize("num_rows", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ranks_that_sample_a_share_of_the_rows_each_draw_what_one_rank_would(on_ranks, dtype, num_rows):
    """From a vocabulary of which neither a chunk nor a rank's part divides; ties, and logits that are never drawn."""
    vocab_size, generator = 1301, torch.Generator().manual_seed(num_rows)
    logits = (2 * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)
    logits[:, [5, -1]] = logits.max() + 1  # of two the first
    logits[:, 100:400] = -torch.inf
    temperatures = torch.arange(num_rows) % 3 * 0.7
    uniforms = torch.rand(num_rows, dtype=torch.float64, generator=generator)
    for random in ((None, None), (temperatures, uniforms)):

        def run(tp, random=random):
            width = -(-vocab_size // tp.size)
            padded = torch.nn.functional.pad(logits, (0, width * tp.size - vocab_size), value=99.0)  # not to be drawn
            return sample_on_ranks(tp, padded[:, tp.rank * width :][:, :width].contiguous(), vocab_size, *random)

        first, *others = on_ranks(run)
        assert torch.equal(first, sample(logits, *random))
        assert others == [None] * len(others)
