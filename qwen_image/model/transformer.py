"""Qwen-Image's MMDiT: 60 double-stream blocks over text and image tokens. Parameter names are the checkpoint's.

A multimodal diffusion transformer (MMDiT; Esser et al. 2024) is a transformer over two streams, text and image, each with its
own projections, norms and MLP; they meet in one attention over both. The noise level enters as adaptive layer norm: shifts,
scales and gates of each block (qwen_image/model/modulation_table.py). The output is the velocity of each image token.

Source of the architecture: diffusers 0.42.1 `QwenImageTransformer2DModel`. Differences, none of which changes the output
beyond rounding: rotary positions use real numbers, the mask exists only where padding exists, modulation is computed outside
the blocks (so that a table can replace it), and the last block skips the text half that nobody reads.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qwen_image.model.conditioning import Grids, source_tokens, target_tokens
from qwen_image.model.joint_attention import JointAttention
from qwen_image.model.joint_layout import can_invert
from qwen_image.model.layers import NORM_EPS, FeedForward, Linear, RMSNorm, TimestepEmbedder
from qwen_image.model.modulation_table import Modulation, ModulationTable
from qwen_image.model.rotary import Rotary, rotary_table
from qwen_image.model.sizes import TransformerConfig

# Modules of the last block that only feed its unused text output: they get no gradient, so LoRA must not target them.
DEAD_IN_LAST_BLOCK = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")


class BlockSource(Protocol):
    """Brings the weights of `blocks` to the device, where they don't stay (qwen_image/streaming/block_stream.py)."""

    blocks: list[int]

    def enter(self, block: int) -> None:
        """Before block number `block` computes."""

    def leave(self, block: int, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """After it: its outputs, to be used from here on."""

    def pause(self) -> AbstractContextManager[None]:
        """Inside, nothing is brought: for passes whose numbers don't matter."""


class Block(nn.Module):
    """A double-stream block: modulated joint attention, then a modulated MLP per stream, both gated and residual."""

    def __init__(self, dim: int, heads: int, is_last: bool):
        super().__init__()
        self.is_last = is_last
        self.img_mod = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.txt_mod = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=NORM_EPS)
        self.attn = JointAttention(dim, heads)
        self.img_mlp = FeedForward(dim)
        self.txt_mlp = FeedForward(dim)

    def modulation(self, temb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """temb [B,D] → (image, text) modulation, each [B, 1, 6·D]: shift, scale, gate of attention, then of the MLP."""
        return self.img_mod(temb).unsqueeze(1), self.txt_mod(temb).unsqueeze(1)

    def forward(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        image_modulation: torch.Tensor,
        text_modulation: torch.Tensor,
        rotary: Rotary,
        keep: torch.Tensor | None,
        dense_padding: bool,
        clean: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """image [B,S,D] and text [B,T,D] → the same shapes.

        Modulations are [B, 1, 6·D]. With `clean` (bool [1, S, 1]) the image's is [B, 2, 6·D]: its second row is that of the
        tokens where `clean` is True.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            by_token(part, clean) for part in image_modulation.chunk(6, dim=-1)
        )
        text_shift1, text_scale1, text_gate1, text_shift2, text_scale2, text_gate2 = text_modulation.chunk(6, dim=-1)
        image_attended, text_attended = self.attn(
            self.norm(image) * (1 + scale1) + shift1,
            self.norm(text) * (1 + text_scale1) + text_shift1,
            rotary,
            keep,
            dense_padding,
            image_only=self.is_last,
        )
        image = image + gate1 * image_attended
        image = image + gate2 * self.img_mlp(self.norm(image) * (1 + scale2) + shift2)
        if text_attended is not None:
            text = text + text_gate1 * text_attended
            text = text + text_gate2 * self.txt_mlp(self.norm(text) * (1 + text_scale2) + text_shift2)
        return image, text


def by_token(rows: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    """Each token's row: of rows [B, 2, D] the second where `second` [1, S, 1] is True; without it the only one [B, 1, D]."""
    return rows if second is None else torch.where(second, rows[:, 1:], rows[:, :1])


class QwenImageTransformer(nn.Module):
    """The denoiser: packed latents, prompt embeddings and a noise level in, velocity out.

    Attributes:
        checkpointed_blocks: so many leading blocks recompute their activations in the backward pass.
        saved_inputs: a context around each of these that decides where their inputs wait for the backward pass.
        draws_random_numbers: in its blocks (a LoRA's dropout), which recomputing must draw again.
        dense_padding: padded text costs no attention mask (qwen_image/model/attention.py); off, it costs a masked kernel.
        block_stream: brings the weights of blocks that don't stay on the device; None: all do.
        modulation_table: stands in for the modulation layers (qwen_image/model/modulation_table.py); None: they are computed.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim = config.inner_dim
        self.config = config
        self.checkpointed_blocks = 0
        self.saved_inputs: Callable[[], AbstractContextManager[object]] = nullcontext
        self.draws_random_numbers = False
        self.dynamic_lengths = False
        self.dense_padding = True
        self.block_stream: BlockSource | None = None
        self.modulation_table: ModulationTable | None = None
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(dim)})
        self.txt_norm = RMSNorm(config.joint_attention_dim)
        self.img_in = Linear(config.in_channels, dim)
        self.txt_in = Linear(config.joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            Block(dim, config.num_attention_heads, is_last=i == config.num_layers - 1) for i in range(config.num_layers)
        )
        self.norm_out = nn.ModuleDict({"linear": Linear(dim, 2 * dim)})
        self.proj_out = Linear(dim, config.patch_size**2 * config.out_channels)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        prompt_mask: torch.Tensor | None,
        grids: Grids,
        modulation: Modulation | None = None,
    ) -> torch.Tensor:
        """Packed latents [B, S, 64], timestep [B], embeddings [B,T,3584], mask [B,T] or None → velocity of the first image.

        `grids`: rows and columns of the images that the S tokens are of (model/conditioning.py); the velocity has the first
        one's tokens. `modulation`: what `look_up(timestep)` returned, if that was done before.
        """
        image = self.img_in(latents)
        text = self.txt_in(self.txt_norm(prompt_embeds))
        if modulation is None:
            modulation = self.look_up(timestep)
        if modulation is None:
            temb = self.embed_time(timestep.to(image.device, image.dtype))
        final = self.final_modulation(temb) if modulation is None else modulation.final
        clean = source_tokens(grids, image.device) if self.config.zero_cond_t else None
        rotary = rotary_table(text.shape[1], grids, self.config.axes_dims_rope, image.device)
        keep = None if prompt_mask is None else F.pad(prompt_mask, (0, image.shape[1]), value=True)
        for index, block in enumerate(self.transformer_blocks):
            assert isinstance(block, Block)
            if self.block_stream is not None:
                self.block_stream.enter(index)
            if self.dynamic_lengths:
                mark_lengths(image, text, rotary, keep, clean)
            of_image, of_text = block.modulation(temb) if modulation is None else modulation.blocks[index].unbind()
            if clean is not None:
                of_clean = self.clean_modulation(index, block)
                of_image = torch.cat([of_image, of_clean.expand(len(of_image), -1, -1)], 1)
            arguments = (image, text, of_image, of_text, rotary, keep, self.dense_padding, clean)
            if index < self.checkpointed_blocks and torch.is_grad_enabled():
                with self.saved_inputs():
                    image, text = checkpoint(
                        block, *arguments, use_reentrant=False, preserve_rng_state=self.draws_random_numbers
                    )
            else:
                image, text = block(*arguments)
            if self.block_stream is not None:
                image, text = self.block_stream.leave(index, image, text)
        if len(grids) > 1:
            image = image[:, : target_tokens(grids)]
        scale, shift = final.chunk(2, dim=-1)
        image = F.layer_norm(image, image.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift
        return self.proj_out(image)

    def look_up(self, timestep: torch.Tensor) -> Modulation | None:
        """Time inputs [B], best on the CPU → the modulation from the table; None without one."""
        return None if self.modulation_table is None else self.modulation_table.lookup(timestep)

    def embed_time(self, timestep: torch.Tensor) -> torch.Tensor:
        """Time inputs [B] in the model's dtype → [B, D], what all modulation is computed from."""
        return self.time_text_embed["timestep_embedder"](timestep)

    def final_modulation(self, temb: torch.Tensor) -> torch.Tensor:
        """temb [B, D] → scale and shift before the output layer, [B, 1, 2·D]."""
        return self.norm_out["linear"](F.silu(temb)).unsqueeze(1)

    def clean_modulation(self, index: int, block: Block) -> torch.Tensor:
        """The image modulation [1, 1, 6·D] of clean tokens: that of the time input 0, from the table where there is one."""
        if self.modulation_table is not None:
            assert self.modulation_table.clean is not None, "a table for zero_cond_t holds the time input 0"
            return self.modulation_table.clean[index]
        return block.img_mod(self.embed_time(self.proj_out.bias.new_zeros(1))).unsqueeze(1)

    def compile_blocks(self, dynamic: bool = False) -> None:
        """Compile the blocks' forward, one graph for all and one for the last: once for each shape, or for all `dynamic`ally.

        Dynamic means the numbers of text and image tokens; the batch size is compiled for.
        """
        self.dynamic_lengths = dynamic
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        # Else graphs with the operators of qwen_image/kernels/ are compiled anew in each process: their gradients are
        # autograd.Functions, of which the cache's key knows the code.
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        # Norms over 3,072 channels in one pass where that is faster: left to itself the compiler reads such rows twice.
        # It finds out by timing, so not where every bit must be the same in another process. torch 2.11 fails when it
        # looks for what another process found out about a kernel that it has from a cache.
        os.environ.setdefault("TORCHINDUCTOR_DISABLE_MULTI_KERNEL_CACHE", "1")
        options = {"triton.multi_kernel": int(not torch.are_deterministic_algorithms_enabled())}
        for block in self.transformer_blocks:
            assert isinstance(block, Block)
            block.attn.invertible_norms = can_invert(block.attn.norms())
            block.compile(dynamic=None if dynamic else False, options=options)


def mark_lengths(
    image: torch.Tensor, text: torch.Tensor, rotary: Rotary, keep: torch.Tensor | None, clean: torch.Tensor | None
) -> None:
    """Tell the compiler that the number of tokens varies: it then compiles for all of them at once."""
    for tensor in (image, text, *rotary, *(each for each in (keep, clean) if each is not None)):
        torch._dynamo.maybe_mark_dynamic(tensor, 1)
