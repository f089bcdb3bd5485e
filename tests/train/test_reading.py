"""Reading: every format and its errors, and the held-out split."""

import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
import tiny
from tokenizers import processors

from linearize.errors import LinearizeError
from linearize.train import documents
from linearize.train.documents import Chat, heldout_documents, leads_of_others, load_documents
from linearize.train.sequences import tokenize

TEXTS = ["first document", "zweites – Dokument", "third\nwith two lines"]


def jsonl(texts) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write_parquet(path, columns) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda path: path.write_bytes(jsonl(TEXTS))),
        ("bom.jsonl", lambda path: path.write_bytes(b"\xef\xbb\xbf" + jsonl(TEXTS) + b"\n")),
        ("a.jsonl.xz", lambda path: path.write_bytes(lzma.compress(jsonl(TEXTS)))),
        ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(jsonl(TEXTS)))),
        ("a.parquet", lambda path: write_parquet(path, {"id": [1, 2, 3, 4], "text": [*TEXTS, None]})),
    ],
)
def test_rows_are_documents(tmp_path, name, write):
    write(tmp_path / name)
    assert load_documents(str(tmp_path / name)) == TEXTS


def test_folder_is_read_in_order_and_blank_documents_are_skipped(tmp_path):
    (tmp_path / "b.txt").write_text("one file,\n\none document", encoding="utf-8")
    (tmp_path / "a.jsonl").write_bytes(jsonl(["from a", " \n"]))
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.txt").write_text("deeper")
    assert load_documents(str(tmp_path)) == ["from a", "one file,\n\none document", "deeper"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\n", r"a.csv does not end with one of .jsonl, .jsonl.xz, .jsonl.gz, .txt, .parquet"),
        ("a.jsonl", b"", "a.jsonl holds no text"),
        ("a.txt", b" \n", "a.txt holds no text"),
        ("a.txt", b"four\xff", "a.txt is not UTF-8 at byte 4"),
        ("a.jsonl", jsonl(["x"]) + b"\xff", "a.jsonl is not UTF-8 at byte 14"),
        ("a.jsonl", jsonl(["x"]) + b"{", "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x\\ud83dy"}', r"a.jsonl:1: \\ud83d at character 1 is half of a surrogate pair"),
        (
            "a.jsonl",
            jsonl(["x"]) + b'{"body": 1, "id": 2}',
            "a.jsonl:2: no string field 'text', and no 'messages'; it has: body, id",
        ),
        ("a.jsonl", b'{"text": null}', "a.jsonl:1: no string field 'text'"),
        ("a.jsonl", b"[1]", "a.jsonl:1: no string field 'text', and no 'messages'; it has: list"),
        ("a.jsonl.xz", lzma.compress(jsonl(["x"]))[:-9], "cannot read .*a.jsonl.xz"),
        ("a.jsonl.gz", gzip.compress(jsonl(["x"]), mtime=0)[:-9], "cannot read .*a.jsonl.gz"),
        ("a.jsonl.gz", b"no gzip", "cannot read .*a.jsonl.gz"),
        ("a.parquet", b"no parquet at all", "cannot read .*a.parquet"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LinearizeError, match=message):
        load_documents(str(tmp_path / name))


def test_parquet_needs_a_column_of_strings(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"body": ["x"], "id": [1]})
    with pytest.raises(LinearizeError, match=r"a.parquet: no column 'text' or 'messages'; it has: body, id"):
        load_documents(str(tmp_path / "a.parquet"))
    write_parquet(tmp_path / "a.parquet", {"text": [1]})
    with pytest.raises(LinearizeError, match=r"a.parquet: column 'text' holds int"):
        load_documents(str(tmp_path / "a.parquet"))


TURNS = [{"role": "user", "content": "how long"}, {"role": "assistant", "content": "as it is"}]
TEMPLATE = "{% for m in messages %}{{ m['role'][0] + ',' + m['content'] + '.' }}{% endfor %}"


def test_rows_of_messages_become_text_by_the_template(tmp_path):
    rows = [{"text": "a text"}, {"messages": TURNS}, {"source": "x", "messages": [{"role": "user", "content": " "}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "the end"}]))
    documents = load_documents(str(tmp_path / "a.jsonl"))
    assert documents == ["a text", Chat(TURNS, f"{tmp_path / 'a.jsonl'}:2"), "the end"]
    words = tiny.tokenizer()
    words.chat_template = TEMPLATE + "{{ '<eos> ' }}"
    found = [words.decode(ids).replace(" ", "") for ids in tokenize(documents, words)]
    assert found == ["atext<eos>", "u,howlong.a,asitis.<eos>", "theend<eos>"]


def test_heldout_text_has_no_chats(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n" + json.dumps({"messages": TURNS}))
    with pytest.raises(LinearizeError, match=r"a.jsonl:2: rows of 'messages' are to train on"):
        load_documents(str(tmp_path / "a.jsonl"), "heldout")


def test_a_chat_has_no_second_beginning(tmp_path):
    words = tiny.tokenizer()
    words.chat_template = "{{ '<unk>' }}" + TEMPLATE
    words._tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", words.unk_token_id)]
    )
    (text, chat) = tokenize(["text", Chat(TURNS, "a.jsonl:1")], words)
    assert text[0] == chat[0] == words.unk_token_id
    assert list(chat).count(words.unk_token_id) == 1


def test_columns_of_messages(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"id": [1, 2], "messages": [TURNS, None]})
    assert load_documents(str(tmp_path / "a.parquet")) == [Chat(TURNS, str(tmp_path / "a.parquet"))]


@pytest.mark.parametrize(
    "row", [{"messages": []}, {"messages": "hello"}, {"messages": [{"role": "user"}]}, {"messages": [["user", "x"]]}]
)
def test_bad_messages_are_named(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n" + json.dumps(row))
    with pytest.raises(LinearizeError, match=r"a.jsonl:2: 'messages' is no list of objects that have strings"):
        load_documents(str(tmp_path / "a.jsonl"))


def test_messages_need_a_template_that_takes_them():
    words, chat = tiny.tokenizer(), Chat(TURNS, "chat.jsonl:3")
    with pytest.raises(LinearizeError, match=r"chat.jsonl:3: a row of 'messages' needs a chat template"):
        tokenize(["a text", chat], words)
    words.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(LinearizeError, match=r"chat.jsonl:3: the chat template does not take .*: roles must alternate"):
        tokenize([chat], words)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.jsonl", "no file gone.jsonl"),
        ("dir/gone.txt", "no file dir/gone.txt"),
        ("wikipedia", "no data at 'wikipedia'; valid: wiki, a file or folder of .jsonl"),
        ("empty", "no text in empty"),
        ("", "no data at ''; valid: wiki"),
    ],
)
def test_missing_sources(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LinearizeError, match=message):
        load_documents(source)


def test_hub_dataset(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"text" if name == "owner/good" else "body": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_documents("owner/good") == TEXTS
    assert load_documents("owner/good:test[:1%]") == TEXTS
    assert asked == [("owner/good", "train"), ("owner/good", "test[:1%]")]
    with pytest.raises(LinearizeError, match="owner/bad: no column 'text' or 'messages'; it has: body"):
        load_documents("owner/bad")


def test_hub_offline(monkeypatch):
    import datasets

    def load_dataset(name, split):
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(LinearizeError, match=r"owner/name \(split train\): Couldn't reach the hub; connect"):
        load_documents("owner/name")


# --- the embedded text ---


def test_leads_of_heldout_articles_are_left_out():
    articles = [
        "Andre Kirk Agassi ( ; born 1970) is a player. Steffi Graf is his wife.",
        "Austin is the capital of Texas in the United States.Austin may also refer to: ...",
        "An astronomer is a scientist in the field of astronomy.",
        "In other words, and in quite some length, this paragraph is quoted word for word in an article held out.",
    ]
    leads = {
        "Andre Agassi": "A player.",
        "Austin, Texas": "A city.",
        "Astronomer": "Someone.",
        "Quoted": articles[3][:70] + " but goes on in another way",
        "Kirk (church)": "Kept: names a part of a subject.",
        "Steffi Graf": "Kept: only mentioned.",
        "Austin Powers": "Kept: another subject.",
        "Astronomy": "Kept: another word.",
    }
    rows = [{"title": title, "extract": extract} for title, extract in leads.items()]
    kept = leads_of_others(rows, articles)
    assert [text.split(":")[0] for text in kept] == ["Kept"] * 4


@pytest.fixture
def wiki(monkeypatch) -> list[str]:
    """Thirty articles, as the embedded text has them."""
    articles = [f"article {number}" for number in range(1, 31)]
    monkeypatch.setattr(documents, "_articles", lambda: articles)
    return articles


@pytest.mark.parametrize(
    ("articles", "train", "expected"),
    [
        (None, "", range(21, 31)),
        (None, "wiki", range(21, 31)),
        ("1-20", "other.txt", range(1, 21)),
        ("25, 3,4-6,5", "other.txt", [3, 4, 5, 6, 25]),
        ("22-23", "wiki", [22, 23]),
    ],
)
def test_articles_of_wiki_by_number(wiki, articles, train, expected):
    found = heldout_documents("wiki", articles, train)
    assert found == {number: f"article {number}" for number in expected}


@pytest.mark.parametrize(
    ("articles", "words"),
    [("20-21", "1-20 are trained on; valid: 21-30"), ("0-3", "within 1-30"), ("30-31", "within 1-30"),
     ("25-22", "within 1-30"), ("x", "'1-20,25'"), ("", "'1-20,25'"), ("21,,22", "'1-20,25'")],
)  # fmt: skip
def test_articles_that_cannot_be_measured_on(wiki, articles, words):
    with pytest.raises(LinearizeError, match=words):
        heldout_documents("wiki", articles, "wiki")


def test_documents_of_a_file_by_number(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(jsonl(["a", " ", "b", "c"]))
    assert heldout_documents(str(path)) == {1: "a", 2: "b", 3: "c"}
    assert heldout_documents(str(path), "2-3") == {2: "b", 3: "c"}


def test_unknown_split():
    with pytest.raises(LinearizeError, match="unknown split 'test'; valid: heldout, train"):
        load_documents("wiki", "test")  # type: ignore[arg-type]


@pytest.mark.slow
def test_real_wiki_splits():
    training, heldout = load_documents("wiki"), load_documents("wiki", "heldout")
    assert (len(training), len(heldout)) == (20 + 10_033 - 6, 10)
    assert training[0].startswith("Anarchism is")
    assert heldout[0].startswith("Anthropology is")
    spans = {tuple(words[i : i + 13]) for words in map(str.split, heldout) for i in range(len(words) - 12)}
    for text in training:
        words = text.split()
        assert not any(tuple(words[i : i + 13]) in spans for i in range(len(words) - 12)), text[:100]
