"""A transformer for ZeRO-3 that no rank ever holds whole: built without memory, and each rank reads only its own part.

DeepSpeed's own way (zero.Init around the constructor, then GatheredParameters) gathers every tensor whole on every rank,
fills it on one and scatters it again. Here a rank reads the bytes of its partition straight from the safetensors files to
where they stay, so that loading needs no communication, each byte is read once over all ranks (with hpZ: once a node
more), and the peak is the rank's share.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qwen_image.loading.model_files import ModelFiles
from qwen_image.loading.pinned_memory import Arena
from qwen_image.loading.safetensors_ranges import RangeReader, StoredTensor
from qwen_image.loading.weights import empty_transformer, match_weights, replace_parameter
from qwen_image.model.transformer import QwenImageTransformer
from train.config.zero_plan import ZeroPlan


def load_partitioned(
    files: ModelFiles, dtype: torch.dtype, zero: ZeroPlan, progress: bool = False
) -> QwenImageTransformer:
    """The frozen transformer, partitioned over all ranks as `zero` says, ready for LoRA and the engine.

    Partitions lie on the GPU, or in host memory (pinned if asked) with offload_param. A collective at its end, so that
    all ranks raise what one of them met: ValueError for another model's or damaged files, MemoryError, OSError.
    """
    problem: Exception | None = None
    transformer: QwenImageTransformer | None = None
    try:
        transformer = _load(files, dtype, zero, progress)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        problem = error
    raise_together(problem)
    assert transformer is not None
    return transformer.eval()


def raise_together(problem: Exception | None) -> None:
    """Raise the first rank's problem on every rank; a collective. One rank alone would leave the others waiting."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, None if problem is None else (type(problem).__name__, str(problem)))
    if problem is not None:
        raise problem
    for rank, other in enumerate(problems):
        if other is not None:
            kind = {"FileNotFoundError": FileNotFoundError, "OSError": OSError}.get(other[0], ValueError)
            raise kind(f"{other[1]} (on rank {rank})")


def _load(files: ModelFiles, dtype: torch.dtype, zero: ZeroPlan, progress: bool) -> QwenImageTransformer:
    import deepspeed

    transformer = empty_transformer(files)
    stored = match_weights(transformer, files["transformer"].weights)
    # Not entered as a context: that would patch torch's constructors. Only its conversion of a parameter is used.
    init = deepspeed.zero.Init(config_dict_or_path=zero.settings, dtype=dtype)
    world = dist.get_world_size()
    home = Arena(
        device=torch.device("cpu") if zero.offload_param else init.local_device,
        dtype=dtype,
        pinned=zero.pin_param and init.local_device.type == "cuda",
        remaining=sum(share_of(tensor.numel, world) for tensor in stored.values()),
    )
    groups = [world] + ([init.num_ranks_in_param_group] if init.zero_param_process_group is not None else [])
    total = sum(share_of(t.numel, group) * t.dtype.itemsize for t in stored.values() for group in groups)
    with RangeReader(progress, total) as reader:
        for name, tensor in stored.items():
            # No memory behind it: a partition that already exists is never copied from the whole.
            whole = torch.empty((), dtype=dtype, device=init.local_device).expand(tensor.shape)
            parameter = nn.Parameter(whole, requires_grad=False)
            replace_parameter(transformer, name, parameter)
            partition(init, parameter, home)
            for part, rank in parts_of(init, parameter):
                read_part(reader, tensor, part, rank)
    return transformer


def share_of(numel: int, world: int) -> int:
    """Elements of one rank's partition, padding included."""
    return -(-numel // world)


def partition(init: Any, parameter: Any, home: Arena) -> None:
    """Make a DeepSpeed parameter of `parameter` whose partition, still unfilled, lies in `home`.

    What DeepSpeed 0.19.8 does in Init._partition_param when it partitions for the first time, without a whole tensor.
    """
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    init._convert_to_deepspeed_param(parameter)
    size = share_of(parameter.ds_numel, dist.get_world_size(parameter.ds_process_group))
    part: Any = home.take(size)
    part.ds_numel = size
    part.status = PartitionedParamStatus.AVAILABLE
    part.final_location = None
    parameter.ds_tensor = part
    parameter.ds_numel_aligned = size * dist.get_world_size(parameter.ds_process_group)
    if init.zero_param_process_group is not None:  # hpZ copies its second partition from the whole tensor
        parameter.data = torch.empty(parameter.ds_shape, dtype=parameter.dtype, device=init.local_device)
    parameter.partition()
    assert parameter.ds_tensor is part and parameter.numel() == 0, "DeepSpeed partitions in another way than 0.19.8 did"


def parts_of(init: Any, parameter: Any) -> list[tuple[torch.Tensor, int]]:
    """This rank's partitions with its number among those who share: the first, and hpZ's second inside the node."""
    parts = [(parameter.ds_tensor, parameter.ds_zero_partition_rank)]
    if parameter.ds_secondary_tensor is not None:
        parts.append((parameter.ds_secondary_tensor, init.rank_in_group))
    return parts


def read_part(reader: RangeReader, stored: StoredTensor, part: torch.Tensor, rank: int) -> None:
    """Fill partition number `rank` of a tensor; padding at the end is zero."""
    first = rank * part.numel()
    real = max(0, min(part.numel(), stored.numel - first))
    part[real:].zero_()
    if real:
        reader.read(stored, part[:real], first)
