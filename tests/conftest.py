"""One thread: the tests' models are so small that a second one costs more than it computes."""

import os

import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
