"""The frozen policy that the KL holds the trained one to: weights in a mapped file, so that an idle reference takes no memory of its own.

RUN/reference-N.safetensors   the policy as it was after N steps
"""

import re
from pathlib import Path

import torch

from dsv2.checkpoint.source import map_tensors, save_tensors
from dsv2.errors import CheckpointError
from dsv2.files import atomic_file
from dsv2.model.transformer import Transformer

_FILE = re.compile(r"reference-(\d+)\.safetensors")


class Reference:
    """A policy of the past.

    Args:
        folder: of the run.
        policy: that is trained; gives the shape.
    """

    def __init__(self, folder: Path, policy: Transformer) -> None:
        self._folder, self._step = folder, -1
        with torch.device("meta"):
            self._model = Transformer(policy.config)
        self._model.frequencies = policy.frequencies  # no weight, so no file holds it

    def keep(self, policy: Transformer, step: int) -> None:
        """Write the policy as it is after ``step`` steps."""
        with atomic_file(self._file(step)) as new:
            save_tensors(new, {name: value.detach() for name, value in policy.state_dict().items()})

    def at(self, step: int) -> Transformer:
        """Return the policy that was kept at a step.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        if self._step != step:
            if not self._file(step).exists():
                raise CheckpointError(f"{self._file(step)} is missing", hint="begin the run again in another --out")
            self._model.load_state_dict(map_tensors(self._file(step)), assign=True)
            self._model.requires_grad_(False)
            self._step = step
        return self._model

    def remove_before(self, step: int) -> None:
        """Delete those of earlier steps."""
        for path in self._folder.iterdir():
            if (match := _FILE.fullmatch(path.name)) and int(match[1]) < step:
                path.unlink()

    def _file(self, step: int) -> Path:
        return self._folder / f"reference-{step}.safetensors"
