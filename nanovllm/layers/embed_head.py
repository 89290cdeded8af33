"""The two ends of the vocabulary, split by rows over tensor-parallel ranks: embedding and LM head."""

import torch
from torch import nn

from nanovllm.layers.weight import Weight
from nanovllm.utils.context import get_step
from nanovllm.utils.loader import CheckpointTensor
from nanovllm.utils.parallel import TensorParallel


class VocabParallelEmbedding(nn.Module):
    """Each rank embeds the tokens of its rows, the others' as zeros; an all-reduce adds them up.

    A vocabulary that does not divide by the ranks is padded at its end with rows that no token id reaches.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.vocab_size = vocab_size
        rows = -(-vocab_size // tp.size)
        self.start = min(tp.rank * rows, vocab_size)
        self.end = min(self.start + rows, vocab_size)
        self.weight = Weight(rows, hidden_size, least_bits=8)

    def load_weight(self, name: str, loaded: CheckpointTensor, shard: str | None) -> None:
        full_shape, num_rows = (self.vocab_size, self.weight.shape[1]), self.end - self.start
        self.weight.load(name, loaded, full_shape, slice(0, num_rows), slice(self.start, self.end))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] token ids -> [T, hidden_size]."""
        if self.tp.size == 1:
            return self.weight.rows(input_ids)
        is_mine = (input_ids >= self.start) & (input_ids < self.end)
        embeddings = self.weight.rows(torch.where(is_mine, input_ids - self.start, 0))
        return self.tp.all_reduce(embeddings * is_mine.unsqueeze(-1))


class ParallelLMHead(VocabParallelEmbedding):
    """Logits, gathered on rank 0 or left where they are."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [R, this rank's part of the vocabulary] for the tokens after which one is sampled."""
        rows = get_step().logit_rows
        return self.weight.linear(hidden_states if rows is None else hidden_states[rows])

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[n, hidden_size] -> [n, vocab_size] on rank 0, None on the others."""
        return self.gather(self.weight.linear(hidden_states))

    def gather(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Every rank's part of [n, vocab_size] logits -> all of them on rank 0, None on the others."""
        logits = self.tp.gather_columns(logits)
        return None if logits is None else logits[:, : self.vocab_size]
