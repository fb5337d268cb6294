"""What `pip install` adds to site-packages: this one folder, with the rooms in it, and the commands.

    qwen-image-lora-train --help              # or on all GPUs: deepspeed --no_python qwen-image-lora-train …
    import qwen_image_lora                    # then `from qwen_image.pipeline import QwenImagePipeline` finds the room

The rooms are called `files`, `train` and so on, names that nobody may claim in a site-packages that others share. So a
wheel carries them inside this folder, which goes first on the path here, before anything of ours is imported. In a
checkout they lie beside it instead, where the path leads already.
"""

import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
if (_FOLDER / "train").is_dir() and str(_FOLDER) not in sys.path:
    sys.path.insert(0, str(_FOLDER))


def make() -> int:
    from train.make_lora import main

    return main()


def train() -> int:
    from train.train_lora import main

    return main()


def sample() -> int:
    from train.sample import main

    return main()


def merge() -> int:
    from train.merge_lora import main

    return main()


def convert() -> int:
    from train.convert_lora import main

    return main()


def report() -> int:
    from train.report import main

    return main()


def make_shards() -> int:
    from data_prep.make_shards import main

    return main()


def check_shards() -> int:
    from data_prep.check_shards import main

    return main()


def encode_shards() -> int:
    from data_prep.encode_shards import main

    return main()
