"""A VAE of the real class with hand-set weights: it keeps the colors of 8 × 8 pixels and paints them back smoothly.

With random weights a decoded image is noise and the demo's pictures would show nothing. Nothing is learned here either:
the residual branches are switched off, the strided convolutions average, the upsampling ones interpolate, and

    SiLU(a) − SiLU(−a) = a

makes the two non-linear output layers linear: every value travels with its negative. Before them stands a norm over the
channels, which large constant channels hold still (it would divide out the brightness).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLQwenImage

COLORS = 3
FEATURES = 5  # red, green, blue and the luminance's slopes to the right and downwards
HOLD = 16.0  # value of the constant channels; pixels lie in -1 … 1


def set_blur_weights(vae: AutoencoderKLQwenImage, generator: torch.Generator) -> None:
    """Overwrite the weights of `vae` (in place); `generator` draws how the five features mix in 16 latent channels.

    Needs a base width of at least 8: three colors, their negatives and two constants.
    """
    import torch

    _switch_off_residual_branches(vae)
    encoder, decoder = vae.encoder, vae.decoder
    mixing = torch.linalg.qr(torch.randn(vae.config.z_dim, FEATURES, generator=generator)).Q  # [16, 5], orthonormal

    _set_taps(encoder.conv_in, torch.eye(COLORS), _one_pixel(3))
    downs = [block.resample[1] for block in encoder.down_blocks if hasattr(block, "resample")]
    average = torch.zeros(3, 3)
    average[:2, :2] = 0.25
    for conv in downs[:-1]:
        _set_taps(conv, torch.eye(COLORS), average)
    last = downs[-1]
    _set_taps(last, torch.cat([torch.eye(COLORS), torch.zeros(2, COLORS)]), average)
    for feature, axis in ((3, 1), (4, 0)):
        slope = torch.zeros(3, 3)
        slope[:2, :2] = torch.tensor([0.5, -0.5]).view((1, 2) if axis else (2, 1))
        last.weight[feature, :COLORS] += slope / COLORS
    last.weight[FEATURES : 2 * FEATURES] = -last.weight[:FEATURES]
    last.bias[2 * FEATURES :] = HOLD
    scale = _undo_norm(encoder.norm_out, pairs=FEATURES)
    _set_taps(encoder.conv_out, torch.cat([mixing, -mixing], 1) * scale, _one_pixel(3))
    encoder.conv_out.bias[vae.config.z_dim :] = -10.0  # log-variance: the posterior is as good as a point
    _set_taps(vae.quant_conv, torch.eye(2 * vae.config.z_dim), _one_pixel(1))

    _set_taps(vae.post_quant_conv, torch.eye(vae.config.z_dim), _one_pixel(1))
    _set_taps(decoder.conv_in, mixing[:, :COLORS].T, _one_pixel(3))
    ups = [block.upsamplers[0].resample[1] for block in decoder.up_blocks if block.upsamplers is not None]
    tent = torch.tensor([0.25, 0.5, 0.25])
    for conv in ups:  # after nearest-neighbor upsampling, [¼ ½ ¼] is linear interpolation
        _set_taps(conv, torch.eye(COLORS), tent[:, None] * tent)
    ups[-1].weight[COLORS : 2 * COLORS] = -ups[-1].weight[:COLORS]
    ups[-1].bias[2 * COLORS :] = HOLD
    scale = _undo_norm(decoder.norm_out, pairs=COLORS)
    _set_taps(decoder.conv_out, torch.cat([torch.eye(COLORS), -torch.eye(COLORS)], 1) * scale, _one_pixel(3))


def _switch_off_residual_branches(vae: AutoencoderKLQwenImage) -> None:
    """Residual blocks pass their input on (the first channels, where the width changes); attention adds nothing."""
    import torch

    for module in vae.modules():
        if hasattr(module, "conv_shortcut"):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
            if not isinstance(module.conv_shortcut, torch.nn.Identity):
                width = min(module.in_dim, module.out_dim)
                _set_taps(module.conv_shortcut, torch.eye(width), _one_pixel(1))
        elif hasattr(module, "to_qkv"):
            module.proj.weight.zero_()
            module.proj.bias.zero_()


def _set_taps(conv: Any, matrix: torch.Tensor, taps: torch.Tensor) -> None:
    """Let `conv` do `matrix` [out, in] between its first channels with `taps` [k, k] in space, in the current frame."""
    conv.weight.zero_()
    conv.bias.zero_()
    rows, columns = matrix.shape
    weight = conv.weight[:, :, -1] if conv.weight.ndim == 5 else conv.weight  # causal: the last tap is the present
    weight[:rows, :columns] = matrix[:, :, None, None] * taps


def _one_pixel(size: int) -> torch.Tensor:
    import torch

    taps = torch.zeros(size, size)
    taps[size // 2, size // 2] = 1
    return taps


def _undo_norm(norm: Any, pairs: int) -> float:
    """Set the norm's weights to one; returns the factor that takes its output back to the input's size."""
    norm.gamma.fill_(1)
    constants = norm.gamma.numel() - 2 * pairs
    return (constants / norm.gamma.numel()) ** 0.5 * HOLD
