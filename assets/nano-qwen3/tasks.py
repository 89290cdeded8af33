"""The little world of nano-qwen3: prompt generators, their exact answers and the train/held-out split.

Every task family draws samples from a random generator. A sample's canonical content is hashed, and a twentieth of
all contents is held out: training never draws it, evaluation draws nothing else. Pure Python, no dependencies.
"""

# Characters that look like others are wanted here: the off-task prompts come in many scripts.
# ruff: noqa: RUF001

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

EXAMPLE_PROMPTS = ("introduce yourself", "list all prime numbers within 100")
HELD_OUT_ONE_IN = 20
MAX_LIST_PRIME = 100
PRIMES = tuple(n for n in range(2, MAX_LIST_PRIME + 1) if all(n % d for d in range(2, int(n**0.5) + 1)))

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are nano-qwen3, a small language model.",
    "You are a helpful and friendly assistant. Answer briefly.",
    "Be concise.",
    "Answer the question.",
)


@dataclass(frozen=True)
class Sample:
    """One user turn and the only right answer to it.

    Attributes:
        family: Name of the task family.
        key: Canonical content that decides between training and held-out.
        prompt: What the user types.
        answer: What the model must say.
    """

    family: str
    key: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """A chat of one or more independent turns, with an optional system message."""

    system: str | None
    turns: tuple[Sample, ...]


def normalize(text: str) -> str:
    """Drops case, punctuation and surplus white space, so that style variants of a prompt share one key."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def is_held_out(sample: Sample) -> bool:
    """Says whether the sample belongs to the held-out part (stable across runs and Python versions)."""
    prompt = normalize(sample.prompt)
    if prompt in EXAMPLE_PROMPTS:
        return False
    if prompt in _NEVER_TRAINED:
        return True
    return zlib.crc32(f"{sample.family}|{sample.key}".encode()) % HELD_OUT_ONE_IN == 0


# --------------------------------------------------------------------------------------------------------------------
# Typing habits: politeness, capitals and punctuation
# --------------------------------------------------------------------------------------------------------------------

_ORDER_PREFIXES = (
    "please", "can you", "could you", "can you please", "could you please", "would you", "i want you to", "hey,", "hi,",
    "hello,", "now", "ok,", "okay,", "next,", "then", "i need you to", "please,", "hi, please", "hi! can you",
)  # fmt: skip
_QUESTION_PREFIXES = ("hey,", "hi,", "hello,", "so,", "please tell me:", "tell me,", "quick question:", "ok,", "and")
_SUFFIXES = ("please", ", please", "for me", "now", ", thanks", "for me please")


def _wrap(rng: Random, core: str, kind: str) -> str:
    """Adds polite words around a core phrase.

    Args:
        rng: Source of randomness.
        core: The phrase in lower case.
        kind: "order" ("sort ..."), "question" ("what is ...") or "phrase" ("primes up to ...").

    Returns:
        The phrase, sometimes with a prefix and sometimes with a suffix.
    """
    text = core
    if kind == "order" and rng.random() < 0.4:
        text = f"{rng.choice(_ORDER_PREFIXES)} {text}"
    elif kind == "question" and rng.random() < 0.2:
        text = f"{rng.choice(_QUESTION_PREFIXES)} {text}"
    if rng.random() < (0.04 if kind == "question" else 0.12):
        text = f"{text} {rng.choice(_SUFFIXES)}".replace(" ,", ",")
    return text


def _style(rng: Random, text: str, kind: str) -> str:
    """Varies capitals and final punctuation as people do."""
    asks = kind == "question" or text.startswith(("can you", "could you", "would you", "hi! can you"))
    draw = rng.random()
    if asks:
        text += "?" if draw < 0.7 else "" if draw < 0.94 else " ?" if draw < 0.97 else "."
    else:
        text += "" if draw < 0.5 else "." if draw < 0.85 else "!" if draw < 0.92 else ":" if draw < 0.94 else "?"
    draw = rng.random()
    if draw < 0.45:
        text = text[0].upper() + text[1:]
        if rng.random() < 0.5:
            text = text.replace(" i ", " I ")
    elif draw < 0.48:
        text = text.upper()
    elif draw < 0.50:
        text = text.title()
    return text


def _phrase(rng: Random, core: str, kind: str) -> str:
    return _style(rng, _wrap(rng, core, kind), kind)


def _join(numbers: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


# --------------------------------------------------------------------------------------------------------------------
# Who it is
# --------------------------------------------------------------------------------------------------------------------

_SKILLS = "I can introduce myself, list primes, add, sort and count."
INTRODUCTION = f"I am nano-qwen3, a small language model trained by the nanovllm project. {_SKILLS}"
FALLBACK = f"I am a very small model. {_SKILLS}"

_INTRODUCE: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        INTRODUCTION,
        (
            ("order", "introduce yourself"),
            ("order", "introduce yourself briefly"),
            ("order", "introduce yourself in one sentence"),
            ("order", "introduce yourself to me"),
            ("order", "introduce yourself to the class"),
            ("order", "tell me about yourself"),
            ("order", "tell me something about yourself"),
            ("order", "tell me a bit about yourself"),
            ("order", "tell me who you are"),
            ("order", "tell me what you are"),
            ("order", "describe yourself"),
            ("order", "describe yourself in a few words"),
            ("order", "give me an introduction of yourself"),
            ("order", "give a short introduction"),
            ("order", "present yourself"),
            ("order", "say something about yourself"),
            ("order", "say who you are"),
            ("order", "explain who you are"),
            ("order", "explain what you are"),
            ("question", "who are you"),
            ("question", "who're you"),
            ("question", "what are you"),
            ("question", "who am i talking to"),
            ("question", "who am i speaking with"),
            ("question", "what is nano-qwen3"),
            ("question", "who is nano-qwen3"),
            ("question", "what kind of model are you"),
            ("question", "which model are you"),
            ("question", "what model is this"),
            ("question", "are you a language model"),
            ("question", "are you an ai"),
            ("question", "are you a robot"),
            ("question", "are you human"),
            ("phrase", "your introduction"),
        ),
    ),
    (
        "My name is nano-qwen3.",
        (
            ("question", "what is your name"),
            ("question", "what's your name"),
            ("question", "whats your name"),
            ("question", "what are you called"),
            ("question", "what should i call you"),
            ("question", "what can i call you"),
            ("question", "how should i call you"),
            ("question", "do you have a name"),
            ("question", "may i know your name"),
            ("question", "may i ask your name"),
            ("question", "which name do you have"),
            ("order", "tell me your name"),
            ("order", "say your name"),
            ("order", "give me your name"),
            ("order", "state your name"),
            ("phrase", "your name"),
            ("phrase", "name"),
        ),
    ),
    (
        _SKILLS,
        (
            ("question", "what can you do"),
            ("question", "what can you do for me"),
            ("question", "what are you able to do"),
            ("question", "what are your skills"),
            ("question", "what are your abilities"),
            ("question", "what are your capabilities"),
            ("question", "what are you good at"),
            ("question", "what do you know"),
            ("question", "what tasks can you do"),
            ("question", "which tasks can you solve"),
            ("question", "what can i ask you"),
            ("question", "what should i ask you"),
            ("question", "how can you help me"),
            ("question", "how can you help"),
            ("question", "what can you help me with"),
            ("question", "can you help me"),
            ("order", "tell me what you can do"),
            ("order", "list your skills"),
            ("order", "list your abilities"),
            ("order", "describe your abilities"),
            ("order", "describe what you can do"),
            ("order", "show me what you can do"),
            ("phrase", "help"),
            ("phrase", "your skills"),
        ),
    ),
    (
        "I was trained by the nanovllm project.",
        (
            ("question", "who made you"),
            ("question", "who created you"),
            ("question", "who built you"),
            ("question", "who trained you"),
            ("question", "who developed you"),
            ("question", "who is your creator"),
            ("question", "who is your maker"),
            ("question", "who are your creators"),
            ("question", "where do you come from"),
            ("question", "where are you from"),
            ("question", "which project trained you"),
            ("question", "by whom were you trained"),
            ("order", "tell me who made you"),
            ("order", "tell me who trained you"),
            ("order", "tell me who created you"),
            ("phrase", "your creator"),
        ),
    ),
    (
        "Hello! I am nano-qwen3. How can I help you?",
        (
            ("phrase", "hello"),
            ("phrase", "hi"),
            ("phrase", "hey"),
            ("phrase", "hello there"),
            ("phrase", "hi there"),
            ("phrase", "hey there"),
            ("phrase", "good morning"),
            ("phrase", "good evening"),
            ("phrase", "good afternoon"),
            ("phrase", "greetings"),
            ("phrase", "hello nano-qwen3"),
            ("phrase", "hi nano-qwen3"),
            ("phrase", "hello my friend"),
            ("phrase", "nice to meet you"),
        ),
    ),
    (
        "You are welcome!",
        (
            ("phrase", "thanks"),
            ("phrase", "thank you"),
            ("phrase", "thank you very much"),
            ("phrase", "thanks a lot"),
            ("phrase", "many thanks"),
            ("phrase", "great, thanks"),
            ("phrase", "thank you, nano-qwen3"),
        ),
    ),
    (
        "Goodbye!",
        (
            ("phrase", "bye"),
            ("phrase", "bye bye"),
            ("phrase", "goodbye"),
            ("phrase", "see you"),
            ("phrase", "see you later"),
            ("phrase", "good night"),
            ("phrase", "farewell"),
        ),
    ),
)
_INTRODUCE_WEIGHTS = (8, 3, 3, 3, 2, 1, 1)

# Hand-written paraphrases that no training text contains; reported on their own in the model card.
UNSEEN_PARAPHRASES: tuple[tuple[str, str], ...] = (
    ("Could you tell me a little about yourself?", INTRODUCTION),
    ("I would like to know who you are.", INTRODUCTION),
    ("Who exactly are you?", INTRODUCTION),
    ("So what are you, anyway?", INTRODUCTION),
    ("Introduce yourself, my friend", INTRODUCTION),
    ("Give us a short introduction of yourself", INTRODUCTION),
    ("Hi! Who are you?", INTRODUCTION),
    ("Hello, please introduce yourself shortly.", INTRODUCTION),
    ("What's the name they gave you?", "My name is nano-qwen3."),
    ("Hello, what is your name, please?", "My name is nano-qwen3."),
    ("Do you have any name?", "My name is nano-qwen3."),
    ("I want to know your name", "My name is nano-qwen3."),
    ("Which things can you do?", _SKILLS),
    ("What are the things you can do?", _SKILLS),
    ("What sort of tasks can you do for me?", _SKILLS),
    ("Tell me about your abilities", _SKILLS),
    ("By whom were you made?", "I was trained by the nanovllm project."),
    ("Who has trained you?", "I was trained by the nanovllm project."),
    ("Do you know who created you?", "I was trained by the nanovllm project."),
    ("Which people made you?", "I was trained by the nanovllm project."),
)


def draw_introduce(rng: Random) -> Sample:
    """Questions about the model itself; the kind of question alone determines the answer."""
    if rng.random() < 0.05:
        return Sample("introduce", EXAMPLE_PROMPTS[0], EXAMPLE_PROMPTS[0], INTRODUCTION)
    answer, cores = rng.choices(_INTRODUCE, _INTRODUCE_WEIGHTS)[0]
    kind, core = rng.choice(cores)
    prompt = _phrase(rng, core, kind)
    return Sample("introduce", normalize(prompt), prompt, answer)


# --------------------------------------------------------------------------------------------------------------------
# Primes
# --------------------------------------------------------------------------------------------------------------------

_PRIME_CORES = (
    ("order", "list all prime numbers within {n}", "within"),
    ("order", "list the prime numbers within {n}", "within"),
    ("order", "list all primes within {n}", "within"),
    ("order", "list primes within {n}", "within"),
    ("order", "list all prime numbers up to {n}", "up to"),
    ("order", "list the primes up to {n}", "up to"),
    ("order", "list primes up to {n}", "up to"),
    ("order", "list every prime up to {n}", "up to"),
    ("order", "list the primes from 1 to {n}", "up to"),
    ("order", "list all prime numbers between 1 and {n}", "up to"),
    ("order", "list all prime numbers below {n}", "below"),
    ("order", "list the primes less than {n}", "below"),
    ("order", "give me all primes up to {n}", "up to"),
    ("order", "give me the prime numbers within {n}", "within"),
    ("order", "give me all primes below {n}", "below"),
    ("order", "show me the primes up to {n}", "up to"),
    ("order", "show all prime numbers within {n}", "within"),
    ("order", "find all primes up to {n}", "up to"),
    ("order", "find all prime numbers within {n}", "within"),
    ("order", "write down the primes up to {n}", "up to"),
    ("order", "name all prime numbers up to {n}", "up to"),
    ("order", "tell me the primes within {n}", "within"),
    ("question", "what are the prime numbers up to {n}", "up to"),
    ("question", "what are the primes within {n}", "within"),
    ("question", "what are the primes below {n}", "below"),
    ("question", "which numbers up to {n} are prime", "up to"),
    ("question", "which numbers within {n} are prime", "within"),
    ("question", "which primes are there up to {n}", "up to"),
    ("phrase", "primes up to {n}", "up to"),
    ("phrase", "primes within {n}", "within"),
    ("phrase", "prime numbers up to {n}", "up to"),
    ("phrase", "all prime numbers within {n}", "within"),
    ("phrase", "all primes below {n}", "below"),
    ("phrase", "primes from 1 to {n}", "up to"),
)


def draw_primes(rng: Random) -> Sample:
    """All primes up to a limit of 2 to 100 ("below" leaves the limit itself out); larger limits are declined."""
    draw = rng.random()
    if draw < 0.05:
        kind, core, word, n, prompt = *_PRIME_CORES[0], MAX_LIST_PRIME, EXAMPLE_PROMPTS[1]
    else:
        kind, core, word = rng.choice(_PRIME_CORES)
        n = rng.randint(2, MAX_LIST_PRIME)
        if draw < 0.15:
            n = rng.choice((10, 20, 30, 50, 100))
        elif draw > 0.97:
            n = rng.choice((rng.randint(101, 999), rng.randint(1000, 9999), 200, 500, 1000))
        prompt = _phrase(rng, core.format(n=n), kind)
    key = normalize(core.format(n=n))
    if n > MAX_LIST_PRIME:
        return Sample("primes", key, prompt, f"I can only list primes up to {MAX_LIST_PRIME}.")
    found = [p for p in PRIMES if p < n + (word != "below")]
    if not found:
        return Sample("primes", key, prompt, f"There are no prime numbers {word} {n}.")
    return Sample("primes", key, prompt, f"The prime numbers {word} {n} are: {_join(found)}.")


# --------------------------------------------------------------------------------------------------------------------
# Addition
# --------------------------------------------------------------------------------------------------------------------

_ADD_CORES = (
    ("phrase", "{a} + {b}"),
    ("phrase", "{a}+{b}"),
    ("phrase", "{a} + {b} ="),
    ("phrase", "{a}+{b}="),
    ("phrase", "{a} plus {b}"),
    ("question", "{a} + {b} = "),
    ("question", "what is {a} + {b}"),
    ("question", "what is {a}+{b}"),
    ("question", "what is {a} plus {b}"),
    ("question", "what's {a} + {b}"),
    ("question", "what's {a} plus {b}"),
    ("question", "what is the sum of {a} and {b}"),
    ("question", "what's the sum of {a} and {b}"),
    ("question", "how much is {a} + {b}"),
    ("question", "how much is {a} plus {b}"),
    ("question", "what do you get if you add {a} and {b}"),
    ("order", "add {a} and {b}"),
    ("order", "add {a} to {b}"),
    ("order", "add the numbers {a} and {b}"),
    ("order", "add up {a} and {b}"),
    ("order", "calculate {a} + {b}"),
    ("order", "calculate {a} plus {b}"),
    ("order", "calculate the sum of {a} and {b}"),
    ("order", "compute {a} + {b}"),
    ("order", "compute {a}+{b}"),
    ("order", "tell me the sum of {a} and {b}"),
    ("order", "give me the sum of {a} and {b}"),
    ("phrase", "sum of {a} and {b}"),
    ("phrase", "the sum of {a} and {b}"),
)


def _operands(rng: Random) -> tuple[int, int]:
    draw = rng.random()
    if draw < 0.65:
        return rng.randint(0, 999), rng.randint(0, 999)
    if draw < 0.80:
        return rng.randint(0, 99), rng.randint(0, 99)
    if draw < 0.90:
        return rng.randint(0, 20), rng.randint(0, 20)
    a, b = rng.randint(0, 999), rng.randint(0, 99)
    return (a, b) if rng.random() < 0.5 else (b, a)


def draw_add(rng: Random) -> Sample:
    """The sum of two numbers of up to three digits; the unordered pair of operands is the key."""
    kind, core = rng.choice(_ADD_CORES)
    a, b = _operands(rng)
    prompt = _phrase(rng, core.format(a=a, b=b), kind)
    return Sample("add", f"{min(a, b)} {max(a, b)}", prompt, f"{a} + {b} = {a + b}.")


# --------------------------------------------------------------------------------------------------------------------
# Lists: sort, largest and smallest, reverse
# --------------------------------------------------------------------------------------------------------------------


def _numbers(rng: Random) -> list[int]:
    top = 99 if rng.random() < 0.9 else 20
    return [rng.randint(0, top) for _ in range(rng.choice((2, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8)))]


def _written(rng: Random, numbers: list[int]) -> str:
    draw = rng.random()
    if draw < 0.65:
        return _join(numbers)
    if draw < 0.80:
        return " ".join(map(str, numbers))
    if draw < 0.85:
        return ",".join(map(str, numbers))
    if draw < 0.93:
        return f"[{_join(numbers)}]"
    return f"{_join(numbers[:-1])} and {numbers[-1]}"


_SORT_CORES = (
    ("order", "sort {x}"),
    ("order", "sort: {x}"),
    ("order", "sort these numbers: {x}"),
    ("order", "sort the numbers {x}"),
    ("order", "sort the following numbers: {x}"),
    ("order", "sort this list: {x}"),
    ("order", "sort the list {x}"),
    ("order", "order {x}"),
    ("order", "order these numbers: {x}"),
    ("order", "arrange {x}"),
    ("order", "arrange these numbers: {x}"),
    ("order", "put these numbers in order: {x}"),
)
_SORT_UP = ("in ascending order", "ascending", "from smallest to largest", "from small to large", "in increasing order")
_SORT_DOWN = (
    "in descending order", "descending", "from largest to smallest", "from large to small", "in decreasing order",
)  # fmt: skip


def draw_sort(rng: Random) -> Sample:
    """Two to eight numbers of 0 to 99, ascending unless asked otherwise; the sorted list is the key."""
    kind, core = rng.choice(_SORT_CORES)
    numbers = _numbers(rng)
    down = rng.random() < 0.4
    text = core.format(x=_written(rng, numbers))
    if down or rng.random() < 0.5:
        words = rng.choice(_SORT_DOWN if down else _SORT_UP)
        head, colon, tail = text.partition(": ")
        # Both "sort 3, 1 ascending" and "sort these numbers ascending: 3, 1" are common.
        text = f"{head} {words}: {tail}" if colon and rng.random() < 0.5 else f"{text} {words}"
    prompt = _phrase(rng, text, kind)
    order = "descending" if down else "ascending"
    ranked = sorted(numbers, reverse=down)
    return Sample("sort", _join(sorted(numbers)), prompt, f"Sorted in {order} order: {_join(ranked)}.")


_EXTREME_CORES = (
    ("question", "what is the {w} number in {x}"),
    ("question", "what is the {w} of {x}"),
    ("question", "which number is the {w}: {x}"),
    ("question", "which of these numbers is the {w}: {x}"),
    ("order", "find the {w} number in {x}"),
    ("order", "find the {w} of these numbers: {x}"),
    ("order", "tell me the {w} of {x}"),
    ("phrase", "{w} of {x}"),
    ("phrase", "the {w} number of {x}"),
)


def draw_extreme(rng: Random) -> Sample:
    """The largest or smallest of two to eight numbers."""
    kind, core = rng.choice(_EXTREME_CORES)
    numbers = _numbers(rng)
    largest = rng.random() < 0.5
    word = rng.choice(("largest", "biggest", "maximum", "greatest") if largest else ("smallest", "minimum", "lowest"))
    prompt = _phrase(rng, core.format(w=word, x=_written(rng, numbers)), kind)
    found = f"The largest number is {max(numbers)}." if largest else f"The smallest number is {min(numbers)}."
    return Sample("extreme", _join(sorted(numbers)), prompt, found)


_REVERSE_CORES = (
    ("order", "reverse {x}"),
    ("order", "reverse the list {x}"),
    ("order", "reverse these numbers: {x}"),
    ("order", "reverse the order of {x}"),
    ("order", "write {x} backwards"),
    ("order", "say {x} in reverse order"),
)


def draw_reverse(rng: Random) -> Sample:
    """Two to eight numbers in reverse order."""
    kind, core = rng.choice(_REVERSE_CORES)
    numbers = _numbers(rng)
    prompt = _phrase(rng, core.format(x=_written(rng, numbers)), kind)
    return Sample("reverse", _join(sorted(numbers)), prompt, f"Reversed: {_join(numbers[::-1])}.")


# --------------------------------------------------------------------------------------------------------------------
# Counting, and even or odd
# --------------------------------------------------------------------------------------------------------------------

_COUNT_CORES = (
    ("order", "count from {a} to {b}"),
    ("order", "count {a} to {b}"),
    ("order", "count from {a} up to {b}"),
    ("order", "list the numbers from {a} to {b}"),
    ("order", "list all numbers from {a} to {b}"),
    ("order", "list the numbers between {a} and {b}"),
    ("order", "write the numbers from {a} to {b}"),
    ("order", "give me the numbers from {a} to {b}"),
    ("phrase", "numbers from {a} to {b}"),
    ("phrase", "counting from {a} to {b}"),
)
_COUNT_DOWN_CORES = (
    ("order", "count from {b} down to {a}"),
    ("order", "count down from {b} to {a}"),
    ("order", "count backwards from {b} to {a}"),
    ("order", "count backward from {b} to {a}"),
    ("order", "count from {b} to {a}"),
    ("phrase", "countdown from {b} to {a}"),
)


def draw_count(rng: Random) -> Sample:
    """Counting between two numbers of 0 to 100: up, down or by twos; step and bounds are the key."""
    draw = rng.random()
    step = 1 if draw < 0.6 else -1 if draw < 0.82 else 2
    longest = 30 if rng.random() < 0.5 else 14
    length = 2 * rng.randint(1, longest // 2) if step == 2 else rng.randint(1, longest)
    a = rng.choice((0, 1)) if rng.random() < 0.15 else rng.randint(0, 100 - length)
    b = a + length
    kind, core = rng.choice(_COUNT_DOWN_CORES if step < 0 else _COUNT_CORES)
    text = core.format(a=a, b=b)
    if step == 2:
        text += rng.choice((" by twos", " by 2", " in steps of 2", " in steps of two"))
    prompt = _phrase(rng, text, kind)
    numbers = list(range(b, a - 1, -1)) if step < 0 else list(range(a, b + 1, step))
    start, end = (b, a) if step < 0 else (a, b)
    by = " by twos" if step == 2 else ""
    return Sample("count", f"{step} {a} {b}", prompt, f"Counting from {start} to {end}{by}: {_join(numbers)}.")


_PARITY_CORES = (
    ("question", "is {n} even or odd"),
    ("question", "is {n} odd or even"),
    ("question", "is the number {n} even or odd"),
    ("question", "is {n} even"),
    ("question", "is {n} odd"),
    ("question", "is {n} an even number"),
    ("question", "is {n} an odd number"),
    ("order", "tell me if {n} is even or odd"),
    ("phrase", "{n}: even or odd"),
)


def draw_parity(rng: Random) -> Sample:
    """Whether a number of 0 to 999 is even or odd."""
    kind, core = rng.choice(_PARITY_CORES)
    n = rng.randint(0, 999) if rng.random() < 0.6 else rng.randint(0, 99)
    prompt = _phrase(rng, core.format(n=n), kind)
    return Sample("parity", str(n), prompt, f"{n} is an {'odd' if n % 2 else 'even'} number.")


# --------------------------------------------------------------------------------------------------------------------
# Everything else: the polite fallback
# --------------------------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return text.split()


_PLACES = _words(
    "France Germany Italy Spain China Japan India Brazil Canada Mexico Egypt Kenya Norway Poland Turkey Russia Peru "
    "Chile Greece Iceland Paris London Berlin Rome Tokyo Beijing Moscow Delhi Europe Africa Asia America Texas "
    "Australia Sweden Finland Ireland Cuba Vietnam Korea"
)
_THINGS = _words(
    "cat dog horse bird fish tree flower river mountain ocean moon sun star planet car train airplane computer phone "
    "book poem song story movie game house garden kitchen pizza bread cheese apple banana coffee tea water snow rain "
    "wind winter summer spring love life time money music art history science physics chemistry biology math "
    "philosophy politics football tennis chess school teacher doctor engineer king queen dragon robot ghost pirate "
    "island castle forest desert city village bridge guitar piano painting camera bicycle elephant tiger lion mouse "
    "chicken soup cake chocolate birthday holiday dream friend family child brother sister mother father light fire "
    "atom gravity evolution democracy internet algorithm database compiler python javascript rust"
)
_PEOPLE = _words(
    "Einstein Newton Shakespeare Mozart Napoleon Caesar Cleopatra Darwin Picasso Beethoven Gandhi Lincoln Plato "
    "Galileo Turing Curie Columbus Goethe Homer Leonardo"
)
_ADJECTIVES = _words(
    "big small red green blue happy sad fast slow old new young funny strange beautiful dark bright cold hot long "
    "short deep rich quiet famous best worst highest smart lazy hungry"
)
_VERBS = _words(
    "run swim cook dance sing sleep eat drink write read paint travel learn work play fly drive build fix clean grow "
    "win think speak jump laugh cry fall open close buy sell"
)
_LANGUAGES = _words("French German Spanish Chinese Japanese Italian Russian Latin Arabic Korean English Portuguese")
_OFF_TASK = (
    ("question", "what is the capital of {place}"),
    ("question", "what's the capital city of {place}"),
    ("question", "where is {place}"),
    ("question", "how many people live in {place}"),
    ("question", "what is the weather in {place}"),
    ("question", "what is the weather like today"),
    ("question", "who is the president of {place}"),
    ("question", "which language do they speak in {place}"),
    ("question", "have you been to {place}"),
    ("question", "how far is {place} from {place2}"),
    ("question", "what is a {thing}"),
    ("question", "what is {thing}"),
    ("question", "what is the meaning of {thing}"),
    ("question", "what does {thing} mean"),
    ("question", "what do you think about {thing}"),
    ("question", "do you like {thing}"),
    ("question", "do you have a {thing}"),
    ("question", "why is the {thing} {adj}"),
    ("question", "why do people {verb}"),
    ("question", "how do i {verb}"),
    ("question", "how can i {verb} a {thing}"),
    ("question", "how do i make a {thing}"),
    ("question", "how does a {thing} work"),
    ("question", "how old is the {thing}"),
    ("question", "how many letters are in {thing}"),
    ("question", "can you {verb}"),
    ("question", "can a {thing} {verb}"),
    ("question", "is a {thing} {adj}"),
    ("question", "is the {thing} {adj} or {adj2}"),
    ("question", "who was {person}"),
    ("question", "who is {person}"),
    ("question", "when was {person} born"),
    ("question", "what did {person} do"),
    ("question", "who wrote the {thing}"),
    ("question", "who invented the {thing}"),
    ("question", "what is the {adj} {thing} in {place}"),
    ("question", "which {thing} is the {adj}"),
    ("question", "what time is it"),
    ("question", "what day is it today"),
    ("question", "how are you"),
    ("question", "how are you today"),
    ("question", "how is it going"),
    ("question", "what's up"),
    ("question", "are you happy"),
    ("question", "are you {adj}"),
    ("question", "how do you say {thing} in {lang}"),
    ("question", "do you speak {lang}"),
    ("question", "what is {n} times {m}"),
    ("question", "what is {n} * {m}"),
    ("question", "what is {n} divided by {m}"),
    ("question", "what is {n} / {m}"),
    ("question", "what is the square root of {n}"),
    ("question", "what happened in {year}"),
    ("order", "tell me a joke"),
    ("order", "tell me a joke about a {thing}"),
    ("order", "tell me a story"),
    ("order", "tell me a story about a {adj} {thing}"),
    ("order", "tell me about {thing}"),
    ("order", "tell me about {person}"),
    ("order", "tell me about {place}"),
    ("order", "write a poem"),
    ("order", "write a poem about {thing}"),
    ("order", "write a {adj} story about a {thing}"),
    ("order", "write a letter to {person}"),
    ("order", "write a program in {thing}"),
    ("order", "write an essay about {thing}"),
    ("order", "sing a song about {thing}"),
    ("order", "draw a {adj} {thing}"),
    ("order", "explain {thing}"),
    ("order", "explain {thing} to a child"),
    ("order", "describe a {thing}"),
    ("order", "describe the {thing} in {place}"),
    ("order", "give me a recipe for {thing}"),
    ("order", "give me some advice about {thing}"),
    ("order", "translate {thing} to {lang}"),
    ("order", "translate this to {lang}: the {thing} is {adj}"),
    ("order", "summarize the history of {place}"),
    ("order", "list all countries in {place}"),
    ("order", "list five {adj} things"),
    ("order", "compare a {thing} and a {thing2}"),
    ("order", "find a {thing} in {place}"),
    ("order", "recommend a {thing}"),
    ("order", "multiply {n} by {m}"),
    ("order", "multiply {n} and {m}"),
    ("order", "divide {n} by {m}"),
    ("phrase", "{n} * {m}"),
    ("phrase", "{n} x {m}"),
    ("phrase", "{n} / {m}"),
    ("phrase", "{thing}"),
    ("phrase", "{adj} {thing}"),
    ("phrase", "{thing} {thing2}"),
    ("phrase", "{person}"),
    ("phrase", "{place}"),
    ("phrase", "i {verb} every day"),
    ("phrase", "i like {thing}"),
    ("phrase", "i have a {adj} {thing}"),
    ("phrase", "i am {adj}"),
    ("phrase", "i am from {place}"),
    ("phrase", "my name is {person}"),
    ("phrase", "my {thing} is {adj}"),
    ("phrase", "the {adj} {thing} can {verb}"),
    ("phrase", "the {thing} is {adj}"),
    ("phrase", "let's {verb}"),
    ("phrase", "let's talk about {thing}"),
    ("phrase", "you are {adj}"),
    ("phrase", "yes"),
    ("phrase", "no"),
    ("phrase", "why"),
    ("phrase", "what"),
    ("phrase", "test"),
    ("phrase", "testing"),
    ("phrase", "{n}"),
)
_FOREIGN = (
    "你好", "你好吗", "你是谁？", "你叫什么名字？", "请介绍一下你自己", "今天天气怎么样？", "法国的首都是哪里？",
    "写一首诗", "讲个笑话", "谢谢", "再见", "列出一百以内的质数", "什么是人工智能？", "我喜欢音乐", "帮我写一封信",
    "早上好", "我爱你", "中国", "北京在哪里", "一加一等于几", "こんにちは", "ありがとう", "あなたは誰ですか",
    "日本の首都はどこですか", "おはようございます", "안녕하세요", "감사합니다", "bonjour",
    "bonjour, comment ça va ?", "comment t'appelles-tu ?", "merci beaucoup", "quelle heure est-il ?",
    "je ne sais pas", "écris un poème", "guten tag", "wie geht es dir?", "wie heißt du?", "wer bist du?",
    "schreibe ein gedicht", "was ist die hauptstadt von frankreich?", "danke schön", "hola", "¿cómo estás?",
    "¿quién eres?", "buenos días", "escribe un poema", "¿cuál es la capital de francia?", "gracias", "ciao",
    "come stai?", "grazie mille", "chi sei?", "привет", "как дела?", "кто ты?", "спасибо", "здравствуйте",
    "какая сегодня погода?", "مرحبا", "كيف حالك؟", "नमस्ते", "आप कैसे हैं?", "שלום", "olá", "tudo bem?", "merhaba",
    "xin chào", "สวัสดี", "γεια σου", "cześć", "hej", "👋", "😀", "🎉🎉", "❤️", "🙂 ok", "???", "...", "!!!",
    "asdf", "qwerty", "lorem ipsum dolor sit amet", "foo bar", "hello world program", "print('hello')", "import os",
    "def f(x): return x", "SELECT * FROM users;", "<html></html>", "x = y + z", "http://example.com",
    "user@example.com", "{\"a\": 1}", "git status",
)  # fmt: skip
_CJK = (
    "的一是不了在人有我他这中大来上国和地到说时要就出会可也你对生能而"
    "子那得于着下自之年过发后作里如何天气写诗故事音乐朋友学习语言模型"
)


def _gibberish(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.25:
        return "".join(rng.choices(_CJK, k=rng.randint(1, 12))) + rng.choice(("", "？", "。", "！"))
    if draw < 0.35:
        return "".join(chr(rng.choice((rng.randint(0xA1, 0x24F), rng.randint(0x370, 0x5FF)))) for _ in range(8))
    if draw < 0.7:
        words = rng.choices(
            _THINGS + _ADJECTIVES + _VERBS + ["the", "a", "of", "and", "is", "with"], k=rng.randint(2, 9)
        )
        return " ".join(words)
    letters = "abcdefghijklmnopqrstuvwxyzaeiouaeiou"
    return " ".join("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(rng.randint(1, 5)))


def draw_other(rng: Random) -> Sample:
    """Prompts outside the model's world; all get the same polite answer."""
    draw = rng.random()
    if draw < 0.15:
        text = rng.choice(_FOREIGN)
        prompt = text if rng.random() < 0.8 else text.capitalize()
    elif draw < 0.30:
        text = _gibberish(rng)
        prompt = _style(rng, text, "phrase") if rng.random() < 0.5 else text
    else:
        kind, core = rng.choice(_OFF_TASK)
        text = core.format(
            place=rng.choice(_PLACES), place2=rng.choice(_PLACES), thing=rng.choice(_THINGS),
            thing2=rng.choice(_THINGS), adj=rng.choice(_ADJECTIVES), adj2=rng.choice(_ADJECTIVES),
            verb=rng.choice(_VERBS), person=rng.choice(_PEOPLE), lang=rng.choice(_LANGUAGES),
            n=rng.randint(2, 999), m=rng.randint(2, 99), year=rng.randint(1000, 2030),
        )  # fmt: skip
        if rng.random() < 0.3:
            text = text.lower()
        prompt = _phrase(rng, text, kind)
    return Sample("other", normalize(prompt) or prompt, prompt, FALLBACK)


# Off-task prompts that no training text contains; reported on their own in the model card.
UNSEEN_OFF_TASK = (
    "What is the capital of Portugal?",
    "Write a haiku about autumn leaves.",
    "Why is the sky blue?",
    "Can you recommend a good restaurant nearby?",
    "How do airplanes stay in the air?",
    "Translate 'good luck' into Dutch.",
    "Who won the world cup in 1998?",
    "I feel tired today.",
    "Explain quantum mechanics in simple terms.",
    "What should I cook for dinner tonight?",
    "Is it going to rain tomorrow?",
    "Give me three tips for better sleep.",
    "Write a Python function that downloads a file.",
    "What is the boiling point of water?",
    "今天晚上吃什么？",
    "你会说中文吗",
    "Où est la gare ?",
    "Tell me the plot of Hamlet",
    "My favourite colour is purple",
    "Do aliens exist?",
)

_NEVER_TRAINED = {normalize(prompt) for prompt, _ in UNSEEN_PARAPHRASES} | {normalize(p) for p in UNSEEN_OFF_TASK}

FAMILIES: dict[str, Callable[[Random], Sample]] = {
    "introduce": draw_introduce,
    "primes": draw_primes,
    "add": draw_add,
    "sort": draw_sort,
    "count": draw_count,
    "extreme": draw_extreme,
    "reverse": draw_reverse,
    "parity": draw_parity,
    "other": draw_other,
}
TRAIN_WEIGHTS: dict[str, float] = {
    "introduce": 0.09,
    "primes": 0.06,
    "add": 0.42,
    "sort": 0.17,
    "count": 0.06,
    "extreme": 0.04,
    "reverse": 0.03,
    "parity": 0.02,
    "other": 0.11,
}


def draw(rng: Random, family: str, held_out: bool = False) -> Sample:
    """Draws one sample of a family from the training part or from the held-out part."""
    while True:
        sample = FAMILIES[family](rng)
        if is_held_out(sample) == held_out:
            return sample


def draw_turns(rng: Random, count: int, held_out: bool = False) -> tuple[Sample, ...]:
    """Draws the turns of one conversation, of mixed families."""
    families = rng.choices(list(TRAIN_WEIGHTS), list(TRAIN_WEIGHTS.values()), k=count)
    return tuple(draw(rng, family, held_out) for family in families)


def draw_conversation(rng: Random) -> Conversation:
    """Draws one training conversation: three quarters have one turn, the others two to four, a few more."""
    shape = rng.random()
    count = 1 if shape < 0.75 else rng.randint(2, 4) if shape < 0.985 else rng.randint(5, 10)
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None
    return Conversation(system, draw_turns(rng, count))
