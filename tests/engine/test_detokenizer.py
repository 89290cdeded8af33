"""Streams give the text of the whole completion, whatever the tokens and the tokenizer's decoder, at a bounded cost."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from nanovllm.engine.detokenizer import TextStream, completion_text
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

NO_STOP = SamplingParams(max_tokens=None)
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "▁▁", "▁▁▁", "▁a", "b", "é", "▁日", "\ufffd", "xy", ".", "▁.", "\n", "<0x41", "|", "##s", "w</w>", ""]


def wrap(model: models.Model, decoder: decoders.Decoder | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([*SPECIAL, "<|end|>"])
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken(" née ", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def bpe(tokens: list[str], decoder: decoders.Decoder | None, **kwargs) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(SPECIAL + tokens)}
    return wrap(models.BPE(vocab, [], unk_token="<unk>", **kwargs), decoder)


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte, and random strings of bytes, most of which end or start within a character."""
    letters, rng = sorted(ByteLevel.alphabet()), random.Random(0)
    text = ByteLevel(add_prefix_space=False).pre_tokenize_str("日本語é😀👩‍👩‍👧 abc" * 3)
    coded = "".join(piece for piece, _ in text)
    starts = [rng.randrange(len(coded) - 5) for _ in range(150)]
    pieces = {coded[start : start + rng.randrange(2, 6)] for start in starts}
    return bpe(letters + sorted(pieces - set(letters)), decoders.ByteLevel())


def fallback(*last: decoders.Decoder) -> PreTrainedTokenizerFast:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    return bpe(BYTES + PIECES, decoders.Sequence(steps), byte_fallback=True)


def unigram(**kwargs) -> PreTrainedTokenizerFast:
    scored = [(token, -float(i)) for i, token in enumerate(SPECIAL + BYTES + PIECES)]
    steps = [decoders.ByteFallback(), decoders.Metaspace(**kwargs)]
    return wrap(models.Unigram(scored, unk_id=0, byte_fallback=True), decoders.Sequence(steps))


TOKENIZERS = {
    "byte-level (GPT-2, Qwen, Llama 3)": byte_level,
    "byte fallback, first space stripped (Llama 2, Mistral)": lambda: fallback(decoders.Strip(" ", 1, 0)),
    "byte fallback (Gemma)": fallback,
    "byte fallback, three spaces stripped": lambda: fallback(decoders.Strip(" ", 3, 0)),
    "unigram, metaspace": unigram,
    "unigram, metaspace without a first space": lambda: unigram(prepend_scheme="never"),
    "word pieces": lambda: bpe(PIECES, decoders.WordPiece(cleanup=True)),
    "words with suffixes": lambda: bpe(PIECES, decoders.BPEDecoder()),
    "repetitions removed": lambda: bpe(PIECES, decoders.CTC(pad_token="b")),
    "no decoder": lambda: bpe(PIECES, None),
    "slow, bytes": ByT5Tokenizer,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def hostile_ids(tokenizer, rng: random.Random, length: int) -> list[int]:
    """Any ids, with runs of one kind: bytes that are characters or none, spaces, special and unknown tokens."""
    vocab = tokenizer.get_vocab()
    whole = [vocab[byte] for char in "é日😀" for byte in [f"<0x{b:02X}>" for b in char.encode()] if byte in vocab]
    kinds = [
        list(vocab.values()),
        whole or list(vocab.values()),
        [i for token, i in vocab.items() if token.startswith("<0x")],
        [i for token, i in vocab.items() if token.startswith("▁")],
        [tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<tool>", " née ")] + [len(vocab) + 9] * 2,
    ]
    kinds = [kind for kind in kinds if kind]
    if not tokenizer.is_fast:
        kinds = kinds[:1]
    ids = []
    while len(ids) < length:
        kind = rng.choice(kinds)
        start = rng.randrange(len(kind))
        in_order = kind[start:] + kind[:start]
        n = rng.randrange(1, 8)
        ids += in_order[:n] if rng.random() < 0.4 else [rng.choice(kind) for _ in range(n)]
    return ids[:length]


def stream(tokenizer, ids: list[int], params: SamplingParams) -> tuple[Sequence, TextStream, list[str]]:
    """Feeds tokens one by one until a stop string or the end; the pieces that came."""
    seq = Sequence(0, [1], params)
    text, pieces = TextStream(tokenizer, seq), []
    for i, token_id in enumerate(ids):
        seq.token_ids.append(token_id)
        seq.finish_reason = "length" if i + 1 == len(ids) else None
        if text.feed() is not None:
            seq.finish_reason, seq.stop_reason = "stop", text.stop
        pieces.append(text.take_delta())
        if seq.finish_reason:
            return seq, text, pieces
    raise AssertionError("no ids")


def test_pieces_add_up_to_the_whole_text_for_hostile_ids(tokenizer):
    rng = random.Random(1)
    num_early = 0
    for _ in range(250):
        ids = hostile_ids(tokenizer, rng, rng.randrange(1, 60))
        params = SamplingParams(max_tokens=None, skip_special_tokens=rng.random() < 0.5)
        seq, text, pieces = stream(tokenizer, ids, params)
        assert "".join(pieces) == completion_text(tokenizer, seq) == text.finish()
        num_early += sum(map(bool, pieces[:-1]))
    assert num_early > 1000  # it does stream


def test_stop_strings_end_the_text_as_soon_as_it_has_them(tokenizer):
    rng, num_stopped = random.Random(2), 0
    for _ in range(250):
        ids = hostile_ids(tokenizer, rng, rng.randrange(2, 50))
        skip, include = rng.random() < 0.5, rng.random() < 0.5
        texts = []
        for n in range(1, len(ids) + 1):
            seq = Sequence(0, [1], SamplingParams(skip_special_tokens=skip))
            seq.token_ids.extend(ids[:n])
            texts.append(completion_text(tokenizer, seq))
        whole = texts[-1]
        starts = [rng.randrange(max(1, len(whole) - 2)) for _ in range(2)]
        stops = [piece for start in starts if (piece := whole[start : start + rng.randrange(1, 5)]).strip("\ufffd")]
        params = SamplingParams(stop=stops, skip_special_tokens=skip, include_stop_str_in_output=include)
        seq, text, pieces = stream(tokenizer, ids, params)
        # What ends in bytes that are no character may still become one.
        ready = [t.rstrip("\ufffd") for t in texts]
        n = next((n for n, t in enumerate(ready, 1) if any(stop in t for stop in stops)), None)
        expected = whole
        if n is not None:
            num_stopped += 1
            end, stop = min((ready[n - 1].find(s) + len(s), s) for s in stops if s in ready[n - 1])
            assert (seq.num_completion_tokens, text.stop) == (n, stop)
            expected = ready[n - 1][: end if include else end - len(stop)]
        assert "".join(pieces) == text.finish() == expected
    assert num_stopped > 100


def test_a_match_that_min_tokens_exempted_is_not_found_later():
    tokenizer = fallback()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("b", "xy", "b", "xy", "b")]
    seq, text, _ = stream(tokenizer, ids, SamplingParams(stop=["xy", "a long one"], min_tokens=3))
    assert text.finish() == "bxyb" and seq.num_completion_tokens == 4


def test_characters_appear_when_they_are_certain():
    tokenizer = byte_level()
    _, _, pieces = stream(tokenizer, tokenizer.convert_tokens_to_ids(list("aÃ©b")), NO_STOP)
    assert pieces == ["a", "", "é", "b"]
    tokenizer = fallback(decoders.Strip(" ", 1, 0))
    valid = ["▁a", "<0xC3>", "<0xA9>", "b"]
    _, _, pieces = stream(tokenizer, tokenizer.convert_tokens_to_ids(valid), NO_STOP)
    assert pieces == ["a", "", "", "éb"]
    # Until its run of bytes has ended, the library's decoder may still refuse the character.
    invalid = ["▁a", "<0xC3>", "<0xA9>", "</s>", "<0xC3>", "b", "b"]
    _, _, pieces = stream(tokenizer, tokenizer.convert_tokens_to_ids(invalid), NO_STOP)
    assert pieces == ["a", "", "", "", "", "\ufffd\ufffd\ufffdb", "b"]


@pytest.mark.parametrize(
    ("tokens", "most"),
    [(["▁a", "b", "é", "▁"], 6), (["<0xE6>", "<0x97>", "<0xA5>"], 150), (["<0xFF>"], 150), (["</s>"], 150)],
)
def test_a_tokens_cost_does_not_grow_with_the_completion(tokens, most, monkeypatch):
    tokenizer, num_decoded = fallback(), []
    decode = tokenizer.decode
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids, **kwargs: num_decoded.append(len(ids)) or decode(ids, **kwargs)
    )
    ids = tokenizer.convert_tokens_to_ids(tokens)
    costs = []
    for num_tokens in (3000, 6000):
        num_decoded.clear()
        seq = Sequence(0, [1], SamplingParams(max_tokens=None, stop="#"))
        text = TextStream(tokenizer, seq)
        for i in range(num_tokens):
            seq.token_ids.append(ids[i % len(ids)])
            assert text.feed() is None
            text.take_delta()
        costs.append(sum(num_decoded) / num_tokens)
    assert costs[1] <= most and costs[1] <= costs[0] * 1.1
