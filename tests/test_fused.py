"""Models with the fused kernels, which the interpreter runs on a CPU, against the same models without them."""

import pytest
import torch
from tiny import assert_close, ids, logits, tiny
from transformers import DynamicCache

from linearize import convert, mixer
from linearize.ops import gated_delta, liger

pytest.importorskip("triton", reason="the kernels are Triton's")
if torch.cuda.is_available():
    pytest.skip("the kernels' fp32 is the interpreter's", allow_module_level=True)
import interpreted  # noqa: F401

SETTINGS = {"mixing_weight": 0.4, "sinks": 3}
calls: list[tuple] = []  # of the operator
windows: list[tuple] = []  # of the window's kernel


@pytest.fixture
def fused(monkeypatch):
    """Switches the kernels on, and counts their calls."""
    run = liger.fused

    def count(*arguments):
        calls.append(arguments)
        return run(*arguments)

    def switch() -> None:
        calls.clear()
        monkeypatch.setattr(liger, "why_not_fused", lambda *_: None)
        monkeypatch.setattr(liger, "fused", count)

    return switch


def model(structure: str, family: str = "llama", **settings):
    return convert(tiny(family, head_dim=16), structure=structure, layers="0,1", **SETTINGS | settings).eval()


@pytest.mark.parametrize("structure", ["gla", "gated_retention", "mamba2", "lightning", "deltanet", "gated_deltanet"])
@torch.no_grad()
def test_a_model_gives_the_same(structure, fused):
    converted = model(structure)
    packed = torch.cat([torch.arange(40), torch.arange(35)])[None]
    mask = (torch.arange(75) >= 9).long()[None]
    given = [{}, {"position_ids": packed}, {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}]
    expected = [logits(converted, ids(1, 75), use_cache=False, **kwargs) for kwargs in given]
    fused()
    for kwargs, truth in zip(given, expected, strict=True):
        assert_close(logits(converted, ids(1, 75), use_cache=False, **kwargs)[:, 9:], truth[:, 9:])
    assert len(calls) == 6


@pytest.mark.parametrize("structure", ["deltanet", "gated_deltanet"])
def test_branches_with_kernels_of_their_own_give_the_same(structure, monkeypatch):
    """Layers that no kernel serves whole: learned gates, readouts, mixing by what is read."""
    settings = {"mixing": "data_dependent", "gate_source": "learned", "feature_map": "none", "readout": "gated"}
    settings |= {"negative_eigenvalues": True}
    positions = torch.cat([torch.arange(40), torch.arange(35)])[None]
    monkeypatch.setattr(gated_delta, "why_not_fused", lambda *_: None)
    monkeypatch.setattr(liger, "why_not_windowed", lambda *_: None)
    found, used = [], []
    for module, name in ((gated_delta, "fused"), (liger, "windowed")):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, run=run, name=name: used.append(name) or run(*given))
    for dtype in (None, torch.float32):
        for module in (gated_delta, mixer):
            monkeypatch.setattr(module, "kernel_dtype", lambda _, dtype=dtype: dtype)
        converted = model(structure, **settings)
        for name, parameter in converted.named_parameters():  # what starts at 0 would hide what it is multiplied with
            if "recurrence" in name or "mixing" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
        result = converted(ids(1, 75), labels=ids(1, 75, seed=1), position_ids=positions, use_cache=False)
        result.loss.backward()
        gradients = {name: p.grad for name, p in converted.named_parameters() if "attn" in name}
        found.append({"logits": result.logits.detach()} | gradients)
    assert used == ["windowed", "fused"] * 2  # of three layers, one stays as it is
    for name, expected in found[0].items():
        assert_close(found[1][name], expected, 1e-4)


@pytest.fixture
def by_kernels(fused, monkeypatch):
    """All that a GPU takes kernels for, in fp32; counts the calls of the window's kernel, too."""
    run = liger.windowed

    def count(*arguments):
        windows.append(arguments)
        return run(*arguments)

    def switch() -> None:
        fused()
        windows.clear()
        for module in (gated_delta, liger):
            monkeypatch.setattr(module, "why_not_fused", lambda *_: None)
        monkeypatch.setattr(liger, "why_not_windowed", lambda *_: None)
        monkeypatch.setattr(liger, "windowed", count)
        for module in (gated_delta, mixer):
            monkeypatch.setattr(module, "kernel_dtype", lambda _: torch.float32)

    return switch


@pytest.mark.parametrize(
    ("settings", "operators", "alone"),
    [
        ({"structure": "lightning", "window": 20, "sinks": 0}, 8, 6),
        ({"structure": "gated_deltanet"}, 6, 4),
        ({"structure": "gated_deltanet", "gate_source": "learned", "feature_map": "none", "readout": "rms"}, 0, 6),
        ({"structure": "none", "rope": "none"}, 0, 6),
    ],
)
@torch.no_grad()
def test_a_prompt_goes_on_by_kernels(settings, operators, alone, by_kernels):
    """From where the sinks have left the window, which is 64 tokens but for one; before, by operations."""
    converted = model(**settings)
    expected = logits(converted, ids(2, 180), use_cache=False)
    by_kernels()
    cache = DynamicCache(config=converted.config)
    parts = [logits(converted, part, past_key_values=cache) for part in ids(2, 180).split([40, 30, 70, 1, 39], dim=1)]
    assert_close(torch.cat(parts, dim=1), expected)
    assert (len(calls), len(windows)) == (operators, alone)


@pytest.mark.filterwarnings("ignore:padding behind tokens of its row")
@pytest.mark.parametrize("settings", [{"structure": "gla"}, {"structure": "gated_deltanet", "behind": True}])
@torch.no_grad()
def test_padding_within_a_prompt(settings, by_kernels):
    """By operations: kernels would begin another document behind it."""
    converted, mask = model(**settings), torch.ones(1, 90, dtype=torch.long)
    mask[0, 60] = 0
    given = {"attention_mask": mask, "position_ids": mask.cumsum(1) - 1, "use_cache": False}
    expected = logits(converted, ids(1, 90), **given)
    by_kernels()
    real = mask[0].bool()
    assert_close(logits(converted, ids(1, 90), **given)[:, real], expected[:, real])


@torch.no_grad()
def test_states_in_fp16_and_sinks_by_layer_go_on(by_kernels):
    """By operations and by kernels from the same caches."""
    converted, found = model("gla", sinks=[3, 1, 0], state_dtype="float16"), []
    for switch in (lambda: None, by_kernels):
        switch()
        cache = DynamicCache(config=converted.config)
        parts = [logits(converted, part, past_key_values=cache) for part in ids(2, 150).split([80, 70], dim=1)]
        assert cache.layers[0].state.dtype == torch.float16
        found.append(torch.cat(parts, dim=1))
    assert (len(calls), len(windows)) == (4, 2)
    assert_close(*found, 1e-4)


@torch.no_grad()
def test_a_padded_prompt_goes_on_by_kernels_once_windows_are_full(by_kernels):
    """The first row's window is not full."""
    converted = model("gla")
    mask = (torch.arange(180) >= torch.tensor([[45], [0]])).long()
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    expected = logits(converted, ids(2, 180), use_cache=False, **given)
    by_kernels()
    cache, parts = DynamicCache(config=converted.config), []
    for begin, end in ((0, 100), (100, 120), (120, 180)):
        now = {"attention_mask": mask[:, :end], "position_ids": given["position_ids"][:, begin:end]}
        parts.append(logits(converted, ids(2, 180)[:, begin:end], past_key_values=cache, **now))
    assert_close(torch.cat(parts, dim=1)[:, 45:], expected[:, 45:])
    assert (len(calls), len(windows)) == (4, 2)


@pytest.mark.parametrize("settings", [{"structure": "gla"}, {"structure": "deltanet", "negative_eigenvalues": True}])
def test_gradients_are_the_same(settings, fused):
    found = []
    for switch in (lambda: None, fused):
        switch()
        converted = model(**settings)
        converted(ids(1, 70), labels=ids(1, 70, seed=1)).loss.backward()
        found.append({name: p.grad for name, p in converted.named_parameters() if "attn" in name})
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, 1e-4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"readout": "rms"}, "no kernel for readout rms"),
        ({"structure": "gsa"}, "no kernel for structure gsa with mixing per_head"),
        ({"mixing": "data_dependent"}, "no kernel for structure gla with mixing data_dependent"),
        ({"family": "gemma2"}, "no kernel for the attention of Gemma2Attention"),
        ({"family": "glm4"}, "no kernel for the attention of Glm4Attention"),
    ],
)
def test_layers_without_a_kernel_say_why(settings, reason):
    converted = model(**{"structure": "gla", **settings})
    assert converted.model.layers[0].self_attn.kernel == reason


@torch.no_grad()
def test_norms_that_leave_queries_and_keys_in_fp32_within_autocast(monkeypatch):
    """As Qwen3's do: the kernels take them in the values' dtype."""
    given = []
    monkeypatch.setattr(mixer, "kernel_dtype", lambda x: torch.bfloat16)
    monkeypatch.setattr(liger, "why_not_fused", lambda q, k, v, *_: given.append((q.dtype, k.dtype, v.dtype)) or "no")
    monkeypatch.setattr(liger, "why_not_windowed", lambda *_: "no")
    monkeypatch.setattr(liger, "warn_once", lambda _: None)
    converted = model("gla", "qwen3")
    with torch.autocast("cpu", torch.bfloat16):
        logits(converted, ids(1, 20), use_cache=False)
    assert given == 2 * [(torch.bfloat16,) * 3]
