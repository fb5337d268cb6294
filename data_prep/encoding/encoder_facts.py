"""What an encoded data set says of its encoders, and whether a model may train on it."""

from __future__ import annotations

from typing import Any

LATENTS = "posterior mode, normalised: (x - latents_mean) / latents_std"
PROMPTS = "last hidden state after the final norm, template tokens dropped, valid tokens only"
# Two sets with different values in one of these cannot be mixed, and a model that has others refuses them.
IDENTITY = ("vae", "text_encoder", "latents", "prompts", "template_drop", "dtype")
# Besides, of sets for edit models: the member of the family, and where its text encoder has pictures.
EDIT_IDENTITY = ("family", "picture_positions")
TEXT_TO_IMAGE = "Qwen-Image"  # the family of sets that name none


def describe_encoding(
    *,
    model: str,
    revision: str | None,
    vae: str,
    text_encoder: str,
    template_drop: int,
    latent_std: bool,
    computed_in: str,
    edit: dict[str, Any] | None = None,
    captions: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """`Manifest.encoding`: `vae` and `text_encoder` are fingerprints of their weights, `model` is for people.

    `dtype` is that of the stored tensors, `computed_in` that of the encoders. `edit`: what there is besides for an edit model:
    EDIT_IDENTITY, `prompt_width`, `empty_captions` (whether each sample has the embedding of "" with its pictures).
    `captions`: what became of them (caption_variants.Variants.identity), where anything did.
    """
    return (
        (edit or {})
        | ({"captions": captions} if captions else {})
        | {
            "model": model,
            "revision": revision,
            "vae": vae,
            "text_encoder": text_encoder,
            "dtype": "bfloat16",
            "computed_in": computed_in,
            "latents": LATENTS,
            "latent_std": latent_std,
            "prompts": PROMPTS,
            "template_drop": template_drop,
        }
    )


def check_encoding(folder: str, encoding: dict[str, Any], own: dict[str, Any], model: str) -> None:
    """Raise ValueError when the set in `folder` was encoded by other rules or encoders than `own` (what is known of them)."""
    encoded_for = encoding.get("family", TEXT_TO_IMAGE)
    if own.get("family", TEXT_TO_IMAGE) != encoded_for:
        raise ValueError(
            f"{folder} was encoded for {encoded_for}, but {model} is {own.get('family', TEXT_TO_IMAGE)}: encode the image "
            f"shards again with data_prep/encode_shards.py --model {model}"
        )
    for name in (*IDENTITY, *EDIT_IDENTITY):
        if name in own and encoding.get(name) != own[name]:
            raise ValueError(
                f"{folder} was encoded by {encoding.get('model')} with {name} = {encoding.get(name)}, but {model} has "
                f"{name} = {own[name]}: encode the image shards again with data_prep/encode_shards.py --model {model}"
            )
