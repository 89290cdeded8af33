"""The architectures, under the names that a checkpoint's config.json gives them.

To add one that is a decoder as `decoder` has it, derive from `DecoderForCausalLM` and say how it differs, as `qwen`
does; else write a module with

    __init__(config, max_len, tp)               config as transformers reads it; ValueError if it uses what is lacking
    forward(input_ids, positions)               [T] and [T] -> [T, hidden_size]; parameters as a checkpoint has them
    compute_logits(hidden_states)               [T, hidden_size] -> [R, this rank's part of the vocabulary]
    lm_head                                     a `ParallelLMHead`
    packed_modules, ignored_weights(name)       see `loader.load_model`

of the layers in `nanovllm.layers`, and enter it here, or from outside before an engine is made:

    nanovllm.models.MODELS["MyForCausalLM"] = MyForCausalLM
"""

from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.phi3 import Phi3ForCausalLM
from nanovllm.models.qwen import Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM

MODELS = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": LlamaForCausalLM,
    "Phi3ForCausalLM": Phi3ForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
}
