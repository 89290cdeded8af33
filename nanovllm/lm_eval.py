"""nanovllm as a model type of lm-evaluation-harness, an optional extra: `pip install ".[lm-eval]"`.

`python -m nanovllm.lm_eval` is the harness' own command line, which then knows `--model nanovllm`. In Python, importing
this module registers it. It does what the harness' `hf` model does, and keeps to its names.
"""

import logging

try:
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models import utils as model_utils
except ImportError as error:
    raise ImportError(f"nanovllm.lm_eval needs lm-evaluation-harness: pip install lm_eval ({error})") from error

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, if they may be cached; context, continuation
logger = logging.getLogger("nanovllm")


@register_model("nanovllm")
class NanoVLLM(TemplateLM):
    """All requests of a kind run in one call.

    Args:
        pretrained: A checkpoint, as for `LLM`.
        device: As for `LLM`; "cuda:0" is "auto".
        batch_size, max_batch_size: Ignored; `max_num_seqs` and `max_num_batched_tokens` say what runs together.
        max_length: Most tokens that a token may follow; else one less than `max_model_len`.
        max_gen_toks: Most tokens to generate where a task does not say.
        add_bos_token: Whether to add the tokenizer's special tokens; by default what it does by itself.
        prefix_token_id: What a text without a context follows; else the tokenizer's BOS or EOS.
        chat_template_args, enable_thinking: Variables of the chat template.
        think_end_token: Of an answer only what follows this text counts.
        **settings: Of `LLM`.
    """

    def __init__(
        self, pretrained: str, device: str | None = None, batch_size: object = None, max_batch_size: object = None,
        max_length: int | None = None, max_gen_toks: int = 256, add_bos_token: bool | None = None,
        prefix_token_id: int | None = None, chat_template_args: dict[str, object] | None = None,
        enable_thinking: bool | None = None, think_end_token: str | None = None, **settings: object
    ):  # fmt: skip
        super().__init__()
        if max_length is not None:
            settings["max_model_len"] = max_length + 1
        device = "auto" if device in (None, "cuda:0") else device  # what the command line says by itself
        self.llm = LLM(pretrained, device=device, **settings)
        self.tokenizer = self.llm.tokenizer
        if self.tokenizer is None:
            raise ValueError(f"{pretrained} has no tokenizer, and the harness' requests are texts")
        self.max_length, self.max_gen_toks = self.llm.config.max_model_len - 1, max_gen_toks
        self.add_bos_token, self.think_end_token = add_bos_token, think_end_token
        ids = prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self._prefix_token_id = next((token_id for token_id in ids if token_id is not None), None)
        self.chat_template_args = chat_template_args or {}
        if enable_thinking is not None:
            self.chat_template_args |= {"enable_thinking": enable_thinking}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as a text; without `add_generation_prompt` one whose last message goes on."""
        kind = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **kind, **self.chat_template_args)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Token ids, without special tokens if the text has them, as a chat template's may."""
        if add_special_tokens is None:
            has_prefix = model_utils.has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if has_prefix else self.add_bos_token
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **special)

    def _loglikelihood_tokens(self, requests: list[Encoded], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """What `loglikelihood` comes to; too long a context loses its beginning."""
        most = self.max_length + 1
        kept = [context[max(len(context) + len(rest) - most, 0) :] for _, context, rest in requests]
        if num_cut := sum(len(ids) < len(context) for ids, (_, context, _) in zip(kept, requests, strict=True)):
            logger.warning("%d of %d contexts lose their beginning: max_length=%d", num_cut, len(kept), most - 1)
        scores = self.llm.score(kept, [rest for *_, rest in requests], use_tqdm=not disable_tqdm)
        answers = [(score.logprob, score.is_greedy) for score in scores]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of `max_length` that score each token once."""
        windows: list[Encoded] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *utils.make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string; other generation arguments are those of `SamplingParams`."""
        prompts, params, stops = [], [], []
        eos = self.tokenizer.decode(self.eot_token_id)
        for request in requests:
            context, given = request.args
            options = {"temperature": 0.0} | model_utils.normalize_gen_kwargs(given, self.max_gen_toks)
            max_tokens, _ = options.pop("max_gen_toks"), options.pop("do_sample")
            stops.append(model_utils.handle_stop_sequences(options.pop("until"), eos))
            if max_tokens >= self.max_length:
                raise ValueError(f"max_gen_toks={max_tokens} leaves no room for a prompt: max_length={self.max_length}")
            prompts.append(self.tok_encode(context)[max_tokens - self.max_length :])
            stop = [] if self.think_end_token else [text for text in stops[-1] if text]  # thoughts do not stop
            params.append(SamplingParams(max_tokens=max_tokens, stop=stop, **options))
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        texts = []
        for request, output, stop in zip(requests, outputs, stops, strict=True):
            texts.append(model_utils.postprocess_generated_text(output.text, stop, self.think_end_token))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
