"""What a LoKr costs on one linear layer, forward and backward: the base alone, with PEFT's LoKr, with ours, with a LoRA.

    python bench/lokr_layer.py                                  # an MLP layer and an attention layer, 4,224 tokens, bf16
    python bench/lokr_layer.py --tokens 512 --dtype float32 --device cpu
    python bench/lokr_layer.py --compile                        # each under torch.compile

The layers are Qwen-Image's (3072 → 3072 and 3072 → 12288). Ways take turns; the least of `--turns` counts. Memory: what the
forward pass keeps for the backward pass besides the input, on the CPU too.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

SIZES = ((3072, 3072), (12288, 3072))
SPECS = ((32, -1), (16, 8), (10**6, 8))  # rank, factor


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, default=4224, help="rows of the input (default 4224: 1024² and 128 of text)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(argv)
    import torch

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, options.dtype)
    print("| out × in | rank, factor | way | parameters | ms | MiB kept |\n| --- | --- | --- | --- | --- | --- |")
    for outputs, inputs in SIZES:
        for rank, factor in SPECS:
            named = ways(outputs, inputs, rank, factor, device, dtype)
            measured = measure(named, options.tokens, options.turns, options.compile)
            for name, (seconds, kept) in measured.items():
                trained = sum(p.numel() for p in named[name].parameters() if p.requires_grad)
                cells = f"{outputs} × {inputs}", f"{rank}, {factor}", name, f"{trained:,}"
                print(f"| {' | '.join(cells)} | {1000 * seconds:.2f} | {kept / 2**20:.1f} |", flush=True)
    return 0


def ways(outputs: int, inputs: int, rank: int, factor: int, device: Any, dtype: Any) -> dict[str, Any]:
    """Layers by name: the frozen one, and with adapters of random weights around it."""
    import torch
    from peft import LoKrConfig
    from peft.tuners.lokr.layer import Linear as PeftLinear

    from train.lora.lokr_layer import LoKrLinear

    base = torch.nn.Linear(inputs, outputs, device=device, dtype=dtype).requires_grad_(False)
    config = LoKrConfig(decompose_factor=factor)
    layers = {"base alone": base}
    for name, kind in (("PEFT's LoKr", PeftLinear), ("LoKr", LoKrLinear)):
        layers[name] = kind(base, "default", config, r=rank, alpha=rank).to(device, dtype)
    layers["LoRA of rank 32"] = plain_lora(base)
    for layer in layers.values():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
    return layers


def plain_lora(base: Any) -> Any:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    return Linear(base, "default", LoraConfig(r=32), r=32, lora_alpha=32)


def measure(layers: dict[str, Any], tokens: int, turns: int, compiles: bool) -> dict[str, tuple[float, int]]:
    """name → (seconds of forward and backward, bytes kept between them besides input and weights)."""
    import torch

    base = layers["base alone"]
    x = torch.randn(tokens, base.in_features, device=base.weight.device, dtype=base.weight.dtype, requires_grad=True)
    upstream = torch.randn(tokens, base.out_features, device=x.device, dtype=x.dtype)
    run = {name: torch.compile(layer) if compiles else layer for name, layer in layers.items()}
    kept = {name: kept_bytes(partial(run[name], x), x, layer) for name, layer in layers.items()}
    least = dict.fromkeys(layers, float("inf"))
    for turn in range(turns + 1):
        for name, layer in layers.items():
            wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
            seconds = timed(partial(step, run[name], x, wanted, upstream), x.device)
            if turn:  # the first one warms up
                least[name] = min(least[name], seconds)
    return {name: (least[name], kept[name]) for name in layers}


def step(layer: Any, x: Any, wanted: list[Any], upstream: Any) -> None:
    import torch

    torch.autograd.grad(layer(x), wanted, upstream)


def kept_bytes(forward: Callable[[], Any], x: Any, layer: Any) -> int:
    import torch

    found = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    for tensor in (x, *layer.parameters()):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(found.values())


def timed(work: Callable[[], Any], device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
