"""The model card: how the drawing model was made and how well it draws, from the numbers that were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from demo.pictures.random_scenes import held_out
from demo.pictures.scene import COLOR_NAMES, SHAPE_NAMES

FACTS = "card.json"


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """Write the numbers as card.json and in words as README.md."""
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(facts), encoding="utf-8")


def card(facts: dict[str, Any]) -> str:
    """The card as Markdown."""
    names = list(facts["classifier_on_drawn"])
    rows = [
        f"| {name} | {facts['held_out'].get(name, float('nan')):.1%} | {facts['seen'].get(name, float('nan')):.1%} "
        f"| {facts['classifier_on_drawn'][name]:.1%} |"
        for name in names
    ]
    table = "\n".join(rows)
    pairs = len(SHAPE_NAMES) * len(COLOR_NAMES)
    held = sum(held_out(shape, color) for shape in SHAPE_NAMES for color in COLOR_NAMES)
    command = (
        f"python demo/train_drawing_model.py --output_path drawing_model --pictures {facts['pictures']} "
        f"--vae_steps {facts['vae_steps']} --steps {facts['steps']} --seed {facts['seed']}"
    )
    asked, denoised, guidance = facts["score_pictures"], facts["score_steps"], facts["score_guidance"]
    return f"""# A tiny Qwen-Image that can draw

{facts["bytes"] / 1e6:.1f} MB, made by this project's `demo/train_drawing_model.py` from nothing but pictures that the script
draws itself; no other data and no other weights went in. It stands in for the 20 B model where there is no GPU: every
part is of the real class, so the same code loads and trains it.

| part | class | here |
| --- | --- | --- |
| transformer | `QwenImageTransformer2DModel` | 5 blocks of 4 × 32 channels, 3.1 M parameters |
| VAE | `AutoencoderKLQwenImage` | base width 16, 1.2 M parameters, trained; mean error {facts["vae_error"]:.2f} of 255 |
| text encoder | `Qwen2_5_VLForConditionalGeneration` | 2 layers of width 64, trained with the transformer |
| tokenizer | `Qwen2Tokenizer` | byte-level BPE, learned from the captions |
| scheduler | `FlowMatchEulerDiscreteScheduler` | Qwen-Image's configuration |

The text encoder's vision tower and vocabulary head are random and unused. Weights are stored in float16. It draws
pictures of {facts["side"]} × {facts["side"]} pixels: one or two of 25 things (circle, square, triangle, star, heart, ring,
cross, diamond, moon, flower, tree, house, fish, boat, mushroom, cat, cup and eight short words), in 10 colors, plain
or in 3 textures, in 3 sizes and 9 places, on 12 backgrounds. Ask as in “a large orange dotted moon at the top left, on a
pink background” or “night sky: a red fish on the left and the word "HI" in white on the right”; guidance 3, 20 steps.

## How it was made

{facts["pictures"]} pictures, three captions each; {facts["vae_steps"]} steps of the VAE, {facts["steps"]} steps of
{facts["batch"]} pictures of text encoder and transformer; {facts["seconds"]} s in all on {facts["device"]}.
Again with the same numbers of steps:

    {command}

## How well it draws

One pair of thing and color in ten ({held} of {pairs}) was never drawn for training. The model drew {asked} captions of
such pairs and {max(1, asked // 2)} of seen ones, in {denoised} steps with guidance {guidance}; a
classifier (`classifier.safetensors`, learned from drawn pictures of all pairs) said what it saw. The last column is the
classifier's own accuracy on drawn pictures that are new to it: what a perfect model would get. “all” counts a picture
only if every answer is right. `python demo/score_drawings.py --model demo/drawing_model` measures it again.

![what it drew of held-out pairs](preview.jpg)

| | held-out pairs | seen pairs | drawn pictures |
| --- | --- | --- | --- |
{table}
"""
