"""A model in memory as lm-evaluation-harness takes it; importing this needs the extra `eval`."""

from collections.abc import Iterable
from typing import Any, TextIO

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from linearize.evaluate.generation import unchanged_scores
from linearize.evaluate.perplexity import last_hidden
from linearize.families import Head

AT_ONCE = {"cuda": 32768, "cpu": 4096}  # tokens of a batch
HEAD_ROWS = 2048  # tokens for which logits exist at once


class InMemory(TemplateLM):
    """Scores in batches of similar lengths, padded at their ends, which no token before sees: so no mask is needed and
    a score does not depend on what it is batched with, but for rounding."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: int = 64,
        label: str = "",
        progress: TextIO | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.rows, self.label = model, tokenizer, rows, label
        self.progress = progress  # where the bar goes, or nowhere
        self.head, self.max_length = Head(model), model.config.max_position_embeddings
        self.known: dict[str, list[int]] = {}  # tokens of texts that are asked for soon

    @property
    def eot_token_id(self) -> int:
        """What ends a text; it also is what an empty context becomes."""
        ends = self.tokenizer.eos_token_id
        return int(self.tokenizer.pad_token_id or 0) if ends is None else int(ends)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of `string`; with the special tokens that the tokenizer adds itself, unless told otherwise."""
        if add_special_tokens is None and string in self.known:
            return self.known[string]
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, verbose=False, **given)["input_ids"]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log probability, whether it is what greedy decoding gives) of each continuation of a context.

        All texts become tokens at once, each once, on all cores: one by one those of mmlu take minutes.
        """
        pairs = [request.args for request in requests]
        texts = list({text for context, end in pairs if context for text in (context.rstrip(), context + end) if text})
        self.known = dict(zip(texts, self.tokenizer(texts, verbose=False)["input_ids"] if texts else [], strict=True))
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self.known = {}

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log probability, whether it is what greedy decoding gives) of each continuation.

        Options that differ in their last token alone, as letters do, share one forward pass.
        """
        wanted: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}  # inputs -> (number, what is to follow)
        for number, (_, context, continuation) in enumerate(requests):
            ids = (*context, *continuation)[-self.max_length - 1 : -1]
            wanted.setdefault(ids, []).append((number, continuation[max(0, len(continuation) - len(ids)) :]))
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(wanted, key=lambda ids: -len(ids))
        form: dict[str, Any] = {"unit": "tok", "unit_scale": True, "delay": 1, "leave": False}
        total = sum(map(len, order))
        with tqdm(total=total, desc=f"tasks {self.label}", file=self.progress, disable=disable_tqdm, **form) as bar:
            for batch in self._batches(order):
                asked = [(row, end) for row, ids in enumerate(batch) for number, end in wanted[ids]]
                numbers = [number for ids in batch for number, end in wanted[ids]]
                for number, score in zip(numbers, self._scored(batch, asked), strict=True):
                    scores[number] = score
                bar.update(sum(map(len, batch)))
        return scores

    def _batches(self, order: list[tuple[int, ...]]) -> Iterable[list[tuple[int, ...]]]:
        """Runs of at most `rows` inputs and `AT_ONCE` tokens; `order` begins with the longest."""
        most, start = AT_ONCE.get(self.model.device.type, AT_ONCE["cpu"]), 0
        while start < len(order):
            size = max(1, min(self.rows, most // max(1, len(order[start]))))
            yield order[start : start + size]
            start += size

    def _scored(self, batch: list[tuple[int, ...]], asked: list[tuple[int, list[int]]]) -> list[tuple[float, bool]]:
        """For each pair of a row of `batch` and what follows the input there: its score."""
        device, longest = self.model.device, len(batch[0])
        rows = [[*ids, *[self.eot_token_id] * (longest - len(ids))] for ids in batch]
        hidden = last_hidden(self.model, torch.tensor(rows, device=device))
        spans = [hidden[row, len(batch[row]) - len(end) : len(batch[row])] for row, end in asked]
        targets = torch.tensor([token for _, end in asked for token in end], device=device)
        parts = []
        for part, target in zip(torch.cat(spans).split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
            logits = self.head(part).float()
            loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
            parts.append(torch.stack([-loss.double(), (logits.argmax(-1) == target).double()]))
        scores = torch.cat(parts, dim=1).cpu().split([len(end) for _, end in asked], dim=1)
        return [(logs.sum().item(), bool(greedy.all())) for logs, greedy in scores]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each whole text, in windows of the length that the model reads."""
        scores = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            scores.append(sum(score for score, _ in self._loglikelihood_tokens(pairs, True)))
        return scores

    @torch.no_grad()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to the first of its stopping sequences."""
        texts = []
        asked = [request.args for request in requests]
        for context, given in tqdm(asked, desc=f"generate {self.label}", file=self.progress, delay=1, leave=False):
            until = [given["until"]] if isinstance(given.get("until"), str) else list(given.get("until") or [])
            most = int(given.get("max_gen_toks", 256))
            room = max(1, self.max_length - most)
            ids = torch.tensor([self.tok_encode(context)[-room:]], device=self.model.device)
            stop = Stop(self.tokenizer, ids.shape[1], list(filter(None, until)))
            with unchanged_scores(self.model, self.tokenizer):
                output = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=most,
                    do_sample=False,
                    pad_token_id=self.eot_token_id,
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
            texts.append(stop.before(output))
        return texts


class Stop(StoppingCriteria):
    """Ends a text of one row at the first of some strings, wherever tokens begin and end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, strings: list[str]) -> None:
        self.tokenizer, self.start, self.strings = tokenizer, start, strings

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether it is to end, `[1]`."""
        text = self._text(input_ids)
        return torch.tensor([any(string in text for string in self.strings)], device=input_ids.device)

    def before(self, ids: Tensor) -> str:
        """What was generated before the first of the strings."""
        text = self._text(ids)
        for string in self.strings:
            text = text.split(string)[0]
        return text

    def _text(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids[0, self.start :], skip_special_tokens=True)
