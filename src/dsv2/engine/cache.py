"""Storage of the latent cache: blocks of 64 tokens, every layer's entries, in 32, 16, 8 or 6 bits (section 2.1.2; spec 2.3, 2.4, 7).

Which block belongs to whom is ``blocks.py``'s to know; what an entry holds is written in kernels/formats.py.
"""

from dsv2.errors import ConfigError
from dsv2.kernels.cpu.library import BLOCK_LEN, CacheFormat
from dsv2.kernels.cpu.memory import HugeMemory
from dsv2.model.config import ModelConfig

_SLACK = 256  # bytes behind the last entry: kernels read whole registers
NAMES = {"fp32": CacheFormat.F32, "bf16": CacheFormat.BF16, "8": CacheFormat.EIGHT, "6": CacheFormat.SIX}


def entry_bytes(config: ModelConfig, kind: CacheFormat) -> int:
    """Return the bytes of one token in one layer.

    With d_c numbers of a latent and d_h^R of a key: 4 (d_c + d_h^R) in fp32, 2 (d_c + d_h^R) in bf16; 8 bits: d_c + 2 ceil(d_c / 64) +
    2 d_h^R; 6 bits: d_c / 2 + 3 d_c / 32 + 2 d_h^R, which is 6.000 bits a number for V2's 512 + 64 (spec 7).

    Raises:
        ConfigError: 6 bits take latents in groups of 32.
    """
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    if kind == CacheFormat.F32:
        return 4 * (latent + rope)
    if kind == CacheFormat.BF16:
        return 2 * (latent + rope)
    if kind == CacheFormat.EIGHT:
        return latent + 2 * -(-latent // 64) + 2 * rope
    if latent % 32:
        raise ConfigError(f"a 6-bit cache needs kv_lora_rank in multiples of 32; this model's is {latent}", hint="use the 8-bit cache")
    return latent // 2 + 3 * latent // 32 + 2 * rope


class LatentStore:
    """One block of memory [layers, blocks, 64, bytes of an entry].

    Args:
        config: of the model.
        kind: bits of an entry.
        num_blocks: tokens it holds, in units of 64.
    """

    def __init__(self, config: ModelConfig, kind: CacheFormat, num_blocks: int) -> None:
        self.format, self.entry_bytes, self.num_blocks = kind, entry_bytes(config, kind), num_blocks
        self.num_layers = config.num_hidden_layers
        self.memory = HugeMemory(self.num_layers * num_blocks * BLOCK_LEN * self.entry_bytes + _SLACK)

    def views(self, block: int) -> list[memoryview]:
        """Return a block's memory, layer by layer, writable."""
        size, memory = BLOCK_LEN * self.entry_bytes, self.memory.view()
        starts = [(layer * self.num_blocks + block) * size for layer in range(self.num_layers)]
        return [memory[start : start + size] for start in starts]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes over all layers."""
        return self.num_layers * self.entry_bytes
