"""ZeRO as the DeepSpeed JSON asks for it: read once, typed, and the complete settings for `deepspeed.initialize`."""

from dataclasses import dataclass, field
from typing import Any

from train.config.deepspeed_json import is_about_parameters, load_deepspeed_config, warnings
from train.config.train_config import TrainConfig


@dataclass(frozen=True)
class ZeroPlan:
    """What the ranks divide among themselves, and where it lies (ZeRO: arXiv:1910.02054).

    Attributes:
        stage: 2 divides gradients and optimizer state, 3 the frozen weights too.
        offload_param: the partitions of the frozen weights lie in host memory (`pin_param`: pinned), not on the GPU.
        offload_optimizer: master weights, moments and AdamW's arithmetic are the CPU's.
        hpz: so many ranks hold the weights once more among them, so that gathering stays inside a node; 1: none do.
        reduce_bucket_size: elements reduced at once; `overlap_comm` has two such buffers.
        casts_buffers: the JSON gives buffers a type of its own.
        settings: the whole JSON with every number filled in.
    """

    stage: int
    offload_param: bool = False
    pin_param: bool = False
    offload_optimizer: bool = False
    hpz: int = 1
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    contiguous_gradients: bool = True
    casts_buffers: bool = False
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def partitioned(self) -> bool:
        """Whether the ranks divide the frozen weights too, or these lie in host memory (train/base_model/base_home.py)."""
        return self.stage == 3

    @property
    def engine_settings(self) -> dict[str, Any]:
        """What DeepSpeed is given: stage 2 over the LoRA. The frozen base is not DeepSpeed's to divide."""
        block = {k: v for k, v in self.settings["zero_optimization"].items() if not is_about_parameters(k)}
        return self.settings | {"zero_optimization": block | {"stage": 2}}

    def warnings(self) -> list[str]:
        """For people: what in the JSON costs speed or precision without need."""
        return [f"warning: {line}" for line in warnings(self.settings)]

    @classmethod
    def from_config(cls, config: TrainConfig, world: int) -> "ZeroPlan":
        """Of the JSON that `config.deepspeed` names, for `world` ranks. Raises what `load_deepspeed_config` raises."""
        return cls.from_settings(load_deepspeed_config(config.deepspeed, config, world))

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "ZeroPlan":
        """Of checked settings; what they leave out is as DeepSpeed's own model of the block says."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        block = settings["zero_optimization"]
        zero = DeepSpeedZeroConfig(**block)
        param, optimizer = zero.offload_param, zero.offload_optimizer
        return cls(
            stage=int(zero.stage),
            offload_param=param is not None and param.device == "cpu",
            pin_param=bool((block.get("offload_param") or {}).get("pin_memory")),  # page-locked if asked for alone
            offload_optimizer=optimizer is not None and optimizer.device == "cpu",
            hpz=zero.zero_hpz_partition_size,
            reduce_bucket_size=zero.reduce_bucket_size,
            overlap_comm=bool(zero.overlap_comm),
            contiguous_gradients=zero.contiguous_gradients,
            casts_buffers="buffer_dtype" in settings.get("data_types", {}),
            settings=settings,
        )
