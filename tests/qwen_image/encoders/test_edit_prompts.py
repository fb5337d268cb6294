"""Edit models: prompt embeddings with pictures, source latents and generated images against diffusers' own edit pipelines.

diffusers' image processor resizes with Pillow (Lanczos), transformers' with Pillow too (`Qwen2VLImageProcessorPil`, bicubic).
Everything in float32. The Plus pipeline takes one prompt at a time, so batches are compared with a loop.
"""

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

from qwen_image.encoders.source_images import SourceImage, stretched
from qwen_image.encoders.text_encoder import EncoderBytes, TextEncoder
from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.model.family import MEMBERS, source_size
from qwen_image.pipeline import QwenImagePipeline, encode_sources
from tests.helpers.edit_reference import picture, pipeline_of

SIZES = {  # landscape, portrait, square; larger and smaller than what they become
    "edit": ([(300, 200)], [(90, 160)]),
    "edit-2509": ([(300, 200)], [(128, 256), (64, 64)], [(100, 90), (640, 480), (50, 70)]),
    "edit-2511": ([(200, 300)], [(64, 64), (100, 250)], [(80, 80), (80, 60), (60, 80)]),
}
CASES = [(family, sizes) for family, each in SIZES.items() for sizes in each]
NAMES = [f"{family}, {len(sizes)} of {sizes[0][0]}x{sizes[0][1]}" for family, sizes in CASES]
INSTRUCTION = "make the cup blue, keep everything else"

AREA = 96 * 96  # of source images here, instead of 1024²: the tiny VAE takes a minute for each of those


@pytest.fixture(scope="module")
def models(tiny_edit_models):
    return tiny_edit_models


@pytest.fixture(scope="module")
def references(models):
    """diffusers' pipelines by family, as they are and repaired, with AREA in the place of theirs."""
    patch = pytest.MonkeyPatch()
    patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", AREA)
    theirs = pipeline_qwenimage_edit.calculate_dimensions
    patch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: theirs(AREA, ratio))
    yield {
        (family, repaired): pipeline_of(folder, family != "edit", repaired)
        for family, folder in models.items()
        for repaired in (False, True)
    }
    patch.undo()


@pytest.fixture(scope="module")
def ours(models):
    return {
        family: QwenImagePipeline.from_pretrained(str(folder), dtype=torch.float32) for family, folder in models.items()
    }


def pictures(sizes):
    return [picture(*size, seed) for seed, size in enumerate(sizes)]


def as_given(images):
    """As if the VAE saw the pictures themselves: then nothing comes between them and the text encoder's own stretch."""
    return [SourceImage(np.asarray(image), *image.size) for image in images]


def shown_to_encoder(reference, family, images):
    """What the pipeline's __call__ makes of the pictures before it encodes the prompt."""
    member = MEMBERS[family]
    if member.text_encoder_area is None:
        return [reference.image_processor.resize(each, *source_size(AREA, *each.size)[::-1]) for each in images]
    return [
        reference.image_processor.resize(each, *source_size(member.text_encoder_area, *each.size)[::-1])
        for each in images
    ]


@pytest.mark.parametrize("positions", ["grid", "consecutive"])
@pytest.mark.parametrize("family,sizes", CASES, ids=NAMES)
@torch.no_grad()
def test_prompt_embeddings_equal_diffusers(models, references, family, sizes, positions):
    reference = references[family, positions == "grid"]
    files = resolve_model(ModelSource(str(models[family]), picture_positions=positions), ("text_encoder", "tokenizer"))
    encoder = TextEncoder.of_model(files, torch.float32, "cpu")
    images = pictures(sizes)
    seen = shown_to_encoder(reference, family, images)
    sources = as_given(images) if MEMBERS[family].text_encoder_area else [stretched(image, AREA) for image in images]
    for text in (INSTRUCTION, "", " "):
        expected, mask = reference.encode_prompt(text, image=seen)
        found = encoder.encode_pictures(text, sources)
        assert mask is None and torch.equal(found.embeds, expected[0])
        instruction = len(encoder.tokenizer(text + "<|im_end|>\n<|im_start|>assistant\n").input_ids)
        assert len(found.embeds) == found.picture_tokens + instruction
    assert encoder.template_drop == reference.prompt_template_encode_start_idx == 64


def test_the_two_kinds_of_positions_differ(ours):
    encoder = ours["edit-2509"].text_encoder
    source = as_given(pictures([(100, 80)]))
    on_grid = encoder.encode_pictures(INSTRUCTION, source).embeds
    plain = TextEncoder(
        encoder.tokenizer,
        encoder.language_model,
        member=encoder.member,
        vision=type(encoder.vision)(encoder.vision.model, encoder.vision.processor, "consecutive"),
    ).encode_pictures(INSTRUCTION, source)
    assert (on_grid - plain.embeds).abs().max() > 0.1


def test_limits_count_the_instruction_alone(ours):
    encoder, source = ours["edit-2509"].text_encoder, as_given(pictures([(100, 80)]))
    whole = encoder.encode_pictures("word " * 1500, source)
    short = encoder.encode_pictures(INSTRUCTION, source)
    assert len(whole.embeds) == whole.picture_tokens + 1024 and whole.picture_tokens == short.picture_tokens > 190
    assert torch.equal(short.cut(3), short.embeds[: short.picture_tokens + 3])
    assert torch.equal(short.cut(512), short.embeds)
    with pytest.raises(ValueError, match="stands for a token of a picture"):
        encoder.encode_pictures("a <|image_pad|> b", source)


@pytest.mark.parametrize("family,sizes", CASES, ids=NAMES)
@torch.no_grad()
def test_source_latents_equal_diffusers(references, ours, family, sizes):
    reference, images = references[family, True], pictures(sizes)
    sources = [stretched(image, AREA) for image in images]
    found = encode_sources(ours[family].vae, [sources])
    for image, source, latents in zip(images, sources, found, strict=True):
        width, height = source_size(AREA, *image.size)
        pixels = reference.image_processor.preprocess(image, height, width).unsqueeze(2)
        expected = reference._encode_vae_image(pixels, generator=None)
        assert source.pixels.shape == (height, width, 3) and latents.shape == (1, 16, 1, height // 8, width // 8)
        torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family,sizes", [CASES[0], CASES[3], CASES[6]], ids=[NAMES[0], NAMES[3], NAMES[6]])
def test_generated_images_equal_diffusers(references, ours, family, sizes):
    reference, images = references[family, True], pictures(sizes)
    options = {"num_inference_steps": 2, "true_cfg_scale": 3.0, "height": 64, "width": 96}
    expected = reference(
        images if family != "edit" else images[0],
        INSTRUCTION,
        negative_prompt=" ",
        generator=torch.Generator().manual_seed(5),
        output_type="np",
        **options,
    ).images
    pipeline = ours[family]
    sources = [stretched(image, AREA) for image in images]
    if MEMBERS[family].text_encoder_area:  # its stretch starts from the picture itself
        given = as_given(images)
        latents = encode_sources(pipeline.vae, [sources])
        prompt, negative = (pipeline._prompt([text], 512, [given], latents) for text in (INSTRUCTION, " "))
        actual = pipeline.generate(prompt, negative_prompt=negative, seeds=[5], **options)
    else:
        actual = pipeline.generate([INSTRUCTION], sources=[sources], seeds=[5], **options)
    assert expected.std() > 0.05
    assert np.abs(actual.numpy() / 255.0 - expected).max() <= 2 / 255


def test_sizes_are_diffusers():
    """Of every ratio, at inference's own areas."""
    theirs = pipeline_qwenimage_edit_plus.calculate_dimensions
    for width in range(16, 4000, 37):
        for height in (64, 500, 768, 1000, 1024, 1536, 2999):
            if max(width, height) <= 16 * min(width, height):
                for area in (384 * 384, 1024 * 1024):
                    assert source_size(area, width, height) == theirs(area, width / height)


def test_streamed_layers_give_the_same_embeddings_and_counted_bytes(models):
    files = resolve_model(ModelSource(str(models["edit-2511"])), ("text_encoder", "tokenizer"))
    whole, streamed = (TextEncoder.of_model(files, torch.float32, "cpu", streamed=each) for each in (False, True))
    streamed.streamed.stream.poisoned = True
    given = as_given(pictures([(80, 80), (80, 60)]))
    for _ in range(2):
        found = [encoder.encode_pictures(INSTRUCTION, given) for encoder in (whole, streamed)]
        assert torch.equal(found[0].embeds, found[1].embeds) and found[0].picture_tokens == found[1].picture_tokens
    counted = EncoderBytes.of(files["text_encoder"], torch.float32, sees=True)
    assert counted.whole == sum(p.nbytes for p in whole.vision.model.parameters())
    tower = sum(p.nbytes for p in whole.vision.model.visual.parameters())
    without = EncoderBytes.of(files["text_encoder"], torch.float32)
    assert counted.streamed - without.streamed == counted.whole - without.whole == tower
