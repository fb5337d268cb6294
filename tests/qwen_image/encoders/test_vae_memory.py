"""The VAE on a GPU without room: image by image, then in tiles, and said once a size. Running out is played."""

import pytest
import torch

from qwen_image.encoders.vae import VAE
from qwen_image.loading.model_files import ModelSource, resolve_model


@pytest.fixture
def vae(tiny_model, monkeypatch) -> tuple[VAE, list[str]]:
    vae = VAE.from_files(resolve_model(ModelSource(str(tiny_model)), ("vae",))["vae"], torch.float32, "cpu")
    said: list[str] = []
    vae.say = said.append
    vae.limit = 10**9  # pixels or latents that there is room for at once
    for name in ("_encode", "_decode"):
        compute = getattr(vae.model, name)

        def limited(x, *more, compute=compute, **options):
            tile = vae.model.use_tiling and min(x.shape[-2:]) > 0
            if not tile and x.shape[0] * x.shape[-1] * x.shape[-2] > vae.limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return compute(x, *more, **options)

        monkeypatch.setattr(vae.model, name, limited)
    return vae, said


def test_a_batch_that_does_not_fit_is_done_one_by_one(vae):
    vae, said = vae
    images = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    whole, std = vae.encode_moments(images)
    decoded = vae.decode(whole)
    vae.limit = 32 * 48
    again, std_again = vae.encode_moments(images)
    torch.testing.assert_close(again, whole)
    torch.testing.assert_close(std_again, std)
    vae.limit = 4 * 6
    torch.testing.assert_close(vae.decode(whole), decoded)
    assert said == [] and not vae.tiled


def test_an_image_that_does_not_fit_is_done_in_tiles_and_others_stay_whole(vae):
    vae, said = vae
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(1, 3, 64, 64, generator=generator), torch.randn(2, 3, 320, 288, generator=generator)
    whole, expected = vae.encode(large), vae.encode(small)
    vae.limit = 64 * 64
    tiled = vae.encode(large)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() < 0.2 * whole.abs().mean()
    assert torch.equal(vae.encode(large), tiled) and torch.equal(vae.encode(small), expected)
    (line,) = said
    assert line.startswith(
        "images of 320×288 are encoded in tiles: there is no room on the GPU for a whole one, and the "
    )
    vae.limit = 10
    assert vae.decode(whole[:1]).shape == (1, 3, 320, 288)
    assert said[1] == "images of 320×288 are decoded in tiles: there is no room on the GPU for a whole one"


def test_another_error_is_an_error(vae, monkeypatch):
    vae, said = vae

    def broken(*arguments, **options):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(vae.model, "_encode", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        vae.encode(torch.zeros(1, 3, 32, 32))
    assert said == []
