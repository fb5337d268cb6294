"""Each peer's training step at tiny size on the CPU: it trains LoRA and nothing else, and gives its memory back."""

from __future__ import annotations

import pytest

from bench.peers import PEERS, TINY, Shape, Work, main, unavailable

WORK = Work(height=64, width=32, batch=1, text_tokens=7)


@pytest.mark.parametrize("name", list(PEERS))
def test_a_step_trains_lora_alone(name: str):
    torch = pytest.importorskip("torch")
    if reason := unavailable(name):
        pytest.skip(reason)
    with PEERS[name](TINY, WORK, "cpu") as peer:
        trainable = {id(parameter) for parameter in peer.trainable}
        frozen = [parameter for parameter in peer.parameters if id(parameter) not in trainable]
        assert sum(parameter.numel() for parameter in peer.trainable) == TINY.layers * 6 * 2 * 32 * TINY.width
        assert {parameter.dtype for parameter in peer.parameters} == {torch.bfloat16}
        before_frozen = [parameter.clone() for parameter in frozen]
        before = [parameter.detach().clone() for parameter in peer.trainable]
        losses = [peer.step() for _ in range(2)]
        assert all(loss.shape == () and loss.isfinite() and not loss.requires_grad for loss in losses)
        assert losses[0] != losses[1], "noise and σ are drawn anew each step"
        # lora_B starts at zero; a step of bfloat16 may round away in lora_A. Nobody reads the last block's text output,
        # so its text queries get no gradient.
        moved = [bool(now.any()) for old, now in zip(before, peer.trainable, strict=True) if not old.any()]
        assert len(moved) == TINY.layers * 6 and moved.count(False) <= 1, f"{moved.count(False)} lora_B did not move"
        assert all(torch.equal(a, b) for a, b in zip(before_frozen, frozen, strict=True))
        assert all(parameter.grad is None for parameter in peer.parameters), "zero_grad belongs to the step"
    assert all(parameter.numel() == 0 for parameter in peer.parameters), "memory is freed though `peer` is still held"


def test_blocks_are_compiled_once_for_all():
    torch = pytest.importorskip("torch")
    if reason := unavailable("diffusers_tuned"):
        pytest.skip(reason)
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with PEERS["diffusers_tuned"](Shape(4, TINY.heads, TINY.head_dim, TINY.joint_dim), WORK, "cpu") as peer:
        peer.step()
        peer.step()
        graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 2, "one for the first block, whose input needs no gradient, one for all others"


def test_peers_do_not_disturb_one_another():
    """accelerate's precision and diffusers' attention backend are process-wide."""
    if reason := unavailable("diffusers"):
        pytest.skip(reason)
    from accelerate.state import AcceleratorState
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backend = _AttentionBackendRegistry.get_active_backend()[0]
    for name in ("diffusers_tuned", "diffusers"):
        with PEERS[name](TINY, WORK, "cpu"):
            pass
        assert _AttentionBackendRegistry.get_active_backend()[0] == backend
        assert AcceleratorState._shared_state == {}


def test_refusals(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match="one image at a time"), PEERS["diffsynth"](TINY, Work(64, 64, 2), "cpu"):
        pass
    assert main(["--tiny", "--height", "72"]) == 2
    assert "error: height and width must be positive multiples of 16, got 72×72" in capsys.readouterr().err
    assert main(["--tiny", "--batch", "2", "--peers", "diffsynth"]) == 0
    assert "diffsynth: left out" in capsys.readouterr().out
