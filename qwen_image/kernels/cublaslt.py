"""cuBLASLt's matrix products with GELU or its gradient in their epilogue, which PyTorch does not expose, by ctypes.

The constants, structures and argument lists are those of CUDA's header cublasLt.h; what they mean:
https://docs.nvidia.com/cuda/cublas/#cublasltmatmul. GELU there is the tanh approximation, computed in float32 from the
product before it is rounded. cuBLASLt counts columns first: a row-major [rows, columns] is its [columns, rows], so the
weight comes first in its products and the output's columns are its m.
"""

import ctypes
import threading
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

COMPUTE_32F, REAL_32F, REAL_16BF = 68, 0, 14  # cublasComputeType_t, cudaDataType_t
# cublasLtMatmulDescAttributes_t
TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, BIAS_POINTER = 3, 4, 7, 8
AUX_POINTER, AUX_LEADING_DIMENSION, AUX_TYPE, BIAS_TYPE = 11, 12, 22, 26
# cublasLtEpilogue_t; "aux" is the product before GELU: written by one, read by the other
GELU_AUX_BIAS, DGELU = 164, 192
MAX_WORKSPACE, MIN_ALIGNMENTS = 1, (5, 6, 7, 8)  # cublasLtMatmulPreferenceAttributes_t; of A, B, C and D

WORKSPACE_LIMIT = 32 << 20  # bytes: what NVIDIA advises for Hopper, and as much as PyTorch gives cuBLAS there
ALIGNMENT = 256  # bytes: what cuBLASLt takes for granted, and asks of its workspace; PyTorch's allocator gives 512

_SIGNATURES: dict[str, list[Any]] = {  # all return a cublasStatus_t; pointers would be cut to 32 bits without these
    "cublasLtCreate": [c_void_p],
    "cublasLtMatmulDescCreate": [c_void_p, c_int, c_int],
    "cublasLtMatmulDescSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatrixLayoutCreate": [c_void_p, c_int, c_uint64, c_uint64, c_int64],
    "cublasLtMatmulPreferenceCreate": [c_void_p],
    "cublasLtMatmulPreferenceSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatmulPreferenceDestroy": [c_void_p],
    "cublasLtMatmulAlgoGetHeuristic": [*[c_void_p] * 7, c_int, c_void_p, c_void_p],
    "cublasLtMatmul": [*[c_void_p] * 14, c_size_t, c_void_p],
}


class _Choice(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class _Product(NamedTuple):
    """What a plan is made for: an output [rows, columns], summed over `inner`."""

    device: int
    rows: int
    columns: int
    inner: int
    epilogue: int
    alignment: int  # bytes, of all addresses


class _Plan(NamedTuple):
    descriptor: c_void_p
    weight: c_void_p  # this and the next two: layouts
    x: c_void_p
    output: c_void_p
    choice: _Choice


# Plans are kept for good: one takes about a kilobyte of the host's memory, and a run has as many as its batches have
# different numbers of rows. Threads share them, and ctypes lets others run during a call: hence the lock.
_plans: dict[_Product, _Plan] = {}
_lock = threading.Lock()


@cache
def library() -> ctypes.CDLL | None:
    """The libcublasLt of the CUDA version that this PyTorch was built for, or None; PyTorch has loaded it as a rule."""
    if torch.version.cuda is None:  # built for the CPU, or for AMD
        return None
    name = f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}"
    packages = find_spec("nvidia")
    folders = [] if packages is None else packages.submodule_search_locations or []
    candidates = [name, *(str(file) for folder in folders for file in sorted(Path(folder).rglob(name)))]
    for candidate in candidates:
        try:
            found = ctypes.CDLL(candidate)
            for function, arguments in _SIGNATURES.items():
                getattr(found, function).argtypes = arguments
        except (OSError, AttributeError):  # not there; not what it should be
            continue
        return found
    return None


def product_with_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], weight [N, K], bias [N], bf16 → gelu(y) and y = x·weightᵀ + bias, both [M, N] in bf16.

    All contiguous, at multiples of 16 bytes; K and N multiples of 8. Raises RuntimeError when cuBLASLt refuses.
    """
    y, gelu = (x.new_empty((x.shape[0], weight.shape[0])) for _ in range(2))
    _multiply(GELU_AUX_BIAS, x, weight, gelu, {AUX_POINTER: y, BIAS_POINTER: bias})
    return gelu, y


def product_with_gelu_gradient(gradient: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """gradient [M, K], weight [K, N], y [M, N], bf16 → (gradient·weight)·gelu'(y) [M, N]; the rest as above."""
    output = torch.empty_like(y)
    _multiply(DGELU, gradient, weight, output, {AUX_POINTER: y})
    return output


def _multiply(
    epilogue: int, x: torch.Tensor, weight: torch.Tensor, output: torch.Tensor, others: dict[int, torch.Tensor]
) -> None:
    """`others`: what the epilogue reads and writes, by the descriptor's attribute."""
    tensors = x, weight, output, *others.values()
    assert all(each.is_contiguous() and each.dtype == torch.bfloat16 and each.device == x.device for each in tensors)
    addresses = ALIGNMENT
    for each in tensors:
        addresses |= each.data_ptr()
    alignment = addresses & -addresses  # the largest power of two in all of them, at most ALIGNMENT
    (rows, inner), columns = x.shape, output.shape[1]
    product = _Product(x.get_device(), rows, columns, inner, epilogue, alignment)
    pointers = {attribute: c_void_p(each.data_ptr()) for attribute, each in others.items()}
    with torch.cuda.device(x.device), _lock:
        plan = _plans.get(product)
        if plan is None:
            plan = _plans[product] = _make_plan(product, pointers)
        _set(product, "cublasLtMatmulDescSetAttribute", plan.descriptor, pointers)
        # Of the caching allocator, which knows the stream and whether a CUDA graph is captured: free when we return.
        workspace = torch.empty(max(plan.choice.workspace_bytes, ALIGNMENT), dtype=torch.uint8, device=x.device)
        operands = weight.data_ptr(), plan.weight, x.data_ptr(), plan.x
        outputs = [output.data_ptr(), plan.output] * 2  # C, of which there is none since β is 0, and D
        algorithm = byref(plan.choice)  # its first field
        stream = torch.cuda.current_stream(x.device).cuda_stream
        scaled = byref(c_float(1)), *operands, byref(c_float(0)), *outputs
        rest = algorithm, workspace.data_ptr(), workspace.numel(), stream
        _call(product, "cublasLtMatmul", _handle(product.device), plan.descriptor, *scaled, *rest)


def _make_plan(product: _Product, pointers: dict[int, c_void_p]) -> _Plan:
    """Ask cuBLASLt's heuristics for the algorithm. `pointers` only say that there is something: any call's will do."""
    _, rows, columns, inner, epilogue, alignment = product
    transposed = epilogue == GELU_AUX_BIAS
    descriptor = _create(product, "cublasLtMatmulDescCreate", COMPUTE_32F, REAL_32F)
    settings: dict[int, Any] = {TRANSPOSE_A: c_int(transposed), TRANSPOSE_B: c_int(0), EPILOGUE: c_int(epilogue)}
    settings |= {AUX_LEADING_DIMENSION: c_int64(columns), AUX_TYPE: c_int(REAL_16BF)}
    if BIAS_POINTER in pointers:
        settings[BIAS_TYPE] = c_int(REAL_16BF)
    _set(product, "cublasLtMatmulDescSetAttribute", descriptor, settings | pointers)
    weight, x, output = (
        _create(product, "cublasLtMatrixLayoutCreate", REAL_16BF, height, width, height)
        for height, width in ((inner, columns) if transposed else (columns, inner), (inner, rows), (columns, rows))
    )
    preference = _create(product, "cublasLtMatmulPreferenceCreate")
    limits: dict[int, Any] = {MAX_WORKSPACE: c_size_t(WORKSPACE_LIMIT)}
    if alignment < ALIGNMENT:
        limits |= dict.fromkeys(MIN_ALIGNMENTS, ctypes.c_uint32(alignment))
    _set(product, "cublasLtMatmulPreferenceSetAttribute", preference, limits)
    choice, found = _Choice(), c_int(0)
    layouts = weight, x, output, output
    asked = _handle(product.device), descriptor, *layouts, preference, 1, byref(choice), byref(found)
    _call(product, "cublasLtMatmulAlgoGetHeuristic", *asked)
    _call(product, "cublasLtMatmulPreferenceDestroy", preference)
    if found.value < 1 or choice.state:
        raise RuntimeError(f"cuBLASLt has no algorithm for {product} (status {choice.state})")
    return _Plan(descriptor, weight, x, output, choice)


@cache
def _handle(device: int) -> c_void_p:
    """For the current device, which must be `device`."""
    return _create(f"device {device}", "cublasLtCreate")


def _create(what: object, function: str, *arguments: Any) -> c_void_p:
    made = c_void_p()
    _call(what, function, byref(made), *arguments)
    return made


def _set(product: _Product, function: str, target: c_void_p, attributes: dict[int, Any]) -> None:
    for attribute, value in attributes.items():
        _call(product, function, target, attribute, byref(value), ctypes.sizeof(value))


def _call(what: object, function: str, *arguments: Any) -> None:
    status = getattr(library(), function)(*arguments)
    if status:
        raise RuntimeError(f"{function} failed with status {status} for {what}")
