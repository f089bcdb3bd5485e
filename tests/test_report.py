"""The page, its figures, the table and the model card, from the made-up run of `test_results`."""

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml
from test_results import full_suite, late, synthetic, without

from linearize.drawing import spread_out
from linearize.errors import LinearizeError
from linearize.figures import FIGURES, figures
from linearize.report import COLUMNS, model_card, render, table, write
from linearize.results import read, verdict

BASELINES = ("window_only", "window_equal_memory", "recurrence_off", "window_off")
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks nesting; gathers ids, headings and whatever a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.fetched, self.tags, self.headings = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data") and not value.startswith(("#", "data:image/png;base64,")):
                self.fetched.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def page():
    return render(synthetic())


def test_page_needs_nothing_else(page):
    found = Page(page)
    assert found.fetched == []
    assert not {"script", "link", "iframe", "img", "object"} & set(found.tags)
    assert not re.search(r"url\((?!#)|@import", page)


def test_page_has_every_section(page):
    found = Page(page)
    assert found.headings == [
        "What is lost, and where",
        "What is left at late positions",
        "Training",
        "What the layers learned",
        "How long the states remember",
        "Memory",
        "Speed",
        "All models",
        "How it was made",
    ]
    assert found.tags.count("svg") == len(FIGURES)
    assert page.count('class="tile') == 1 + 5
    for text in ("23 %", "248× less", "5.6×", "3e−6", "NVIDIA H100", "2.11.0", "rank: 32", "6 min 53 s", "7,864,320"):
        assert text in page
    assert verdict(synthetic()).split(": ")[0] in page


def test_ids_are_unique_and_referred_to(page):
    ids = Page(page).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'url\(#([^)"]+)\)|href="#([^"]+)"', page)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_figures_are_standalone_text_and_repeatable():
    drawn = figures(synthetic())
    assert list(drawn) == list(FIGURES)
    assert drawn == figures(synthetic())
    for svg in drawn.values():
        root = ElementTree.fromstring(svg)
        texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert len(texts) > 5
        assert "DejaVu" not in svg
    assert "late loss above the teacher (nats)" in drawn["ablation"]


def test_everything_from_outside_is_escaped():
    bad = '<script>alert("$x^")</script> & $'
    curve = {"stage": bad, "model": bad, "tokens": [10, 20], "loss": [1.0, 0.5]}
    report = synthetic(
        model=bad, structure=bad, heldout=bad, hardware=bad, curves=[curve], versions={bad: bad}, recipe={bad: bad},
        seeds={bad: 1}, seconds={bad: 1.0}, trained_tokens={bad: 1}, cache_bytes={bad: {8: 8}},
        tokens_per_second={bad: {8: 8.0}},
    )  # fmt: skip
    page = render(report)
    assert "<script" not in page
    assert "<script" not in "".join(Page(page).tags)
    assert page.count("&lt;script&gt;") > 8
    card = model_card(report, "a`b\n# c")
    assert "\n# c" not in card


def test_without_baselines():
    report = without(synthetic(), *BASELINES)
    page = render(report)
    assert "not compared with a window alone" in page
    assert "window only</text>" not in figures(report)["loss_by_position"]
    assert "ablation" not in figures(report)  # one bar compares nothing
    assert "orange" not in page
    assert len(table(report).splitlines()) == 2 + 3
    assert "not compared" in model_card(report, "a/b")


def test_one_layer_one_context_one_point():
    report = synthetic(
        layers=[{"layer": 3, "mixing": [0.1], "decay_tokens": [50.0], "half_life": [1.0, 2.0, 3.0, 4.0, 5.0]}],
        cache_bytes={"teacher": {1024: 4096}, "converted": {1024: 512}},
        tokens_per_second={"converted": {1024: 10.0}},
        curves=[{"stage": "align", "model": "converted", "tokens": [5], "loss": [0.3]}],
    )
    assert "8.0× less" in render(report)
    assert set(figures(report)) == set(FIGURES)


SUITE = ["Late gap by length", "Recall from beyond the window", "Benchmarks", "Option bias", "Generation"]


def test_the_full_suite_has_its_sections():
    found = Page(page := render(synthetic(suite=full_suite())))
    start = found.headings.index(SUITE[0])
    assert found.headings[start : start + len(SUITE)] == SUITE
    assert found.headings[start - 1] == "Speed"
    assert found.tags.count("svg") == len(FIGURES) + 1
    assert found.fetched == []
    assert len(found.ids) == len(set(found.ids))
    for text in ("23% [11%, 36%]", "−25% [−50%, −4.0%]", "20 sequences of 20 articles",
                 "single needles beyond the window it finds 40 %",
                 "−0.4 [−1.2, +0.4]", "40 / 20 / 20 / 20",
                 "multi value, window only", "67.0 ± 1.1", "60 %"):  # fmt: skip
        assert text in page, text


@pytest.mark.parametrize("part", ["late", "recall", "tasks", "generation"])
def test_a_part_of_the_suite_alone(part):
    found = Page(render(synthetic(suite={part: full_suite()[part]})))
    sections = [heading for heading in found.headings if heading in SUITE]
    names = {"late": SUITE[:1], "recall": SUITE[1:2], "tasks": SUITE[2:4], "generation": SUITE[4:]}
    assert sections == names[part]


def test_windows_that_differ_from_layer_to_layer():
    report = synthetic()
    report.models.converted.narrowest_window, report.models.converted.window = 64, 128
    assert "window of 64–128" in render(report)
    assert "| 64–128 |" in table(report)


def test_a_hybrid_says_what_it_kept():
    report = synthetic().model_copy(update={"kept": "9 of 90 key/value heads"})
    assert "; 9 of 90 key/value heads stay as they are" in render(report)
    assert "9 of 90 key/value heads stay softmax attention, whose cache grows" in model_card(report, "a/b")


def test_one_bucket():
    data = synthetic().model_dump()
    for result in data["models"].values():
        result["loss_by_position"] = result["loss_by_position"][:1]
    assert "loss_by_position" in figures(synthetic(**data))


def test_nothing_but_losses():
    empty = {"layers": [], "curves": [], "cache_bytes": {}, "tokens_per_second": {}, "recipe": {}, "seeds": {}}
    report = synthetic(**empty, versions={}, seconds={}, trained_tokens={})
    assert list(figures(report)) == ["loss_by_position", "ablation"]
    assert "not measured" in render(report)
    assert "<details>" not in render(report)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_diverged(value):
    data = late(synthetic(), converted=value, recurrence_off=value, untrained=value).model_dump()
    data["models"]["converted"] |= {"perplexity": value, "loss_by_position": [value] * 64}
    data["models"]["untrained"]["loss_by_position"] = [value] * 64
    data["curves"] = [{"stage": "align", "model": "converted", "tokens": [1, 2, 3], "loss": [1.0, value, value]}]
    data["layers"] = [{"layer": 0, "mixing": [value], "decay_tokens": [value, 20.0]}]
    report = synthetic(**data | {"decode_parity": value})
    assert "diverged" in render(report)
    assert 'class="tile bad"' in render(report)


def test_poor_parity_is_marked(page):
    assert 'class="tile bad"' not in page
    assert 'class="tile bad"' in render(synthetic(decode_parity=0.3))


def test_table_is_aligned_markdown():
    lines = table(synthetic()).splitlines()
    assert len(lines) == 2 + 7
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == list(COLUMNS)
    assert lines[1].startswith("| ---")
    assert re.search(r"\| converted +\| +64 \| +9,830,400 \| +31.1 \| .* 3.402 \| +85 % \|", lines[6])


def test_model_card():
    report = synthetic()
    card = model_card(report, report.model)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers"
    assert front["base_model"] == report.model
    assert {"linearize", "gla"} <= set(front["tags"])
    assert table(report) in card
    assert verdict(report) in card
    assert "import linearize" in card
    assert "## Limitations" in card
    assert "base_model" not in yaml.safe_load(model_card(report, "my folder/my model").split("---\n")[1])


def test_write(tmp_path):
    report = synthetic()
    write(report, tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"report.json", "report.html"}
    assert read(tmp_path / "new" / "folder") == report
    with pytest.raises(LinearizeError, match="cannot write"):
        write(report, tmp_path / "new" / "folder" / "report.json")


def test_labels_arespread_out():
    assert spread_out([0, 1, 50], 10) == [-4.5, 5.5, 50]
    assert spread_out([0, 0, 0, 12], 10) == pytest.approx([-12, -2, 8, 18])
    assert spread_out([], 10) == []
