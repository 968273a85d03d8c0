"""Rates of a machine: what a GPU computes, holds and moves in a second. ``recipes/hardware`` ships some, each with its source."""

from pydantic import Field, model_validator

from dsv2.config import Section, load_recipe


class Hardware(Section):
    """The rates of one kind of GPU, or of a CPU that takes its place, as its data sheet gives them."""

    name: str = Field(description="what tables call it")
    bf16_flops: float = Field(ge=1e6, le=1e18, description="dense bf16 matrix FLOP/s of one GPU")
    fp8_flops: float = Field(default=0.0, ge=0, le=1e18, description="dense fp8 matrix FLOP/s of one GPU; 0: it has no such units")
    memory_bytes: float = Field(ge=1e6, le=1e15, description="memory of one GPU, bytes")
    memory_bandwidth: float = Field(ge=1e3, le=1e18, description="bytes/s that one GPU reads from its memory")
    intra_bandwidth: float = Field(ge=1e3, le=1e18, description="bytes/s that one GPU sends to others of its node, one direction")
    inter_bandwidth: float = Field(ge=1e3, le=1e18, description="bytes/s that one GPU sends to other nodes, one direction")
    gpus_per_node: int = Field(default=8, gt=0, le=1_000_000, description="GPUs that the fast links join")
    price_per_hour: float = Field(default=0.0, ge=0, le=1e6, description="dollars for one GPU for one hour")

    @model_validator(mode="after")
    def _check(self) -> "Hardware":
        if 0 < self.fp8_flops < self.bf16_flops:
            raise ValueError(f"fp8_flops = {self.fp8_flops:g} is below bf16_flops = {self.bf16_flops:g}: leave it out where there is none")
        return self

    def matrix_flops(self, bits: int) -> float:
        """Return the FLOP/s of matrix products whose weights are stored with so many bits: fp8 at 8 bits where there is such a unit."""
        return self.fp8_flops if bits == 8 and self.fp8_flops else self.bf16_flops


def load_hardware(source: str) -> Hardware:
    """Read the rates of a machine by name (h800, h200, h100, a100, cpu) or from a TOML file of one's own.

    Args:
        source: a shipped name, in any case, or a path with a slash or ending in .toml.

    Returns:
        The rates.

    Raises:
        ConfigError: no such machine (the nearest name is given), or the file has a wrong or missing value.
    """
    named = source if "/" in source or source.endswith(".toml") else source.lower()
    return load_recipe(named, Hardware, folder="hardware")
