"""A recipe is read, overridden, checked as a whole, and written so that it reads back the same."""

import pytest
import torch
import yaml
from tiny import assert_close, ids, logits, tiny
from transformers import DynamicCache

from linearize import convert
from linearize.errors import LinearizeError
from linearize.recipe import Recipe, dump, parse_tokens, read, shipped


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipes_read_and_read_back(name, tmp_path):
    recipe = read(name)
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    assert read(tmp_path / "recipe.yaml") == recipe


def test_a_recipe_on_top_of_another(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: default\nmixer: {window: 32}\nseed: 3")
    (tmp_path / "next.yaml").write_text("base: mine.yaml\ndistill: {tokens: 5M}")  # beside it, wherever one is
    assert read(tmp_path / "next.yaml") == read("default", ["mixer.window=32", "seed=3", "distill.tokens=5M"])
    (tmp_path / "mine.yaml").write_text("base: next.yaml")
    with pytest.raises(LinearizeError, match="has itself as a base"):
        read(tmp_path / "next.yaml")
    (tmp_path / "mine.yaml").write_text("base: nothing")
    with pytest.raises(LinearizeError, match="unknown recipe 'nothing'"):
        read(tmp_path / "next.yaml")
    with pytest.raises(LinearizeError, match=r"window-only, or a \.yaml file$"):
        read("nothing")


def test_the_window_alone_is_the_default_without_its_recurrence():
    assert read("window-only") == read("default", ["mixer.structure=none", "baselines=[]"])


def test_nothing_given_is_every_default():
    assert read() == Recipe()


@pytest.mark.parametrize(
    ("given", "tokens"),
    [("30k", 30_000), ("2.5M", 2_500_000), ("1B", 10**9), ("1e6", 10**6), ("512", 512), (7, 7)],
)
def test_token_counts(given, tokens):
    assert parse_tokens(given) == tokens


@pytest.mark.parametrize("given", ["", "k", "many", "infM", "nan", "1T"])
def test_bad_token_counts(given):
    with pytest.raises(LinearizeError, match=f"'{given}' is no number of tokens; valid: 500000, 30K"):
        parse_tokens(given)


def test_overrides_come_last_and_keep_the_rest():
    recipe = read(
        "default", ["distill.learning_rate=1e-4", "mixer.window=32", "lora=null"], {"mixer.window": 8, "layers": "5"}
    )
    assert recipe.distill is not None
    assert (recipe.distill.learning_rate, recipe.distill.tokens) == (1e-4, 2_000_000)
    assert (recipe.mixer.root["window"], recipe.mixer.root["sinks"], recipe.layers, recipe.lora) == (32, 4, "5", None)


def test_numbers_are_layers_too():
    assert read(None, ["layers=5"]).layers == "5"
    assert read(None, ["layers=0-1,5"]).layers == "0-1,5"


def test_flags_are_not_yaml():
    assert read(None, [], {"model": "1e5", "data.train": "[x"}).model == "1e5"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["foo=1"], ["unknown recipe key 'foo'", "valid: model, layers"]),
        (
            ["lora.foo=1", "mixer.bar=2"],
            ["'lora.foo'; valid: r, alpha", "unknown mixer key 'bar'; valid: structure, local"],
        ),
        (["seed=-1", "foo=1", "mixer.window=0"], ["'seed' is -1", "'foo'", "mixer key 'window' is 0"]),
        (["mixer.structure=foo"], ["unknown structure 'foo'; valid: deltanet, gated_deltanet"]),
        (["mixer=3"], ["mixer is 3"]),
        (["align.tokens.x=3"], ["'align.tokens' is {'x': 3}"]),
        (["distill.learning_rate=.inf"], ["'distill.learning_rate' is inf", "finite"]),
        (["distill.kl_weight=2"], ["'distill.kl_weight' is 2", "less than or equal to 1"]),
        (["baselines=[foo]"], ["'baselines.0' is 'foo'", "window_only", "window_equal_memory"]),
        (["adapter=foo"], ["'adapter' is 'foo'", "merged", "separate"]),
        (["evaluation.contexts=[4, 0]"], ["'evaluation.contexts.1' is 0"]),
        (["lora.targets=[]"], ["'lora.targets' is []"]),
        (["seed"], ["--set 'seed'", "key=value"]),
        (["=1"], ["--set '=1'", "key=value"]),
        (["seed=[1"], ["--set 'seed=[1'"]),
    ],
)
def test_all_that_is_wrong_is_said_at_once(overrides, words):
    with pytest.raises(LinearizeError) as error:
        read("default", overrides)
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"mixer: [", b"- 1", b"", b"caf\xe9: 1"])
def test_damaged_files(content, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(LinearizeError, match=r"mine.yaml is not a YAML recipe"):
        read(path)


def test_a_key_that_is_there_twice(tmp_path):
    (path := tmp_path / "recipe.yaml").write_text("seed: 1\ndistill:\n  tokens: 1K\n  tokens: 2K\n", encoding="utf-8")
    with pytest.raises(LinearizeError, match=r"is not a YAML recipe: the key 'tokens' is there twice, .* line 3"):
        read(path)


def test_one_override_by_itself():
    assert read("demo", "seed=7") == read("demo", ["seed=7"])


def test_missing_files():
    with pytest.raises(LinearizeError, match=r"'nosuch.yaml'; shipped: default, demo"):
        read("nosuch.yaml")
    with pytest.raises(LinearizeError, match=r"unknown recipe 'nosuch'; valid: default, demo, .*a .yaml file"):
        read("nosuch")


def test_every_key_is_written(tmp_path):
    assert yaml.safe_load(dump(Recipe())).keys() == Recipe.model_fields.keys()


@pytest.mark.parametrize("name", [name for name in shipped() if name not in ("default", "demo")])
def test_shipped_recipes_convert(name):
    mixer = read(name).mixer
    model = convert(tiny(num_hidden_layers=4), **mixer.root).eval()
    full = logits(model, ids(1, 80), use_cache=False)
    cache = DynamicCache(config=model.config)
    assert_close(torch.cat([logits(model, x, past_key_values=cache) for x in ids(1, 80).split([70, 1, 9], 1)], 1), full)


def test_a_chosen_structure_replaces_what_the_recipe_says_of_gates(capsys):
    recipe = read("default", given={"mixer.structure": "lightning"})
    assert recipe.mixer.values("gate_temperature") == [16.0]
    assert "the recipe's mixer.gate_temperature is left out: lightning has no gate" in capsys.readouterr().err
    with pytest.raises(LinearizeError, match=r"gate_temperature 3\.0 has no effect: lightning has no gate"):
        read("default", ["mixer.structure=lightning", "mixer.gate_temperature=3"])


def test_transnormer_has_softmax_early_and_linear_attention_late():
    layers = [read("transnormer").mixer.layer(index, 4) for index in range(4)]
    assert [(layer.structure, layer.local) for layer in layers] == [("none", "block")] * 2 + [("gla", "none")] * 2


def test_shortest_is_refused_where_text_is_sampled():
    assert read("default", ["data.shortest=64"]).data.shortest == 64
    with pytest.raises(LinearizeError, match="shortest 64 has no effect on train self"):
        read("default", ["data.train=self", "data.shortest=64"])
