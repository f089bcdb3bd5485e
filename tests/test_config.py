"""MixerConfig refuses what a layer cannot be, in words."""

import json

import pytest
from pydantic import BaseModel, ConfigDict

from linearize.config import MixerConfig, MixerSettings, validated
from linearize.errors import LinearizeError
from linearize.structures import STRUCTURES


@pytest.mark.parametrize("structure", [*STRUCTURES, "none"])
def test_config_survives_json(structure):
    settings = validated(MixerSettings, {"structure": structure, "window": [7, 9], "mixing_weight": 0.25}, "mixer")
    assert validated(MixerSettings, json.loads(settings.model_dump_json()), "mixer") == settings


def test_initial_mixing_weight():
    assert MixerConfig(mixing="fixed").initial_mixing_weight == 0.5
    assert MixerConfig(mixing="per_head").initial_mixing_weight == 0.02
    assert MixerConfig(mixing_weight=0.0).initial_mixing_weight == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"structure": "foo"}, "^unknown structure 'foo'; valid: deltanet, gated_deltanet, .*, none, rwkv6$"),
        ({"window": 0}, "mixer key 'window' is 0: .* greater than or equal to 1"),
        ({"window": 1.5}, "mixer key 'window' is 1.5"),
        ({"window": True}, "mixer key 'window' is True: it is no switch, and takes a value"),
        ({"sinks": -1}, "mixer key 'sinks' is -1"),
        ({"gate_temperature": 0}, "mixer key 'gate_temperature' is 0: .* greater than 0"),
        ({"gate_temperature": float("inf")}, "mixer key 'gate_temperature' is inf: .* finite"),
        (
            {"mixing": "foo"},
            "mixer key 'mixing' is 'foo': .*'fixed', 'per_head', 'data_dependent' or 'shared_normalizer'",
        ),
        ({"mixing_weight": 2}, "mixer key 'mixing_weight' is 2"),
        ({"foo": 1}, "unknown mixer key 'foo'; valid: structure, local, window, sinks"),
        ({"foo": 1, "window": 0}, "'window' is 0.*; unknown mixer key 'foo'"),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(LinearizeError, match=message):
        validated(MixerConfig, given, "mixer")


def test_missing_keys_and_failed_items():
    class Shape(BaseModel):
        model_config = ConfigDict(extra="forbid")
        size: int

    with pytest.raises(LinearizeError, match="shape key 'size' is missing"):
        validated(Shape, {}, "shape")


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        MixerConfig().window = 3
