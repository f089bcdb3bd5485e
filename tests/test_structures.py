"""Every structure, in a model: cached decoding, padding, packing, gradients; and what each one is."""

import pytest
import torch
from tiny import assert_close, ids, tiny
from transformers import DynamicCache

from linearize import LinearizeError, MixerConfig, convert
from linearize.convert import mixers
from linearize.evaluate.layers import layer_statistics
from linearize.features import softmax
from linearize.gates import Gate, pooled
from linearize.ops.gated_linear import reference
from linearize.structures import STRUCTURES
from linearize.structures.base import Layer, absent
from linearize.structures.lightning import rates

NAMES = sorted(STRUCTURES)
GATED = sorted(set(NAMES) - {"lightning", "deltanet", "kronecker"})  # by what the text says


def layer(name: str, layer_idx: int = 1, heads: int = 2, **settings) -> Layer:
    return Layer(MixerConfig(structure=name, **settings), layer_idx, 4, 3 * heads, heads, 8, 48)


def made(name: str, q, k, v, place: Layer | None = None):
    """A structure's inputs with the softmax feature map, or features of its own, and the gate from the key."""
    structure, place = STRUCTURES[name], place or layer(name)
    gate = Gate(structure, place, 8)(torch.zeros(len(q), q.shape[1], 48), q, k, v)
    if not structure.own_features:
        q, k = softmax(q), softmax(k)
    return structure.inputs(q, k, v, gate, place)


def projections(T: int = 9, scale: float = 1.0):
    return [scale * torch.randn(2, T, heads, 8) for heads in (6, 2, 2)]


def fading(name: str, temperature: float = 2) -> dict[str, float]:
    """A gate temperature, for those that have one."""
    structure = STRUCTURES[name]
    return {"gate_temperature": temperature} if structure.decays and structure.gate_size is not absent else {}


def model_with(name: str):
    """A converted model in which the recurrence counts as much as the window."""
    return convert(tiny(), structure=name, window=4, sinks=2, mixing_weight=0.5, **fading(name)).eval()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_cached_decoding_is_the_full_forward(name):
    model, ids = model_with(name), torch.randint(3, 90, (2, 21))
    full = model(ids, use_cache=False).logits
    for split in ([1] * 21, [5, 1, 15], [13] + [1] * 8):
        cache, parts = DynamicCache(config=model.config), ids.split(split, dim=1)
        assert_close(torch.cat([model(part, past_key_values=cache).logits for part in parts], 1), full)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padding_and_packing_change_nothing(name):
    model, ids = model_with(name), torch.randint(3, 90, (1, 15))
    alone = model(ids, use_cache=False).logits
    padded = torch.cat([torch.randint(3, 90, (1, 6)), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 6), torch.ones(1, 15)], dim=1).long()
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    assert_close(model(padded, attention_mask=mask, position_ids=position_ids).logits[:, 6:], alone)
    packed = torch.cat([torch.randint(3, 90, (1, 7)), ids], dim=1)
    position_ids = torch.cat([torch.arange(7), torch.arange(15)])[None]
    assert_close(model(packed, position_ids=position_ids).logits[:, 7:], alone)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"kronecker"}))
def test_gates_only_forget(name):
    for scale in (1.0, 30.0, 300.0):
        assert (made(name, *projections(scale=scale)).log_g <= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_at_any_scale(name):
    for scale in (0.0, 1.0, 30.0, 300.0):
        q, k, v = (x.requires_grad_() for x in projections(scale=scale))
        output, _ = STRUCTURES[name].operator(*made(name, q, k, v))
        output.square().sum().backward()
        assert torch.isfinite(output).all()
        assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


@pytest.mark.parametrize("name", NAMES)
def test_memory_times_are_those_of_the_gates(name):
    for row in layer_statistics(model_with(name), torch.randint(3, 90, (15,))):
        assert all((0 < time < 1e5) == (name in {*GATED, "lightning"}) for time in row.decay_tokens)


@pytest.mark.parametrize("mixing", ["per_head", "data_dependent", "shared_normalizer"])
def test_mixing_weights_are_those_of_the_text(mixing):
    """What the output of both branches is made by, not where it started."""
    model, tokens = convert(tiny(), window=4, mixing=mixing, mixing_weight=0.3, feature_map="softmax"), ids(1, 30)
    for mixer in mixers(model):
        for parameter in mixer.mixing.parameters():
            torch.nn.init.normal_(parameter, 0.3, 0.2)
    seen = []

    def watch(module, arguments, output):
        recurrent, local, *_ = (x.double() for x in arguments[:2])
        seen.append(((output - local) / (recurrent - local)).mean((0, 1, 3)))

    hooks = [mixer.mixing.register_forward_hook(watch) for mixer in mixers(model)]
    rows = layer_statistics(model, tokens[0])
    for hook in hooks:
        hook.remove()
    for row, expected in zip(rows, seen, strict=True):
        assert row.mixing == pytest.approx(expected.tolist(), rel=1e-2)


def test_they_are_different_structures():
    q, k, v = projections()
    seen = {}
    for name in NAMES:
        output, _ = STRUCTURES[name].operator(*made(name, q, k, v, layer(name, **fading(name))))
        same = [other for other, before in seen.items() if torch.allclose(before, output)]
        assert same == (["gated_retention"] if name == "mlstm" else [])
        seen[name] = output


def test_temperature_lengthens_memory():
    for name in GATED:
        short, long = (made(name, *projections(), layer(name, gate_temperature=t)).log_g.mean() for t in (1, 100))
        assert short < long < 0


def test_hgrn2_forgets_what_it_does_not_write_and_less_in_deeper_layers():
    q, k, v = projections()
    for layer_idx in range(4):
        inputs = made("hgrn2", q, k, v, layer("hgrn2", layer_idx))
        assert_close(inputs.k, 1 - inputs.log_g.exp())
        assert (inputs.log_g.exp() >= layer_idx / 4).all()


def test_rwkv6_and_mamba2_are_their_equations():
    q, k, v = projections()
    inputs = made("rwkv6", q, k, v, layer("rwkv6", gate_temperature=1))
    assert_close(inputs.log_g.exp(), torch.exp(-torch.exp(k)))
    inputs = made("mamba2", q, k, v, layer("mamba2", gate_temperature=1))
    step = torch.log1p(k.mean(-1, keepdim=True).exp())
    assert_close(inputs.log_g, -step)
    assert_close(inputs.k, step * k.softmax(-1))


@pytest.mark.parametrize("schedule", ["paper", "alibi"])
def test_lightning_is_a_constant_scalar_decay(schedule):
    q, k, v = projections()
    place = layer("lightning", decay_schedule=schedule)
    output, state = STRUCTURES["lightning"].operator(*made("lightning", q, k, v, place))
    log_g = -rates(place).float().view(1, 1, 2, 1).expand(2, 9, 2, 8)
    features = softmax(q), softmax(k), v
    for ours, truth in zip((output, state), reference(*features, log_g, torch.zeros(2, 2, 8, 8)), strict=True):
        assert_close(ours, truth)


def test_lightning_schedules():
    assert rates(layer("lightning", 1, heads=4)).tolist() == [2 * h * 0.75 for h in (1, 2, 3, 4)]
    alibi = rates(layer("lightning", 3, heads=2, decay_schedule="alibi")).tolist()
    assert alibi == pytest.approx([2**-4 * 1e-5, 2**-8 * 1e-5])


def test_gated_deltanet_without_decay_is_deltanet():
    q, k, v = projections(40)
    plain = made("deltanet", q, k, v, layer("deltanet"))
    gated = made("gated_deltanet", q, k, v, layer("gated_deltanet"))
    assert (gated.log_g < 0).all()
    gated = gated._replace(log_g=torch.zeros_like(gated.log_g))
    assert_close(STRUCTURES["gated_deltanet"].operator(*gated)[0], STRUCTURES["deltanet"].operator(*plain)[0])


def test_negative_eigenvalues_double_beta():
    q, k, v = projections()
    half, whole = (made("deltanet", q, k, v, layer("deltanet", negative_eigenvalues=n)).beta for n in (False, True))
    assert_close(whole, 2 * half)
    assert (whole < 2).all()


@pytest.mark.parametrize("slots", [1, 8, 24])
def test_gsa_is_softmax_over_its_slots(slots):
    """Token by token, as attention over M keys and values that are running means."""
    q, k, v = projections()
    place = layer("gsa", gate_temperature=1, slots=slots)
    output, state = STRUCTURES["gsa"].operator(*made("gsa", q, k, v, place))
    alpha = pooled(k, slots).sigmoid()[..., None]
    keys = values = torch.zeros(2, 2, slots, 8)
    for t in range(q.shape[1]):
        keys = alpha[:, t] * keys + (1 - alpha[:, t]) * softmax(k)[:, t, :, None]
        values = alpha[:, t] * values + (1 - alpha[:, t]) * v[:, t, :, None]
        read = torch.nn.functional.scaled_dot_product_attention(softmax(q)[:, t].unflatten(1, (2, 3)), keys, values)
        assert_close(output[:, t], read.flatten(1, 2))
    assert_close(state, torch.cat([keys, values], dim=-1))


def test_kronecker_does_not_care_for_the_scale_of_queries_and_keys():
    q, k, v = projections()
    one, other = (made("kronecker", s * q, s * k, v) for s in (1, 100))
    assert_close(one.q, other.q)
    assert_close(one.k, other.k)
    assert one.k.shape[-1] == 2 * 45
    elsewhere = made("kronecker", q, k, v, layer("kronecker", 2))
    assert not torch.allclose(one.k, elsewhere.k)


@pytest.mark.parametrize("setting", [{"negative_eigenvalues": True}, {"decay_schedule": "alibi"}, {"slots": 8}])
def test_settings_of_other_structures_are_refused(setting):
    with pytest.raises(LinearizeError, match=next(iter(setting))):
        convert(tiny(), structure="gla", **setting)
