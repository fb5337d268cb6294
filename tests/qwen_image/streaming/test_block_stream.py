"""Streamed blocks: bit for bit the resident model's losses and gradients, whatever the home, with stale slots poisoned."""

import itertools

import pytest
import torch
import torch.distributed as dist

from demo.random_model import write_random_model
from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.loading.staged import Readers, load_staged
from qwen_image.streaming.block_layout import ALIGNMENT, BlockLayout, frozen_matrices
from qwen_image.streaming.block_store import BlockStore
from qwen_image.streaming.block_stream import BlockStream
from qwen_image.streaming.int8_storage import decode, encode
from qwen_image.streaming.stream_blocks import BlockHomes, load_streamed
from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from train.lora.inject import inject_lora, lora_parameters
from train.lora.spec import LoraSpec
from train.step.fused_projection import fuse_projections

BLOCKS = 6
GRID = [k / 10 for k in range(1, 11)]
CPU = torch.device("cpu")
TARGETS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "img_mlp.net.2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "model"
    write_random_model(folder, layers=BLOCKS, heads=1, text_dim=64)
    return resolve_model(ModelSource(str(folder)), ("transformer",))


def prepare(transformer, fused=False, checkpointed=0):
    spec = LoraSpec(TARGETS[:6] if fused else TARGETS, 4, 4.0)
    inject_lora(transformer, spec, seed=1, dtype=transformer.proj_out.weight.dtype)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in lora_parameters(transformer).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.3, generator=generator)
    if fused:
        fuse_projections(transformer)
    transformer.checkpointed_blocks = checkpointed
    return transformer


def batch(seed, transformer):
    generator = torch.Generator().manual_seed(seed)
    dtype = transformer.proj_out.weight.dtype
    latents = torch.randn(2, 12, 64, generator=generator).to(dtype)
    return latents, torch.tensor([0.3, 0.7]), torch.randn(2, 5, 64, generator=generator).to(dtype), None, ((3, 4),)


def step(transformer, seed=0):
    """Output, and the gradient of every LoRA matrix."""
    output = transformer(*batch(seed, transformer))
    trained = list(lora_parameters(transformer).values())
    return [output.detach(), *torch.autograd.grad(output.float().square().mean(), trained)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and torch.isfinite(a).all()
    assert sum(b.abs().sum() for b in expected) > 0


@pytest.mark.parametrize("checkpointed", [0, 3])
@pytest.mark.parametrize("on_device", [(), (1, 4)], ids=str)
@pytest.mark.parametrize(("float8", "fused"), [(False, False), (False, True), (True, False), (True, True)])
def test_gradients_equal_the_resident_base_bit_for_bit(files, checkpointed, on_device, float8, fused):
    options = {"base_float8": float8, "sigmas": GRID}
    resident = prepare(load_staged(files, torch.float32, CPU, **options), fused, checkpointed)
    for slots in (1, 2, 3):
        homes = BlockHomes(frozenset(on_device), slots=slots)
        streamed = prepare(load_streamed(files, torch.float32, CPU, homes, **options), fused, checkpointed)
        streamed.block_stream.poisoned = True
        assert len(streamed.block_stream.blocks) == BLOCKS - len(on_device)
        for seed in range(2):
            assert_same(step(streamed, seed), step(resident, seed))


@pytest.mark.parametrize("checkpointed", [0, 2])
def test_passes_of_every_kind_in_any_order(files, checkpointed):
    """Forward alone, two forwards before their backwards (accumulation), an aborted pass, a paused one."""
    resident = prepare(load_staged(files, torch.float32, CPU, sigmas=GRID), checkpointed=checkpointed)
    streamed = prepare(
        load_streamed(files, torch.float32, CPU, BlockHomes(slots=2), sigmas=GRID), checkpointed=checkpointed
    )
    streamed.block_stream.poisoned = True
    with torch.no_grad():
        for seed in range(2):
            assert torch.equal(streamed(*batch(seed, streamed)), resident(*batch(seed, resident)))

    def two(transformer):
        losses = [transformer(*batch(seed, transformer)).float().square().mean() for seed in (4, 5)]
        trained = list(lora_parameters(transformer).values())
        return [
            torch.stack(pair).sum(0)
            for pair in zip(*(torch.autograd.grad(loss, trained) for loss in losses), strict=True)
        ]

    assert_same(two(streamed), two(resident))
    streamed(*batch(6, streamed))  # its backward pass never comes
    assert_same(step(streamed, 7), step(resident, 7))
    before = streamed.block_stream.fetches
    with streamed.block_stream.pause():
        step(streamed, 8)
    assert streamed.block_stream.fetches == before
    assert_same(step(streamed, 9), step(resident, 9))


def test_each_pass_fetches_what_the_slots_do_not_hold(files):
    streamed = prepare(load_streamed(files, torch.float32, CPU, BlockHomes(slots=3), sigmas=GRID))
    step(streamed)
    before = streamed.block_stream.fetches
    step(streamed)
    assert streamed.block_stream.fetches - before == 2 * (BLOCKS - 3)


def test_a_stale_slot_would_show(files):
    """The tests above can fail: with contents left as they are, gradients differ."""
    resident = prepare(load_staged(files, torch.float32, CPU, sigmas=GRID))
    streamed = prepare(load_streamed(files, torch.float32, CPU, BlockHomes(slots=2), sigmas=GRID))
    expected = step(resident)
    output = streamed(*batch(0, streamed))
    streamed.block_stream.paused = True
    gradients = torch.autograd.grad(output.float().square().mean(), list(lora_parameters(streamed).values()))
    assert torch.equal(output, expected[0])
    assert not all(torch.equal(a, b) for a, b in zip(gradients, expected[1:], strict=True))


@pytest.mark.parametrize("on_device", [(), (1, 4)], ids=str)
def test_int8_storage_is_what_it_decodes_to(files, on_device):
    """The streamed model equals a resident one whose matrices were coded and decoded; and that is near the exact one."""
    exact = load_staged(files, torch.float32, CPU, sigmas=GRID)
    rounded = load_staged(files, torch.float32, CPU, sigmas=GRID)
    for block in rounded.transformer_blocks:
        for _, parameter in frozen_matrices(block):
            decode(*encode(parameter.data.clone()), parameter.data)
    homes = BlockHomes(frozenset(on_device), storage="int8", slots=2)
    streamed = load_streamed(files, torch.float32, CPU, homes, sigmas=GRID)
    streamed.block_stream.poisoned = True
    expected = step(prepare(rounded))
    assert_same(step(prepare(streamed)), expected)
    error = (step(prepare(exact))[0] - expected[0]).norm() / expected[0].norm()
    assert 0 < error < 0.02
    assert streamed.block_stream.store.slot_size() < 0.3 * streamed.block_stream.slots[0].numel()  # float32 here


@pytest.mark.parametrize("kind", ["normal", "student"])
def test_int8_groups_err_less_than_rows_of_float8(kind):
    from qwen_image.float8.scaled_rows import quantize_rows

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 1024, generator=generator) * 0.02
    if kind == "student":  # three degrees of freedom: normal over the root of a chi-square / 3
        weight /= (torch.randn(3, 512, 1024, generator=generator).square().mean(0)).sqrt()
    inputs = torch.randn(64, 1024, generator=generator) * (1 + 50 * (torch.rand(1024, generator=generator) < 0.005))
    exact = inputs @ weight.T
    coded = torch.empty_like(weight)
    decode(*encode(weight), coded)
    values, scale = quantize_rows(weight)
    errors = [((inputs @ w.T - exact).norm() / exact.norm()).item() for w in (coded, values.float() * scale)]
    assert errors[0] < 0.5 * errors[1]
    assert errors[0] < 0.015


def test_zeros_and_odd_widths_survive_int8():
    weight = torch.zeros(3, 40)
    weight[1] = torch.linspace(-1, 1, 40)
    coded = torch.empty_like(weight)
    decode(*encode(weight), coded)
    assert torch.equal(coded[0], weight[0]) and (coded - weight).abs().max() < 1 / 127


def test_matrices_of_a_fused_projection_lie_side_by_side():
    shape, dtype = torch.Size((8, 16)), torch.bfloat16
    names = ["attn.to_q.weight", "attn.to_k.weight", "attn.to_out.0.weight", "img_mlp.net.0.proj.weight"]
    layout = BlockLayout.of(dict.fromkeys(names, (shape, dtype)))
    offsets = [piece.offset for piece in layout.pieces]
    assert offsets[1] == offsets[0] + 256 and all(offset % ALIGNMENT == 0 for offset in (offsets[0], *offsets[2:]))
    flat = torch.zeros(layout.size, dtype=torch.uint8)
    views = layout.views(flat)
    flat.fill_(1)
    assert all(view._version == 0 and (view.view(torch.uint8) == 1).all() for view in views.values())


def test_a_fused_projection_of_a_streamed_block_copies_nothing(files):
    streamed = prepare(load_streamed(files, torch.float32, CPU, BlockHomes(), sigmas=GRID), fused=True)
    stream = streamed.block_stream
    slots = {slot.untyped_storage().data_ptr() for slot in stream.slots}
    for block in streamed.transformer_blocks:
        for projection in (block.attn.image_projection, block.attn.text_projection):
            assert projection.weight.untyped_storage().data_ptr() in slots


def on_ranks(files, folder):
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(world)))
    results = []
    for host, float8, storage in itertools.product((False, True), (False, True), ("computed", "int8")):
        if float8 and storage == "int8":
            continue
        homes = BlockHomes(group=group, host=host, storage=storage, slots=2)
        options = {"base_float8": float8, "sigmas": GRID, "readers": Readers(group)}
        streamed = load_streamed(files, torch.float32, CPU, homes, **options)
        streamed.block_stream.poisoned = True
        whole = sum(layout.size for layout in streamed.block_stream.layouts.values())
        held = sum(part.numel() for part in streamed.block_stream.store.parts.values())
        assert held <= whole / world + 1000 * BLOCKS
        results.append(step(prepare(streamed)))
    torch.save(results, folder / f"{rank}.pt")


@pytest.mark.parametrize("world", [2, 3])
def test_parts_over_ranks_give_the_whole(files, tmp_path, world):
    run_ranks(world, on_ranks, files, tmp_path)
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt")
        plain, float8 = (
            step(prepare(load_staged(files, torch.float32, CPU, base_float8=each, sigmas=GRID)))
            for each in (False, True)
        )
        int8 = step(prepare(load_streamed(files, torch.float32, CPU, BlockHomes(storage="int8"), sigmas=GRID)))
        for result, expected in zip(found, [plain, int8, float8] * 2, strict=True):
            assert_same(result, expected)


def failing(files, folder):
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(world)))

    def change(name, weight):
        if name.startswith("transformer_blocks.3."):
            raise OSError("the disk is gone")
        return weight

    try:
        load_staged(files, torch.float32, CPU, change=change, readers=Readers(group))
    except OSError as error:
        (folder / f"{rank}.txt").write_text(str(error))


def test_all_ranks_end_when_one_cannot_read(files, tmp_path):
    run_ranks(2, failing, files, tmp_path)
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert all("the disk is gone" in text for text in texts)


def test_the_store_pads_unequal_parts():
    store = BlockStore(CPU, {0: 10, 4: 7})
    for block, size in ((0, 10), (4, 7)):
        store.put(block, torch.arange(size, dtype=torch.uint8) + block)
    into = torch.zeros(store.slot_size(), dtype=torch.uint8)
    store.fetch(4, into)
    assert into[:7].tolist() == list(range(4, 11))


def test_an_owner_is_checked_at_every_entry():
    layout = BlockLayout.of({"weight": (torch.Size((2, 2)), torch.float32)})
    store = BlockStore(CPU, {0: layout.size, 1: layout.size})
    for block in (0, 1):
        store.put(block, torch.full((layout.size,), block, dtype=torch.uint8))
    stream = BlockStream({0: layout, 1: layout}, store, CPU, slots=1)
    stream.require(0, +1)
    stream._refill = lambda block: None
    with pytest.raises(AssertionError, match="slot 0 holds block 0, not 1"):
        stream.require(1, +1)
