"""nanovllm as a stage of a Ray Data pipeline. Knows nothing of batch files: `nanovllm.batch` runs those there."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from nanovllm.batch.lines import Item
from nanovllm.batch.local import answer
from nanovllm.batch.ray_backend import connect, replica_resources
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    import pyarrow
    import ray.data

OVERLAP = 4  # batches that a replica computes at a time, so that the end of one leaves nothing idle


def build_processor(
    model: str,
    sampling_params: SamplingParams | None = None,
    *,
    prompt_column: str = "prompt",
    messages_column: str | None = None,
    output_column: str = "generated_text",
    error_column: str = "error",
    concurrency: int | tuple[int, int] = 1,
    batch_size: int = 256,
    num_cpus: float | None = None,
    **settings: object,
) -> Callable[["ray.data.Dataset"], "ray.data.Dataset"]:
    """A stage that completes the prompts of a dataset's rows, by replicas of the model spread over the cluster.

    Each replica is an actor with the GPUs that it needs (`tensor_parallel_size`) or, where the cluster has none or
    `device` is "cpu", with `num_cpus`. One that dies is started again by Ray, and its rows run again. A row that
    fails, such as a prompt that is too long, keeps its place: its error is text, and its answer null.

    Args:
        model: As for `LLM`; a path must exist on every node.
        sampling_params: For all rows. Without a `seed`, and with a temperature, the answers differ from run to run.
        prompt_column: The column of texts, or of lists of token ids.
        messages_column: The column of lists of messages, for the chat template; instead of `prompt_column`.
        output_column: The column to add with the answers' texts.
        error_column: The column to add with what a row failed of; null in the others.
        concurrency: How many replicas, or the fewest and the most.
        batch_size: Rows handed to a replica at once. It computes four such batches at a time.
        num_cpus: The share of each replica that has no GPU, also the number of its threads. By default all cores of
            the smallest node but one, which the stages that read and write need.
        **settings: Fields of `Config`, as for `LLM`.

    Returns:
        A function from a `ray.data.Dataset` to one with the columns `output_column`, `finish_reason` and
        `error_column` beside those it had. Lazy, as all of Ray Data is.

    Raises:
        ValueError: Two of the columns have the same name, or a dataset has none of the name of the prompts, or has
            one of the name of what is to be added (once it runs).

    Example:
        >>> process = build_processor("Qwen/Qwen3-0.6B", SamplingParams(max_tokens=100), prompt_column="question")
        >>> process(ray.data.read_parquet("in")).write_parquet("out")
    """
    column = prompt_column if messages_column is None else messages_column
    names = [column, output_column, "finish_reason", error_column]
    if len(set(names)) < len(names):
        raise ValueError(f"the columns must have different names, got {names}")
    fewest, most = (concurrency, concurrency) if isinstance(concurrency, int) else concurrency
    arguments = {
        "model": model, "settings": settings, "params": sampling_params or SamplingParams(), "column": column,
        "is_chat": messages_column is not None, "output_column": output_column, "error_column": error_column,
    }  # fmt: skip

    def process(dataset: "ray.data.Dataset") -> "ray.data.Dataset":
        import ray.data

        if not ray.is_initialized():
            connect(None)
        needs = replica_resources(settings)
        if "num_cpus" in needs:
            needs["num_cpus"] = (needs["num_cpus"] - 1 or 0.5) if num_cpus is None else num_cpus
        return dataset.map_batches(
            _Stage,
            fn_constructor_kwargs=arguments,
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=fewest, max_size=most),
            max_concurrency=OVERLAP,
            **needs,
        )

    return process


class _Stage:
    """One replica, and what it does with a batch."""

    def __init__(
        self, model: str, settings: dict[str, object], params: SamplingParams, column: str, is_chat: bool,
        output_column: str, error_column: str
    ):  # fmt: skip
        self._llm, self._params, self._column, self._is_chat = LLM(model, **settings), params, column, is_chat
        self._new_columns = output_column, "finish_reason", error_column

    async def __call__(self, batch: "pyarrow.Table") -> "pyarrow.Table":
        """Asynchronous for Ray Data to run several at a time."""
        return await asyncio.to_thread(self._answer, batch)

    def _answer(self, batch: "pyarrow.Table") -> "pyarrow.Table":
        import pyarrow

        if self._column not in batch.column_names:
            raise ValueError(f"the dataset has no column {self._column!r}, it has {batch.column_names}")
        taken = sorted(set(self._new_columns) & set(batch.column_names))
        if taken:
            raise ValueError(f"the dataset has a column {taken[0]!r} already; rename it, or what is to be added")
        items = [self._item(row, value) for row, value in enumerate(batch.column(self._column).to_pylist())]
        outputs = [output for _, output in sorted(answer(self._llm, items), key=lambda pair: pair[0].line)]
        texts = [None if output["finish_reason"] == "error" else output["text"] for output in outputs]
        columns = texts, [output["finish_reason"] for output in outputs], [output.get("error") for output in outputs]
        for name, values in zip(self._new_columns, columns, strict=True):
            batch = batch.append_column(name, pyarrow.array(values, pyarrow.string()))
        return batch

    def _item(self, row: int, value: object) -> Item:
        if not self._is_chat:
            return Item(row, "", self._params, prompt=value)
        # A table's messages all have the same keys, with nulls where one was not given.
        messages = [{key: part for key, part in message.items() if part is not None} for message in value or ()]
        return Item(row, "", self._params, messages=messages)
