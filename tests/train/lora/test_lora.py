"""LoRA: targets, injection, and files that other programs apply with the right scale."""

import json
import os
import stat

import pytest
import torch
from diffusers import QwenImagePipeline as DiffusersPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen_image.model.sizes import TransformerConfig
from qwen_image.model.transformer import QwenImageTransformer
from qwen_image.pipeline import QwenImagePipeline, predict_velocity
from train.config.train_config import TrainConfig
from train.lora.inject import attach_lora, inject_lora, lora_parameters, set_lora_enabled
from train.lora.lora_file import read_lora, save_lora
from train.lora.spec import LoraSpec
from train.lora.targets import GROUPS, expand_groups, linear_layers, resolve_targets

ATTENTION = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def load(tiny_model, dtype=torch.float32):
    return QwenImagePipeline.from_pretrained(
        str(tiny_model), components=("transformer", "text_encoder"), dtype=dtype, device="cpu"
    )


def velocity(pipeline, seed=0):
    latents = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(seed))
    prompt = pipeline.text_encoder.encode(["a", "a longer caption"])
    with torch.no_grad():
        return predict_velocity(pipeline.transformer, latents, torch.tensor([0.3, 0.8]), prompt, 3, 4)


def diffusers_velocity(pipeline, prompt, seed=0):
    latents = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return pipeline.transformer(
            hidden_states=latents,
            timestep=(torch.tensor([0.3, 0.8]) * 1000) / 1000,
            encoder_hidden_states=prompt.embeds,
            encoder_hidden_states_mask=prompt.mask.long(),
            img_shapes=[[(1, 3, 4)]] * 2,
            return_dict=False,
        )[0]


def trained(tiny_model, spec, seed=1):
    """A model whose LoRA has moved away from zero."""
    pipeline = load(tiny_model)
    inject_lora(pipeline.transformer, spec)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_parameters(pipeline.transformer).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.05, generator=generator)
        if name.endswith("lora_magnitude_vector"):
            parameter.data.mul_(1.1)
    return pipeline


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(ATTENTION, 4, 4),
        LoraSpec(("to_q", "img_mlp.net.2", "img_in", "proj_out"), 4, 12),
        LoraSpec(("to_k", "txt_mod.1", "img_mod.1"), 9, 3, rslora=True),
    ],
    ids=["attention", "alpha", "rslora"],
)
def test_diffusers_gives_the_same_velocity_with_our_file(tiny_model, tmp_path, spec):
    ours = trained(tiny_model, spec)
    path = tmp_path / "lora.safetensors"
    save_lora(path, lora_parameters(ours.transformer), spec, {"step": "3"}, torch.float32)
    theirs = DiffusersPipeline.from_pretrained(tiny_model)
    prompt = ours.text_encoder.encode(["a", "a longer caption"])
    base = diffusers_velocity(theirs, prompt)
    theirs.load_lora_weights(path)
    expected = velocity(ours)
    assert (expected - base).abs().max() > 0.05, "the LoRA must do something"
    torch.testing.assert_close(diffusers_velocity(theirs, prompt), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_our_own_file_comes_back(tiny_model, tmp_path, dora):
    spec = LoraSpec(("to_q", "img_mlp.net.2"), 4, 8, dora=dora)
    ours = trained(tiny_model, spec)
    path = tmp_path / "lora.safetensors"
    save_lora(path, lora_parameters(ours.transformer), spec, {}, torch.float32)
    again = load(tiny_model)
    base = velocity(again)
    attach_lora(again.transformer, read_lora(path, again.transformer))
    torch.testing.assert_close(velocity(again), velocity(ours), atol=1e-5, rtol=0)
    set_lora_enabled(again.transformer, False)
    assert torch.equal(velocity(again), base)


def test_strength_scales_the_update(tiny_model, tmp_path):
    spec = LoraSpec(("proj_out",), 4, 4)  # the last layer: the output is linear in the strength
    path = tmp_path / "lora.safetensors"
    save_lora(path, lora_parameters(trained(tiny_model, spec).transformer), spec, {}, torch.float32)
    outputs = []
    for strength in (0.0, 0.5, 1.0):
        pipeline = load(tiny_model)
        attach_lora(pipeline.transformer, read_lora(path, pipeline.transformer), strength)
        outputs.append(velocity(pipeline))
    torch.testing.assert_close(outputs[1] - outputs[0], outputs[2] - outputs[1], atol=1e-5, rtol=0)
    assert (outputs[2] - outputs[0]).abs().max() > 0.01


def as_comfyui(state, alpha):
    """`diffusion_model.x.lora_up.weight` with `.alpha`, as ComfyUI's and kohya's trainers write."""
    files = {}
    for name, tensor in state.items():
        module, _, kind = name.removeprefix("transformer.").removesuffix(".weight").rpartition(".")
        files[f"diffusion_model.{module}.lora_{'down' if kind == 'lora_A' else 'up'}.weight"] = tensor
        files[f"diffusion_model.{module}.alpha"] = torch.tensor(float(alpha))
    return files


def test_other_programs_files_are_understood(tiny_model, tmp_path):
    spec = LoraSpec(("to_q", "img_mlp.net.2", "proj_out"), 4, 4)
    ours = trained(tiny_model, spec)
    own = tmp_path / "own.safetensors"
    save_lora(own, lora_parameters(ours.transformer), spec, {}, torch.float32)
    state = load_file(own)
    halved = {k: v / 2 if "lora_B" in k else v for k, v in state.items()}  # alpha 8 over rank 4 doubles it again
    flat = {}
    for name, tensor in as_comfyui(halved, 8).items():
        module, _, rest = name.removeprefix("diffusion_model.").partition(".lora_" if "lora_" in name else ".alpha")
        flat[f"lora_unet_{module.replace('.', '_')}" + ("." + "lora_" + rest if rest else ".alpha")] = tensor
    variants = {
        "comfyui": (as_comfyui(halved, 8), None),
        "kohya": (flat, None),
        "diffsynth": (
            {
                k.removeprefix("transformer.")
                .replace(".lora_", ".lora_")
                .replace("_A.", "_A.default.")
                .replace("_B.", "_B.default."): v
                for k, v in state.items()
            },
            None,
        ),
        "diffusers": (
            halved,
            {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})},
        ),
    }
    for name, (tensors, metadata) in variants.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
        again = load(tiny_model)
        attach_lora(again.transformer, read_lora(path, again.transformer))
        torch.testing.assert_close(velocity(again), velocity(ours), atol=1e-5, rtol=0, msg=name)


def test_file_has_no_alpha_and_tells_its_facts(tiny_model, tmp_path):
    spec = LoraSpec(("to_q",), 4, 8)
    path = tmp_path / "lora.safetensors"
    save_lora(path, lora_parameters(trained(tiny_model, spec).transformer), spec, {"step": "7"}, torch.bfloat16)
    with safe_open(path, "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
        dtype = file.get_tensor(names[0]).dtype
    assert all(
        n.startswith("transformer.transformer_blocks.") and n.endswith((".lora_A.weight", ".lora_B.weight"))
        for n in names
    )
    assert metadata["lora_rank"] == "4" and metadata["lora_alpha"] == "8" and metadata["step"] == "7"
    assert metadata["lora_scale_in_lora_B"] == "2.0" and dtype == torch.bfloat16


def test_a_lora_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    spec, before = LoraSpec(("to_q",), 2, 2), os.umask(0o027)
    try:
        save_lora(tmp_path / "x.safetensors", {"a.to_q.lora_A": torch.ones(2, 3)}, spec, {}, torch.float32)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_injection_changes_nothing_and_trains_lora_alone(tiny_model):
    pipeline = load(tiny_model)
    before = velocity(pipeline)
    inject_lora(pipeline.transformer, LoraSpec(ATTENTION, 4, 4))
    assert torch.equal(velocity(pipeline), before)
    trainable = {name for name, p in pipeline.transformer.named_parameters() if p.requires_grad}
    assert trainable and all(".lora_" in name for name in trainable)


def test_initial_weights_depend_on_seed_and_layer_alone(tiny_model):
    weights = []
    for targets, seed in ((("to_q",), 0), (("to_v", "to_q"), 0), (("to_q",), 1)):
        pipeline = load(tiny_model)
        inject_lora(pipeline.transformer, LoraSpec(targets, 4, 4), seed)
        weights.append(lora_parameters(pipeline.transformer)["transformer_blocks.0.attn.to_q.lora_A"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    bound = weights[0].shape[1] ** -0.5
    assert 0.9 * bound < weights[0].abs().max() <= bound


def test_the_dead_half_of_the_last_block_is_never_adapted(tiny_model):
    transformer = load(tiny_model).transformer
    names = resolve_targets(transformer, ["add_q_proj", "to_add_out", "txt_mlp.net.2", "add_k_proj"])
    assert [n for n in names if n.startswith("transformer_blocks.1.")] == ["transformer_blocks.1.attn.add_k_proj"]
    assert len([n for n in names if n.startswith("transformer_blocks.0.")]) == 4
    inject_lora(transformer, LoraSpec(("add_q_proj", "add_k_proj", "txt_mod.1"), 2, 2))
    prompt = torch.randn(1, 5, transformer.config.joint_attention_dim)
    transformer(torch.randn(1, 4, 64), torch.tensor([0.5]), prompt, None, ((2, 2),)).square().sum().backward()
    without = [name for name, p in lora_parameters(transformer).items() if p.grad is None]
    assert without == []


def test_groups_stand_for_the_layers_of_every_block(tiny_model):
    """`all` is every linear layer of the blocks; a group is what its names would be, in a LoRA's header and checkpoint too."""
    transformer = QwenImagePipeline.from_pretrained(str(tiny_model), components=("transformer",)).transformer
    in_blocks = [name for name in linear_layers(transformer) if name.startswith("transformer_blocks.")]
    assert resolve_targets(transformer, ["all"]) == in_blocks
    parts = [set(resolve_targets(transformer, [group])) for group in ("attention", "mlp", "modulation")]
    assert set.union(*parts) == set(in_blocks) and sum(map(len, parts)) == len(in_blocks)
    assert {name.split(".")[2] for name in parts[0]} == {"attn"}
    assert resolve_targets(transformer, ["mlp", "to_q", "img_mlp.net.2"]) == resolve_targets(
        transformer, [*GROUPS["mlp"], "to_q"]
    )
    assert expand_groups(["modulation", "to_q", "modulation"]) == ("img_mod.1", "txt_mod.1", "to_q")
    config = {"model": "m", "data": "d", "deepspeed": "d", "output_path": "o"}
    by_group = LoraSpec.from_config(TrainConfig(**config, lora_target_modules="mlp,to_q"))
    by_name = LoraSpec.from_config(TrainConfig(**config, lora_target_modules=[*GROUPS["mlp"], "to_q"]))
    assert by_group == by_name and "mlp" not in by_group.target_modules


def test_only_dead_layers_are_no_lora():
    with torch.device("meta"):
        transformer = QwenImageTransformer(TransformerConfig(num_layers=1))
    assert "transformer_blocks.0.attn.to_q" in resolve_targets(transformer, ["all"])  # the dead ones are left out
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.to_add_out never gets a gradient"):
        resolve_targets(transformer, ["to_add_out"])


def test_unknown_target_names_those_that_exist(tiny_model):
    transformer = load(tiny_model).transformer
    with pytest.raises(
        ValueError, match=r"no linear layer is called 'to_query'; there are .*add_k_proj.*to_q.*proj_out"
    ):
        resolve_targets(transformer, ["to_q", "to_query"])
    assert "norm_out.linear" in linear_layers(transformer)


def test_a_lora_of_another_model_is_refused(tiny_model, tmp_path):
    transformer = load(tiny_model).transformer
    path = tmp_path / "lora.safetensors"
    save_file({"transformer.single_blocks.0.to_q.lora_A.weight": torch.zeros(2, 4)}, path)
    with pytest.raises(ValueError, match="no LoRA weight of a layer that this transformer has"):
        read_lora(path, transformer)
    name = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{name}.lora_A.weight": torch.zeros(2, 7), f"{name}.lora_B.weight": torch.zeros(7, 2)}, path)
    with pytest.raises(ValueError, match="made for a 7×7 layer, but this model's is 128×128"):
        read_lora(path, transformer)
    save_file({f"{name}.lora_A.weight": torch.zeros(2, 128)}, path)
    with pytest.raises(ValueError, match="incomplete"):
        read_lora(path, transformer)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="no readable safetensors file"):
        read_lora(path, transformer)
