"""What is special to a family: its logits, its windows, its experts, its adapters, and what its row must not forget."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_cache import in_parts
from tiny import FAMILIES, assert_close, ids, logits, relative, tiny
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel

from linearize import LinearizeError, convert, families, revert
from linearize.convert import attention_of, decoder, mixers
from linearize.evaluate.perplexity import score
from linearize.families import FAMILIES as ROWS
from linearize.families import Head, as_they_are, family_of, rotation, separate
from linearize.ops.liger import rotate
from linearize.recipe import LoraSettings
from linearize.train.distill import distill_loss
from linearize.train.trainer import with_lora

LENGTH = 24
TEACHER = {"sinks": 0, "mixing": "fixed", "mixing_weight": 0}  # with the window of a layer, what it was
SLIDING = {"sliding_window": 6}
LATER = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
WINDOWS = {  # families with windows of their own: settings, layers that slide
    "gemma2": (SLIDING, "0,2"),
    "gemma3_text": (SLIDING, "0,2"),
    "gpt_oss": (SLIDING, "0,2"),
    "mistral": (SLIDING, "0-2"),
    "mixtral": (SLIDING, "0-2"),
    "olmo3": (SLIDING, "0,2"),
    "phi3": (SLIDING, "0-2"),
    "qwen2": (LATER, "1,2"),
    "qwen3": (LATER, "1,2"),
    "smollm3": (LATER, "1"),
    "starcoder2": (SLIDING, "0-2"),
}
MIXED = [name for name, (_, layers) in WINDOWS.items() if layers != "0-2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_the_model_s_logits(family):
    model = tiny(family)
    with torch.no_grad():
        ours = Head(model)(decoder(model)(ids(2, LENGTH)).last_hidden_state)
    assert torch.equal(ours, logits(model, ids(2, LENGTH)))
    assert {id(p) for p in Head(model).parameters()} == {id(p) for p in model.get_output_embeddings().parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_model_s_logits(family):
    teacher, student, tokens = tiny(family), convert(tiny(family), window=4, mixing_weight=0.4), ids(1, LENGTH)
    batch = {"input_ids": tokens, "position_ids": torch.arange(LENGTH)[None], "targets": F.pad(tokens[:, 1:], (0, 1))}
    batch["targets"][:, -1] = -100
    log_p = student(tokens).logits[0, :-1].double().log_softmax(-1)
    log_t = logits(teacher, tokens)[0, :-1].double().log_softmax(-1)
    divergence = (log_t.exp() * (log_t - log_p)).sum(-1).mean()
    expected = 0.3 * divergence + 0.7 * F.nll_loss(log_p, tokens[0, 1:])
    loss = distill_loss(student, teacher, batch, 0.3)
    assert_close(loss.detach(), expected.detach())
    weights = [attention_of(student, 1).get_submodule(family_of(student.config).projections[0]).weight]
    weights.append(student.get_output_embeddings().weight)
    for ours, theirs in zip(*(torch.autograd.grad(x, weights) for x in (loss, expected)), strict=True):
        assert_close(ours, theirs)
    assert_close(score(teacher, tokens).loss[0], F.nll_loss(log_t, tokens[0, 1:], reduction="none"))


@pytest.mark.parametrize("family", WINDOWS)
def test_a_layer_s_own_window_is_ours_to_the_token(family):
    settings, sliding = WINDOWS[family]
    expected = logits(tiny(family, **settings), ids(2, LENGTH))
    assert relative(logits(tiny(family, **settings | {"sliding_window": 7}), ids(2, LENGTH)), expected) > 1e-3
    model = convert(tiny(family, **settings), layers=sliding, window=6, **TEACHER)
    assert_close(logits(model, ids(2, LENGTH)), expected)
    assert_close(in_parts(model, ids(2, LENGTH), [9, 1, 1, 5, *[1] * 8])[0], expected)
    with pytest.raises(LinearizeError, match=f"layer {sliding[0]} has a sliding window of 6 .* less than window 7"):
        convert(tiny(family, **settings), window=7)


@pytest.mark.parametrize("family", MIXED)
def test_a_full_layer_may_have_a_larger_window_than_a_sliding_one(family):
    settings, sliding = WINDOWS[family]
    full = ",".join(str(i) for i in range(3) if str(i) not in sliding)
    model = convert(tiny(family, **settings), layers=full, window=LENGTH, **TEACHER)
    expected = logits(tiny(family, **settings), ids(2, LENGTH))
    assert_close(logits(model, ids(2, LENGTH)), expected)
    assert_close(in_parts(model, ids(2, LENGTH), [9, *[1] * 15])[0], expected)


@pytest.mark.parametrize(
    "layers", [{"softmax_every": 2}, {"softmax_every": 3}, {"layers": "1"}, {"layers": "2"}], ids=str
)
@pytest.mark.parametrize("family", WINDOWS)
def test_layers_with_windows_beside_converted_ones(family, layers):
    """Decoding goes on past every window, with padding and without."""
    model = convert(tiny(family, **WINDOWS[family][0]), window=4, sinks=2, mixing_weight=0.4, **layers)
    full = logits(model, ids(2, LENGTH), use_cache=False)
    for sizes in ([1] * LENGTH, [9, 1, 1, 5, *[1] * 8], [3, 12, *[1] * 9]):
        assert_close(in_parts(model, ids(2, LENGTH), sizes)[0], full)
    mask = (torch.arange(LENGTH) >= torch.tensor([0, 8])[:, None]).long()
    padded = in_parts(model, ids(2, LENGTH), [9, 1, 1, 5, *[1] * 8], mask)[0]
    assert_close(padded[0], full[0])
    assert_close(padded[1, 8:], logits(model, ids(2, LENGTH)[1:, 8:])[0])


@pytest.mark.parametrize("layers", ["0", "1", "0,2"])
@pytest.mark.parametrize("family", MIXED)
def test_a_cache_that_knows_of_no_windows(family, layers):
    model = convert(tiny(family, **WINDOWS[family][0]), window=4, sinks=2, mixing_weight=0.4, layers=layers)
    cache, parts = DynamicCache(), ids(2, LENGTH).split([9, 1, 1, 5, *[1] * 8], 1)
    ours = torch.cat([logits(model, part, past_key_values=cache) for part in parts], 1)
    assert_close(ours, logits(model, ids(2, LENGTH), use_cache=False))


@pytest.mark.parametrize("layers", [{"softmax_every": 2}, {"layers": "1"}], ids=str)
@pytest.mark.parametrize("family", WINDOWS)
def test_generation_past_every_window(family, layers):
    model = convert(tiny(family, **WINDOWS[family][0]), window=4, sinks=2, mixing_weight=0.4, **layers)
    given = {"max_new_tokens": 15, "do_sample": False, "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    cached, plain = (model.generate(ids(2, 5), use_cache=use_cache, **given) for use_cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("family", "forgotten"),
    [
        ("cohere", {"logits": as_they_are}),
        ("cohere", {"project": separate}),
        ("gemma2", {"logits": as_they_are}),
        ("gemma2", {"softcap": None}),
        ("gemma3_text", {"logits": as_they_are}),
        ("gemma3_text", {"softcap": "attn_logit_softcapping"}),
        ("gpt_oss", {"null_logits": None}),
        ("granite", {"logits": as_they_are}),
        ("phi", {"project": separate}),
    ],
    ids=lambda given: given if isinstance(given, str) else next(iter(given)),
)
def test_what_a_row_forgets_is_noticed(family, forgotten, monkeypatch):
    """The settings of the tiny models are such that each of them is felt."""
    model = tiny(family)
    expected = logits(model, ids(2, LENGTH))
    monkeypatch.setitem(families.FAMILIES, family, families.FAMILIES[family]._replace(**forgotten))
    convert(model, window=LENGTH, **TEACHER)
    with torch.no_grad():
        ours = Head(model)(decoder(model)(ids(2, LENGTH)).last_hidden_state)
    assert relative(ours, expected) > 1e-2


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma3_text", {"query_pre_attn_scalar": 16}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 3}),  # another rotation
        ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
        ("granite", {"attention_multiplier": 8**-0.5}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"embedding_multiplier": 1.0}),
        ("olmo3", {"layer_types": ["full_attention"] * 3}),
        ("phi", {"partial_rotary_factor": 1.0}),
    ],
    ids=str,
)
def test_what_a_config_says_is_felt_and_kept(family, setting):
    expected = logits(tiny(family, **setting), ids(2, LENGTH))
    assert relative(logits(tiny(family), ids(2, LENGTH)), expected) > 1e-2
    model = convert(tiny(family, **setting), window=LENGTH, **TEACHER)
    assert_close(logits(model, ids(2, LENGTH)), expected)


@pytest.mark.parametrize(
    ("family", "setting"), [("cohere", {"use_qk_norm": False}), ("phi", {"qk_layernorm": False})], ids=str
)
def test_norms_that_a_family_may_do_without(family, setting):
    expected = logits(tiny(family, **setting), ids(2, LENGTH))
    assert_close(logits(convert(tiny(family, **setting), window=LENGTH, **TEACHER), ids(2, LENGTH)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_on_the_family_s_projections(family, tmp_path):
    model = with_lora(convert(tiny(family), window=4, mixing_weight=0.4), LoraSettings(r=2))
    names = {name.split(".self_attn.")[1] for name, p in model.named_parameters() if p.requires_grad}
    adapters = {f"{name}.lora_{x}.default.weight" for name in family_of(model.config).projections for x in "AB"}
    assert names == adapters | {"mixing.modules_to_save.default.weight"}
    before = logits(model, ids(2, LENGTH))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # an adapter's A has no gradient before its B is something
        model(ids(2, LENGTH), labels=ids(2, LENGTH)).loss.backward()
        silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert silent == []
        optimizer.step()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    trained = logits(model, ids(2, LENGTH))
    assert relative(trained, before) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    beside = PeftModel.from_pretrained(convert(tiny(family), window=4, mixing_weight=0.4), tmp_path / "adapter")
    assert_close(logits(beside, ids(2, LENGTH)), trained)
    merged = model.merge_and_unload()
    assert_close(logits(merged, ids(2, LENGTH)), trained)
    merged.save_pretrained(tmp_path)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids(2, LENGTH)), logits(merged, ids(2, LENGTH))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_was_loaded_goes_the_whole_way(family, tmp_path):
    """Loading may change names and layouts of weights, and saving change them back."""
    model = tiny(family)
    expected = logits(model, ids(2, LENGTH))
    model.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    convert(loaded, window=4, mixing_weight=0.4)
    converted = logits(loaded, ids(2, LENGTH))
    loaded.save_pretrained(tmp_path / "converted")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again, ids(2, LENGTH)), converted)
    assert torch.equal(logits(revert(again), ids(2, LENGTH)), expected)


def test_mixtral_s_experts_load_from_the_layout_of_its_checkpoints(tmp_path):
    """One matrix for each expert and projection, as on the hub."""
    model = tiny("mixtral")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    saved = load_file(file)
    experts = "model.layers.1.block_sparse_moe.experts"
    assert {f"{experts}.2.{name}.weight" for name in ("w1", "w2", "w3")} <= saved.keys()
    saved[f"{experts}.2.w1.weight"] += 1
    save_file(saved, file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    fused = loaded.get_submodule("model.layers.1.mlp.experts")
    gate, up = fused.gate_up_proj[2].chunk(2)
    for name, weight in (("w1", gate), ("w3", up), ("w2", fused.down_proj[2])):
        assert torch.equal(weight, saved[f"{experts}.2.{name}.weight"])
    expected = logits(loaded, ids(2, LENGTH))
    assert relative(expected, logits(model, ids(2, LENGTH))) > 1e-3
    convert(loaded, window=LENGTH, **TEACHER).save_pretrained(tmp_path / "converted")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not any(info.values())
    assert_close(logits(again, ids(2, LENGTH)), expected)
    assert torch.equal(again.get_submodule("model.layers.1.mlp.experts").gate_up_proj, fused.gate_up_proj)


def test_null_logits_that_a_checkpoint_lacks_are_initialised(tmp_path):
    convert(tiny("gpt_oss"), window=4, layers="0,2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    saved = {name: x for name, x in load_file(file).items() if not name.endswith("2.self_attn.sinks")}
    save_file(saved, file, metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.layers.2.self_attn.sinks"}
    assert torch.equal(mixers(model)[0].sinks, saved["model.layers.0.self_attn.sinks"])
    assert 0 < mixers(model)[1].sinks.std() < 3 * model.config.initializer_range


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_attention_to_what_comes_after_is_refused(family):
    with pytest.raises(LinearizeError, match=r"layer 0 sees the tokens after .*valid: causal attention"):
        convert(tiny(family, use_bidirectional_attention=True), window=4)


def test_a_family_without_a_row_is_told_what_one_needs():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=7, n_positions=8))
    for refuse in (convert, Head):
        with pytest.raises(
            LinearizeError, match=r"'gpt2' in families.py; a row needs .*docs/families.md.*valid: cohere"
        ):
            refuse(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_say_how_channels_are_paired(family):
    q, angles = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 4)
    cos, sin = (torch.cat([x, x], dim=-1) for x in (angles.cos(), angles.sin()))
    try:
        rotated, _ = rotation(ROWS[family], family)(q, q, cos, sin, unsqueeze_dim=2)
    except RuntimeError:  # it takes a cos for each pair
        rotated = torch.zeros_like(q)
    assert torch.allclose(rotated, rotate(q, cos, sin), atol=1e-6) == ROWS[family].rotates_halves
