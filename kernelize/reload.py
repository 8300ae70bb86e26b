"""What a checkpoint answers to one fixed question. Run as a program, it asks where kernelize cannot be imported.

    python -I reload.py FOLDER ANSWER.safetensors '{"trust_remote_code": true, "threads": 1}'

It must work alone: it imports torch, transformers and safetensors, and nothing of this package.
"""

from __future__ import annotations

import json
import sys
from importlib.abc import MetaPathFinder

PROMPT_TOKENS = 192
GREEDY_TOKENS = 8


class Blocked(MetaPathFinder):
    """Makes kernelize look uninstalled, however it was installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "kernelize":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def answer(model) -> dict:
    """Logits of a seeded random prompt, and the greedy continuation that the cache produces.

    Returns {"logits": [T, V] float32, "tokens": [N] int64}, on the CPU. The prompt is longer than a usual window,
    so that memory and slots are read; it is shorter where the model's positions end earlier.
    """
    import torch

    limit = model.config.get_text_config().max_position_embeddings
    length = max(1, min(PROMPT_TOKENS, limit - GREEDY_TOKENS))
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    prompt = torch.randint(vocabulary, (1, length), generator=generator).to(model.device)  # [1, T]
    mask = torch.ones_like(prompt)
    with torch.no_grad():
        logits = model(input_ids=prompt, attention_mask=mask).logits[0]  # [T, V]
        tokens = model.generate(
            prompt, attention_mask=mask, do_sample=False, max_new_tokens=GREEDY_TOKENS, pad_token_id=0
        )
    return {"logits": logits.float().cpu().contiguous(), "tokens": tokens[0, length:].cpu().contiguous()}


def main(folder: str, target: str, options: str) -> None:
    sys.meta_path.insert(0, Blocked())
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    settings = json.loads(options)
    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=settings["trust_remote_code"], use_safetensors=True,
        subfolder=settings.get("subfolder", ""),
    )  # fmt: skip
    save_file(answer(model.eval()), target)


if __name__ == "__main__":
    main(*sys.argv[1:])
