"""The prose of a training text: documents of some sources alone, and short ones joined to long ones.

    python -m benchmarks.prose train.jsonl.xz --out prose.jsonl.xz

TEXT has rows of `source` and `text`, as `benchmarks.training_text` writes them. Of a technical manual, what comes late
is mostly read off what came before; of essays, speeches, novels and encyclopedias, less so.
"""

import argparse
import json
import lzma
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from linearize.files import check_writable, write_bytes

SOURCES = "brown|sotu|stdlib|anarchism|jargon|handbook|wiki.lead"  # the names in either form of that text
SHORT, LONG = 2000, 6500  # characters: shorter documents are joined with their neighbours to this length or more


def main() -> None:
    """Write them in an order that depends on nothing else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help=".jsonl.xz")
    parser.add_argument("--out", type=Path, required=True, help=".jsonl.xz")
    parser.add_argument("--sources", default=SOURCES, help="a pattern of their names")
    arguments = parser.parse_args()
    check_writable(arguments.out)
    with lzma.open(arguments.text, "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if re.search(arguments.sources, row["source"])]
    documents = [*(row["text"] for row in rows if len(row["text"]) > SHORT)]
    for source in dict.fromkeys(row["source"] for row in rows):
        documents += joined(row["text"] for row in rows if row["source"] == source and len(row["text"]) <= SHORT)
    random.Random(0).shuffle(documents)
    written = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    write_bytes(arguments.out, lzma.compress(written.encode()))
    print(f"{arguments.out}: {len(documents):,} documents, {sum(map(len, documents)):,} characters")


def joined(texts: Iterable[str]) -> Iterator[str]:
    """Neighbours as one document each; what is left at the end is too short, and left out."""
    held, size = [], 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= LONG:
            yield "\n\n".join(held)
            held, size = [], 0


if __name__ == "__main__":
    main()
