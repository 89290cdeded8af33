"""One thread: the tests' models are so small that a second one costs more than it computes."""

import os

import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():  # before anything imports triton: kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)
