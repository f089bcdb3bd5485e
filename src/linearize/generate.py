"""Text from a checkpoint, printed as it comes."""

import math
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TextStreamer

from linearize.checkpoint import load
from linearize.errors import LinearizeError


def generate(checkpoint: Path, prompt: str, chat: bool, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Stream a continuation of `prompt` to stdout; the cache is of one size however long prompt and answer are, but for
    what stays softmax attention. On a GPU in bf16, which the kernels are for, else in fp32.

    Raises LinearizeError for an empty prompt, and for `chat` where the tokenizer has no chat template.
    """
    if not prompt.strip():
        raise LinearizeError(f"the prompt {prompt!r} is empty; give some text")
    if not 0 <= temperature < math.inf:
        raise LinearizeError(f"temperature is {temperature}; valid: 0, which is greedy, and up")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(checkpoint, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    if chat and tokenizer.chat_template is None:
        raise LinearizeError(f"the tokenizer of {checkpoint} has no chat template; leave --chat out")
    if chat:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(seed)
    whole: PreTrainedModel = model.merge_and_unload() if isinstance(model, PeftModel) else model
    whole.to(device).generate(
        **inputs.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True),
    )
