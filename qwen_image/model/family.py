"""The members of Qwen-Image's family that share its transformer: what each is told, what of source images it sees, and where.

Their tensors have equal names and shapes; they differ in how they are conditioned. A folder in the Hugging Face layout tells
which member it is (qwen_image/loading/model_files.py); a single file cannot, so `--model_family` says it.

Sources: diffusers 0.42.1, pipelines/qwenimage/pipeline_qwenimage.py, _edit.py, _edit_plus.py. Imports no torch.
"""

import math
from dataclasses import dataclass, replace

_SYSTEM = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n<|im_start|>assistant\n"
_EDIT = _SYSTEM.format(
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how the "
    "user's text instruction should alter or modify the image. Generate a new image that meets the user's requirements while "
    "maintaining consistency with the original input where appropriate."
)
_VISION = "<|vision_start|><|image_pad|><|vision_end|>"  # <|image_pad|> becomes as many tokens as the image has

SOURCE_STEP = 32  # pixels: the sides of source images are multiples of it
SOURCE_AREA = 1024 * 1024  # pixels of a source image as the VAE sees it


@dataclass(frozen=True)
class Member:
    """How one model is conditioned.

    Attributes:
        name: what people, shards and LoRA files call it.
        pipelines: of diffusers, by which a folder is recognized.
        template: of the chat; `{}` stands for the pictures and the caption.
        picture: stands for each source image before the caption; `{}`, if it is there, for the image's number from 1.
        most_sources: source images that it takes; it needs one at least if it takes any.
        text_encoder_area: pixels of a source image for the text encoder; None: it sees what the VAE sees.
        size_from: the source image that inference takes the target's size from: 0 the first, -1 the last.
        zero_cond_t: tokens of source images are modulated as at the noise level 0.
    """

    name: str
    pipelines: tuple[str, ...]
    template: str
    picture: str = ""
    most_sources: int = 0
    text_encoder_area: int | None = None
    size_from: int = 0
    zero_cond_t: bool = False

    @property
    def prefix(self) -> str:
        """The template up to pictures and caption: its tokens are dropped from the embeddings."""
        return self.template.partition("{}")[0]

    def pictures(self, sources: int) -> str:
        """What stands before the caption of a prompt with so many source images."""
        return "".join(self.picture.format(number + 1) for number in range(sources))

    def check_sources(self, count: int, where: str) -> None:
        """Raise ValueError unless a sample may have so many source images; `where` begins the sentence."""
        if self.most_sources == 0 and count:
            raise ValueError(
                f"{where} has {count} source image{'s' * (count > 1)}, but {self.name} paints from text alone: it takes an "
                "edit model (Qwen-Image-Edit, -Edit-2509, -Edit-2511)"
            )
        if self.most_sources and not 1 <= count <= self.most_sources:
            takes = "one source image" if self.most_sources == 1 else f"one to {self.most_sources} source images"
            raise ValueError(
                f"{where} has {count or 'no'} source image{'s' * (count != 1)}, but {self.name} takes {takes}"
            )


TEXT_TO_IMAGE = Member(
    "Qwen-Image",
    ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    _SYSTEM.format(
        "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
        "objects and background:"
    ),
)
EDIT = Member(
    "Qwen-Image-Edit",
    ("QwenImageEditPipeline", "QwenImageEditInpaintPipeline"),
    _EDIT,
    picture=_VISION,
    most_sources=1,
)
EDIT_2509 = Member(
    "Qwen-Image-Edit-2509",
    ("QwenImageEditPlusPipeline",),
    _EDIT,
    picture=f"Picture {{}}: {_VISION}",
    most_sources=3,
    text_encoder_area=384 * 384,
    size_from=-1,
)
EDIT_2511 = replace(EDIT_2509, name="Qwen-Image-Edit-2511", zero_cond_t=True)
# by the values of --model_family
MEMBERS = {"text-to-image": TEXT_TO_IMAGE, "edit": EDIT, "edit-2509": EDIT_2509, "edit-2511": EDIT_2511}


def source_size(area: int, width: int, height: int) -> tuple[int, int]:
    """Width and height that inference stretches an image to: about `area` pixels in its ratio, multiples of SOURCE_STEP.

    diffusers' `calculate_dimensions(area, width / height)`, to the rounding of its floating point.
    """
    ratio = width / height
    side = math.sqrt(area * ratio)
    sides = (round(side / SOURCE_STEP) * SOURCE_STEP, round(side / ratio / SOURCE_STEP) * SOURCE_STEP)
    return max(sides[0], SOURCE_STEP), max(sides[1], SOURCE_STEP)
