"""What the tests of the base's homes share."""

import pytest

from demo.random_model import write_random_encoded, write_random_model


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("homes")
    write_random_model(folder / "model", layers=5, heads=1, text_dim=64)
    data = write_random_encoded(folder / "data", 12, 32, 32, prompt_tokens=6, text_dim=64, buckets=2)
    flags = ["--model", str(folder / "model"), "--data", str(data), "--dtype", "float32", "--lora_rank", "3"]
    flags += ["--learning_rate", "2e-3", "--num_workers", "0", "--log_steps", "1", "--wandb_mode", "disabled"]
    return [*flags, "--save_steps", "0", "--validation_samples", "2", "--validation_steps", "3"]
