"""From text to what training and evaluation take: read documents, tokenise them, cut them into sequences."""

import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast, overload

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm import tqdm

from linearize.assets import HUB_NAME, TEXTS, asset_file, quick_hub
from linearize.errors import LinearizeError, unknown

SPLITS = ("train", "heldout")
SELF = "self"  # a source that is not read: the teacher samples it (`train.sample`)
TRAIN_ARTICLES = 20  # of the 30 embedded ones; the others are held out
PASSAGES = 8, 64  # tokens of a passage that is said again
IGNORED = -100  # what cross_entropy takes for "no target here"
FIELDS = ("text", "messages")  # of a row, of which the first that is there is its document
BATCH = 64  # documents tokenised at once: enough for the tokenizer's threads, few enough to stop early


class Chat(NamedTuple):
    """A document of turns, which becomes text by the tokenizer's chat template."""

    messages: list[dict[str, Any]]  # each has a `role` and a `content`
    place: str  # where it was read


Document = str | Chat


# --- reading ---------------------------------------------------------------------------------------------------------


@overload
def load_documents(source: str, split: Literal["heldout"]) -> list[str]: ...


@overload
def load_documents(source: str, split: Literal["train"] = "train") -> list[Document]: ...


def load_documents(source: str, split: Literal["train", "heldout"] = "train") -> list[Document] | list[str]:
    """The documents of `source`, without blank ones.

    `source` is `wiki` (the embedded text), a local file (`.jsonl`, `.jsonl.xz`, `.jsonl.gz`, `.parquet`: one document
    a row, in `text`, or a chat in `messages`; `.txt`: the whole file is one document), a folder of such files (in the
    order of their names), or a hub dataset `owner/name[:split]` (`train` unless named). `split` chooses within `wiki`;
    held-out text has no chats.
    Raises `LinearizeError` that names the file, and the line or byte, when the source cannot be read or holds no text.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if source == SELF:
        raise LinearizeError(
            f"{SELF} is text to train on, which the model samples; here: wiki, a file or folder of {_suffixes()}, "
            "or owner/name"
        )
    path = Path(source).expanduser()
    hub = re.fullmatch(rf"({HUB_NAME.pattern})(?::(\S+))?", source)
    documents: Iterator[Document]
    if source == "wiki":
        documents = iter(_wiki(split))
    elif source and path.is_dir():
        documents = _read_folder(path)
    elif source and (path.exists() or _suffix(path)):
        documents = _read_file(path)
    elif hub:
        documents = _read_hub(hub[1], hub[2] or "train")
    else:
        raise LinearizeError(f"no data at {source!r}; valid: wiki, a file or folder of {_suffixes()}, or owner/name")
    found = [document for document in documents if _has_text(document)]
    if not found:
        raise LinearizeError(f"{source} holds no text; give some longer than one sequence")
    if split == "heldout" and (chat := next((one for one in found if isinstance(one, Chat)), None)):
        raise LinearizeError(f"{chat.place}: rows of 'messages' are to train on; give held-out text in rows of 'text'")
    return found


def _has_text(document: Document) -> bool:
    parts = [document] if isinstance(document, str) else [turn["content"] for turn in document.messages]
    return any(part.strip() for part in parts)


def _read_folder(folder: Path) -> Iterator[Document]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and _suffix(path))
    if not paths:
        raise LinearizeError(f"no text in {folder}; files end with one of {_suffixes()}")
    for path in paths:
        yield from _read_file(path)


def _read_file(path: Path) -> Iterator[Document]:
    if not path.exists():
        raise LinearizeError(f"there is no file {path}; give wiki, a file or folder of {_suffixes()}, or owner/name")
    suffix = _suffix(path)
    if suffix is None:
        raise LinearizeError(f"{path} does not end with one of {_suffixes()}")
    try:
        yield from READERS[suffix](path)
    except (OSError, EOFError, lzma.LZMAError) as error:  # unreadable, or compressed data that is cut or damaged
        raise LinearizeError(f"cannot read {path}: {error}") from error


def _read_txt(path: Path) -> Iterator[str]:
    yield _decode(path.read_bytes(), path, 0)


def _read_jsonl(path: Path) -> Iterator[Document]:
    openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
    offset = 0
    with openers.get(path.suffix, open)(path, "rb") as opened:
        for number, raw in enumerate(cast(BinaryIO, opened), start=1):
            line = _decode(raw, path, offset)
            offset += len(raw)
            if line.strip():
                yield _document_of(line, f"{path}:{number}")


def _document_of(line: str, place: str) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise LinearizeError(f"{place}: not JSON: {error}") from error
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and "text" not in row and "messages" in row:
        return _chat(row["messages"], place)
    has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise LinearizeError(f"{place}: no string field 'text', and no 'messages'; it has: {has}")


def _chat(messages: Any, place: str) -> Chat:
    turns = messages if isinstance(messages, list) else []
    if not turns or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise LinearizeError(f"{place}: 'messages' is no list of objects that have strings 'role' and 'content'")
    return Chat(turns, place)


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow  # slow to import, and only parquet needs it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            name = _field(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(columns=[name]):
                yield from _column(name, batch.column(0).to_pylist(), str(path))
    except pyarrow.ArrowException as error:
        raise LinearizeError(f"cannot read {path}: {error}") from error


def _read_hub(name: str, split: str) -> Iterator[Document]:
    import datasets  # slow to import, and only hub names need it

    try:
        with quick_hub():
            rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # a dozen unrelated classes; each of them says that this text is not to be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LinearizeError(
            f"no local file {name}, and the hub gave no dataset {name} (split {split}): {reason}; "
            "connect, or give a local file or folder with --data"
        ) from error
    field = _field(rows.column_names, name)
    yield from _column(field, rows[field], name)


def _field(names: Sequence[str], place: str) -> str:
    """The column that holds the documents."""
    for name in FIELDS:
        if name in names:
            return name
    raise LinearizeError(f"{place}: no column 'text' or 'messages'; it has: {', '.join(names)}")


def _column(name: str, values: Iterable[object], place: str) -> Iterator[Document]:
    for value in values:
        if value is None:  # an empty cell is a blank document
            continue
        if name == "messages":
            yield _chat(value, place)
        elif isinstance(value, str):
            yield value
        else:
            raise LinearizeError(f"{place}: column 'text' holds {type(value).__name__}, not strings")


def _decode(raw: bytes, path: Path, offset: int) -> str:
    """`raw`, which begins at byte `offset` of (the unpacked) `path`, as text without a byte order mark."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LinearizeError(f"{path} is not UTF-8 at byte {offset + error.start}; give text in UTF-8") from error
    return text.removeprefix("\ufeff") if offset == 0 else text


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.xz": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), None)


def _suffixes() -> str:
    return ", ".join(READERS)


def heldout_documents(source: str, articles: str | None = None, train: str = "") -> dict[int, str]:
    """The held-out documents of `source` by their numbers, from 1 on: all, or those that `articles` ("1-20,25") lists.

    Of the embedded `wiki`, whose whole articles are numbered 1-30, all are 21-30, which nothing here trains on.
    Raises `LinearizeError` as `load_documents` does, for numbers that there are not, and for articles of `wiki` that
    training on `train` has seen.
    """
    found = dict(enumerate(_articles() if source == "wiki" else load_documents(source, "heldout"), 1))
    if source == "wiki" and articles is None:
        articles = f"{TRAIN_ARTICLES + 1}-{len(found)}"
    chosen = list(found) if articles is None else _numbers(articles, len(found), source)
    if source == train == "wiki" and min(chosen) <= TRAIN_ARTICLES:
        raise LinearizeError(
            f"articles {articles!r} of wiki: 1-{TRAIN_ARTICLES} are trained on; valid: {TRAIN_ARTICLES + 1}-"
            f"{len(found)}, or another text to train on"
        )
    return {number: found[number] for number in chosen}


def _numbers(articles: str, count: int, source: str) -> list[int]:
    """The numbers that "1-20,25" means, each once, in order."""
    parts = [re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part) for part in articles.split(",")]
    ranges = [(int(part[1]), int(part[2] or part[1])) for part in parts if part]
    if len(ranges) < len(parts) or any(not 1 <= first <= last <= count for first, last in ranges):
        raise LinearizeError(
            f"articles {articles!r} of {source} are not valid; give numbers and ranges like '1-20,25' within 1-{count}"
        )
    return sorted({number for first, last in ranges for number in range(first, last + 1)})


# --- the embedded text -----------------------------------------------------------------------------------------------


def _wiki(split: str) -> list[str]:
    """Whole articles 1-20 and the first paragraphs of others to train on; whole articles 21-30 held out."""
    articles = _articles()
    training, heldout = articles[:TRAIN_ARTICLES], articles[TRAIN_ARTICLES:]
    if split == "heldout":
        return heldout
    leads = json.loads(asset_file(TEXTS["wiki leads"]).read_text(encoding="utf-8"))
    return training + leads_of_others(leads.values(), heldout)


def _articles() -> list[str]:
    """The 30 whole articles."""
    lines = asset_file(TEXTS["wiki_demo.txt"]).read_text(encoding="utf-8").split("\n")
    return [line for line in lines if line.strip()]


def leads_of_others(leads: Iterable[dict[str, str]], articles: list[str]) -> list[str]:
    """The first paragraphs that are of none of `articles`, which bear no titles; in doubt one is left out.

    An article's subject is its words before the first verb or bracket ("Andre Kirk Agassi ("). A title matches if,
    without its qualifier (", Texas", " (law)"), it has the subject's first word and no word that the subject lacks.
    """
    subjects = [_words(re.split(r" (?:is|are|was|were|primarily)\b|[,(]", article[:300])[0]) for article in articles]
    text = "\n".join(articles)

    def match(title: list[str]) -> bool:
        return any(subject[0] in title and set(title) <= set(subject) for subject in subjects)

    return [
        lead["extract"]
        for lead in leads
        if not match(_words(re.split(r"[,(]", lead["title"])[0])) and lead["extract"][:60] not in text
    ]


def _words(text: str) -> list[str]:
    """The words of `text` in lower case, without an article at the beginning."""
    return re.findall(r"\w+", re.sub(r"^(an?|the) ", "", text.casefold()))


# --- tokens ----------------------------------------------------------------------------------------------------------


def tokenize(
    documents: Sequence[Document], tokenizer: Any, limit: int | None = None, shortest: int = 0
) -> list[np.ndarray]:
    """Token ids (int32) of each document, ended by the tokenizer's end-of-text token if it has one.

    A beginning-of-text token is there only if the tokenizer, or for a chat its template, adds it itself. Documents of
    fewer than `shortest` tokens are left out. Stops after the document with which `limit` tokens are reached.
    Raises LinearizeError for a chat where there is no template, or one that does not take it.
    """
    found: list[np.ndarray] = []
    tokens = read = 0
    characters = sum(map(_size, documents))
    with tqdm(desc="tokenizing", unit="tok", unit_scale=True, delay=1, leave=False) as bar:
        for start in range(0, len(documents), BATCH):
            batch = list(documents[start : start + BATCH])
            for document, ids in zip(batch, _encoded(batch, tokenizer), strict=True):
                ended = _ended(ids, tokenizer.eos_token_id)
                read += _size(document)
                if len(ended) < shortest:
                    continue
                found.append(ended)
                tokens += len(ended)
                if limit is not None and tokens >= limit:
                    return found
            expected = tokens * characters // max(read, 1)
            bar.total = expected if limit is None else min(expected, limit)
            bar.update(tokens - bar.n)
    return found


def _size(document: Document) -> int:
    """Characters."""
    return len(document) if isinstance(document, str) else sum(len(turn["content"]) for turn in document.messages)


def _encoded(batch: Sequence[Document], tokenizer: Any) -> list[list[int]]:
    texts = [document for document in batch if isinstance(document, str)]
    chats = [_rendered(document, tokenizer) for document in batch if isinstance(document, Chat)]
    # verbose=False: no warning that a document is longer than the model reads; it will be cut
    plain = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else [])
    turns = iter(tokenizer(chats, add_special_tokens=False, verbose=False)["input_ids"] if chats else [])
    return [next(turns if isinstance(document, Chat) else plain) for document in batch]


def _rendered(chat: Chat, tokenizer: Any) -> str:
    """The chat as text, which ends where its last turn does."""
    if tokenizer.chat_template is None:
        raise LinearizeError(
            f"{chat.place}: a row of 'messages' needs a chat template, and this model's tokenizer has none; "
            "give rows of 'text', or a chat model"
        )
    try:
        return tokenizer.apply_chat_template(chat.messages, tokenize=False).rstrip()
    except Exception as error:  # whatever a template raises: templates are programs
        raise LinearizeError(f"{chat.place}: the chat template does not take these 'messages': {error}") from error


def _ended(ids: list[int], eos: int | None) -> np.ndarray:
    if eos is not None and (not ids or ids[-1] != eos):
        ids = [*ids, eos]
    return np.asarray(ids, dtype=np.int32)


# --- sequences -------------------------------------------------------------------------------------------------------


def pack(
    documents: Sequence[np.ndarray], sequence_length: int, tokens: int, source: str = "the text", repeats: float = 0.0
) -> list[dict[str, Int64[Tensor, "T"]]]:
    """Cut the documents, one after the other, into sequences of `sequence_length` tokens, at least `tokens` in all.

    Text shorter than that starts over. Each sequence has `input_ids`; `position_ids`, which start from 0 at every
    document's beginning and at the sequence's own (which is how a mixer knows where to forget its state); and
    `targets`, the next token of the same document within the sequence, or -100 where there is none. A share `repeats`
    of the tokens, about, gives way to passages that the document had before (`repeated`).
    Raises `LinearizeError` for lengths below 2, budgets below 1, and text shorter than one sequence.
    """
    if sequence_length < 2 or tokens < 1:
        raise LinearizeError(f"sequence_length must be 2 or more and tokens 1 or more, not {sequence_length}, {tokens}")
    total = sum(map(len, documents))
    if total < sequence_length:
        raise LinearizeError(f"{source} has {total} tokens, fewer than one sequence of {sequence_length}")
    ids = np.concatenate([np.asarray(document, dtype=np.int64) for document in documents])
    begins = np.concatenate([np.arange(len(document)) == 0 for document in documents])
    sequences = -(-tokens // sequence_length)
    starts = range(0, sequences * sequence_length, sequence_length)
    return [_cut(ids, begins, start, sequence_length, repeats) for start in starts]


def _cut(ids: np.ndarray, begins: np.ndarray, start: int, length: int, repeats: float) -> dict[str, Int64[Tensor, "T"]]:
    """One sequence: `length` tokens from `start` on, counted round and round; `begins`: a document begins here."""
    place = np.arange(start, start + length) % len(ids)
    begin, ids = begins[place], ids[place]
    begin[0] = True
    if repeats:
        ids = repeated(ids, np.flatnonzero(begin), repeats, np.random.default_rng(start))
    count = np.arange(length)
    targets = np.full(length, IGNORED)
    targets[:-1] = np.where(begin[1:], IGNORED, ids[1:])
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(count - np.maximum.accumulate(np.where(begin, count, 0))),
        "targets": torch.from_numpy(targets),
    }


def repeated(ids: np.ndarray, begins: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """`ids` `[T]` with passages said again, in place of what stood there: about `share` of the tokens.

    A passage of `PASSAGES` tokens comes from anywhere before its place in the document, whose beginnings are `begins`.
    Running text asks little of a memory; a passage that comes again can be told from it and from nothing else.
    """
    ids, ends = ids.copy(), [*begins[1:], len(ids)]
    shortest, longest = PASSAGES
    pause = (shortest + longest) / 2 * (1 - share) / share  # between two passages, on average
    for begin, end in zip(begins, ends, strict=True):
        place = begin + longest
        while True:
            place += int(random.exponential(pause))
            size = int(random.integers(shortest, longest + 1))
            if place + size >= end:  # a document's last token stays
                break
            start = int(random.integers(begin, place - size + 1))
            ids[place : place + size] = ids[start : start + size]
            place += size
    return ids


def heldout_sequences(
    documents: Sequence[np.ndarray], sequence_length: int, count: int, source: str = "the text"
) -> Int64[Tensor, "N T"]:
    """Up to `count` windows of `sequence_length` tokens: every document's first, then their second ones, and so on.

    Windows do not overlap and shorter tails are dropped. Raises `LinearizeError` if no document is as long as that,
    or if a number is below 1.
    """
    return heldout_windows(documents, sequence_length, count, source)[0]


def heldout_windows(
    documents: Sequence[np.ndarray], sequence_length: int, count: int, source: str = "the text"
) -> tuple[Int64[Tensor, "N T"], list[int]]:
    """As `heldout_sequences`, and for each window the place of its document."""
    if sequence_length < 1 or count < 1:
        raise LinearizeError(f"sequence_length and count must be 1 or more, not {sequence_length}, {count}")
    longest = max(map(len, documents), default=0)
    if longest < sequence_length:
        raise LinearizeError(
            f"{source}: the longest held-out document has {longest} tokens, fewer than {sequence_length}"
        )
    cuts = [
        (place, start)
        for start in range(0, longest - sequence_length + 1, sequence_length)
        for place, document in enumerate(documents)
        if len(document) >= start + sequence_length
    ][:count]
    windows = [documents[place][start : start + sequence_length].astype(np.int64) for place, start in cuts]
    return torch.from_numpy(np.stack(windows)), [place for place, _ in cuts]
