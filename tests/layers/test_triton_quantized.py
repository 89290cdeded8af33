"""Products with quantised weights in Triton against those with the weights dequantised in plain PyTorch, and binaries.

In Triton's interpreter without a GPU, else on it.
"""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from aot import ALL, ARCHITECTURES, SHARED_LIMIT, compile_kernel
from launches import Specialization, record, without_interpreter
from nanovllm.kernels import triton_experts, triton_linear, triton_quantized
from nanovllm.kernels.triton_quantized import TritonQuantizedWeight
from nanovllm.layers.weight import PlainWeight
from pairs import case_id, in_turn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUANTIZED = triton_quantized.KINDS
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
if DEVICE.type == "cuda":  # the interpreter's bf16 is wrong
    TOLERANCE[torch.bfloat16] = 2e-2


def random_weight(
    kind: str, n: int, k: int, group_size: int, has_zeros: bool = False, scales: torch.dtype = torch.float32
) -> tuple[tuple, Tensor]:
    """A `TritonQuantizedWeight`'s arguments, with all codes there are, and the [N, K] weight that they stand for."""
    num_groups = -(-k // group_size)
    scale = (torch.rand(n, num_groups, device=DEVICE) / {"int4": 16, "int8": 128, "fp8": 256}[kind] + 1e-3).to(scales)
    low, high = (0, 16) if kind == "int4" else (-128, 128)
    codes = torch.randint(low, high, (n, k), device=DEVICE)
    zeros, zero = None, 8 if kind == "int4" else 0
    if has_zeros:
        zeros = torch.randint(low, high, (n, num_groups), device=DEVICE)
        zero = zeros.repeat_interleave(group_size, 1)[:, :k]
    number = (codes - zero).float()
    if kind == "int4":
        values = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
        zeros = None if zeros is None else zeros.to(torch.uint8)
    else:
        values, zeros = codes.to(torch.int8), None if zeros is None else zeros.to(torch.int16)
    if kind == "fp8":
        values[values & 127 == 127] = 0  # NaN
        values = values.view(torch.float8_e4m3fn)
        number = values.float()
    weight = number * scale.float().repeat_interleave(group_size, 1)[:, :k]
    return (values, scale, zeros, group_size, (n, k)), weight


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Sums are cut up as those of large weights are."""
    monkeypatch.setattr(triton_quantized, "SPLIT", 48)


CASES = [
    ("int4", 72, 256, 128, True, torch.float16),
    ("int4", 33, 176, 16, True, torch.float32),  # the halves do not begin where tiles do
    ("int4", 100, 96, 32, False, torch.bfloat16),
    ("int4", 40, 192, 96, True, torch.bfloat16),
    ("int4", 65, 144, 144, False, torch.float32),
    ("int8", 72, 256, 128, True, torch.bfloat16),
    ("int8", 33, 208, 32, False, torch.float32),
    ("int8", 50, 75, 75, True, torch.float16),
    ("fp8", 72, 200, 128, False, torch.float32),
    ("fp8", 50, 75, 75, False, torch.bfloat16),
]


@pytest.mark.parametrize(("case", "dtype"), in_turn(CASES, list(TOLERANCE)), ids=str)
def test_products_are_those_of_the_dequantised_weight(case, dtype):
    torch.manual_seed(0)
    args, exact = random_weight(*case)
    (n, k), weight = exact.shape, TritonQuantizedWeight(*args)
    xs, bias = torch.randn(100, k + 16).to(DEVICE, dtype)[:, :k], torch.randn(n).to(DEVICE, dtype)
    for num_rows, shift in ((1, bias), (32, None), (100, bias)):
        x = xs[:num_rows]
        expected = x.double() @ exact.to(dtype).double().T + (0 if shift is None else shift.double())
        out = weight.linear(x, shift)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)
        assert num_rows > 1 or torch.equal(weight.linear(x, shift), out)
    ids = torch.tensor([n - 1, 0, 5], device=DEVICE)
    assert torch.equal(weight.rows(ids), exact[ids]) and weight.shape == (n, k)


@pytest.mark.parametrize("kind", QUANTIZED.values())
def test_every_code_is_dequantised_exactly(kind):
    """With products that are one weight each."""
    args, exact = random_weight(kind, 64, 256, 64, kind != "fp8")
    eye = torch.eye(256, device=DEVICE)
    assert torch.equal(TritonQuantizedWeight(*args).linear(eye).T, exact)


def test_a_large_weight_is_kept_in_place_and_its_sums_are_cut_up_into_enough_shares(monkeypatch):
    args, exact = random_weight("int4", 32, 2048, 128)
    values = args[0].clone()
    weight = TritonQuantizedWeight(values, *args[1:])
    assert weight.values.data_ptr() == values.data_ptr()
    assert weight.nbytes == 32 * (1024 + 16 * 4)
    x = torch.randn(3, 2048, device=DEVICE)
    for size, shares in ((48, 16), (400, 2), (2000, 1)):
        monkeypatch.setattr(triton_quantized, "SPLIT", size)
        assert weight.split(1, 64) == (shares, 16 // shares)
        torch.testing.assert_close(weight.linear(x), x @ exact.T, rtol=1e-5, atol=1e-4)
    assert weight.split(10**6, 64) == (1, 16)


class Mixture(list):
    addresses = None


EXPERTS = [("int4", 32, True), ("int4", 96, False), ("int8", 32, True), ("fp8", 128, False)]  # groups, zeros


@pytest.mark.parametrize(("kind", "dtype"), in_turn(EXPERTS, list(TOLERANCE)), ids=str)
def test_a_mixture_of_quantised_experts_is_that_of_dequantised_ones(kind, dtype):
    torch.manual_seed(0)
    kind, group_size, has_zeros = kind
    quantised, exact = Mixture(), Mixture()
    for _ in range(4):
        pairs = [random_weight(kind, *shape, group_size, has_zeros, torch.float16) for shape in ((224, 96), (96, 112))]
        weights = (
            [TritonQuantizedWeight(*args) for args, _ in pairs],
            [PlainWeight(weight.to(dtype)) for _, weight in pairs],
        )
        for experts, (gate_up, down) in zip((quantised, exact), weights, strict=True):
            layers = [SimpleNamespace(weight=SimpleNamespace(kernel=kernel)) for kernel in (gate_up, down)]
            experts.append(SimpleNamespace(gate_up_proj=layers[0], down_proj=layers[1]))
    for num_tokens in (1, 80):
        x = torch.randn(num_tokens, 112).to(DEVICE, dtype)[:, :96]
        chosen = torch.stack([torch.randperm(3)[:2] for _ in range(num_tokens)]).to(DEVICE)
        counts = torch.rand(num_tokens, 2, device=DEVICE)
        expected = triton_experts.mix(x, chosen, counts, exact)
        out = triton_experts.mix(x, chosen, counts, quantised)
        torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)
        assert expected.abs().max() > 1


# ---- binaries


PRODUCTS = [(1024, False), (6000, True), (16384, False)]  # outputs, and whether there is a bias


def record_all_products() -> list[tuple[set[Specialization], set[Specialization]]]:
    return [record_products(*case) for case in PRODUCTS]


def record_products(n: int, has_bias: bool) -> tuple[set[Specialization], set[Specialization]]:
    """What is compiled for one row and for many, and for numbers between."""
    weight = TritonQuantizedWeight(*random_weight("int4", n, 4096, 128, True, torch.float16)[0])
    bias = torch.zeros(n, dtype=torch.bfloat16) if has_bias else None

    def launch(*numbers: int) -> None:
        for num_rows in numbers:
            weight.linear(torch.zeros(num_rows, 4096, dtype=torch.bfloat16), bias)

    return record(lambda: launch(1, 2000)), record(lambda: launch(2, 16, 17, 32, 33, 64, 65, 128, 129, 512, 1000))


def test_no_batch_compiles_anything_after_one_row_and_many():
    for (n, _), (start_up, steps) in zip(PRODUCTS, without_interpreter(record_all_products), strict=True):
        assert steps <= start_up and len(start_up) == 2 + (n < 16384)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES |= {kind: dtype for dtype, kind in QUANTIZED.items()}
VARIANTS = [(kind, "bf16", 128, True) for kind in QUANTIZED.values()] + [("int4", "fp16", 32, False)]
if ALL:
    VARIANTS += [(kind, *of) for kind in QUANTIZED.values() for of in (("fp16", 2048, True), ("fp32", 32, False))]
by_architecture = pytest.mark.parametrize("arch", ARCHITECTURES, ids="sm_{}".format)


def make_like(kind: str, n: int, dtype: str, group_size: int, has_zeros: bool) -> tuple[TritonQuantizedWeight, dict]:
    """One of 2048 inputs, and the types of its parts as a kernel's signature has them."""
    values = torch.empty(n, 1024 if kind == "int4" else 2048, dtype=DTYPES[kind])
    zeros = torch.zeros(n, 2048 // group_size, dtype=torch.uint8 if kind == "int4" else torch.int16)
    scales, zeros = zeros.to(DTYPES[dtype]), zeros if has_zeros and kind != "fp8" else None
    weight = TritonQuantizedWeight(values, scales, zeros, group_size, (n, 2048))
    of_zeros = None if zeros is None else "*u8:16" if kind == "int4" else "*i16:16"
    return weight, {"values": "*u8:16", "scales": f"*{dtype}:16", "zeros": of_zeros}


def check_binary(kernel: object, pointers: dict[str, str | None], others: dict, constexprs: dict, arch: int) -> None:
    launch = {name: constexprs.pop(name) for name in ("num_warps", "num_stages")}
    constexprs |= {name: None for name, of in pointers.items() if of is None}
    signature = {name: of for name, of in pointers.items() if of is not None} | others
    binary = compile_kernel(kernel, signature, constexprs, arch, **launch)
    assert binary.shared <= SHARED_LIMIT[arch] and binary.spilled == 0
    assert ".ftz" not in binary.ptx  # FP8 passes through subnormal numbers


@pytest.mark.parametrize(("variant", "arch"), in_turn(VARIANTS, ARCHITECTURES, is_whole=ALL), ids=case_id)
def test_quantised_product_compiles_ahead_of_time(variant, arch):
    kind, dtype, group_size, has_zeros = variant
    for n, num_rows in product((1024, 8192), (1, 1000)):
        weight, parts = make_like(kind, n, dtype, group_size, has_zeros)
        others = {name: f"*{dtype}:16" for name in ("x", "bias", "out")} | {"partial": "*fp32:16"}
        config = weight.config(num_rows, DTYPES[dtype])
        check_binary(
            triton_linear.linear_kernel, parts | others, {"num_rows": "i32", "x_stride": "i32:16", "steps": "i32"},
            {**weight.sizes, **config}, arch,
        )  # fmt: skip


@pytest.mark.parametrize(("variant", "arch"), in_turn(VARIANTS[::-1], ARCHITECTURES, is_whole=ALL), ids=case_id)
def test_quantised_experts_compiles_ahead_of_time(variant, arch):
    kind, dtype, *_ = variant
    weight, parts = make_like(kind, 1536, *variant[1:])
    parts = {f"{name}_like": of for name, of in parts.items()}
    for rows in (16,) if dtype == "fp32" else (16, 64):
        check_binary(
            triton_experts._grouped_kernel, {"x": f"*{dtype}:16", "out": f"*{dtype}:16"} | parts,
            dict.fromkeys(["addresses", "tiles", "of_tile"], "*i64:16") | {"x_stride": "i32:16"},
            {"NUM_CHOSEN": 8, "E": 128, **triton_experts.grouped_config(weight, rows, DTYPES[dtype])}, arch,
        )  # fmt: skip


@by_architecture
def test_the_sum_of_shares_compiles_ahead_of_time(arch):
    pointers = {"partial": "*fp32:16", "bias": "*bf16:16", "out": "*bf16:16"}
    sizes = {"N": 6000, "COLUMNS": 1024, "num_warps": 4, "num_stages": 3}
    check_binary(triton_quantized._add_shares_kernel, pointers, {"num_splits": "i32"}, sizes, arch)
