"""The sampler's distribution is the softmax's, exactly on its support and statistically elsewhere."""

import numpy as np
import pytest
import torch

from helpers import chi_squared_p
from nanovllm.engine.batch import splitmix64
from nanovllm.layers.sampler import sample


def draw(logits: torch.Tensor, temperature: float, n: int, key: int = 0) -> torch.Tensor:
    """`n` tokens from one row of logits, with the engine's own random numbers."""
    uniforms = torch.from_numpy(splitmix64(np.full(n, key, dtype=np.uint64), np.arange(n)))
    return sample(logits.expand(n, -1), torch.full((n,), temperature), uniforms)


@pytest.mark.parametrize("vocab_size", [7, 512, 1300])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_softmax(vocab_size, temperature):
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 2
    tokens = draw(logits, temperature, 20_000, key=vocab_size)
    counts = torch.bincount(tokens, minlength=vocab_size)
    assert chi_squared_p(counts, (logits.double() / temperature).softmax(0)) > 1e-4


def test_the_test_notices_a_wrong_temperature():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 2
    counts = torch.bincount(draw(logits, 1.0, 20_000), minlength=300)
    assert chi_squared_p(counts, (logits.double() / 1.1).softmax(0)) < 1e-4


def test_inverse_cdf_is_exact():
    """Every token's share of a fine grid of random numbers is its probability."""
    logits = torch.randn(1500, generator=torch.Generator().manual_seed(1))
    n = 20_000
    grid = (torch.arange(n).double() + 0.5) / n
    share = torch.bincount(sample(logits.expand(n, -1), torch.ones(n), grid), minlength=1500) / n
    assert (share - logits.softmax(0)).abs().max() < 1.01 / n


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.full((1, 2000), -torch.inf)
    logits[0, [3, 700, 1999]] = 0.0
    ends = torch.tensor([0.0, 1 / 3, 2 / 3, 1 - 2**-53], dtype=torch.float64)
    assert set(sample(logits.expand(4, -1), torch.ones(4), ends).tolist()) == {3, 700, 1999}


@pytest.mark.parametrize("temperature", [1e-40, 1e-8, 1e-3])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature):
    logits = torch.randn(4, 1000) * 50
    tokens = sample(logits, torch.full((4,), temperature), torch.rand(4, dtype=torch.float64))
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_rows_with_temperature_zero_are_greedy_beside_others():
    logits = torch.randn(6, 1000)
    temperatures = torch.tensor([0.0, 5.0, 0.0, 5.0, 0.0, 5.0])
    tokens = sample(logits, temperatures, torch.full((6,), 0.999, dtype=torch.float64))
    assert tokens[::2].tolist() == logits.argmax(-1)[::2].tolist()
    assert tokens[1::2].tolist() != logits.argmax(-1)[1::2].tolist()


def test_full_vocabulary_in_bf16():
    logits = torch.randn(8, 151_936, dtype=torch.bfloat16)
    tokens = sample(logits, torch.ones(8), torch.linspace(0, 0.999, 8, dtype=torch.float64))
    assert tokens.diff().min() > 0  # larger numbers fall further along
    assert tokens.max() < 151_936


def test_splitmix64_known_values():
    """The generator's first outputs for seed 1234567, which its reference implementation prints."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    got = splitmix64(np.full(3, 1234567, dtype=np.uint64), np.arange(1, 4))
    assert got.tolist() == [(value >> 11) * 2.0**-53 for value in expected]
