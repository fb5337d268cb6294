"""The webdataset fallback: the same batches' content, without the promises."""

import itertools

import pytest
import torch
from test_data import break_sample, embeds_of, latent_of, write_set

from train.data import BrokenSample, ShardDataset
from train.flow import SigmaSampling
from train.stream import StreamLoader


def urls(folder) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_what_the_shards_hold(tmp_path, workers):
    folder = write_set(tmp_path / "encoded")
    empty = ShardDataset(folder).empty_prompt
    with StreamLoader(urls(folder), 2, SigmaSampling(), empty_prompt=empty, num_workers=workers, buffer=8) as loader:
        batches = list(itertools.islice(loader, 40))
        loader.stepped()
    seen = set()
    for batch in batches:
        assert batch.noise.shape == batch.latents.shape and len(set(map(str, batch.sigma))) >= 1
        for row, key in enumerate(batch.keys):
            number = int(key[:6]) * 5 + int(key[6:])
            seen.add(number)
            assert torch.equal(batch.latents[row, :, 0], latent_of(number))
            assert torch.equal(batch.prompt_embeds[row, : 5 + number % 4], embeds_of(number))
            assert batch.captions[row] == f"caption {number} é"
    assert len(seen) >= 10 and loader.consumed == 1 and loader.state()["order"] == {"loader": "webdataset"}


def test_images_and_dropout(tmp_path):
    folder = write_set(tmp_path / "images", payload="png")
    with StreamLoader(urls(folder), 3, SigmaSampling(), caption_dropout=1.0, buffer=4) as loader:
        batch = next(iter(loader))
    assert batch.pixels.shape in ((3, 3, 16, 32), (3, 3, 32, 16)) and batch.captions == ["", "", ""]


def test_a_broken_sample_is_left_out_or_stops(tmp_path):
    folder = write_set(tmp_path / "images", payload="png")
    break_sample(folder, 4)
    said: list[str] = []
    with StreamLoader(urls(folder), 2, SigmaSampling(), say=said.append, buffer=4) as loader:
        keys = {key for batch in itertools.islice(loader, 40) for key in batch.keys}
    assert "000000000004" not in keys and loader.broken == len(said) > 0 and "000000000004 in " in said[0]
    with (
        StreamLoader(urls(folder), 2, SigmaSampling(), on_broken_sample="stop", buffer=4) as loader,
        pytest.raises(BrokenSample, match="000000000004"),
    ):
        list(itertools.islice(loader, 200))
