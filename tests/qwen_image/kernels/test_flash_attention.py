"""Attention by FlashAttention 4: on the CPU around a stand-in for the library, on a Hopper GPU that has it for real."""

import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch

from qwen_image.kernels import flash_attention
from qwen_image.kernels.flash_attention import can_flash, is_hopper, is_installed
from qwen_image.model.attention import joint_attention
from tests.helpers.attention_reference import keep_mask, reference

ON_HOPPER = torch.cuda.is_available() and is_installed() and is_hopper(torch.device("cuda"))
needs_library = pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU and flash-attn-4")
DIM = 64

# Real text tokens of each sample (None: no mask), text tokens, all tokens, and heads on a GPU.
CASES = {
    "no mask": (None, 5, 19),
    "no padding": ([6, 6], 6, 16),
    "some": ([2, 5], 6, 16),
    "one sample only": ([6, 1], 6, 16),
    "all but one": ([0, 0], 30, 31),
}

GPU_CASES = {
    "no mask": (None, 64, 365, 24),
    "no padding": ([64, 64], 64, 365, 3),
    "some": ([64, 3], 64, 365, 24),
    "one block of keys": ([5, 0], 37, 37 + 48, 2),  # a backward kernel of its own
    "all but one": ([0, 0], 150, 151, 3),
    "long": ([17, 100], 128, 1152, 2),
}


def forward(query, key, value, return_lse):
    """What the library returns: output [B, Lq, H, D] and, as far as it is read here, float32 log-sum-exp [B, H, Lq]."""
    assert return_lse
    assert all(each.is_contiguous() for each in (query, key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    output = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
    return output.contiguous(), scores.logsumexp(-1).float(), None, None, None


def backward(query, key, value, output, grad, lse):
    """The gradients [B, L, H, D] of that, from the output and log-sum-exp as given."""
    assert lse.dtype == torch.float32
    assert all(each.is_contiguous() for each in (query, key, value, output, grad, lse))
    scale = query.shape[-1] ** -0.5
    weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) * scale - lse.unsqueeze(-1)).exp()
    through = torch.einsum("bqhd,bkhd->bhqk", grad, value)
    dots = (grad * output).sum(-1).transpose(1, 2).unsqueeze(-1)
    d_scores = weights * (through - dots) * scale
    return (
        torch.einsum("bhqk,bkhd->bqhd", d_scores, key).contiguous(),
        torch.einsum("bhqk,bqhd->bkhd", d_scores, query).contiguous(),
        torch.einsum("bhqk,bqhd->bkhd", weights, grad).contiguous(),
    )


@pytest.fixture
def calls(monkeypatch):
    """The library's stand-in is there and may compute in float32 on the CPU; what it was called for is written down."""
    calls = []
    library = SimpleNamespace(
        _flash_attn_fwd=lambda *x, **y: calls.append("forward") or forward(*x, **y),
        _flash_attn_bwd=lambda *x, **y: calls.append("backward") or backward(*x, **y),
    )
    monkeypatch.setattr(flash_attention, "library", lambda: library)
    monkeypatch.setattr(flash_attention, "HAS_FLASH", True)
    monkeypatch.setattr(flash_attention, "DTYPES", (torch.float32,))
    monkeypatch.setattr(flash_attention, "is_hopper", torch.compiler.assume_constant_result(lambda device: True))
    return calls


def run(function, leaves, weight, keep, first_row, dtype):
    """Output [B, H, Lq, D] where it counts and the gradients [B, L, H, D] of the leaves, all as float64 on the CPU."""
    query, key, value = (leaf.to(dtype).requires_grad_() for leaf in leaves)
    weight = weight[:, first_row:].to(dtype).transpose(1, 2)  # as in training, nothing is read from padded rows
    output = function(
        query[:, first_row:].contiguous().transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), keep
    )
    (output * weight).sum().backward()
    output = output * (weight != 0)
    return [each.detach().double().cpu() for each in (output, query.grad, key.grad, value.grad)]


def make(lengths, text, tokens, batch, heads, dim, dtype, device):
    """Leaves and weight [B, L, H, D] and a mask."""
    keep = torch.ones(batch, tokens, dtype=torch.bool) if lengths is None else keep_mask(lengths, text, tokens)
    generator = torch.Generator().manual_seed(0)
    *leaves, weight = torch.randn(4, batch, tokens, heads, dim, generator=generator).to(device, dtype)
    keep = keep.to(device)
    return leaves, weight * keep[..., None, None], keep


def by_flash(query, key, value, keep):
    assert can_flash(query, key, value)
    return joint_attention(query, key, value, keep, dense=True)


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
@pytest.mark.parametrize("image_only", [False, True])
def test_output_and_gradients_equal_the_masked_softmax(case, image_only, calls):
    lengths, text, tokens = CASES[case]
    leaves, weight, keep = make(lengths, text, tokens, 2, 3, DIM, torch.float32, "cpu")
    first_row = text if image_only else 0
    expected = run(reference, leaves, weight, keep, first_row, torch.float64)
    actual = run(by_flash, leaves, weight, None if lengths is None else keep, first_row, torch.float32)
    assert calls == ["forward", "backward"]
    # One real key among thirty zero keys: what the share is rounded by counts a thousandfold.
    tolerance = 1e-3 if case == "all but one" else 1e-5
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_it_is_not_used_where_every_bit_counts(calls):
    (query, key, value), _, keep = make([2, 5], 6, 16, 2, 1, DIM, torch.float32, "cpu")
    arguments = *(leaf.transpose(1, 2) for leaf in (query, key, value)), keep
    torch.use_deterministic_algorithms(True)
    try:
        joint_attention(*arguments, dense=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == []
    joint_attention(*arguments, dense=True)
    assert calls == ["forward"]


def test_one_compiled_graph_does_all_lengths(calls):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(by_flash, fullgraph=True, dynamic=True, backend=count)
    for tokens in (16, 19, 23):
        leaves, weight, keep = make([2, 5], 6, tokens, 2, 3, DIM, torch.float32, "cpu")
        expected = run(reference, leaves, weight, keep, 0, torch.float64)
        for one, other in zip(run(compiled, leaves, weight, keep, 0, torch.float32), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert calls == ["forward", "backward"] * 3
    assert len(graphs) == 1


@pytest.mark.parametrize("zeros", [None, [0.0, 3.0]], ids=["no padding", "padding"])
def test_the_operator_is_registered_as_the_compiler_wants_it(zeros, calls):
    query, key, value = (torch.randn(2, n, 3, DIM, requires_grad=True).transpose(1, 2) for n in (4, 9, 9))
    torch.library.opcheck(
        torch.ops.qwen_image.flash_attention,
        (query, key, value, None if zeros is None else torch.tensor(zeros)),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    output, lse = torch.ops.qwen_image.flash_attention(query, key, value, None)
    torch.library.opcheck(
        torch.ops.qwen_image.flash_attention_backward,
        tuple(each.detach() for each in (output, query, key, value, output, lse)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_what_it_cannot_do_stays_as_it_was(calls, monkeypatch):
    query = torch.randn(2, 9, 3, DIM).transpose(1, 2)
    assert can_flash(query, query, query)
    assert not can_flash(query, query, query.contiguous()), "[B, H, L, D] in memory"
    assert not can_flash(query, query.double(), query)
    assert not can_flash(*[query[..., :32]] * 3), "another head size"
    assert not can_flash(*[torch.randn(2, 9, 3, 32).transpose(1, 2)] * 3)
    monkeypatch.setattr(flash_attention, "is_hopper", is_hopper)
    assert not can_flash(query, query, query), "the CPU"
    monkeypatch.setattr(flash_attention, "is_hopper", lambda device: True)
    monkeypatch.setattr(flash_attention, "DTYPES", (torch.bfloat16, torch.float16))
    assert not can_flash(query, query, query), "float32"
    keep = keep_mask([2, 5], 6, 9)
    expected = reference(*[query.double()] * 3, keep)
    for dense in (True, False):
        actual = joint_attention(query, query, query, keep, dense)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    joint_attention(query, query, query, None, dense=True)
    query = query.bfloat16()
    assert can_flash(query, query, query)
    joint_attention(query, query, query, keep, dense=False)  # the mask was asked for
    assert calls == []
    monkeypatch.setattr(flash_attention, "HAS_FLASH", False)
    assert not can_flash(query, query, query)
    joint_attention(query, query, query, keep, dense=True)
    assert calls == []


@pytest.mark.parametrize(
    "files,installed",
    [
        ([], False),
        (["flash_attn/__init__.py", "cutlass/__init__.py"], False),  # FlashAttention 2
        (["flash_attn/cute/__init__.py"], False),  # its compiler is missing
        (["flash_attn/cute/__init__.py", "cutlass/__init__.py"], True),
        (["flash_attn/__init__.py", "flash_attn/cute/__init__.py", "cutlass/__init__.py"], True),  # both
    ],
)
def test_the_library_is_found_without_importing_it(files, installed, tmp_path, monkeypatch):
    for name in files:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise ImportError('undefined symbol')\n")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert is_installed() == installed


def test_users_do_not_see_what_its_compiler_complains_of(monkeypatch):
    interface = object()
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(interface=interface))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert flash_attention.library.__wrapped__() is interface
        for argument in ("aux_data (position 17)", "aux_data (position 21)", "mQ (position 1)"):
            message = f"Argument {argument} cannot be converted to a JitArgument for function 'f'. Its type `T` is not"
            warnings.warn(message, UserWarning, stacklevel=1)
    assert [str(each.message)[:11] for each in seen] == ["Argument mQ"]


@pytest.fixture
def library_itself(monkeypatch):
    monkeypatch.setattr(flash_attention, "HAS_FLASH", True)  # a test before may have had it distrusted


@needs_library
@pytest.mark.parametrize("image_only", [False, True])
@pytest.mark.parametrize("case", GPU_CASES, ids=list(GPU_CASES))
def test_on_a_gpu_it_is_exact(case, image_only, library_itself):
    """bf16, against float64; with a single key, whose weight is always 1, query and key have no gradient to compare with."""
    lengths, text, tokens, heads = GPU_CASES[case]
    leaves, weight, keep = make(lengths, text, tokens, 2, heads, 128, torch.bfloat16, "cuda")
    first_row = text if image_only else 0
    expected = run(reference, leaves, weight, keep, first_row, torch.float64)
    actual = run(by_flash, leaves, weight, None if lengths is None else keep, first_row, torch.bfloat16)
    for one, other in zip(actual, expected, strict=True):
        alone = case == "all but one"
        assert (one - other).norm() < (0.03 * expected[0].norm() if alone else 0.01 * other.norm())


@needs_library
def test_on_a_gpu_heads_of_64_in_float16_are_exact(library_itself):
    leaves, weight, keep = make([64, 3], 64, 365, 2, 5, 64, torch.float16, "cuda")
    expected = run(reference, leaves, weight, keep, 0, torch.float64)
    for one, other in zip(run(by_flash, leaves, weight, keep, 0, torch.float16), expected, strict=True):
        assert (one - other).norm() < 0.003 * other.norm()
