"""The tensor-parallel layers, rank by rank in one process: the ranks' parts together are the whole layer."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.utils.loader import ShapeError
from nanovllm.utils.parallel import TensorParallel


class Loaded:
    """A tensor that behaves like a slice of a safetensors file, and remembers how much was read."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.numel_read = tensor, 0

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index) -> torch.Tensor:
        part = self.tensor[index]
        self.numel_read += part.numel()
        return part


class Rank(TensorParallel):
    """A rank whose all-reduce leaves its partial sum alone."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("size", [1, 2, 4])
def test_column_parallel_ranks_hold_the_rows_of_their_heads(size):
    q, k, x = torch.randn(8, 6), torch.randn(4, 6), torch.randn(3, 6)
    outs = {"q": [], "k": []}
    loaded = {"q": Loaded(q), "k": Loaded(k)}
    for rank in range(size):
        layer = ColumnParallelLinear(6, {"q": 8, "k": 4}, False, Rank(rank, size))
        for name in loaded:
            layer.load_weight("weight", loaded[name], name)
        layer.weight.finish()
        for name, out in zip(outs, layer(x), strict=True):
            outs[name].append(out)
    torch.testing.assert_close(torch.cat(outs["q"], -1), F.linear(x, q))
    torch.testing.assert_close(torch.cat(outs["k"], -1), F.linear(x, k))
    assert loaded["q"].numel_read == q.numel()  # each rank read its own slice and no more


def test_kv_heads_fewer_than_ranks_are_replicated_to_neighbours():
    k = torch.randn(2 * 4, 6)  # two heads of 4, four ranks
    for rank in range(4):
        layer = ColumnParallelLinear(6, {"k": 8}, False, Rank(rank, 4), {"k": 2})
        layer.load_weight("weight", Loaded(k), "k")
        torch.testing.assert_close(layer.weight.parts["values"], k[rank // 2 * 4 : rank // 2 * 4 + 4])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_row_parallel_ranks_add_up_with_the_bias_once(size):
    weight, bias, x = torch.randn(5, 8), torch.randn(5), torch.randn(3, 8)
    total = 0
    for rank in range(size):
        layer = RowParallelLinear(8, 5, True, Rank(rank, size))
        layer.load_weight("weight", Loaded(weight), None)
        layer.load_weight("bias", Loaded(bias), None)
        layer.weight.finish()
        total = total + layer(x[:, layer.columns])
    torch.testing.assert_close(total, F.linear(x, weight, bias))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_vocabulary_that_does_not_divide_is_padded(size):
    weight = torch.randn(10, 3)
    ids = torch.arange(10)
    total = 0
    for rank in range(size):
        layer = VocabParallelEmbedding(10, 3, Rank(rank, size))
        layer.load_weight("weight", Loaded(weight), None)
        layer.weight.finish()
        total = total + layer(ids)
    torch.testing.assert_close(total, weight)


def test_misshapen_weights_are_refused_even_where_a_slice_would_fit():
    layer = ColumnParallelLinear(6, {"q": 8}, False, Rank(0, 2))
    with pytest.raises(ShapeError, match=r"\[9, 6\].*\[8, 6\]"):
        layer.load_weight("weight", Loaded(torch.randn(9, 6)), "q")
