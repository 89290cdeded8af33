"""The sampler's distribution is the softmax's, exactly on its support and statistically elsewhere.

In plain PyTorch and in Triton. Without a GPU that is Triton's interpreter, which takes 30 ms for a row: fewer draws do.
"""

import numpy as np
import pytest
import torch

from helpers import chi_squared_p
from nanovllm.engine.batch import splitmix64
from nanovllm.kernels import fused
from nanovllm.layers.sampler import sample

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # meant, and seen only there
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = 1 - 2**-53  # the largest random number


class Sampler:
    """`sample` from tensors that are anywhere to the CPU, and how many draws of it a test can afford."""

    def __init__(self, device: str, num_draws: int):
        self.device, self.num_draws, self.is_slow = device, num_draws, num_draws < 1000

    def __call__(self, logits, temperatures=None, uniforms=None) -> torch.Tensor:
        return sample(*(x if x is None else x.to(self.device) for x in (logits, temperatures, uniforms))).cpu()

    def draw(self, logits: torch.Tensor, temperature: float, key: int = 0) -> torch.Tensor:
        """Tokens from one row of logits, with the engine's own random numbers."""
        n = self.num_draws
        uniforms = torch.from_numpy(splitmix64(np.full(n, key, dtype=np.uint64), np.arange(n)))
        return self(logits.expand(n, -1), torch.full((n,), temperature), uniforms)


@pytest.fixture(params=["plain", "triton"])
def sampler(request, monkeypatch):
    kernels, num_draws = None, 20_000
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is published for Linux only")
        from nanovllm.kernels import triton_fused as kernels

        num_draws = 20_000 if DEVICE == "cuda" else 200
    monkeypatch.setattr(fused, "_kernels", lambda *_: kernels)
    return Sampler(DEVICE if kernels else "cpu", num_draws)


@pytest.mark.parametrize("vocab_size", [7, 512, 1300])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_softmax(sampler, vocab_size, temperature):
    if sampler.is_slow and (vocab_size, temperature) != (7, 1.0):
        pytest.skip("too few draws to tell")
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 2
    counts = torch.bincount(sampler.draw(logits, temperature, key=vocab_size), minlength=vocab_size)
    assert chi_squared_p(counts, (logits.double() / temperature).softmax(0)) > 1e-4


def test_the_test_notices_a_wrong_temperature(sampler):
    if sampler.is_slow:
        pytest.skip("too few draws to tell")
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 2
    counts = torch.bincount(sampler.draw(logits, 1.0), minlength=300)
    assert chi_squared_p(counts, (logits.double() / 1.1).softmax(0)) < 1e-4


def test_inverse_cdf_is_exact(sampler):
    """Every token's share of a fine grid of random numbers is its probability."""
    vocab_size = 3000
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1))
    n = sampler.num_draws
    grid = (torch.arange(n).double() + 0.5) / n
    share = torch.bincount(sampler(logits.expand(n, -1), torch.ones(n), grid), minlength=vocab_size) / n
    assert (share - logits.softmax(0)).abs().max() < 1.01 / n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab_size", [1, 300, 2048, 2049, 151_936])
def test_a_token_is_where_its_random_number_falls(sampler, vocab_size, dtype):
    """Within 1e-6 of its interval of the cumulative distribution, which is computed in fp64."""
    if sampler.is_slow and vocab_size > 10_000 and dtype != torch.bfloat16:
        pytest.skip("too slow")
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(6, vocab_size + 3, generator=generator) * 3).to(dtype)[:, :vocab_size]
    temperatures = torch.tensor([0.3, 1.0, 40.0]).repeat(2)
    uniforms = torch.rand(6, generator=generator, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, LAST
    tokens = sampler(logits, temperatures, uniforms).unsqueeze(1)
    probs = (logits.double() / temperatures.unsqueeze(1)).softmax(-1)
    end = probs.cumsum(-1).gather(1, tokens)
    start = end - probs.gather(1, tokens)
    assert (start - 1e-6 <= uniforms.unsqueeze(1)).all() and (uniforms.unsqueeze(1) <= end + 1e-6).all()


def test_tokens_of_probability_zero_are_never_drawn(sampler):
    """Not at the seams of chunks, nor where whole chunks have none, nor should rounding bring a number to 1."""
    for possible in ([3, 700, 1999], [0, 2047, 2048], [2047, 6144], [6999]):
        logits = torch.full((1, 7000), -torch.inf)
        logits[0, possible] = 0.0
        n = len(possible)
        shares = torch.arange(n + 1, dtype=torch.float64) / n
        ends = torch.cat([shares, shares.nextafter(torch.zeros(()).double())])
        assert set(sampler(logits.expand(len(ends), -1), torch.ones(len(ends)), ends).tolist()) == set(possible)


@pytest.mark.parametrize("temperature", [1e-40, 1e-8, 1e-3])
def test_a_tiny_temperature_is_greedy_and_not_nan(sampler, temperature):
    logits = torch.randn(4, 5000) * 50
    tokens = sampler(logits, torch.full((4,), temperature), torch.rand(4, dtype=torch.float64))
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_a_huge_temperature_is_uniform(sampler):
    logits = torch.randn(8, 5000) * 50
    logits[:, 4000:] = -torch.inf
    uniforms = (torch.arange(8) + 0.5).double() / 8
    assert sampler(logits, torch.full((8,), 3e38), uniforms).tolist() == (uniforms * 4000).long().tolist()


def test_rows_with_temperature_zero_are_greedy_beside_others(sampler):
    logits = torch.randn(6, 5000)
    temperatures = torch.tensor([0.0, 5.0, 0.0, 5.0, 0.0, 5.0])
    tokens = sampler(logits, temperatures, torch.full((6,), 0.999, dtype=torch.float64))
    assert tokens[::2].tolist() == logits.argmax(-1)[::2].tolist()
    assert tokens[1::2].tolist() != logits.argmax(-1)[1::2].tolist()


@pytest.mark.parametrize("temperatures", [None, torch.zeros(5)])
def test_greedy_takes_the_first_of_equals(sampler, temperatures):
    logits = torch.randint(-3, 1, (5, 10_000)).to(torch.bfloat16)
    for row, ties in enumerate([[0, 9999], [2047, 2048], [2048, 4095, 4096], [9999], [5, 7]]):
        logits[row, ties] = 2.0
    uniforms = None if temperatures is None else torch.full((5,), 0.7, dtype=torch.float64)
    assert sampler(logits, temperatures, uniforms).tolist() == [0, 2047, 2048, 9999, 5]
    assert logits.argmax(-1).tolist() == [0, 2047, 2048, 9999, 5]


def test_a_row_is_sampled_alike_whatever_is_beside_it(sampler):
    logits = torch.randn(9, 5000).to(torch.bfloat16)
    temperatures, uniforms = torch.rand(9) + 0.1, torch.rand(9, dtype=torch.float64)
    together = sampler(logits, temperatures, uniforms)
    alone = [sampler(logits[i : i + 1], temperatures[i : i + 1], uniforms[i : i + 1]) for i in range(9)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_full_vocabulary_in_bf16(sampler):
    n = 2 if sampler.is_slow else 8
    logits = torch.randn(n, 151_936, dtype=torch.bfloat16)
    tokens = sampler(logits, torch.ones(n), torch.linspace(0, 0.999, n, dtype=torch.float64))
    assert tokens.diff().min() > 0  # larger numbers fall further along
    assert tokens.max() < 151_936


def test_splitmix64_known_values():
    """The generator's first outputs for seed 1234567, which its reference implementation prints."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    got = splitmix64(np.full(3, 1234567, dtype=np.uint64), np.arange(1, 4))
    assert got.tolist() == [(value >> 11) * 2.0**-53 for value in expected]
