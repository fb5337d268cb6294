"""What all tests share: no network, one thread, and models and data built once for the whole session."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# The same examples each time, so that a failure is the change's own. New ones: pytest --hypothesis-profile default
hypothesis.settings.load_profile("ci")

# Before torch and the tokenizers are imported; child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete model of the real classes and random weights (float32, seed 0). Don't write into it."""
    import torch

    from demo.tiny_model import build_tiny_model

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return build_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tiny_edit_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By --model_family: folders of edit models of the real classes with equal random weights. Don't write into them."""
    import shutil

    from demo.tiny_model import build_tiny_model, make_edit_model
    from qwen_image.model.family import MEMBERS

    folder = tmp_path_factory.mktemp("tiny_edit")
    models = {"edit": build_tiny_model(folder / "edit", family="edit")}
    for family in ("edit-2509", "edit-2511"):
        models[family] = shutil.copytree(models["edit"], folder / family)
        make_edit_model(models[family], MEMBERS[family])
    return models


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transformer and scheduler alone, one block of width 128: any encoded shards of width 64 fit. Don't write into it."""
    from demo.random_model import write_random_model

    folder = tmp_path_factory.mktemp("small_model") / "random"
    write_random_model(folder, layers=1, heads=1, text_dim=64)
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded shards for `small_model`: 12 samples in two buckets, prompts of three lengths. Don't write into it."""
    from demo.random_model import write_random_encoded

    folder = tmp_path_factory.mktemp("small_data") / "encoded"
    return write_random_encoded(folder, 12, 32, 32, prompt_tokens=6, text_dim=64, buckets=2)


@pytest.fixture(autouse=True)
def signal_handlers_as_before() -> Iterator[None]:
    """A training run in this process handles SIGTERM; children of later tests would inherit that, and never die of it."""
    signal_numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in signal_numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def process_group_as_before() -> Iterator[None]:
    """DeepSpeed can't join a second group in one process: whoever ended the first would break each later test that trains."""

    def ended() -> bool:
        comm, dist = sys.modules.get("deepspeed.comm.comm"), sys.modules.get("torch.distributed")
        return getattr(comm, "cdb", None) is not None and dist is not None and not dist.is_initialized()

    before = ended()
    yield
    assert before or not ended(), "this test has ended the process group: run what does in a process of its own"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork ranks come first: later ones train in this process, whose process group the forks would inherit."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(0))
    items.sort(key=lambda item: not hasattr(getattr(item, "module", None), "run_ranks"))
