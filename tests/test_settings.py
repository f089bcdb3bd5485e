"""Every setting, in a model: it changes the output or is refused; decoding, padding, packing, gradients, saving."""

import pytest
import torch
from tiny import assert_close, ids, logits, relative, tiny
from transformers import AutoModelForCausalLM, DynamicCache

from linearize import LinearizeError, convert
from linearize.config import MixerConfig, MixerSettings, drop_idle
from linearize.convert import mixers
from linearize.recipe import LoraSettings
from linearize.structures import STRUCTURES
from linearize.train.trainer import ADDED, with_lora

BASE = {"window": 4, "sinks": 2, "mixing_weight": 0.5}
VALUES = {  # others than the default of each setting
    "structure": ["none", "mlstm"],
    "local": ["block", "none"],
    "window": [6],
    "sinks": [0],
    "score": ["softplus_reweighted"],
    "score_power": [2],
    "feature_map": ["hedgehog", "linear", "products", "l2", "relu", "elu", "none"],
    "shifts": [2],
    "readout": ["rms", "soft_rms", "denominator", "gated"],
    "gate_source": ["v", "learned"],
    "gate_temperature": [2.0],
    "time_scales": [40.0],
    "rope": ["both", "none"],
    "decay_schedule": ["alibi"],
    "negative_eigenvalues": [True],
    "state_dtype": ["float16", "bfloat16"],
    "convolution": [3],
    "convolution_form": ["silu"],
    "bonus": [True],
    "slots": [4],
    "behind": [True],
    "mixing": ["fixed", "data_dependent", "shared_normalizer"],
    "mixing_weight": [0.2],
}
BESIDE = {  # settings that have an effect beside others only
    "score_power": {"score": "softplus_reweighted"},
    "convolution_form": {"convolution": 3},
    "shifts": {"feature_map": "products"},
}
COMBINATIONS = [
    {"local": "block"},
    {"local": "none", "sinks": 4, "window": 64, "mixing_weight": None},
    {"score": "softplus_reweighted"},
    {"feature_map": "hedgehog"},
    {"feature_map": "hedgehog", "structure": "hgrn2"},
    {"feature_map": "hedgehog", "structure": "gated_deltanet"},
    {"feature_map": "products", "structure": "gated_deltanet", "behind": True, "gate_source": "learned"},
    {"feature_map": ["linear", "products"], "shifts": 3, "structure": "gated_deltanet", "readout": "soft_rms"},
    {"readout": "rms"},
    {"readout": "denominator"},
    {"readout": "gated", "structure": "gated_deltanet"},
    {"gate_source": "v"},
    {"gate_source": "learned", "time_scales": 30.0},
    {"gate_source": "learned", "time_scales": 30.0, "structure": "gated_deltanet"},
    {"rope": "both"},
    {"rope": "none"},
    {"structure": "rwkv6", "bonus": True},
    {"structure": "rwkv6", "bonus": True, "readout": "denominator"},
    {"convolution": 4},
    {"convolution": 2, "structure": "gated_deltanet", "rope": "both"},
    {"convolution": 4, "convolution_form": "silu", "structure": "gated_deltanet"},
    {"mixing": "data_dependent"},
    {"behind": True},
    {"behind": True, "structure": "gated_deltanet", "rope": "both", "sinks": 0},
    {"behind": True, "structure": "gsa", "slots": 4, "gate_source": "learned"},
    {"behind": True, "structure": "kronecker"},
    {"mixing": "shared_normalizer"},
    {"mixing": "shared_normalizer", "structure": "lightning", "sinks": 0},
    {"mixing": "shared_normalizer", "structure": "mamba2", "feature_map": "hedgehog", "gate_source": "learned"},
    {"local": ["block", "none", "window"], "window": [4, 5, 6], "sinks": [0, 1, 3]},
    {"structure": ["gla", "none", "gated_deltanet"], "readout": ["denominator", "rms", "gated"]},
]


def converted(**settings):
    """A model whose added parameters are not where they start, so that each has something to say."""
    model = convert(tiny(), **BASE | settings).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in added(model).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def read(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits, of all tokens at once and of the last one after a cache of the others."""
    cache = DynamicCache(config=model.config)
    model(tokens[:, :-1], past_key_values=cache)
    last = model(tokens[:, -1:], past_key_values=cache).logits
    return torch.cat([logits(model, tokens, use_cache=False), last], dim=1)


def added(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if any(f".{part}." in name for part in ADDED)}


def test_the_grid_is_all_settings():
    assert list(VALUES) == list(MixerConfig.model_fields)


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_every_setting_changes_the_output_or_is_refused(structure):
    tokens = ids(2, 30)
    for name, values in VALUES.items():
        for value in values:
            beside = BESIDE.get(name, {})
            settings = {"structure": structure, **beside, name: value}
            if (structure, value) in {("mlstm", "mlstm"), ("gated_retention", "mlstm")}:
                continue
            least = 0 if name == "state_dtype" else 1e-4  # of one token's step, which it rounds
            if value == "none" and name == "local":
                settings |= {"window": 64, "sinks": 4, "mixing_weight": None}
            if (name, value) in refusals(structure):
                with pytest.raises(LinearizeError, match="|".join([name, *beside])):
                    converted(**settings)
            else:
                expected = read(converted(structure=structure, **beside), tokens)
                assert relative(read(converted(**settings), tokens), expected) > least, settings


def refusals(structure: str) -> set:
    """What a structure has no use for, spelt out."""
    gates = {("gate_source", "v"), ("gate_source", "learned")}
    decays = {("gate_temperature", 2.0), ("time_scales", 40.0)}
    weights = {("readout", "denominator"), ("mixing", "shared_normalizer")}
    found = {("negative_eigenvalues", True), ("decay_schedule", "alibi"), ("bonus", True), ("slots", 4)}
    return {
        "deltanet": found - {("negative_eigenvalues", True)} | decays | weights,
        "gated_deltanet": found - {("negative_eigenvalues", True)} | weights,
        "lightning": found - {("decay_schedule", "alibi")} | gates | decays,
        "rwkv6": found - {("bonus", True)},
        "gsa": found - {("slots", 4)} | weights,
        "kronecker": found
        | gates
        | decays
        | weights
        | {("shifts", 2)}
        | {("feature_map", value) for value in VALUES["feature_map"]},
    }.get(structure, found)


@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
@torch.no_grad()
def test_cached_decoding_is_the_full_forward(settings):
    model, tokens = converted(**settings), ids(2, 21)
    full = model(tokens, use_cache=False).logits
    for split in ([1] * 21, [5, 1, 15], [3, 10] + [1] * 8):
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split(split, dim=1)]
        assert_close(torch.cat(parts, 1), full)


@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
@torch.no_grad()
def test_padding_and_packing_change_nothing(settings):
    model, tokens = converted(**settings), ids(1, 19)
    alone = model(tokens, use_cache=False).logits
    padded = torch.cat([ids(1, 6, seed=1), tokens], dim=1)
    mask = torch.cat([torch.zeros(1, 6), torch.ones(1, 19)], dim=1).long()
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    assert_close(model(padded, **given).logits[:, 6:], alone)
    cache = DynamicCache(config=model.config)
    parts = []
    for start, end in ((0, 9), (9, 10), (10, 25)):
        given = {"attention_mask": mask[:, :end], "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]}
        parts.append(model(padded[:, start:end], past_key_values=cache, **given).logits)
    assert_close(torch.cat(parts, 1)[:, 6:], alone)
    packed = torch.cat([ids(1, 7, seed=1), tokens, ids(1, 3, seed=2)], dim=1)
    position_ids = torch.cat([torch.arange(7), torch.arange(19), torch.arange(3)])[None]
    assert_close(model(packed, position_ids=position_ids).logits[:, 7:26], alone)


@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
def test_all_that_is_added_learns_and_is_saved(settings, tmp_path):
    model = converted(**settings)
    model(ids(2, 30), labels=ids(2, 30, seed=1)).loss.backward()
    for name, parameter in added(model).items():
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids(1, 20)), logits(model, ids(1, 20)))
    fresh, other = (convert(tiny(), **BASE | settings) for _ in range(2))
    assert torch.equal(logits(fresh, ids(1, 20)), logits(other, ids(1, 20)))


@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
def test_adapters_save_what_is_added(settings):
    model = convert(tiny(), **BASE | settings)
    names = set(added(model))
    expected = logits(model, ids(1, 20))
    wrapped = with_lora(model, LoraSettings(r=2, alpha=2)).eval()
    trained = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        for name, p in wrapped.named_parameters()
        if p.requires_grad and "lora_" not in name
    }
    assert trained == names
    assert_close(logits(wrapped, ids(1, 20)), expected)


def test_a_list_is_spread_over_the_depth():
    settings = MixerSettings({"local": ["block", "none"], "window": 8, "structure": ["gla", "lightning", "gla"]})
    layers = [settings.layer(index, 6) for index in range(6)]
    assert [layer.local for layer in layers] == ["block"] * 3 + ["none"] * 3
    assert [layer.structure for layer in layers] == ["gla"] * 2 + ["lightning"] * 2 + ["gla"] * 2
    assert [layer.window for layer in layers] == [8] * 3 + [64] * 3  # without effect there: the default
    assert settings.values("structure") == ["gla", "lightning"]
    assert settings.widest_window() == 8
    assert MixerSettings({"local": "none"}).widest_window() == 0
    assert MixerSettings({"local": ["none", "block"], "window": [9, 3]}).widest_window() == 3
    assert MixerSettings({"window": [9, 3, 9]}).windows() == [3, 9]
    own = MixerSettings({"window": [3, 4, 5]})
    assert [own.layer(index, 3).window for index in range(3)] == [3, 4, 5]
    assert [own.layer(index, 2).window for index in range(2)] == [3, 4]  # of fewer layers, at their depths


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": []}, "window is an empty list"),
        ({"window": [4, 0]}, "mixer key 'window' is 0"),
        ({"structure": ["gla", "foo"]}, "unknown structure 'foo'"),
        ({"structure": ["gla", "mlstm"], "bonus": True}, "bonus True has no effect: it is of rwkv6"),
        ({"structure": ["gla", "lightning"], "gate_temperature": 3.0, "local": "none", "window": 8}, "window 8 has no"),
        ({"structure": "deltanet", "readout": "denominator"}, "weights that add up, which deltanet has not"),
        ({"feature_map": "none", "readout": "denominator"}, "never negative, and none may be"),
        ({"feature_map": "l2", "mixing": "shared_normalizer"}, "never negative, and l2 may be"),
        ({"readout": "rms", "mixing": "shared_normalizer"}, "shared_normalizer goes with readout none only"),
        ({"local": "block", "mixing": "shared_normalizer"}, "goes with local window only"),
        ({"score": "softplus_reweighted", "mixing": "shared_normalizer"}, "goes with score softmax only"),
        ({"convolution": 4, "mixing": "shared_normalizer"}, "goes with convolution None only"),
        ({"local": "block", "behind": True}, "behind true goes with local window only"),
        ({"convolution": 4, "behind": True}, "behind true goes with convolution None only"),
        ({"structure": "rwkv6", "bonus": True, "behind": True}, "behind true goes with bonus False only"),
        ({"mixing": "shared_normalizer", "behind": True}, "is behind the window as it is"),
        ({"convolution_form": "silu"}, "convolution_form silu has no effect: there is no convolution"),
        ({"structure": "none", "local": "none"}, "leave nothing"),
        ({"rope": "none", "local": "none"}, "give rope local or both"),
        ({"structure": "gsa", "slots": 9}, "9 slots share the gates of 8 key channels"),
        ({"gate_source": "q"}, "6 query heads, and there is one for each of the 2 key/value heads"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(LinearizeError, match=message):
        convert(tiny(), **settings)


def test_a_gate_from_the_queries_where_each_has_a_key():
    model = convert(tiny(num_key_value_heads=6), gate_source="q", **BASE)
    other = convert(tiny(num_key_value_heads=6), gate_source="k", **BASE)
    assert relative(logits(model, ids(1, 20)), logits(other, ids(1, 20))) > 1e-4


def test_settings_of_a_recipe_give_way_to_a_chosen_structure():
    recipe = {"gate_temperature": 256, "mixing_weight": 0.005, "readout": "none"}
    kept, dropped = drop_idle(recipe, {"structure": "lightning"})
    assert kept == {"structure": "lightning", "mixing_weight": 0.005, "readout": "none"}
    assert list(dropped) == ["gate_temperature"]
    kept, dropped = drop_idle(recipe, {"structure": "lightning", "gate_temperature": 3})  # chosen: refused later
    assert kept["gate_temperature"] == 3
    assert not dropped


@torch.no_grad()
def test_one_softmax_over_window_and_recurrence():
    """With no decay and φ(q)·φ(k) in place of the exponential, for tokens beyond the window that are no sinks."""
    model = converted(mixing="shared_normalizer", gate_temperature=3.0, window=5)
    mixer = mixers(model)[1]
    seen = {}
    mixer.o_proj.register_forward_pre_hook(lambda _, arguments: seen.update(output=arguments[0]))
    mixer.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    model(ids(1, 20), use_cache=False)
    q, k, v = (x[0].double() for x in mixer.family.project(mixer, seen["hidden_states"]))
    rotated = mixer.rotate(q[None], k[None], *seen["position_embeddings"], unsqueeze_dim=2)
    c, log_g = mixer.mixing.log_weight.double().exp(), torch.nn.functional.logsigmoid(k) / 3
    for t in range(20):
        for head in range(6):
            near = [j for j in range(t + 1) if j > t - 5 or j < 2]
            far = [j for j in range(t + 1) if j not in near]
            group = head // 3
            weights = {j: (rotated[0][0, t, head] @ rotated[1][0, j, group] * mixer.scaling).exp() for j in near}
            for j in far:  # decayed by the gates of the tokens that left the window after it
                decay = log_g[j + 1 : t - 5 + 1, group].sum(0).exp()
                weights[j] = c[head] * (q[t, head].softmax(-1) * decay) @ k[j, group].softmax(-1)
            expected = sum(w * v[j, group] for j, w in weights.items()) / sum(weights.values())
            assert_close(seen["output"][0, t].view(6, 8)[head], expected, 1e-4)
