"""A model id becomes a local folder through huggingface_hub: weights and tokenizer only, never code or pickles."""

import re
from pathlib import Path

from dsv2.errors import CheckpointError
from dsv2.machine import require_disk
from dsv2.progress import console

_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = (
    "config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
_FILES = {"allow_patterns": list(_WANTED), "ignore_patterns": ["*/*"]}  # the repository's own folder alone


def is_model_id(target: str | Path) -> bool:
    """Tell whether a target is meant for the hub: ``owner/name``, where neither it nor a folder ``owner`` exists here."""
    return _MODEL_ID.fullmatch(str(target)) is not None and not Path(target).exists() and not Path(target).parent.is_dir()


def fetch_model(model_id: str, *, revision: str | None = None) -> Path:
    """Download a model, or find it in the hub's cache, and return its folder; an interrupted download goes on where it stopped.

    Args:
        model_id: ``owner/name``.
        revision: branch, tag or commit; None: the newest.

    Raises:
        CheckpointError: there is no such model, no access to it, or no connection and no copy in the cache.
        DataError: too little disk is free.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    console().print(f"{model_id}: looking it up on the hub, or in its cache {constants.HF_HUB_CACHE}", markup=False, soft_wrap=True)
    try:
        if not constants.is_offline_mode():
            files = snapshot_download(model_id, revision=revision, dry_run=True, **_FILES)
            require_disk(sum(file.file_size or 0 for file in files if file.will_download), Path(constants.HF_HUB_CACHE))
        return Path(snapshot_download(model_id, revision=revision, **_FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{model_id} could not be fetched: {str(error).strip().splitlines()[0]}",
            hint="give a local folder, or check the name, the connection and, for a private model, `hf auth login`",
        ) from error
