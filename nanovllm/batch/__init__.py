"""Jobs over files of requests: any size of input, every answer written, and resumable after whatever happens."""

from nanovllm.batch.output import BatchError
from nanovllm.batch.runner import run

__all__ = ["BatchError", "run"]
