"""Training text that the teacher writes itself: chats and plain text, sampled token by token in many rows at once.

A chat begins with the chat template up to where the user speaks; the teacher makes up the user's turn, and then answers
it (as Magpie does, arXiv 2406.08464). Plain text begins from nothing. Where a document ends, its row begins the next,
so that no row waits for another.
"""

import copy
import gzip
import hashlib
import json
import lzma
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicLayer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache

from linearize.assets import cache_folder, locked, resolve_model
from linearize.checkpoint import fingerprint, load_pretrained
from linearize.convert import attention_of, decoder, is_linearized
from linearize.decoding import UNEVEN
from linearize.errors import LinearizeError
from linearize.families import Head, base_model_type
from linearize.files import check_writable, new_folder, verify_folder, write_bytes
from linearize.graphs import RecordingError, on_the_side, record
from linearize.train.sequences import begin_of
from linearize.train.trainer import shared_copy

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")  # of documents in pretraining; a chat model's own ends are of turns
SPEECH = "linearize"  # a user's words, to find their place in a chat template
FREE = -1  # in a script: the model speaks
ROWS = {"cuda": (256, 2048), "cpu": (8, 32)}  # of the first batch, and the most; each has twice those of the one before
MEMORY = 0.5  # the share of a GPU's that rows may take
GRAPHED = 256  # tokens for which one CUDA graph serves


class Script(NamedTuple):
    """How documents of one kind go: forced tokens, and `FREE` where the model speaks until a stop token."""

    tokens: tuple[int, ...]
    closing: tuple[int, ...]  # what stands for the stop token at each `FREE`; elsewhere `FREE`
    dropped: int = 0  # of the first tokens: not part of the document


# --- what documents are like -----------------------------------------------------------------------------------------


def scripts(tokenizer: PreTrainedTokenizerBase) -> list[Script]:
    """A chat, where the tokenizer has a template that shows where the user speaks, and plain text.

    Raises LinearizeError for a tokenizer without any token to begin or to end a text with.
    """
    begin, known = begin_of(tokenizer), tokenizer.get_vocab()
    separators = [known[name] for name in SEPARATORS if name in known]
    others = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    first = begin or [*separators, *others][:1]
    end = next((token for token in (tokenizer.eos_token_id, *separators) if token is not None), None)
    if not first or end is None:
        raise LinearizeError("this tokenizer has no token to begin or to end a text with; give real text with --data")
    plain = Script((*first, FREE), (*[FREE] * len(first), end), dropped=0 if begin else len(first))
    chat = _chat(tokenizer, end)
    return [plain] if chat is None else [chat, plain]


def _chat(tokenizer: PreTrainedTokenizerBase, end: int) -> Script | None:
    if tokenizer.chat_template is None:
        return None
    text = str(
        tokenizer.apply_chat_template([{"role": "user", "content": SPEECH}], tokenize=False, add_generation_prompt=True)
    )
    before, spoken, after = text.partition(SPEECH)
    head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
    if not spoken or not head or not tail:
        return None
    closing = [FREE] * (len(head) + 1 + len(tail))
    closing[len(head)], closing[-1] = tail[0], end
    return Script((*head, FREE, *tail[1:], FREE), tuple(closing))


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kinds: Sequence[Script]) -> list[int]:
    """Tokens that end a turn or a document."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    known = tokenizer.get_vocab()
    stops = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    stops |= {known.get(name) for name in SEPARATORS} | {token for kind in kinds for token in kind.closing}
    return sorted(token for token in stops - {FREE, None} if token is not None)


# --- sampling --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    kinds: Sequence[Script],
    stops: Sequence[int],
    rows: int,
    length: int,
    temperature: float,
    seed: int,
    progress: Callable[[int], Any] = lambda _: None,
) -> list[np.ndarray]:
    """Documents (int32) out of `rows` of `length` tokens each; the last of a row is cut where the row ends.

    Row i has documents of the kind i modulo their number. `progress` hears of every `rows` tokens. The same arguments
    give the same documents on the same device.
    """
    device, head, step = model.device, Head(model), Step(model, rows, length)
    kind = torch.arange(rows, device=device) % len(kinds)
    longest = max(len(script.tokens) for script in kinds)
    script, closing = (
        torch.tensor([[*row, *[FREE] * (longest - len(row))] for row in table], device=device)[kind]
        for table in ([one.tokens for one in kinds], [one.closing for one in kinds])
    )
    size = torch.tensor([len(one.tokens) for one in kinds], device=device)[kind]
    ends, draw = torch.tensor(stops, device=device), torch.Generator(device).manual_seed(seed)
    tokens = torch.empty(rows, length, dtype=torch.long, device=device)
    begins = torch.zeros(rows, length, dtype=torch.bool, device=device)
    place, start = torch.zeros_like(kind), torch.zeros_like(kind)  # in the script; of the document in its row
    chosen = torch.full_like(kind, FREE)  # what the model says next
    for time in range(length):
        wanted = script.gather(1, place[:, None])[:, 0]
        stopped = (wanted == FREE) & torch.isin(chosen, ends)
        stand_in = closing.gather(1, place[:, None])[:, 0]
        tokens[:, time] = torch.where(stopped, stand_in, torch.where(wanted == FREE, chosen, wanted))
        begins[:, time] = start == time
        if time + 1 < length:
            chosen = _drawn(head(step(time, tokens[:, time], start)), temperature, draw)
        place = place + ((wanted != FREE) | stopped)
        ended = place == size
        place, start = place.masked_fill(ended, 0), start.masked_fill(ended, time + 1)
        progress(rows)
    return _documents(tokens.cpu(), begins.cpu(), [one.dropped for one in kinds])


def _drawn(logits: Tensor, temperature: float, generator: torch.Generator) -> Int[Tensor, "B"]:
    """A token of each row, with the probability that `logits` `[B, V]` give it: the first of exponential clocks."""
    shares = (logits.float() / temperature).softmax(-1)
    return (shares / torch.empty_like(shares).exponential_(generator=generator)).argmax(-1)


def _documents(tokens: Int[Tensor, "B T"], begins: Bool[Tensor, "B T"], dropped: Sequence[int]) -> list[np.ndarray]:
    found = []
    for index, (row, begin) in enumerate(zip(tokens.numpy(), begins.numpy(), strict=True)):
        parts = np.split(row.astype(np.int32), np.flatnonzero(begin)[1:])
        found += [part[dropped[index % len(dropped)] :] for part in parts]
    return [document for document in found if len(document)]


class Step:
    """The model's last hidden state after one more token of each row.

    On a GPU a CUDA graph has the step, which else waits for Python to launch its kernels. A graph reads as many places
    of the cache as there will be when it is made anew, `GRAPHED` tokens later; the mask hides those that are empty.
    """

    def __init__(self, model: PreTrainedModel, rows: int, length: int) -> None:
        self.model, self.length, self.device = model, length, model.device
        self.tokens, self.positions = torch.zeros(2, rows, 1, dtype=torch.long, device=self.device)
        self.seen = torch.zeros(rows, length, dtype=torch.bool, device=self.device)
        self.columns, self.place = torch.arange(length, device=self.device), torch.zeros_like(self.tokens[:1, 0])
        self.layers = [Reserved(length, self.place) for _ in range(model.config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        self.graphed, self.read = self.device.type == "cuda" and can_be_graphed(model), 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden = torch.empty(0)

    def __call__(self, time: int, tokens: Tensor, start: Tensor) -> Tensor:
        """Of `tokens` `[B]` at `time`, in documents that began at `start` `[B]`: `[B, hidden]`."""
        self.tokens[:, 0], self.positions[:, 0] = tokens, time - start
        self.seen.copy_((self.columns >= start[:, None]) & (self.columns <= time))  # nothing of the documents before
        self.place.fill_(time)
        if not self.graphed:
            return self.run(time + 1)
        with torch.cuda.device_of(self.tokens):
            if time >= self.read:
                self.record(min(time + GRAPHED, self.length))
            if self.graph is None:  # it cannot be recorded
                return self.run(time + 1)
            self.graph.replay()
        return self.hidden

    def run(self, read: int) -> Tensor:
        """Without a graph, by the first `read` places of the cache."""
        for layer in self.layers:
            layer.used = read - 1
        given = {"input_ids": self.tokens, "position_ids": self.positions, "attention_mask": self.seen[:, :read]}
        return decoder(self.model)(**given, past_key_values=self.cache, use_cache=True).last_hidden_state[:, 0]

    def record(self, read: int) -> None:
        """A graph that reads the first `read` places; before it, a run in which libraries choose what they do."""
        self.read, self.graph, self.hidden = read, None, torch.empty(0)  # which frees what the last one had
        on_the_side(lambda: self.run(read), times=1)
        try:
            self.graph, self.hidden = record(lambda: self.run(read))
        except RecordingError as error:
            self.graphed = False
            warnings.warn(f"sampling goes without a CUDA graph, several times slower: {error}", stacklevel=2)


def can_be_graphed(model: PreTrainedModel) -> bool:
    """Whether a step does the same for every text and place: experts do not, and sliding windows move."""
    config = model.config
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    sliding = sliding or getattr(config, "sliding_window", None) is not None
    return not sliding and base_model_type(config.model_type) not in UNEVEN


class Reserved(DynamicLayer):
    """A cache layer whose room is there from the beginning: a new token is written at `place` `[1]`, and nothing is
    copied."""

    def __init__(self, length: int, place: Tensor) -> None:
        super().__init__()
        self.length, self.place, self.used = length, place, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for `length` tokens of each row; zeros, since a mask does not hide what is not a number."""
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = key_states.shape
        self.keys = key_states.new_zeros(*shape[:2], self.length, shape[3])
        self.values = value_states.new_zeros(*shape[:2], self.length, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, KV, T, D]`: the new token's, and what is read besides, `used` places and one more."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        self.used += 1
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_seq_length(self) -> int:
        """Places before the new token's, as masks are made for."""
        return self.used


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA for one new token: a group's queries stand as the queries of its key/value head, which is not repeated."""
    B, H, T, D = query.shape
    if T > 1 or kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(B, key.shape[1], -1, D), key, value, attn_mask=attention_mask, scale=kwargs.get("scaling")
    )
    return output.reshape(B, 1, H, -1), None


GROUPED = "linearize_grouped"
AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, AttentionMaskInterface()["sdpa"])


# --- documents, made once --------------------------------------------------------------------------------------------


def sampled_documents(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    length: int,
    seed: int = 0,
    temperature: float = 1.0,
    rows: int | None = None,
) -> list[np.ndarray]:
    """At least `tokens` tokens of documents (int32) of at most `length` each, chats and plain text by turns.

    They are kept in the cache folder, by teacher, seed, length and temperature, batch after batch: what an interrupted
    call has done is not done again, and a later call for more goes on. A batch is the same whatever is asked for, so
    that fewer tokens are the first of more. A GPU works in bf16. Raises LinearizeError for a converted model, and for
    numbers that make no sense.
    """
    if is_linearized(teacher):
        raise LinearizeError("text is sampled from an original model, and this one is converted; give its teacher")
    if tokens < 1 or length < 2 or temperature <= 0 or (rows is not None and rows < 1):
        raise LinearizeError(
            f"tokens and rows must be 1 or more, length 2 or more and temperature above 0, not {tokens}, {rows}, "
            f"{length}, {temperature}"
        )
    kinds = scripts(tokenizer)
    given = [fingerprint(teacher), kinds, length, temperature, seed, rows, ROWS]
    folder = cache_folder() / "samples" / hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]
    with locked(folder):  # of several processes one samples, and the others then read
        documents: list[np.ndarray] = []
        batch, made = 0, 0
        while made < tokens and (kept := _kept(folder / str(batch))) is not None:
            documents, made, batch = documents + kept, made + sum(map(len, kept)), batch + 1
        if made >= tokens:
            return _first(documents, tokens)
        model = _sampler(teacher)
        least, most = (rows, rows) if rows else _rows(model, length)
        with tqdm(desc="sample", total=tokens, initial=made, unit="tok", unit_scale=True) as bar:
            while made < tokens:
                size = min(least << batch, most)
                given_seed = int.from_bytes(hashlib.sha256(f"{seed} {batch}".encode()).digest()[:6])
                try:
                    some = sample(
                        model,
                        kinds,
                        stop_tokens(teacher, tokenizer, kinds),
                        size,
                        length,
                        temperature,
                        given_seed,
                        bar.update,
                    )
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    most, bar.n = size // 2, made
                    torch.cuda.empty_cache()
                    continue
                _keep(some, folder / str(batch))
                documents, made, batch = documents + some, made + sum(map(len, some)), batch + 1
                bar.update(made - bar.n)
        return _first(documents, tokens)


def _first(documents: list[np.ndarray], tokens: int) -> list[np.ndarray]:
    """As many as make up so many tokens."""
    ends = np.cumsum([len(document) for document in documents])
    return documents[: int(np.searchsorted(ends, tokens)) + 1]


def _sampler(teacher: PreTrainedModel) -> PreTrainedModel:
    """The model that samples: on a CPU the teacher's own weights, on a GPU a copy in bf16."""
    if teacher.device.type == "cuda":
        model = copy.deepcopy(teacher).to(dtype=torch.bfloat16)
    else:
        model = shared_copy(teacher)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED)
    return model.eval()


def _rows(model: PreTrainedModel, length: int) -> tuple[int, int]:
    """Rows of the first batch, and the most: as many as are of use, or as a GPU like this one has room for."""
    (least, most), config = ROWS[model.device.type], model.config
    if model.device.type != "cuda":
        return least, most
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * attention_of(model, 0).head_dim * 2
    room = MEMORY * torch.cuda.get_device_properties(model.device).total_memory  # what is free just now may differ
    fit = max(1, int(room / (length * token + 16 * config.vocab_size)))  # logits in fp32, a few times
    return min(least, fit), min(most, fit)


def _keep(documents: Sequence[np.ndarray], folder: Path) -> None:
    with new_folder(folder, kind="sample") as temporary:
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        save_file({"tokens": np.concatenate(documents), "lengths": lengths}, temporary / "sample.safetensors")


def _kept(folder: Path) -> list[np.ndarray] | None:
    """The documents of one batch; None where there are none, or they are not what was written."""
    if not folder.is_dir():
        return None
    try:
        verify_folder(folder)
    except LinearizeError as error:
        print(f"sampling again: {error}", file=sys.stderr)
        return None
    found = load_file(folder / "sample.safetensors")
    return np.split(found["tokens"], np.cumsum(found["lengths"])[:-1])


# --- the command -----------------------------------------------------------------------------------------------------


def export(
    name: str, tokens: int, out: Path, length: int, temperature: float, seed: int, rows: int | None
) -> tuple[int, int]:
    """Sample from the model `name` and write the text to `out`, a JSON object a line; documents and tokens written."""
    packers: dict[str, Callable[[bytes], bytes]] = {".jsonl": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
    if not out.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz")):
        raise LinearizeError(f"{out} does not end with one of .jsonl, .jsonl.gz, .jsonl.xz")
    check_writable(out)
    teacher, tokenizer = load_pretrained(resolve_model(name))
    teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    documents = sampled_documents(teacher, tokenizer, tokens, length, seed, temperature, rows)
    begin, lines = begin_of(tokenizer), []
    for document in documents:
        ids = document.tolist()
        ids = ids[len(begin) :] if ids[: len(begin)] == begin else ids
        ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
        lines.append(json.dumps({"text": tokenizer.decode(ids)}, ensure_ascii=False) + "\n")
    write_bytes(out, packers[out.suffix]("".join(lines).encode()))
    return len(documents), sum(map(len, documents))
