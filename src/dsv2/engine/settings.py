"""The engine's settings, checked before anything is loaded: their names, kinds and ranges, as far as no model is needed."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from dsv2.errors import ConfigError, did_you_mean

Backend = Literal["auto", "native", "torch"]
CacheKind = Literal["auto", "fp32", "bf16", "8", "6"]
_WHOLE = ("max_batch", "max_len", "threads")
_SECONDS_OR_GB = ("cache_gb", "disk_cache_gb", "max_step_s")
_MAY_BE_NONE = ("max_len", "threads", "cache_gb")
_CHOICES = {"cache": get_args(CacheKind), "backend": get_args(Backend)}


def require_settings(settings: Mapping[str, Any], known: frozenset[str]) -> None:
    """Check settings of ``Engine``.

    Args:
        settings: those that were given.
        known: names of all.

    Raises:
        ConfigError: a name is unknown, or a value is of the wrong kind or out of range for any model.
    """
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(f"the engine has no setting {name!r}", hint=did_you_mean(name, known))
        if value is None and name in _MAY_BE_NONE:
            continue
        if name in _WHOLE and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} = {value!r} is not a whole number of at least 1")
        if name in _SECONDS_OR_GB and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf):
            raise ConfigError(f"{name} = {value!r} is not a finite number > 0")
        if name in _CHOICES and str(value) not in _CHOICES[name]:
            raise ConfigError(f"{name} = {value!r} is not one of: {', '.join(_CHOICES[name])}")
