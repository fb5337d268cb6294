"""Prints, as JSON, which arguments of the layout's kernels torch's compiler takes for written; needs Triton, but no GPU."""

import json
from typing import Any

import torch
import triton
from torch._higher_order_ops import triton_kernel_wrap
from triton.backends.compiler import GPUTarget

from qwen_image.kernels import gelu_kernels, joint_kernels, low_rank_kernels

HOPPER = GPUTarget("cuda", 90, 32)
SIZES = {"HEADS": 4, "DIM": 32, "EPS": 1e-6, "GROUP": 4, "SAVE": True, "SAVED": True}
SIZES |= {"RANK": 16, "LANES": 16, "BLOCK": 32, "HEADS_HERE": 4, "text_tokens": 5, "image_tokens": 64, "scale": 0.5}
SIZES |= {"WIDTH": 48, "FIRST": 32, "SECOND": 16, "LARGEST": 448.0, "SMALLEST_SCALE": 1e-30}
FLOAT32 = {"cos", "sin", "scales", "of_image_factors", "of_text_factors"}


class NoGPU:
    """As much of a driver as finding out needs."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def written(kernel: Any, **flags: bool) -> list[str]:
    arguments: dict[str, Any] = {}
    for name in kernel.arg_names:
        dtype = torch.float32 if name in FLOAT32 else torch.bool if name == "keep" else torch.bfloat16
        arguments[name] = flags[name] if name in flags else SIZES.get(name, torch.empty(64, dtype=dtype))
    if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):  # torch 2.13
        accesses = triton_kernel_wrap.identify_accessed_tensors(kernel, arguments, {})
        return sorted(each.name for each in accesses.read_writes.writes)
    return sorted(triton_kernel_wrap.identify_mutated_tensors(kernel, arguments, {}))


def main() -> None:
    triton.runtime.driver.set_active(NoGPU())
    found = {}
    for room in (joint_kernels, low_rank_kernels):
        for name in ("forward_kernel", "backward_kernel"):
            for text_query in (True, False):
                for keep in (True, False):
                    key = f"{room.__name__.rpartition('.')[2]}.{name}"
                    found.setdefault(key, []).append(written(getattr(room, name), TEXT_QUERY=text_query, KEEP=keep))
    for name in ("gelu_kernel", "gelu_gradient_kernel"):
        found[f"gelu_kernels.{name}"] = [written(getattr(gelu_kernels, name))]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
