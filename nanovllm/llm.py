"""The facade that users import. Conveniences that need no engine state live here."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from nanovllm.engine.beam_search import BeamSearchParams, beam_search
from nanovllm.engine.chat import Conversations, render_chats
from nanovllm.engine.inputs import Params, Prompt, Prompts
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scoring import Completions, score
from nanovllm.engine.unordered import generate_unordered
from nanovllm.outputs import BeamOutput, RequestOutput, Score, StreamDelta
from nanovllm.sampling_params import SamplingParams


class LLM(LLMEngine):
    """A model, ready to generate. See `LLMEngine` for the methods and `Config` for the keyword arguments.

    Example:
        >>> llm = LLM("assets/nano-qwen3")
        >>> llm.generate(["Hello"], SamplingParams(temperature=0))[0]["text"]
    """

    def chat(
        self,
        conversations: Conversations,
        sampling_params: Params = None,
        add_generation_prompt: bool = True,
        use_tqdm: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        **keywords: object,
    ) -> list[RequestOutput]:
        """Answers conversations through the tokenizer's chat template.

        The blocks of earlier turns are found in the prefix cache, so a further turn computes only what is new, and
        the part of the last block that was not full.

        Args:
            conversations: One list of messages (`{"role": ..., "content": ...}`), or a list of such lists.
            sampling_params, use_tqdm: As for `generate`.
            add_generation_prompt: End the prompt with the start of the assistant's turn.
            chat_template_kwargs: For the template, such as `{"enable_thinking": False}`.
            **keywords: `tools`, `documents`, or any variable that the template names.

        Returns:
            As `generate`; a list of one output for a single conversation.

        Raises:
            TypeError: A conversation is not a list of messages; or neither this method nor the template has a use for
                a keyword.
            ValueError: The model has no chat template, or the template refuses the messages; and see `generate`.
        """
        prompts = self._render(conversations, add_generation_prompt, chat_template_kwargs, keywords)
        return self.generate(prompts, sampling_params, use_tqdm)

    def chat_stream(
        self,
        conversations: Conversations,
        sampling_params: Params = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        **keywords: object,
    ) -> Iterator[StreamDelta]:
        """As `chat`, piece by piece, as `generate_stream`."""
        prompts = self._render(conversations, add_generation_prompt, chat_template_kwargs, keywords)
        return self.generate_stream(prompts, sampling_params)

    def _render(self, conversations: Conversations, *options: object) -> list[str]:
        self._check_open()
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(f"{self.config.model_path} has no chat template; use generate with a prompt of your own")
        return render_chats(self.tokenizer, conversations, *options)

    def generate_unordered(
        self, prompts: Iterable[Prompt | tuple[Prompt, SamplingParams]], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Completes any number of prompts, of which only so many are in memory as keep the engine busy.

        They are taken from their iterable, in a thread of its own, as the engine has room for them, from when this
        iterator is first read; leaving it frees what is unfinished. A prompt that fails, of its own or because it does
        not fit, is an output with `finish_reason` "error", and `error` says of what; the others go on.

        Args:
            prompts: Prompts as for `generate`, or pairs of a prompt and its own parameters; or an exception in place of
                a prompt that could not be made, which then is this one's error.
            sampling_params: For those without their own.

        Yields:
            What `generate` returns, in the order in which they finish, each with its `index` among the prompts.

        Raises:
            TypeError: `prompts` is not iterable.
            Exception: What the iterable raises; nothing of the call runs on then.
            KeyboardInterrupt: After Ctrl-C, with `outputs`: those that had finished and were not yielded yet.
        """
        self._check_open()
        return generate_unordered(self, prompts, sampling_params)

    def beam_search(
        self,
        prompts: Prompts,
        params: BeamSearchParams = BeamSearchParams(),  # noqa: B008 (frozen)
        use_tqdm: bool = True,
    ) -> list[BeamOutput]:
        """The most likely completions, by beam search.

        Hypotheses share the blocks of what they have in common; nothing is computed twice while the cache has room.

        Args:
            prompts, use_tqdm: As for `generate`.
            params: How to search.

        Returns:
            For each prompt, in order, its best hypothesis (`text`, `token_ids`, `score`, `finish_reason`) with all
            `beam_width` of them, best first, under `outputs`.

        Raises:
            TypeError, ValueError: See `generate`; also when `beam_width` exceeds `max_num_seqs`, or with
                `data_parallel_size` above 1.
        """
        self._check_single("beam_search")
        return beam_search(self, prompts, params, use_tqdm)

    def score(self, prompts: Prompts, completions: Completions, use_tqdm: bool = True) -> list[Score | list[Score]]:
        """The log-probabilities of given completions, under the model's own distribution.

        A prompt is computed once for all its completions, and only their tokens are projected over the vocabulary.

        A text after a text is what the tokens of both together are beyond the prompt's own; spaces at the prompt's end
        count to it, since tokenizers join them to the word that follows. Token ids are taken as they are, and a text
        after token ids is tokenized alone, without special tokens.

        Args:
            prompts: As for `generate`.
            completions: For each prompt one, text or token ids, or a list of them.
            use_tqdm: Show a progress bar.

        Returns:
            For each prompt, in order, a dict, or a list of them where there is a list of completions, with `logprob`
            (their sum), `is_greedy`, `num_tokens`, `token_ids` and `token_logprobs`.

        Raises:
            TypeError: A prompt or a completion is neither text nor integers.
            ValueError: As of `generate`, where a prompt with its completion may fill the model's length; also if a
                completion has no token, or there are not as many `completions` as prompts.
        """
        self._check_open()
        return score(self, prompts, completions, use_tqdm)

    def default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends; `SamplingParams()` where it says nothing."""
        file = self.config.model_path / "generation_config.json"
        stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        stored["max_tokens"] = stored.get("max_new_tokens")
        names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        params = {name: stored[name] for name in names if stored.get(name) is not None}
        if stored.get("do_sample") is False:
            params["temperature"] = 0.0
        return SamplingParams(**params)
