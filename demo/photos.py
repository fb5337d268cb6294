"""A folder of real photographs with captions, taken from installed packages: nothing is downloaded.

    python demo/photos.py --output_path photos

scikit-image, scikit-learn and matplotlib ship a few photographs in their wheels. They are laid out as users have them,
the image beside a text file with its caption; details are cut from the larger ones, each with a caption of its own.
Every caption was written while looking at the picture. The pictures keep their owners' licences (the packages name
them), therefore the folder is made here and not part of this repository.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

# Where each package keeps its photographs, relative to the package's folder.
PHOTO_FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}


@dataclass(frozen=True)
class Photo:
    """One sample: `source` is "package/file"; `box` (left, top, right, bottom in pixels) cuts a detail out of it."""

    name: str
    source: str
    box: tuple[int, int, int, int] | None
    caption: str


# fmt: off
PHOTOS = [
    Photo("astronaut", "skimage/astronaut.png", None,
          "A studio portrait of a smiling woman with short blond hair in an orange astronaut suit, a black and white "
          "helmet in front of her, an American flag on the left and a model of a space shuttle on the right."),
    Photo("astronaut_face", "skimage/astronaut.png", (130, 0, 310, 180),
          "The face of a smiling woman with short blond hair in front of a pale, mottled background."),
    Photo("astronaut_helmet", "skimage/astronaut.png", (272, 332, 512, 512),
          "A white space helmet with a glossy black visor, held before an orange suit."),
    Photo("space_shuttle_model", "skimage/astronaut.png", (345, 0, 490, 300),
          "A model of a white space shuttle with two white boosters and a brown fuel tank on a black stand."),
    Photo("brick", "skimage/brick.png", None,
          "Long narrow paving bricks in rows, seen at an angle, in black and white."),
    Photo("brick_detail", "skimage/brick.png", (128, 256, 384, 512),
          "Narrow dark bricks with light joints, a close view in black and white."),
    Photo("photographer", "skimage/camera.png", None,
          "A black and white photograph of a man in a dark coat who looks through a camera on a tripod, on a wide "
          "lawn with white buildings far behind."),
    Photo("photographer_face", "skimage/camera.png", (130, 50, 350, 240),
          "A man with dark hair and gloves bends to a camera and looks through it, in black and white."),
    Photo("cell", "skimage/cell.png", None,
          "A microscope image of one round bright cell with a dark rim on a plain grey background."),
    Photo("cat", "skimage/chelsea.png", None,
          "A close-up of a tabby cat with brown striped fur, green eyes, a pink nose and long white whiskers."),
    Photo("cat_eyes", "skimage/chelsea.png", (100, 50, 360, 190),
          "Two green eyes of a tabby cat between brown stripes of fur."),
    Photo("coffee", "skimage/coffee.png", None,
          "A red cup of espresso on a red saucer with a metal spoon, on a brown wooden table, seen from above."),
    Photo("coffee_cup", "skimage/coffee.png", (150, 0, 420, 320),
          "A red espresso cup with a white inside, half full of coffee."),
    Photo("coins", "skimage/coins.png", None,
          "Four rows of six old coins with worn portraits on a dark background, in black and white."),
    Photo("grass", "skimage/grass.png", None,
          "Grass, clover and small leaves on the ground, seen from above, in black and white."),
    Photo("grass_detail", "skimage/grass.png", (256, 128, 512, 384),
          "Blades of grass in all directions, a close view in black and white."),
    Photo("gravel", "skimage/gravel.png", None,
          "Grey gravel of small angular stones fills the picture, in black and white."),
    Photo("gravel_detail", "skimage/gravel.png", (0, 256, 256, 512),
          "Angular grey stones, a close view in black and white."),
    Photo("deep_field", "skimage/hubble_deep_field.jpg", None,
          "Thousands of distant galaxies, small spots of orange, blue and white light, on a black sky."),
    Photo("deep_field_left", "skimage/hubble_deep_field.jpg", (0, 200, 400, 600),
          "Small galaxies, red, blue and white, on a black sky, with a pale green one left of the middle."),
    Photo("deep_field_right", "skimage/hubble_deep_field.jpg", (560, 300, 960, 700),
          "Small galaxies on a black sky, among them a large orange one."),
    Photo("tissue", "skimage/ihc.png", None,
          "A microscope image of tissue: glands stained brown among pale tissue with small blue nuclei."),
    Photo("tissue_detail", "skimage/ihc.png", (220, 280, 420, 512),
          "A round gland stained brown in pale tissue with blue nuclei, through a microscope."),
    Photo("moon", "skimage/moon.png", None,
          "The grey surface of the moon with small craters and dark spots, in black and white."),
    Photo("moon_crater", "skimage/moon.png", (60, 30, 220, 150),
          "A round crater with a bright wall on the smooth grey surface of the moon."),
    Photo("motorcycle", "skimage/motorcycle_left.png", None,
          "A red motorcycle with a black seat stands on the concrete floor of a garage, before a wooden bench and "
          "shelves with boxes."),
    Photo("motorcycle_again", "skimage/motorcycle_right.png", None,
          "A parked red motorcycle with chrome exhaust in a garage; shelves with cardboard boxes stand behind it."),
    Photo("motorcycle_engine", "skimage/motorcycle_left.png", (300, 160, 520, 400),
          "The metal engine of a red motorcycle below its tank."),
    Photo("motorcycle_wheel", "skimage/motorcycle_right.png", (430, 240, 660, 470),
          "The front wheel of a motorcycle with a black tyre and a red mudguard on a concrete floor."),
    Photo("page", "skimage/page.png", None,
          "A page of printed English text under the heading “Region-based segmentation”, unevenly lit."),
    Photo("retina", "skimage/retina.jpg", None,
          "The back of an eye: an orange disc with branching red blood vessels and one bright spot, on black."),
    Photo("retina_nerve", "skimage/retina.jpg", (100, 480, 500, 880),
          "The bright yellow spot in the back of an eye where red blood vessels meet."),
    Photo("rocket", "skimage/rocket.jpg", None,
          "A white rocket on its launch pad at dusk between tall steel towers, with bright lamps along the ground."),
    Photo("rocket_upright", "skimage/rocket.jpg", (250, 80, 400, 427),
          "A tall white rocket under a dark blue evening sky."),
    Photo("temple", "sklearn/china.jpg", None,
          "A Chinese tower of several storeys with orange tiled roofs and red columns above trees, a lake behind it."),
    Photo("temple_roofs", "sklearn/china.jpg", (60, 20, 360, 320),
          "Curved orange tiled roofs with green edges on a red Chinese tower."),
    Photo("temple_lake", "sklearn/china.jpg", (340, 140, 640, 427),
          "A wide lake with tiny boats under a pale sky, trees in front."),
    Photo("dahlia", "sklearn/flower.jpg", None,
          "An orange dahlia in full bloom before blurred dark green leaves, a second flower at the lower edge."),
    Photo("dahlia_detail", "sklearn/flower.jpg", (160, 70, 460, 370),
          "The round orange petals of a dahlia, arranged in rings around its red centre."),
    Photo("officer", "matplotlib/grace_hopper.jpg", None,
          "A portrait of an elderly woman with glasses in a dark navy uniform and cap, before an American flag and a "
          "blue background."),
]
# fmt: on


def write_photo_folder(folder: str | Path) -> list[Path]:
    """Write every photo as `name.jpg` or `name.png` with `name.txt` beside it; returns the image paths.

    Whole photographs are copied byte for byte; details are saved in the format of their source.
    Raises FileNotFoundError when a package that carries a photo is not installed.
    """
    from PIL import Image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for photo in PHOTOS:
        source = _source_path(photo.source)
        target = folder / (photo.name + source.suffix)
        if photo.box is None:
            shutil.copyfile(source, target)
        else:
            with Image.open(source, formats=("JPEG", "PNG", "GIF")) as image:
                image.crop(photo.box).save(target, quality=95)  # PNG has no quality and ignores it
        target.with_suffix(".txt").write_text(photo.caption + "\n", encoding="utf-8")
        written.append(target)
    return written


def _source_path(source: str) -> Path:
    package, file = source.split("/")
    spec = importlib.util.find_spec(package)  # locates the package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the photographs need {package}, which is not installed: pip install -e '.[demo]'")
    path = Path(spec.submodule_search_locations[0]) / PHOTO_FOLDERS[package] / file
    if not path.is_file():
        raise FileNotFoundError(f"this version of {package} carries no {file}: {path} is missing")
    return path


def main(argv: list[str] | None = None) -> int:
    """Write the folder from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_path", type=Path, required=True, help="folder to write images and captions into")
    folder = parser.parse_args(argv).output_path
    try:
        images = write_photo_folder(folder)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {len(images)} photos with captions into {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
