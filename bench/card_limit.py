"""What a card can do at best, and what a training step cannot avoid doing: their ratio is a benchmark's share of the peak."""

import time

import torch


def measured_peak(device: torch.device) -> float:
    """TFLOP/s of an 8192³ bf16 product on random data."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - start) / 1e12


def needed_tflop(layers: int, size: tuple[int, int, int], text: int) -> float:
    """Arithmetic of a step that nothing can avoid: linear layers forward and input gradient, attention forward and back.

    `size`: height, width in pixels, batch.
    """
    height, width, batch = size
    image = height * width // 256
    linear = layers * 2 * (4 * 3072**2 + 2 * 4 * 3072**2) * (image + text)
    attention = layers * 4 * (image + text) ** 2 * 3072
    return batch * (2 * linear + 3.5 * attention) / 1e12
