"""Speculation without a draft model: guesses of a sequence's next tokens, and how many of them are worth computing.

A guess is what followed the last tokens when they came before (prompt lookup; Saxena, 2023,
https://github.com/apoorvumang/prompt-lookup-decoding). A step that computes guesses takes longer, how much is measured;
that they come true has a probability, which is estimated for each sequence (Leviathan et al., 2023, arXiv:2211.17192).
"""

from array import array

import numpy as np

from nanovllm.engine.sequence import Sequence

NGRAMS = 4, 2  # how many last tokens are looked up; the longer has the better guesses
MEMORY = 0.9  # weight of a sequence's past guesses, at each step
LEARNING = 0.2  # weight of a step's time beside those before
FORGETTING = 0.999  # factor of the times of other steps meanwhile: what was too slow is tried again
LEAST_GAIN = 1.02  # in tokens a second, for which guesses are made


def look_up(token_ids: array, most: int) -> tuple[int, ...]:
    """The `most` tokens (int32) after the latest occurrence of the last ones; what repeats itself goes on to."""
    data, width = token_ids.tobytes(), token_ids.itemsize
    for n in NGRAMS:
        at, last = len(data) - width, data[-n * width :]
        while (at := data.rfind(last, 0, at)) > 0 and at % width:  # found between two tokens
            at += len(last) - 1
        if at >= 0:
            following = token_ids[at // width + n :][:most]
            return tuple((following * -(-most // len(following)))[:most])
    return ()


class Drafter:
    """Decides how many tokens to guess for each of the sequences that decode together: `most` at most.

    A step's time is learned by its number of tokens, of which there are no more than `max_tokens`.
    """

    def __init__(self, most: int, max_tokens: int):
        self.most, self.max_tokens = most, max_tokens
        self._seconds = np.zeros(max_tokens + 1)  # of a decode step, by its tokens; 0 is unknown
        self._has_run = np.zeros(max_tokens + 1, dtype=bool)

    def draft(self, seqs: list[Sequence], num_tokens: int) -> list[tuple[Sequence, tuple[int, ...]]]:
        """Guesses for some of `seqs`, in a step that computes `num_tokens` without them."""
        chances = np.array([(seq.drafts_right + 1) / (seq.drafts_checked + 2) for seq in seqs])
        drafts = []
        for seq, count in zip(seqs, self._best_counts(chances, num_tokens).tolist(), strict=True):
            most = min(count, seq.max_len - len(seq) - 1)
            if most > 0 and (draft_ids := look_up(seq.token_ids, most)):
                drafts.append((seq, draft_ids))
            else:
                self.learn(seq, 0, 0)
        return drafts

    def learn(self, seq: Sequence, num_right: int, num_drafts: int) -> None:
        """The first `num_right` guesses for a sequence were right; of those after a wrong one nothing is known."""
        seq.drafts_right = MEMORY * seq.drafts_right + num_right
        seq.drafts_checked = MEMORY * seq.drafts_checked + min(num_right + 1, num_drafts)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A decode step with `num_tokens` took so long."""
        if num_tokens > self.max_tokens:
            return
        if not self._has_run[num_tokens]:  # the first of a size may have to be recorded, or compiled
            self._has_run[num_tokens] = True
            return
        before = self._seconds[num_tokens]
        seconds = min(seconds, 2 * before) if before else seconds  # else it was disturbed
        self._seconds *= FORGETTING
        self._seconds[num_tokens] = before + LEARNING * (seconds - before) if before else seconds

    def _best_counts(self, chances: np.ndarray, num_tokens: int) -> np.ndarray:
        """How many tokens to guess for each sequence, so that most tokens a second are kept.

        The j-th guess is kept with the j-th power of a sequence's chance. Of all guesses the likeliest m are made.
        """
        none = np.zeros(len(chances), dtype=int)
        seconds = self._expected_seconds()[num_tokens:]
        room = min(len(chances) * self.most, len(seconds) - 1)
        if room < 1 or not seconds[0]:
            return none
        least_rate, seconds = LEAST_GAIN * num_tokens / seconds[0], seconds[1 : room + 1]
        if ((num_tokens + chances.max() * np.arange(1, room + 1)) / seconds).max() < least_rate:
            return none  # the usual case where many sequences decode together
        kept = chances[:, None] ** np.arange(1, self.most + 1)  # [S, most]
        likeliest = np.sort(kept, axis=None)[::-1][:room]
        rates = (num_tokens + likeliest.cumsum()) / seconds
        best = int(rates.argmax())
        return none if rates[best] < least_rate else (kept >= likeliest[best]).sum(1)

    def _expected_seconds(self) -> np.ndarray:
        """[max_tokens + 1] of a step by its tokens, zeros as long as nothing is known. More tokens take no less."""
        known = np.flatnonzero(self._seconds)
        if not len(known):
            return self._seconds
        times = np.minimum.accumulate(self._seconds[known][::-1])[::-1]
        return np.interp(np.arange(len(self._seconds)), known, times)  # and more than ever were, as long as the most
