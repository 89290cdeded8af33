"""transformers' classes, for annotations alone: an import of them takes as long as PyTorch's, and workers need none."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig as PretrainedConfig
    from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase
else:
    PretrainedConfig = PreTrainedTokenizerBase = object
