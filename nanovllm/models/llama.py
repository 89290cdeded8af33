"""Llama 2 and 3 (Touvron et al., 2023, arXiv:2307.09288; Grattafiori et al., 2024, arXiv:2407.21783), and Mistral
(Jiang et al., 2023, arXiv:2310.06825), which is the same but for its sizes.
"""

from nanovllm.models.decoder import DecoderForCausalLM, Variant
from nanovllm.utils.hf_types import PretrainedConfig
from nanovllm.utils.parallel import TensorParallel


class LlamaForCausalLM(DecoderForCausalLM):
    def __init__(self, config: PretrainedConfig, max_len: int, tp: TensorParallel):
        bias = getattr(config, "attention_bias", False)  # some that say they are Llamas have them
        variant = Variant(qkv_bias=bias, o_bias=bias, mlp_bias=getattr(config, "mlp_bias", False))
        super().__init__(config, variant, max_len, tp)
