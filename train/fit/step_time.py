"""How long a step takes by where the base lies, in which precision, and how many blocks are recomputed: for choosing only.

Seconds of a step of 1024² at batch size 1 on one H100 (bench/LOG.md). On other cards all of these are larger; what is chosen
depends on their ratios.
"""

from train.fit.memory_plan import Setup

BF16, BF16_RECOMPUTED = 0.293, 0.418
FLOAT8, FLOAT8_RECOMPUTED = 0.217, 0.315
DECODED = 0.0019  # a block that becomes bf16 from int8, forwards and backwards
HOST_BYTES, NVLINK_BYTES = 54e9, 389e9  # a second: page-locked memory over PCIe 5, an all-gather over four cards
OVERLAP = 0.2  # of the shorter one of computing and fetching, what is not hidden behind the longer


def step_seconds(setup: Setup) -> float:
    """The estimate; encoders that work during training, and the optimizer on the CPU, are not in it."""
    base = setup.base
    share = setup.checkpointed_blocks / max(1, base.blocks)
    if base.float8:
        computing = FLOAT8 + share * (FLOAT8_RECOMPUTED - FLOAT8)
    else:
        computing = BF16 + share * (BF16_RECOMPUTED - BF16) + base.int8 * base.blocks * DECODED
    _, _, stored = base.block_bytes()
    moved = 2 * base.home.streamed(base.blocks) * stored
    fetching = 0.0
    if base.home.sharing > 1:
        fetching += moved / NVLINK_BYTES
    if base.home.host:
        fetching = max(fetching, moved / base.home.sharing / HOST_BYTES)
    return max(computing, fetching) + OVERLAP * min(computing, fetching)
