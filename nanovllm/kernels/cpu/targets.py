"""The instruction sets that the kernels are compiled for, the best first, and which of them this processor has."""

import os
from dataclasses import dataclass

from nanovllm.utils.checks import check_choice
from nanovllm.utils.device import cpu_has

VARIABLE = "NANOVLLM_CPU_ISA"


@dataclass(frozen=True)
class Target:
    name: str
    features: tuple[str, ...]  # that a processor must have, by Linux's names
    flags: tuple[str, ...]  # of the compiler

    def is_supported(self) -> bool:
        return all(cpu_has(feature) for feature in self.features)


def _x86(name: str, *features: str) -> Target:
    width = ("-mprefer-vector-width=512",) if "avx512f" in features else ()
    return Target(name, features, (*width, *("-m" + feature.replace("_", "") for feature in features)))


def _arm(name: str, **extensions: str) -> Target:
    return Target(name, tuple(extensions.values()), ("-march=armv8.2-a+" + "+".join(extensions),))


AVX2 = "avx2", "fma"
AVX512 = *AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq"
AVX512_BF16 = _x86("avx512_bf16", *AVX512, "avx512_vnni", "avx512_bf16")
AMX = "amx_tile", "amx_bf16", "amx_int8"  # no flags: what is particular to it is in assembler
TARGETS = [
    Target("amx", (*AVX512_BF16.features, *AMX), (*AVX512_BF16.flags, "-DWITH_AMX")),
    AVX512_BF16,
    _x86("avx512_vnni", *AVX512, "avx512_vnni"),
    _x86("avx512", *AVX512),
    _x86("avx_vnni", *AVX2, "avx_vnni"),
    _x86("avx2", *AVX2),
    _arm("neon_bf16", dotprod="asimddp", bf16="bf16"),
    _arm("neon", dotprod="asimddp"),
]


def usable_targets() -> list[Target]:
    """Those that may be compiled and loaded here, the best first: what NANOVLLM_CPU_ISA names and what is below it.

    ValueError if it names something else than a target for this processor.
    """
    supported = [target for target in TARGETS if target.is_supported()]
    chosen = os.environ.get(VARIABLE)
    if chosen is None:
        return supported
    names = [target.name for target in supported]
    check_choice(VARIABLE, chosen, names)
    return supported[names.index(chosen) :]
