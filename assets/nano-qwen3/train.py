"""Makes nano-qwen3: trains the tokenizer and the model on generated chats and saves a Hugging Face checkpoint.

Deterministic, whatever the number of threads. `python assets/nano-qwen3/train.py` rewrites the checkpoint beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

# The order in which the parallel BPE trainer meets equal pairs must not depend on scheduling.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers.models.qwen3.modeling_qwen3 as qwen3
from safetensors.torch import save_file
from tasks import FAMILIES, Conversation, draw, draw_conversation
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, START_ID, END_ID = 0, 1, 2
VOCAB_SIZE = 1536
MAX_POSITIONS = 2048
LENGTHS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024)
MICRO_TOKENS = 2048
# Words take the space before them, digits stand alone, punctuation takes the space before a number (", " and " + ").
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+(?: (?=\p{N}))?|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string %}{{ content }}{% elif content %}
{%- for part in content %}{{ part.text if part.text is defined else '' }}{% endfor %}{% endif %}
{%- endmacro -%}
{%- set has_system = messages and messages[0].role == 'system' -%}
{%- if has_system or tools -%}
{{ '<|im_start|>system\\n' }}
{%- if has_system %}{{ text(messages[0].content) }}{% endif %}
{%- if tools -%}
{{ ('\\n\\n' if has_system else '') + 'Tools:' }}
{%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if not (loop.first and has_system) -%}
{{ '<|im_start|>' + message.role + '\\n' }}{{ text(message.content) }}
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""


def train_tokenizer(seed: int) -> Tokenizer:
    """Trains the byte-level BPE tokenizer on an even mix of all task families (training part only)."""
    rng = Random(seed)
    texts = ["system\n", "user\n", "assistant\n"] * 1000
    for family in FAMILIES:
        for _ in range(3000):
            sample = draw(rng, family)
            texts += [sample.prompt, sample.answer]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def model_config(vocab_size: int) -> dict[str, object]:
    """Returns config.json; some keys appear in the spelling of transformers 4 and in that of transformers 5."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "intermediate_size": 576,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": 6,
        "use_sliding_window": False,
        "sliding_window": None,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": [END_ID, PAD_ID],
        "pad_token_id": PAD_ID,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def save(out: Path, config: dict[str, object], tokenizer: Tokenizer, model: Qwen3ForCausalLM) -> None:
    """Writes the whole checkpoint folder; each file is replaced at once, so that a reader never sees half of it."""
    added = {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, token in enumerate((PAD, START, END))
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": added,
        "additional_special_tokens": [START],
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": None,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {
        "do_sample": True,
        "temperature": 0.6,
        "bos_token_id": None,
        "eos_token_id": [END_ID, PAD_ID],
        "pad_token_id": PAD_ID,
    }
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": config,
        "generation_config.json": generation_config,
        "tokenizer_config.json": tokenizer_config,
    }
    for name, content in files.items():
        (out / f"{name}.tmp").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (out / f"{name}.tmp").replace(out / name)
    tokenizer.save(str(out / "tokenizer.json.tmp"))
    (out / "tokenizer.json.tmp").replace(out / "tokenizer.json")
    # The output layer is tied to the embedding, which is stored once.
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, out / "model.safetensors.tmp", metadata={"format": "pt"})
    (out / "model.safetensors.tmp").chmod(0o644)
    (out / "model.safetensors.tmp").replace(out / "model.safetensors")


def encode(tokenizer: Tokenizer, chat: Conversation) -> tuple[list[int], list[int]]:
    """Renders a chat as the chat template does.

    Returns:
        The token ids, and the positions whose next token the model has to predict (those of the assistant).
    """
    head = f"{START}system\n{chat.system}{END}\n" if chat.system else ""
    ids: list[int] = []
    taught: list[int] = []
    for turn in chat.turns:
        ids += tokenizer.encode(f"{head}{START}user\n{turn.prompt}{END}\n{START}assistant\n").ids
        answer = tokenizer.encode(f"{turn.answer}{END}").ids
        taught += range(len(ids) - 1, len(ids) + len(answer) - 1)
        ids += answer
        head = "\n"
    return ids, taught


def micro_batches(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields micro-batches: chats of similar length, one a row, padded on the right.

    Plain causal attention then never crosses chats and never sees padding. The few fixed shapes keep the kernels
    that the matrix library compiles per shape in its cache.

    Yields:
        Input ids [rows, length], flat positions that are taught, and their target tokens.
    """
    rng = Random(seed)
    waiting: dict[int, list[tuple[list[int], list[int]]]] = {length: [] for length in LENGTHS}
    while True:
        ids, taught = encode(tokenizer, draw_conversation(rng))
        length = next((length for length in LENGTHS if len(ids) <= length), None)
        if length is None:
            continue
        rows = waiting[length]
        rows.append((ids, taught))
        if len(rows) * length + length > MICRO_TOKENS:
            inputs = torch.tensor([row + [PAD_ID] * (length - len(row)) for row, _ in rows])
            places = torch.tensor([i * length + place for i, (_, taught) in enumerate(rows) for place in taught])
            yield inputs, places, inputs.flatten()[places + 1]
            waiting[length] = []


def causal_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Causal grouped-query attention; for short rows several times faster to train on CPU than PyTorch's kernel."""
    rows, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    future = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
    scores = (query * scaling).reshape(rows, kv_heads, -1, dim) @ key.transpose(-1, -2)
    scores = scores.view(rows, kv_heads, -1, length, length) + future
    mixed = scores.softmax(-1).view(rows, kv_heads, -1, length) @ value
    return mixed.view(rows, heads, length, dim).transpose(1, 2).contiguous(), None


def fused_norm(norm: qwen3.Qwen3RMSNorm, hidden: Tensor) -> Tensor:
    """RMS norm in one operation instead of six."""
    return functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warms up for 100 steps, stays for two fifths of the run, then decays linearly to zero."""
    return peak * min((step + 1) / 100, 1.0, (steps - step) / (0.6 * steps))


def train(args: argparse.Namespace) -> None:
    """Trains and saves the tokenizer and the model."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before writing it, and filling each new tensor would cost a fifth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(args.seed)
    AttentionInterface.register("causal", causal_attention)
    qwen3.Qwen3RMSNorm.forward = fused_norm

    tokenizer = train_tokenizer(args.seed)
    config = model_config(tokenizer.get_vocab_size())
    master = Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in config.items() if "dtype" not in k})).float()
    # Forward and backward run on a bf16 copy: matrix products are several times faster, and the loss is that of the
    # weights which get saved. The optimizer works on the fp32 weights, which keep the small updates.
    model = Qwen3ForCausalLM(master.config)
    model.load_state_dict(master.state_dict())
    model.to(torch.bfloat16).train()
    model.set_attn_implementation("causal")
    weights, copies = list(master.parameters()), list(model.parameters())
    print(
        f"{sum(p.numel() for p in master.parameters()):,} parameters, {tokenizer.get_vocab_size()} tokens", flush=True
    )

    matrices = [p for name, p in master.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in master.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = {"lr": args.lr, "momentum": 0.95, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices[::2], **muon),
        torch.optim.Muon(matrices[1::2], **muon),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]

    def gradients(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[float, tuple[Tensor, ...]]:
        ids, taught, targets = batch
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[taught]
        loss = functional.cross_entropy(model.lm_head(hidden).float(), targets, reduction="sum")
        return loss.item(), torch.autograd.grad(loss, copies)

    def update(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad()

    # Each micro-batch is computed by one thread and their gradients are added in order: cores need not wait for each
    # other inside an operation, and the result does not depend on the number of threads.
    pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
    source = micro_batches(tokenizer, args.seed + 1)
    started = time.monotonic()
    shown_loss = shown_steps = tokens = 0
    for step in range(args.steps):
        batch = [next(source) for _ in range(args.micro_batches)]
        tokens += sum(ids.numel() for ids, _, _ in batch)
        taught = sum(len(targets) for _, _, targets in batch)
        for loss, grads in pool.map(gradients, batch):
            shown_loss += loss / taught
            for parameter, grad in zip(weights, grads, strict=True):
                part = grad.float() / taught
                parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, args.steps, args.lr)
        list(pool.map(update, optimizers))
        with torch.no_grad():
            for parameter, copy in zip(weights, copies, strict=True):
                copy.copy_(parameter)
        shown_steps += 1
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            seconds = time.monotonic() - started
            print(
                f"step {step + 1}/{args.steps}  loss {shown_loss / shown_steps:.5f}  {tokens / 1e6:.2f}M tokens  "
                f"{tokens / seconds:.0f} tokens/s  {seconds / 60:.1f} min",
                flush=True,
            )
            shown_loss = shown_steps = 0
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(args.out, config, tokenizer, model)


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches of 2,048 tokens per optimizer step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads; the result does not depend on their number"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="where the checkpoint goes")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
