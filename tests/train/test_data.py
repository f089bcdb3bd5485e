"""From files to sequences: every format and its errors, the held-out split, and no leak between packed documents."""

import gzip
import json
import lzma

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from linearize.errors import LinearizeError
from linearize.train import data
from linearize.train.data import heldout_documents, heldout_sequences, heldout_windows, load_documents, pack, tokenize

TEXTS = ["first document", "zweites – Dokument", "third\nwith two lines"]


def jsonl(texts) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write_parquet(path, columns) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


# --- reading ---


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
    assert documents == ["a text", data.Chat(TURNS, f"{tmp_path / 'a.jsonl'}:2"), "the end"]
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
    (text, chat) = tokenize(["text", data.Chat(TURNS, "a.jsonl:1")], words)
    assert text[0] == chat[0] == words.unk_token_id
    assert list(chat).count(words.unk_token_id) == 1


def test_columns_of_messages(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"id": [1, 2], "messages": [TURNS, None]})
    assert load_documents(str(tmp_path / "a.parquet")) == [data.Chat(TURNS, str(tmp_path / "a.parquet"))]


@pytest.mark.parametrize(
    "row", [{"messages": []}, {"messages": "hello"}, {"messages": [{"role": "user"}]}, {"messages": [["user", "x"]]}]
)
def test_bad_messages_are_named(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n" + json.dumps(row))
    with pytest.raises(LinearizeError, match=r"a.jsonl:2: 'messages' is no list of objects that have strings"):
        load_documents(str(tmp_path / "a.jsonl"))


def test_messages_need_a_template_that_takes_them():
    words, chat = tiny.tokenizer(), data.Chat(TURNS, "chat.jsonl:3")
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
    kept = data.leads_of_others(rows, articles)
    assert [text.split(":")[0] for text in kept] == ["Kept"] * 4


@pytest.fixture
def wiki(monkeypatch) -> list[str]:
    """Thirty articles, as the embedded text has them."""
    articles = [f"article {number}" for number in range(1, 31)]
    monkeypatch.setattr(data, "_articles", lambda: articles)
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


def test_windows_know_their_documents():
    documents = [np.arange(size) for size in (12, 3, 9)]
    found, places = heldout_windows(documents, 4, 10)
    assert places == [0, 2, 0, 2, 0]
    assert torch.equal(found, heldout_sequences(documents, 4, 10))


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


# --- tokens ---


def tokenizer(eos: str | None = "</s>", bos: bool = False) -> PreTrainedTokenizerFast:
    """A token for each character."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "?", *"abcdefgh "])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, bos_token="<s>", model_max_length=4)


def test_documents_end_with_eos(capfd):
    assert [list(ids) for ids in tokenize(["ab", "abcdefgh"], tokenizer())] == [[3, 4, 1], [*range(3, 11), 1]]
    assert [list(ids) for ids in tokenize(["ab"], tokenizer(bos=True))] == [[0, 3, 4, 1]]
    assert [list(ids) for ids in tokenize(["ab"], tokenizer(eos=None))] == [[3, 4]]
    assert capfd.readouterr() == ("", "")  # no bar for what is quick, no warning about lengths


def test_tokenising_stops_at_the_limit(monkeypatch):
    class Counting:
        eos_token_id = 1
        seen = 0

        def __call__(self, texts, verbose):
            self.seen += len(texts)
            return {"input_ids": [[5] * 9 for _ in texts]}

    counting = Counting()
    assert len(tokenize(["text"] * 10_000, counting, limit=995)) == 100
    assert counting.seen < 200


# --- sequences ---


def documents(*lengths: int) -> list[np.ndarray]:
    """Documents of these lengths whose tokens are all different: 100, 101, ...; 200, 201, ...; ..."""
    return [np.arange(length, dtype=np.int32) + 100 * number for number, length in enumerate(lengths, start=1)]


def test_packed_sequences_in_full():
    first, second = pack(documents(3, 5, 1), sequence_length=5, tokens=10)
    assert first["input_ids"].tolist() == [100, 101, 102, 200, 201]
    assert first["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert first["targets"].tolist() == [101, 102, -100, 201, -100]
    assert second["input_ids"].tolist() == [202, 203, 204, 300, 100]  # one token of the second round
    assert second["position_ids"].tolist() == [0, 1, 2, 0, 0]
    assert second["targets"].tolist() == [203, 204, -100, -100, -100]
    assert {tensor.dtype for tensor in (*first.values(), *second.values())} == {torch.int64}


def test_no_target_leaks_between_documents():
    sequences = pack(documents(7, 1, 20, 13, 2), sequence_length=8, tokens=150)
    assert len(sequences) == 19
    for sequence in sequences:
        ids, targets, positions = (sequence[name] for name in ("input_ids", "targets", "position_ids"))
        inside = targets != -100
        assert (targets[inside] == ids[inside] + 1).all()  # the next of the same document
        assert (positions[1:][inside[:-1]] == positions[:-1][inside[:-1]] + 1).all()
        assert (positions[1:][~inside[:-1]] == 0).all()


def test_a_single_document_starts_over_as_a_new_one():
    (sequence,) = pack([*documents(6), np.array([], dtype=np.int32)], sequence_length=4, tokens=3)
    assert sequence["position_ids"].tolist() == [0, 1, 2, 3]
    _, second = pack(documents(6), sequence_length=4, tokens=8)
    assert second["input_ids"].tolist() == [104, 105, 100, 101]
    assert second["targets"].tolist() == [105, -100, 101, -100]


def test_text_shorter_than_one_sequence():
    with pytest.raises(LinearizeError, match="the text has 9 tokens, fewer than one sequence of 10"):
        pack(documents(4, 5), sequence_length=10, tokens=100)


@pytest.mark.parametrize(("length", "tokens"), [(1, 10), (0, 10), (4, 0), (4, -5)])
def test_lengths_out_of_range(length, tokens):
    with pytest.raises(LinearizeError, match="must be"):
        pack(documents(9), length, tokens)


def test_heldout_windows_take_turns():
    windows = heldout_sequences(documents(9, 3, 13), sequence_length=4, count=4)
    assert windows[:, 0].tolist() == [100, 300, 104, 304]
    assert windows.shape == (4, 4)
    assert heldout_sequences(documents(9, 3, 13), 4, count=99)[-1].tolist() == [308, 309, 310, 311]


def test_heldout_too_short():
    with pytest.raises(LinearizeError, match="longest held-out document has 9 tokens, fewer than 10"):
        heldout_sequences(documents(9, 3), sequence_length=10, count=1)
    with pytest.raises(LinearizeError, match="must be 1 or more"):
        heldout_sequences(documents(9), sequence_length=4, count=0)


def test_documents_that_are_too_short_are_left_out():
    texts = ["ab", "abcdefgh", "abc", "abcdefg", "abcdefghi"]
    assert [len(ids) for ids in tokenize(texts, tokenizer(), shortest=8)] == [9, 8, 10]
    assert [len(ids) for ids in tokenize(texts, tokenizer(), limit=10, shortest=8)] == [9, 8]


def test_passages_that_are_said_again():
    """Some tokens give way to passages from before in the same document; all else stays, and targets follow."""
    texts = [np.arange(start, start + length) for start, length in ((0, 90), (1000, 700), (2000, 500))]
    plain, changed = (pack(texts, 1290, 1290, repeats=repeats)[0] for repeats in (0.0, 0.4))
    assert pack(texts, 1290, 1290, repeats=0.4)[0]["input_ids"].equal(changed["input_ids"])
    assert plain["position_ids"].equal(changed["position_ids"])
    ids, before = changed["input_ids"], plain["input_ids"]
    again = ids != before
    assert 0.25 < again.double().mean() < 0.55
    assert (ids[again] < before[again]).all()  # tokens rise within a document
    assert (ids[again] // 1000 == before[again] // 1000).all()
    starts = torch.nonzero(again & ~again.roll(1))[:, 0].tolist()
    assert len(starts) > 5
    for start in starts:
        passage = ids[start : start + 8]
        assert (ids[:start].unfold(0, 8, 1) == passage).all(1).any()
    inside = changed["targets"] != -100
    assert inside.equal(plain["targets"] != -100)
    assert changed["targets"][inside].equal(ids[1:][inside[:-1]])
