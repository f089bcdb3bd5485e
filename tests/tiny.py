"""Random models that take milliseconds, a tokenizer for them, and how results are compared."""

import copy
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from linearize.families import FAMILIES as ROWS
from linearize.results import Curve

FAMILIES = tuple(ROWS)
VOCAB = 97
SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
OWN = {  # settings in which a family differs from the others; whatever scales or bounds must be felt
    "cohere": {"use_qk_norm": True, "logit_scale": 0.3, "attention_bias": True},
    "gemma": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
        "attention_bias": True,
        **SLIDING,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
        "rope_parameters": TWO_ROPES,
        **SLIDING,
    },
    "glm4": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "rope_parameters": YARN,
        **SLIDING,
    },
    "granite": {
        "attention_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.5,
        "attention_bias": True,
    },
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "num_local_experts": 3},
    "olmo": {"clip_qkv": 0.7},
    "olmo3": {"rope_parameters": TWO_ROPES, "attention_bias": True, **SLIDING},
    "phi": {"qk_layernorm": True, "partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": None},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "starcoder2": {"sliding_window": None, "use_bias": True},
}
TOLERANCE = 1e-5


def tiny(model_type: str = "llama", **overrides) -> PreTrainedModel:
    """A random model in eval mode, in fp32, with weights large enough for attention to matter."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    settings |= OWN.get(model_type, {})
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **copy.deepcopy(settings | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():  # biases and norms start as constants
        if parameter.dim() == 1 or "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter.data, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    return model


def ids(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them padding."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens: Tensor, **kwargs) -> Tensor:
    return model(tokens, **kwargs).logits


def relative(output: Tensor, expected: Tensor) -> float:
    """‖output - expected‖ / ‖expected‖; not a number where one of the two is not."""
    output, expected = output.double(), expected.double()
    return ((output - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def assert_close(output: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert output.shape == expected.shape
    assert relative(output, expected) <= tolerance


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, within the vocabulary of `tiny`."""
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {c: i for i, c in enumerate(string.ascii_lowercase + " .,\n", 3)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def checkpoint(folder: Path, model_type: str = "llama", **overrides) -> Path:
    """A folder with a tiny model and its tokenizer, as transformers writes it."""
    tiny(model_type, eos_token_id=1, **overrides).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def text(characters: int, seed: int = 0) -> str:
    """Words drawn from a small set, so that there is something to learn."""
    words = ["the", "recurrent", "window", "sees", "every", "token", "of", "a", "long", "text", "and", "forgets", "it"]
    chosen = torch.randint(len(words), (characters // 3,), generator=torch.Generator().manual_seed(seed))
    return " ".join(words[i] for i in chosen)[:characters]


def timeless(curves: list[Curve]) -> list[Curve]:
    """Curves without the seconds that they took."""
    return [curve.model_copy(update={"seconds": 0.0}) for curve in curves]
