"""How much memory cuBLAS works in: what suits the card, unless the user or determinism says otherwise."""

import os

import pytest
import torch

from train.step.speedups import choose_workspaces

NAMES = "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE"
GPU = torch.device("cuda")


@pytest.fixture
def on(monkeypatch):
    """A GPU of some compute capability; the environment without settings, and restored."""

    def card(major, **environment):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        for name in NAMES:
            monkeypatch.setenv(name, "")  # so that what is set is undone in the end
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return card


def settings():
    return tuple(os.environ.get(name) for name in NAMES)


@pytest.mark.parametrize(
    ("major", "device", "deterministic", "expected"),
    [
        (9, GPU, False, (":0:0", "0")),
        (9, GPU, True, (":4096:8", None)),  # the one of two that PyTorch accepts
        (8, GPU, False, (None, None)),
        (9, torch.device("cpu"), False, (None, None)),
    ],
)
def test_workspaces_suit_card_and_mode(on, major, device, deterministic, expected):
    on(major)
    choose_workspaces(device, deterministic)
    assert settings() == expected


def test_the_users_own_settings_stay(on):
    on(9, CUBLAS_WORKSPACE_CONFIG=":16:8", CUBLASLT_WORKSPACE_SIZE="4096")
    choose_workspaces(GPU, deterministic=False)
    assert settings() == (":16:8", "4096")
