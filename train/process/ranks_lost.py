"""Does an error mean that another rank has ended while this one waited for it?"""

SIGNS = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
)


def rank_was_lost(error: RuntimeError) -> bool:
    """Whether gloo or NCCL says that its peer is gone; their errors have no class of their own."""
    return any(sign in str(error) for sign in SIGNS)
