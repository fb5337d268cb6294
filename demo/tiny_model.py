"""A tiny Qwen-Image of the real classes with random weights, in the Hugging Face layout; built in seconds.

    python demo/tiny_model.py --output_path tiny_model
    python demo/tiny_model.py --output_path mid_model --layers 8 --heads 8 --head_dim 128 --dtype bfloat16

Every component is the class the real checkpoint names (diffusers' transformer, VAE and scheduler, transformers'
Qwen2.5-VL and Qwen2 tokenizer), so the folder goes through the same loading code as the 20B model, here and in
`diffusers.QwenImagePipeline.from_pretrained(folder)`. What it paints is noise: nothing was ever learned.
(demo/drawing_model/ holds one that can draw.)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_image.model.family import MEMBERS, TEXT_TO_IMAGE, Member

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

# diffusers 0.42.1, pipelines/qwenimage/pipeline_qwenimage.py: text before and after the caption.
TEMPLATE_PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
TEMPLATE_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
TEMPLATE_PREFIX_TOKENS = 34  # diffusers hard-codes this number; a test counts it
TEMPLATE_SUFFIX_TOKENS = 5

# Qwen2.5-VL's added tokens in the order of their ids (151643 … 151664 there).
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip

# Only words for the tokenizer to learn; the demo's own captions are in photos.py. Changing them changes the model.
TOKENIZER_CAPTIONS = [
    "a photo of a cat lying on a red blanket, looking into the camera",
    "a photograph of a cup of coffee on a wooden table, seen from above",
    "a close-up of green grass in the sunlight",
    "a rocket standing on its launch pad under a cloudy sky",
    "a portrait of a smiling woman in an orange suit in front of a flag",
    "an old brick wall, grey and white stones, black and white photograph",
    "a yellow flower with pink petals, blurred background",
    "a temple with curved roofs behind trees and water",
    "stars and galaxies on a dark sky",
    "a motorcycle parked in a garage",
]
TOKENIZER_VOCABULARY = 640  # 256 bytes + merges; the special tokens come on top

# Qwen-Image's scheduler/scheduler_config.json.
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "invert_sigmas": False,
    "shift_terminal": 0.02,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}


def build_tiny_model(
    folder: str | Path,
    seed: int = 0,
    *,
    layers: int = 2,
    heads: int = 4,
    head_dim: int = 32,
    text_layers: int = 2,
    text_dim: int = 64,
    vae_dim: int = 8,
    dtype: str = "float32",
    max_shard_size: str = "10GB",
    family: str = "text-to-image",
) -> Path:
    """Write a model with random weights drawn from `seed` into `folder` and return the folder.

    `layers`, `heads` × `head_dim` shape the transformer (60, 24 × 128 in the real one), `text_layers` and `text_dim`
    the text encoder (28, 3584), `vae_dim` is the VAE's base width (96). `dtype` ("float32" or "bfloat16") is that of the
    saved weights; `max_shard_size` splits them over several files, as the real checkpoint's are; `family` is one of
    qwen_image.model.family.MEMBERS.
    Raises ValueError for shapes that the rotary positions cannot divide.
    """
    axes_dims, member = rotary_axes(head_dim), MEMBERS[family]
    if text_dim % 64:
        raise ValueError(f"text_dim {text_dim} must be a multiple of 64 (4 heads with rotary sections)")
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)  # the classes' own initialization draws from the global generator
        tokenizer = make_tokenizer(TOKENIZER_CAPTIONS, TOKENIZER_VOCABULARY, member.template)
        parts = {
            "transformer": _transformer(layers, heads, head_dim, axes_dims, text_dim, seed),
            "text_encoder": make_text_encoder(tokenizer, text_layers, text_dim),
            "vae": _vae(vae_dim),
        }
    for part in parts.values():
        for parameter in part.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG), tokenizer=tokenizer, **parts
    )
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    if member is not TEXT_TO_IMAGE:
        make_edit_model(folder, member)
    return folder


def make_edit_model(folder: Path, member: Member) -> None:
    """Write into a saved text-to-image model what marks it as an edit model: the same weights, conditioned otherwise.

    diffusers' own edit pipelines can't be saved here: their processor wants torchvision.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from qwen_image.encoders.text_encoder import PIXELS_OF_PICTURES

    changes = {
        "model_index.json": {"_class_name": member.pipelines[0]},
        "transformer/config.json": {"zero_cond_t": member.zero_cond_t},
    }
    for name, values in changes.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values, indent=2) + "\n")
    Qwen2VLImageProcessorPil(size=PIXELS_OF_PICTURES).save_pretrained(folder / "processor")


def rotary_axes(head_dim: int) -> tuple[int, int, int]:
    """Split a head's width over frame, row and column in the real model's proportion, 16 : 56 : 56 of 128."""
    if head_dim % 32:
        raise ValueError(f"head_dim {head_dim} must be a multiple of 32, else the rotary axes are not even numbers")
    side = head_dim * 7 // 16
    return head_dim - 2 * side, side, side


def make_tokenizer(
    captions: list[str], vocabulary: int, template: str = TEMPLATE_PREFIX + "{}" + TEMPLATE_SUFFIX
) -> Qwen2Tokenizer:
    """Byte-level BPE learned from `captions`, in which every word of the template is one token, as in the real vocabulary."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    model = Tokenizer(models.BPE())
    model.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    template = template.replace("{}", "")
    for token in SPECIAL_TOKENS:
        template = template.replace(token, "")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # 100 templates to each caption: its words are merged to the end before the captions' words use up the vocabulary.
    roles = ["system\n", "user\n", "assistant\n"]
    model.train_from_iterator([template, *roles] * 100 + captions, trainer)

    bpe = json.loads(model.to_str())["model"]
    special = {token: len(bpe["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2Tokenizer(
        vocab=bpe["vocab"] | special,
        merges=[tuple(pair) for pair in bpe["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
        model_max_length=131072,
    )


def _transformer(
    layers: int, heads: int, head_dim: int, axes_dims: tuple[int, int, int], text_dim: int, seed: int
) -> QwenImageTransformer2DModel:
    """The MMDiT with weights that keep every activation near unit size, modulation and biases included."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=text_dim,
        axes_dims_rope=axes_dims,
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # variance 1 / fan-in
            parameter.normal_(0, 1 / math.sqrt(parameter.shape[1]), generator=generator)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # none of them trivial; queries and keys large enough that attention chooses
            center = 0.0 if name.endswith("bias") else 1.0 if name == "txt_norm.weight" else 2.0
            parameter.normal_(center, 0.1, generator=generator)
    return model


def make_text_encoder(tokenizer: Qwen2Tokenizer, layers: int, dim: int) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with random weights from torch's global generator, `layers` of width `dim`; the vision tower is tiny."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    spread = 1 / math.sqrt(dim)  # instead of 0.02, so that attention moves the tokens of so narrow a model
    half_head = dim // 4 // 2
    rotary = {
        "rope_type": "default",
        "rope_theta": 1000000.0,
        "mrope_section": [half_head // 4, half_head * 3 // 8, half_head * 3 // 8],  # 16 : 24 : 24 of 64
    }
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text_config = {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rotary,
        "initializer_range": spread,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision_config = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": dim,
        "fullatt_block_indexes": [1],
        "initializer_range": spread,
    }
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _vae(base_dim: int) -> AutoencoderKLQwenImage:
    """The VAE with latents_mean and latents_std measured on smooth noise, so that its latents are unit-sized."""
    import torch
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage(base_dim=base_dim, z_dim=16)
    generator = torch.Generator().manual_seed(0)
    blobs = torch.randn(4, 3, 12, 12, generator=generator)
    pixels = torch.nn.functional.interpolate(blobs, size=(96, 96), mode="bicubic").clamp(-1, 1)
    latents = vae.encode(pixels[:, :, None]).latent_dist.mode()  # [4, 16, 1, 12, 12]
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(
        latents_mean=[round(x, 4) for x in mean.tolist()], latents_std=[round(x, 4) for x in std.tolist()]
    )
    return vae


def main(argv: list[str] | None = None) -> int:
    """Build a model from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_path", type=Path, required=True, help="folder to write the model into")
    parser.add_argument("--seed", type=int, default=0, help="draws the weights (default 0)")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks (default 2)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads (default 4)")
    parser.add_argument("--head_dim", type=int, default=32, help="width of a head, a multiple of 32 (default 32)")
    parser.add_argument("--text_layers", type=int, default=2, help="layers of the text encoder (default 2)")
    parser.add_argument("--text_dim", type=int, default=64, help="width of the text encoder (default 64)")
    parser.add_argument("--vae_dim", type=int, default=8, help="base width of the VAE (default 8)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the saved weights")
    parser.add_argument(
        "--family", choices=MEMBERS, default="text-to-image", help="which member (default text-to-image)"
    )
    parser.add_argument("--max_shard_size", default="10GB", help="largest weight file, such as 100MB (default 10GB)")
    options = vars(parser.parse_args(argv))
    try:
        folder = build_tiny_model(options.pop("output_path"), **options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
