"""What DeepSpeed wraps: a module whose forward takes a batch and returns the loss."""

from functools import partial
from typing import cast

import torch
from torch import nn

from qwen_image.model.conditioning import Prompt, pack_latents, source_tokens, unpack_latents
from qwen_image.model.modulation_table import Modulation
from qwen_image.model.rotary import Rotary, rotary_table
from qwen_image.model.transformer import QwenImageTransformer
from qwen_image.pipeline import predict_velocity, time_input
from qwen_image.streaming.block_stream import BlockStream
from train.flow.masked_loss import mask_weights, masked_flow_matching_loss
from train.flow.objective import WeightingName, add_noise, flow_matching_loss, loss_weight, velocity_target
from train.step.cuda_graphs import Inputs, StepGraphs, few_blocks
from train.step.flat_parameter import FlatGradient, flatten

FIXED_INPUTS = 8  # latents, noise, σ, embeddings, mask, a modulation's two parts, and the mask of the loss


class FlowMatchingModule(nn.Module):
    """The transformer and its flow-matching loss, by inference's own `predict_velocity`.

    Attributes:
        flat: all trained matrices as one parameter, once `use_flat` was called; they are then views of it.
        graphs: replays CUDA graphs instead of launching kernel by kernel, when gradients are wanted; None: never.
        always_masked: graphs get a mask even when no text is padding, so that a shape has one pair of them, not two.
        mask_min_weight: of the loss where its mask is 0 (train/flow/masked_loss.py); None: losses have no masks.
    """

    def __init__(
        self,
        transformer: QwenImageTransformer,
        weighting: WeightingName,
        dtype: torch.dtype,
        mask_min_weight: float | None = None,
    ):
        super().__init__()
        self.transformer = transformer
        self.weighting = weighting
        self.dtype = dtype
        self.flat: nn.Parameter | None = None
        self.graphs: StepGraphs | None = None
        self.always_masked = False
        self.mask_min_weight = mask_min_weight

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        sigma: torch.Tensor,
        prompt: Prompt,
        loss_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """latents and noise [B, 16, 1, H/8, W/8], σ [B] on the CPU → each sample's weighted loss, float32 [B].

        `loss_mask`: uint8 [B, H/8, W/8], 255 where the loss counts in full; None: everywhere.
        """
        latents = latents.float()  # of whatever type they came: one shape, one pair of graphs
        modulation = self.transformer.look_up(time_input(sigma, self.dtype)) or (None, None)
        on_device = sigma.to(latents.device, non_blocking=True)
        mask = prompt.mask
        if mask is None and self.graphs is not None and self.always_masked:
            mask = torch.ones(prompt.embeds.shape[:2], dtype=torch.bool, device=latents.device)
        if self.mask_min_weight is None:
            loss_mask = None
        elif loss_mask is None:  # one kind of input, so that a shape has one pair of graphs
            loss_mask = torch.full((len(latents), *latents.shape[-2:]), 255, dtype=torch.uint8, device=latents.device)
        inputs = latents, noise, on_device, prompt.embeds, mask, *modulation, loss_mask, *prompt.sources
        if not torch.is_grad_enabled():
            return self.losses(inputs)
        if self.graphs is not None:
            return self.graphs(inputs)
        if self.flat is not None:
            return cast(torch.Tensor, FlatGradient.apply(partial(self.losses, inputs), self.matrices(), self.flat))
        return self.losses(inputs)

    @torch.no_grad()
    def velocity(self, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """What `forward` compares with its target, as latents: float32 [B, 16, 1, H/8, W/8]. Without a gradient."""
        modulation = self.transformer.look_up(time_input(sigma, self.dtype))
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        on_device = sigma.to(latents.device, non_blocking=True)
        noised = pack_latents(add_noise(latents, noise, on_device)).to(self.dtype)
        tokens = predict_velocity(self.transformer, noised, on_device, prompt, rows, columns, modulation)
        return unpack_latents(tokens.float(), rows, columns)

    def losses(self, inputs: Inputs) -> torch.Tensor:
        """The same from tensors on the device alone: what a graph can hold."""
        latents, noise, sigma, embeds, mask, blocks, final, loss_mask, *_ = inputs
        assert latents is not None and noise is not None and sigma is not None and embeds is not None
        prompt = Prompt(embeds, mask, sources_of(inputs))
        modulation = None if blocks is None or final is None else Modulation(blocks, final)
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        noised = pack_latents(add_noise(latents, noise, sigma)).to(self.dtype)
        prediction = predict_velocity(self.transformer, noised, sigma, prompt, rows, columns, modulation)
        target = pack_latents(velocity_target(latents, noise))
        weight = loss_weight(self.weighting, sigma)
        if loss_mask is None or self.mask_min_weight is None:
            return flow_matching_loss(prediction, target, weight)
        return masked_flow_matching_loss(prediction, target, weight, mask_weights(loss_mask, self.mask_min_weight))

    def matrices(self) -> list[nn.Parameter]:
        """The trained parameters as the transformer uses them."""
        return [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]

    def use_flat(self) -> nn.Parameter:
        """Let gradients arrive at one flat parameter, and return it. Call `link` when it has found its place."""
        self.flat = flatten(self.matrices())
        return self.flat

    def use_graphs(self, always_masked: bool = False) -> None:
        """Replay CUDA graphs from now on. The trained parameters must stay where they are."""
        self.always_masked = always_masked

        def positions(inputs: Inputs) -> tuple[Rotary, torch.Tensor | None]:
            latents, _, _, embeds, *_ = inputs
            assert latents is not None and embeds is not None
            grids = Prompt(embeds, None, sources_of(inputs)).grids(latents.shape[-2] // 2, latents.shape[-1] // 2)
            rotary = rotary_table(embeds.shape[1], grids, self.transformer.config.axes_dims_rope, latents.device)
            return rotary, source_tokens(grids, latents.device)

        source = self.transformer.block_stream
        assert source is None or isinstance(source, BlockStream)
        self.graphs = StepGraphs(
            self.transformer, self.flat, self.losses, partial(few_blocks, self.transformer), positions, source
        )


def sources_of(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The source images' latents among the inputs of `losses`: the last ones."""
    return tuple(each for each in inputs[FIXED_INPUTS:] if each is not None)
