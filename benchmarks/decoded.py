"""Does a model lose anything where it decodes? Late losses token by token from a cache, by the dtype of its states.

    python -m benchmarks.decoded CHECKPOINT --heldout ARTICLES --out docs/results/decoded.json

Held-out losses are computed from whole texts, where states stay in fp32; a cache rounds them after each token. Both
here for the same sequences, in fp32 but for the states.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.results import provenance, write
from linearize import checkpoint
from linearize.checkpoint import unwrapped
from linearize.convert import mixers
from linearize.evaluate.late_gap import texts
from linearize.train.documents import heldout_documents
from linearize.train.sequences import tokenize

DTYPES = ("float32", "float16", "bfloat16")


def main() -> None:
    """One row for each length and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--heldout", default="wiki")
    parser.add_argument("--articles", help="of the held-out text, like 1-20")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    documents, rows = heldout_documents(arguments.heldout, arguments.articles), []
    whole: dict[int, Tensor] = {}
    for dtype in DTYPES:
        model, tokenizer = loaded(arguments.checkpoint, dtype)
        tokens = tokenize(list(documents.values()), tokenizer)
        for length in arguments.lengths:
            if (found := texts(tokens, list(documents), length, arguments.sequences)) is None:
                continue
            if length not in whole:
                whole[length] = read(model, found.ids)
            rows.append(row(length, dtype, whole[length], decoded(model, found.ids)))
            print(rows[-1], flush=True)
            write(arguments.out, {**provenance(), "checkpoint": arguments.checkpoint.name, "rows": rows})


def loaded(folder: Path, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """The checkpoint in `folder` with states of that dtype, on a GPU if there is one."""
    student, tokenizer = checkpoint.load(folder)
    model = unwrapped(student)
    for mixer in mixers(model):
        mixer.config = mixer.config.model_copy(update={"state_dtype": dtype})
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def row(length: int, dtype: str, whole: Float[Tensor, "N T-1"], stepped: Float[Tensor, "N T-1"]) -> dict[str, Any]:
    """Mean losses in nats at positions `length / 2` and up, and the standard error of their difference."""
    late, ours = (loss[:, length // 2 :].double().mean(1).numpy() for loss in (whole, stepped))
    error = float(np.std(ours - late, ddof=1) / len(late) ** 0.5) if len(late) > 1 else None
    means = {"whole": float(late.mean()), "decoded": float(ours.mean()), "standard_error": error}
    return {"length": length, "sequences": len(late), "state_dtype": dtype, **means}


@torch.no_grad()
def read(model: PreTrainedModel, ids: Int[Tensor, "N T"]) -> Float[Tensor, "N T-1"]:
    """Losses of whole texts."""
    return torch.cat(
        [losses(model(x[None], use_cache=False).logits[:, :-1], x[None, 1:]) for x in ids.to(model.device)]
    )


@torch.no_grad()
def decoded(model: PreTrainedModel, ids: Int[Tensor, "N T"]) -> Float[Tensor, "N T-1"]:
    """Losses of the same texts, one token after the other."""
    cache, found = DynamicCache(config=model.config), []
    ids = ids.to(model.device)
    for t in tqdm(range(ids.shape[1] - 1), desc="decoding", delay=1, leave=False):
        logits = model(ids[:, t : t + 1], past_key_values=cache).logits
        found.append(losses(logits, ids[:, t + 1 : t + 2]))
    return torch.cat(found, dim=1)


def losses(logits: Float[Tensor, "N T V"], targets: Int[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """On the CPU, in nats."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).cpu()


if __name__ == "__main__":
    main()
