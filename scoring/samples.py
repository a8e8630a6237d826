"""Samples and batches: token ids with a mask of the scored tokens, padded and grouped by length.

A *scored* token is one that the unlearning loss sees: the answer of a question-answer pair, or every token
but the first of a plain text (the first has no context to be predicted from).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from scoring.errors import UserError

T = TypeVar("T")
Tokens = Literal["answer", "all"]
# Padded tokens in a batch, where nobody says otherwise.
BATCH_TOKENS = 4096
# Tokens that a model without a limit of its own can read.
NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Sample:
    """One tokenized sample.

    Attributes:
        sample_id: unique name within a data set.
        input_ids: token ids, int64, shape (T,).
        scored: which tokens are scored, bool, shape (T,); scored[0] is always False.
        index: position in the data set, so that results can be put back in input order.
    """

    sample_id: str
    input_ids: np.ndarray
    scored: np.ndarray
    index: int = 0

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def num_scored(self) -> int:
        return int(self.scored.sum())


@dataclass(frozen=True)
class Text:
    """A record before tokenization: what is conditioned on, and what is scored.

    `completion` None means plain text: everything after the first token is scored. `messages` (a list of
    {"role", "content"}) is rendered by the tokenizer's chat template; its last, assistant, turn is scored.
    """

    sample_id: str
    prompt: str = ""
    completion: str | None = None
    messages: tuple[dict[str, str], ...] | None = None


@dataclass(frozen=True)
class TextSet:
    """Texts by the name of their data set.

    Attributes:
        name: for messages.
        texts: in order, with ids of their own.
    """

    name: str
    texts: Sequence[Text]


@dataclass(frozen=True)
class Rejected:
    """A sample that cannot be scored, and why."""

    sample_id: str
    reason: str


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def split_ids(tokenizer: Any, text: Text) -> tuple[list[int], list[int]]:
    """Token ids of the context (bos first) and of the part to be scored (eos last, but for plain text).

    The two parts are tokenized apart, so that no token straddles the border and the prompt's ids are those
    that generation would be given.
    """
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if text.messages is not None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "field 'messages' needs a chat template and this tokenizer has none: "
                "use 'prompt'+'completion', or add chat_template to its tokenizer_config.json"
            )
        turns = [dict(turn) for turn in text.messages]
        before = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        if not whole.startswith(before):
            raise UserError("chat template renders the conversation differently with and without its last turn")
        return _token_ids(tokenizer, before), _token_ids(tokenizer, whole[len(before) :])
    if text.completion is None:
        # A plain text carries no end marker: the end is not part of what was memorised.
        return bos, _token_ids(tokenizer, text.prompt)
    return bos + _token_ids(tokenizer, text.prompt), _token_ids(tokenizer, text.completion) + eos


def encode(
    texts: Iterable[Text], tokenizer: Any, max_length: int, tokens: Tokens = "answer"
) -> tuple[list[Sample], list[Rejected]]:
    """Tokenize records; those that cannot be scored come back by id with the reason.

    Args:
        texts: the records, in data-set order.
        tokenizer: a Hugging Face tokenizer.
        max_length: the model's context length in tokens; longer samples are rejected, never cut.
        tokens: "answer" scores the completion; "all" scores every token after the first.
    """
    samples: list[Sample] = []
    rejected: list[Rejected] = []
    for each in encoded(texts, tokenizer, max_length, tokens):
        if isinstance(each, Sample):
            samples.append(each)
        else:
            rejected.append(each)
    return samples, rejected


def encoded(
    texts: Iterable[Text], tokenizer: Any, max_length: int, tokens: Tokens = "answer"
) -> Iterator[Sample | Rejected]:
    """The same, one at a time."""
    for index, text in enumerate(texts):
        context, target = split_ids(tokenizer, text)
        ids = np.asarray(context + target, dtype=np.int64)
        scored = np.zeros(len(ids), dtype=bool)
        if tokens == "all":
            scored[1:] = True
        else:
            scored[max(1, len(context)) :] = True
        empty = not (text.completion if text.completion is not None else text.prompt) and text.messages is None
        if empty:
            yield Rejected(text.sample_id, "empty text")
        elif len(ids) > max_length:
            yield Rejected(text.sample_id, f"{len(ids)} tokens, the model's context holds {max_length}")
        elif not scored.any():
            yield Rejected(text.sample_id, "no scored token")
        else:
            yield Sample(text.sample_id, ids, scored, index)


def check_tokens(
    count: int, largest: int, rejected: Sequence[Rejected], vocabulary: int, tokenizer: str, name: str
) -> None:
    """Refuse samples that a model cannot take.

    Args:
        count: of the samples.
        largest: token id in them.
        rejected: what could not be made a sample.
        vocabulary: tokens that the model embeds.
        tokenizer: that gave the ids, for messages.
        name: of the data set.

    Raises:
        UserError: there is no sample, or one has a token that the model does not know.
    """
    if not count:
        raise nothing_scored(name, rejected)
    if largest >= vocabulary:
        raise UserError(
            f"vocabulary mismatch: {tokenizer} gives token id {largest}, the model embeds {vocabulary}; use the "
            "tokenizer that the model was trained with"
        )


def nothing_scored(name: str, rejected: Sequence[Rejected]) -> UserError:
    """What to say where no sample can be scored."""
    if not rejected:
        return UserError(f"{name}: there is no record; expected at least one")
    first = rejected[0]
    return UserError(
        f"{name}: none of {len(rejected)} samples can be scored; the first, {first.sample_id!r}: {first.reason}"
    )


def context_length(config: Any) -> int:
    """Tokens that a model of this configuration can read."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT


@dataclass(frozen=True)
class Batch:
    """Right-padded samples. B samples, T tokens in the longest, S scored tokens in the fullest.

    Attributes:
        input_ids: (B, T) int64. Padding repeats a sample's last token: causal attention never looks at it.
        positions: (B, S) int64, where the scored tokens are predicted: one before the token itself.
        targets: (B, S) int64, the scored tokens.
        mask: (B, S) bool, False where a row has fewer than S scored tokens.
        lengths: (B,) int64, tokens per sample.
        indices: (B,) int64, positions in the data set.
        sample_ids: B names.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    indices: torch.Tensor
    sample_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.input_ids.to(device),
            self.positions.to(device),
            self.targets.to(device),
            self.mask.to(device),
            self.lengths.to(device),
            self.indices.to(device),
            self.sample_ids,
        )

    def rows(self, start: int, stop: int) -> Batch:
        """The samples start..stop-1 of this batch, re-padded to their own lengths."""
        return collate([self.sample(i) for i in range(start, stop)])

    def sample(self, row: int) -> Sample:
        """The sample in a row, without padding."""
        ids = self.input_ids[row, : int(self.lengths[row])].cpu().numpy()
        scored = np.zeros(len(ids), dtype=bool)
        scored[self.positions[row][self.mask[row]].cpu().numpy() + 1] = True
        return Sample(self.sample_ids[row], ids, scored, int(self.indices[row]))


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad samples to one batch."""
    rows = len(samples)
    longest = max(s.length for s in samples)
    fullest = max(s.num_scored for s in samples)
    input_ids = np.empty((rows, longest), dtype=np.int64)
    positions = np.zeros((rows, fullest), dtype=np.int64)
    targets = np.zeros((rows, fullest), dtype=np.int64)
    mask = np.zeros((rows, fullest), dtype=bool)
    for row, sample in enumerate(samples):
        input_ids[row, : sample.length] = sample.input_ids
        input_ids[row, sample.length :] = sample.input_ids[-1]
        where = np.flatnonzero(sample.scored)
        positions[row, : len(where)] = where - 1
        targets[row, : len(where)] = sample.input_ids[where]
        mask[row, : len(where)] = True
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(positions),
        torch.from_numpy(targets),
        torch.from_numpy(mask),
        torch.tensor([s.length for s in samples]),
        torch.tensor([s.index for s in samples]),
        tuple(s.sample_id for s in samples),
    )


def make_batches(samples: Sequence[Sample], batch_tokens: int) -> list[Batch]:
    """Group samples of similar length into batches of at most `batch_tokens` padded tokens.

    The grouping depends on the samples' tokens alone, neither on their order in the data set nor on how many
    replicas will share the work: that is what makes scores independent of both, to the bit. A sample longer than
    `batch_tokens` gets a batch of its own.
    """
    groups = group_samples(
        np.array([sample.length for sample in samples], dtype=np.int64),
        np.array([sample.num_scored for sample in samples], dtype=np.int64),
        np.array([token_digest(sample.input_ids) for sample in samples], dtype=np.uint64),
        np.array([sample.index for sample in samples], dtype=np.int64),
        batch_tokens,
    )
    return [collate([samples[i] for i in group.tolist()]) for group in groups]


def token_digest(input_ids: np.ndarray) -> int:
    """Eight bytes that tell samples of equal length apart, whatever their names and places."""
    return int.from_bytes(hashlib.blake2b(input_ids.astype(np.int64).tobytes(), digest_size=8).digest(), "little")


def group_samples(
    lengths: np.ndarray, num_scored: np.ndarray, digests: np.ndarray, indices: np.ndarray, batch_tokens: int
) -> list[np.ndarray]:
    """Which of N samples make a batch; see `make_batches`. All arrays are (N,), `digests` by `token_digest`."""
    order = np.lexsort((indices, digests, num_scored, lengths))
    starts: list[int] = []
    for place, length in enumerate(lengths[order].tolist()):
        if not starts or (place + 1 - starts[-1]) * length > batch_tokens:
            starts.append(place)
    return [order[first:last] for first, last in pairwise([*starts, len(order)])]


def evenly_spaced(items: Sequence[T], most: int | None) -> list[T]:
    """At most `most` of the items, evenly spaced from the first to the last; None: all."""
    where = np.linspace(0, len(items) - 1, min(most or len(items), len(items))).round().astype(int)
    return [items[i] for i in where.tolist()]
