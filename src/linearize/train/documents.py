"""Where text comes from: the embedded articles, files, folders and the hub, a document at a time."""

import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast, overload

from linearize.assets import HUB_NAME, TEXTS, asset_file, quick_hub
from linearize.errors import LinearizeError, unknown
from linearize.ranges import numbers

SPLITS = ("train", "heldout")
SELF = "self"  # a source that is not read: the teacher samples it (`train.sample`)
TRAIN_ARTICLES = 20  # of the 30 embedded ones; the others are held out
FIELDS = ("text", "messages")  # of a row, of which the first that is there is its document


class Chat(NamedTuple):
    """A document of turns, which becomes text by the tokenizer's chat template."""

    messages: list[dict[str, Any]]  # each has a `role` and a `content`
    place: str  # where it was read


Document = str | Chat


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


def files_of(source: str) -> list[Path]:
    """The local files that `source` names, in the order in which they are read; none of an embedded or a hub's text."""
    path = Path(source).expanduser()
    if source in ("wiki", SELF):
        return []
    if path.is_dir():
        return sorted(inner for inner in path.rglob("*") if inner.is_file() and _suffix(inner))
    return [path] if path.is_file() else []


def _read_folder(folder: Path) -> Iterator[Document]:
    if not (paths := files_of(str(folder))):
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
        return _whole(row["text"], place)
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
    for turn in turns:
        _whole(turn["content"], place)
    return Chat(turns, place)


def _whole(text: str, place: str) -> str:
    """JSON can spell half of a character, which no text can have."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise LinearizeError(f"{place}: {half} at character {error.start} is half of a surrogate pair") from error
    return text


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
    chosen = list(found) if articles is None else _chosen(articles, len(found), source)
    if source == train == "wiki" and min(chosen) <= TRAIN_ARTICLES:
        raise LinearizeError(
            f"articles {articles!r} of wiki: 1-{TRAIN_ARTICLES} are trained on; valid: {TRAIN_ARTICLES + 1}-"
            f"{len(found)}, or another text to train on"
        )
    return {number: found[number] for number in chosen}


def _chosen(articles: str, count: int, source: str) -> list[int]:
    """The numbers that "1-20,25" means."""
    try:
        if (found := numbers(articles, count))[0] >= 1 and found[-1] <= count:
            return found
    except ValueError:
        pass
    raise LinearizeError(
        f"articles {articles!r} of {source} are not valid; give numbers and ranges like '1-20,25' within 1-{count}"
    )


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
