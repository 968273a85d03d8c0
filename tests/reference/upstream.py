"""transformers' DeepseekV2 as a second oracle: built from a config.json dict and a per-expert state dict."""

from collections.abc import Mapping, Sequence
from copy import deepcopy  # transformers writes into the rope_scaling it is given
from typing import Any

import torch
from torch import Tensor

from .tiny import stack_experts


def upstream_model(state: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """An eager DeepseekV2ForCausalLM holding `state`; every one of its parameters must be in it and the other way round."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    upstream_config = DeepseekV2Config(**deepcopy(dict(config)), attn_implementation="eager", experts_implementation="eager")
    model = DeepseekV2ForCausalLM(upstream_config).to(dtype)
    weights = {name: tensor.detach().to(dtype) for name, tensor in stack_experts(state, config).items()}
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)
    return model.eval()


@torch.no_grad()
def upstream_logits(model: Any, tokens: Sequence[Sequence[int]], positions: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Logits [B, T, V], causal in the order of the sequence.

    The mask of ones keeps transformers from reading a jump in the positions as the border of a packed document.
    """
    ids = torch.tensor(tokens)
    position_ids = torch.tensor(positions) if positions is not None else None
    logits: Tensor = model(ids, position_ids=position_ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits
