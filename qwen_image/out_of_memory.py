"""Which errors say that memory ran out. Imports no torch: `--help` would wait seconds for it."""

# What plain RuntimeErrors say: CUDA (when a graph is instantiated), cuBLAS and cuDNN, the CPU's allocator.
WORDS = ("out of memory", "alloc_failed", "can't allocate memory")


def memory_ran_out(error: RuntimeError) -> bool:
    """Whether `error` is torch.OutOfMemoryError, or says the same in words."""
    text = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or any(words in text for words in WORDS)
