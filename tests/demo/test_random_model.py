"""The random model with encoders: images come out of it, and its full size is the real one's."""

from pathlib import Path

from demo.random_model import write_random_encoders, write_random_model
from qwen_image.encoders.text_encoder import EncoderBytes
from qwen_image.loading.model_files import ModelSource, resolve_model
from train import sample


def test_images_come_out_of_it(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_random_model(model, layers=2, heads=1, text_dim=128)
    parameters, size = write_random_encoders(model, text_dim=128, text_layers=2, vae_dim=8)
    assert size > 2 * parameters > 2 * 152064 * 128
    words = ["--model", str(model), "--output_path", str(tmp_path / "out"), "--prompt", "a fox", "--dtype", "float32"]
    assert sample.main([*words, "--height", "32", "--width", "32", "--num_inference_steps", "2"]) == 0
    assert (tmp_path / "out" / "000-seed0.png").is_file()


def test_its_full_size_is_the_real_ones(tmp_path: Path) -> None:
    """Holes instead of weights: Qwen2.5-VL-7B's language model has 7.07 B parameters without the vocabulary head."""
    import torch

    write_random_model(tmp_path / "model", layers=1, heads=1, hollow=True)
    write_random_encoders(tmp_path / "model", hollow=True)
    files = resolve_model(ModelSource(str(tmp_path / "model")), ("text_encoder", "vae"))
    counted = EncoderBytes.of(files["text_encoder"], torch.bfloat16)
    assert counted.whole == 2 * 7_070_619_136 and 0.9e9 < counted.streamed < 1.0e9
    assert 250e6 < sum(path.stat().st_size for path in files["vae"].weights) < 260e6
