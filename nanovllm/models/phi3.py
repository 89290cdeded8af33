"""Phi-3 and Phi-4 (Abdin et al., 2024, arXiv:2404.14219 and arXiv:2412.08905): projections fused in the checkpoint, and
in some a rotary embedding of a part of each head.
"""

from nanovllm.models.decoder import DecoderForCausalLM, Variant
from nanovllm.utils.hf_types import PretrainedConfig
from nanovllm.utils.parallel import TensorParallel


class Phi3ForCausalLM(DecoderForCausalLM):
    def __init__(self, config: PretrainedConfig, max_len: int, tp: TensorParallel):
        super().__init__(config, Variant(fused=True), max_len, tp)
