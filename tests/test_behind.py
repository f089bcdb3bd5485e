"""A key that leaves the window is turned back to what it was before RoPE, from wherever RoPE had it."""

from unittest.mock import patch

import pytest
import torch
from test_cache import LENGTH, one_by_one
from test_decoding import DELTA, DEVICE, PADDING, UNFUSED, converted, learned
from tiny import FAMILIES, assert_close, ids, logits, relative, tiny
from torch import Tensor
from transformers import DynamicCache

from linearize import convert
from linearize.ops import liger

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UNFUSED]  # on a GPU, in fp32
BEHIND = {"structure": "gla", "behind": True}  # whose recurrence takes its steps by the forward's operations
WHOLE = DELTA | {"readout": "rms", "mixing": "data_dependent", "behind": True}  # one operator's
SPLITS = [one_by_one(2), [6, 1, 1, 4, 1, 1, 3, 1, 1, 1, 4], [3, 2, 1, 7, 11]]
# partial, interleaved, scaled, at two speeds, not in all layers
ROTATIONS = ["phi", "cohere", "glm4", "gpt_oss", "gemma3_text", "smollm3"]


@torch.no_grad()
def in_parts(model, tokens: Tensor, sizes: list[int], mask: Tensor, positions: Tensor) -> Tensor:
    """Logits of all tokens, read in calls of the given sizes."""
    cache, outputs, end = DynamicCache(config=model.config), [], 0
    for part in tokens.split(sizes, dim=1):
        begin, end = end, end + part.shape[1]
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        outputs.append(model(part, past_key_values=cache, **given).logits)
    return torch.cat(outputs, 1)


def assert_any_split_is_the_full_forward(model, tokens: Tensor, mask: Tensor, positions: Tensor) -> None:
    """By the decoder's steps as well as by the ordinary forward."""
    tokens, mask, positions = (x.to(DEVICE) for x in (tokens, mask, positions))
    full = logits(model, tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    outputs = [in_parts(model, tokens, sizes, mask, positions) for sizes in SPLITS]
    with patch("linearize.convert.next_token", lambda *_: None):
        outputs.append(in_parts(model, tokens, SPLITS[1], mask, positions))
    for output in outputs:
        assert_close(output[mask.bool()], full[mask.bool()])


@pytest.mark.parametrize(("family", "layers"), [*((family, "all") for family in FAMILIES), ("llama", "1,2")])
def test_every_family(family, layers):
    model = converted(family, layers=layers, **BEHIND)
    mask, positions = torch.ones(2, LENGTH, dtype=torch.long), torch.arange(LENGTH).expand(2, -1)
    assert_any_split_is_the_full_forward(model, ids(2, LENGTH), mask, positions)


@pytest.mark.parametrize("settings", [BEHIND, WHOLE], ids=["operations", "whole"])
@pytest.mark.parametrize("family", ["llama", *ROTATIONS])
def test_positions_that_a_caller_gives(family, settings):
    """They begin anywhere, each row's for itself, and leave some out."""
    jumps = torch.randint(1, 4, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[100], [7]]) + jumps.cumsum(1)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    assert_any_split_is_the_full_forward(learned(settings, family), ids(2, LENGTH, seed=1), mask, positions)


@pytest.mark.filterwarnings(PADDING)
@pytest.mark.parametrize("settings", [BEHIND, WHOLE], ids=["operations", "whole"])
@pytest.mark.parametrize("family", ["llama", *ROTATIONS])
def test_padding_wherever_it_lies(family, settings):
    """Left of a row, between its tokens, right of what a chunk has of it; its own positions are anything."""
    mask = torch.ones(4, LENGTH, dtype=torch.long)
    mask[0, :7] = 0
    mask[1, [9, 12, 13]] = 0
    mask[2, 8:11] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    assert_any_split_is_the_full_forward(learned(settings, family), ids(4, LENGTH), mask, positions)


@pytest.mark.parametrize(
    "settings",
    [
        {"window": [3, 7, 5], "sinks": [2, 4, 0]},
        {"window": [5, 7, 5], "rope": ["local", "local", "both"]},
        {"rope": ["both", "none", "local"]},
        {"structure": ["gla", "none", "gated_deltanet"]},
        {"behind": [False, True, True], "local": ["none", "window", "window"]},
        {"behind": False, "mixing": "shared_normalizer", "feature_map": "hedgehog"},
    ],
    ids=str,
)
def test_layers_that_differ(settings):
    positions = torch.tensor([[0], [50]]) + torch.arange(LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    assert_any_split_is_the_full_forward(learned(BEHIND | settings), ids(2, LENGTH), mask, positions)


@torch.no_grad()
@pytest.mark.parametrize("settings", [BEHIND, WHOLE], ids=["operations", "whole"])
@pytest.mark.parametrize("size", [1, 4])
def test_other_positions_would_be_seen(size, settings):
    model, tokens, outputs = learned(settings), ids(2, LENGTH).to(DEVICE), []
    for wrong in (0, 1):
        cache = DynamicCache(config=model.config)
        model(tokens[:, :12], past_key_values=cache)
        for layer in cache.layers:
            assert torch.equal(layer.positions.cpu(), torch.arange(7, 12, dtype=torch.int32).expand(2, -1))
            layer.positions += wrong
        parts = tokens[:, 12:20].split(size, 1)
        outputs.append(torch.cat([model(part, past_key_values=cache).logits for part in parts], 1))
    assert relative(*outputs) > 1e-3


@pytest.mark.parametrize("rope", ["local", "both", "none"])
def test_a_cache_keeps_positions_where_they_are_wanted(rope):
    """Beside the window's keys there are none."""
    model = converted(**BEHIND, rope=rope)
    for layer in model(ids(2, LENGTH).to(DEVICE)).past_key_values.layers:
        assert layer.late_gates.shape == (2, 5, 2, 16)
        assert (layer.positions is None) == (rope != "local")


@pytest.mark.parametrize("structure", ["gated_deltanet", "lightning"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gates_wait_as_states_are_kept(dtype, structure):
    """Padding and sinks have none; a structure without gates has one number, which says as much."""
    model, tokens = converted(structure=structure, behind=True, state_dtype=dtype), ids(2, 9).to(DEVICE)
    mask = torch.tensor([[1] * 9, [0] * 5 + [1] * 4], device=DEVICE)
    wanted = torch.tensor([[True] * 5, [False] * 4 + [True]])  # of the last five, behind three sinks
    for layer in model(tokens, attention_mask=mask).past_key_values.layers:
        assert layer.late_gates.dtype == layer.state.dtype == getattr(torch, dtype)
        assert torch.equal(layer.late_gates.isnan().any((2, 3)).cpu(), ~wanted)
        assert layer.late_gates.shape[-1] == (1 if structure == "lightning" else 2)


def test_frequencies_that_depend_on_the_length():
    """A prompt longer than the original length is turned back as it was turned, its first tokens too."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 5.0, 9.0]}
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 8, **factors}
    model = convert(tiny("phi3", rope_parameters=rope), window=5, sinks=3, mixing_weight=0.4, **BEHIND)
    tokens, mask = ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    full = logits(model, tokens, use_cache=False)
    for sizes in (one_by_one(9), [10, 2, 12]):
        assert_close(in_parts(model, tokens, sizes, mask, torch.arange(LENGTH).expand(2, -1)), full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_inverse_of_angles_that_scale_and_are_rounded(dtype):
    x, angles = torch.randn(2, 9, 3, 16), 3 * torch.randn(9, 6).repeat(1, 2)
    rope = (1.3 * angles.cos()).to(dtype), (1.3 * angles.sin()).to(dtype)
    turned = liger.rotate(x, *(part.float() for part in rope))
    assert relative(turned, x) > 0.1
    assert_close(liger.rotate(turned, *liger.inverse(rope)), x, 1e-6)
