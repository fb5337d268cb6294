"""What was seen in the sources and is no input: counted, with the first example, said once and kept in the manifest."""

from __future__ import annotations

from collections import Counter

from files.shown import shown

OWN_FOLDERS = (
    "folders left out because they hold a data set of ours (give such a folder as --dataset_base_path to pack it)"
)
SAME_STEM = "images share their name and caption with another"
LISTED_TWICE = "rows of metadata name an image that an earlier row names: a sample each"
UNLISTED = "images beside a metadata file are not in it, and left out"
UNLISTED_TARS = "tars and parquet files beside a metadata file, which speaks for its folder, are left out"
NESTED_LISTINGS = "metadata files below another one, which speaks for them, are not read"
SEVERAL_COLUMNS = (
    "metadata and parquet files have several columns that could be meant: the first is taken (--image_column,"
    " --caption_column)"
)
SEVERAL_CAPTIONS = "images have several captions, of which training draws one each time (docs/levers.md)"
BAD_AMONG_SEVERAL = "captions among several of one image can't be read, and are left out"
BROKEN_MAP = "captions.json files can't be read: their images' captions are looked for beside the images alone"
UNUSED_CAPTIONS = "entries of captions.json name no image below it, or one that has a caption beside it"
LOST_CHARACTERS = "captions hold U+FFFD, which stands for characters that an earlier program lost"
LONELY_CAPTIONS = "caption files have no image beside them"
HIDDEN = "hidden files and folders (.name) left out"
REPEATS = "images lie in kohya's repeat folders (10_name) and come so many times an epoch (--kohya_folders off: once)"
REGULARIZATION = (
    "images lie in kohya's regularization folder {0} and are left out: pack it by itself (make_shards.py --dataset_base_path"
    " …/{0}) and train with it as --prior_data (--kohya_folders off packs it with the others)"
)
NUMBERED = "images lie in numbered folders (01_name, or above 1000) whose numbers are not taken for kohya's repeats"
WEIGHTS = "images have weights other than 1 in their metadata (--weight_column none: all come once an epoch)"
PLACEHOLDERS = (
    "captions hold [trigger] or {a|b}, which is trained as it stands unless training or encoding gets --trigger_word or"
    " --caption_alternatives"
)
CUT_UNLESS_RAISED = (
    "captions are long for training's 512 tokens: train_lora.py --max_prompt_tokens 1024 would hold them"
)
CUT_ANYWAY = "captions are longer than the 1,024 tokens that the text encoder reads: the rest is cut off"
LINKED_FOLDERS = "links to folders within the base folder not followed, since their targets are walked anyway"
PACKED_ARCHIVES = "packed archives not read: unpack them (plain .tar is read in place)"
NAMED_TWICE = "images in tars have a name that came before: a sample each"
OTHER_MEMBERS = "members of tars are neither images nor captions"
OTHER_PARQUET = "parquet files without images"
LONELY_SOURCES = "images in source/ folders belong to no image in target/, and are left out"
PAIRS_FOUND = (
    "images are packed as targets of edits, with their source images (--source_columns none packs them without)"
)

SEVERAL_MASKS = "images have several masks: the first of --mask_folder, x.mask.png and x-masklabel.png is taken"
LONELY_MASKS = "pictures are named like masks but belong to no image, and are left out (--masks off packs them)"
UNREAD_MASKS = "sources have a column of masks that holds no paths, which is not read (give the masks as files)"


class Remarks:
    """Counts by text, each with its first example."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, text: str, example: str, count: int = 1) -> None:
        self.counts[text] += count
        self.first.setdefault(text, example)

    def lines(self) -> list[str]:
        """One line for people each, names made harmless."""
        return [f"{count} {text}; first {shown(self.first[text])}" for text, count in self.counts.items()]
