"""Finding and reading checkpoints: folders, single files, globs, and everything that is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.pipeline import QwenImagePipeline, load_transformer


@pytest.fixture
def copy(tiny_model, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def weights_of(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def load(model, **paths):
    return QwenImagePipeline.from_pretrained(
        ModelSource(str(model), **paths), components=("transformer",), dtype=torch.float32
    ).transformer


def assert_loaded(transformer, weights):
    state = transformer.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_folder(tiny_model):
    assert_loaded(load(tiny_model), weights_of(tiny_model))


def test_sharded_folder(copy):
    weights = weights_of(copy)
    names = sorted(weights)
    folder = copy / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: weights[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert_loaded(load(copy), weights)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 weight files are missing, first b\.safetensors"):
        load(copy)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
def test_single_file_and_glob(copy, tmp_path, prefix):
    weights = {name: tensor + 1 for name, tensor in weights_of(copy).items()}
    names = sorted(weights)
    save_file({prefix + name: weights[name] for name in names[:9]}, tmp_path / "one-1.safetensors")
    save_file({prefix + name: weights[name] for name in names[9:]}, tmp_path / "one-2.safetensors")
    assert_loaded(load(copy, transformer_path=str(tmp_path / "one-*.safetensors")), weights)
    save_file({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "all.safetensors")
    assert_loaded(load(copy, transformer_path=str(tmp_path / "all.safetensors")), weights)


def test_weights_are_cast_one_by_one(tiny_model):
    transformer = load_transformer(resolve_model(ModelSource(str(tiny_model))), torch.bfloat16)
    weights = weights_of(tiny_model)
    assert all(torch.equal(p, weights[name].bfloat16()) for name, p in transformer.named_parameters())


def test_fingerprint_tells_trained_models_of_one_shape_apart(copy):
    def fingerprint():
        return resolve_model(ModelSource(str(copy))).fingerprint("transformer")

    first = fingerprint()
    assert first == fingerprint()
    weights = weights_of(copy)
    save_file(
        {name: tensor * 1.01 for name, tensor in weights.items()},
        copy / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    assert first != fingerprint()


def damage_missing_component(model):
    shutil.rmtree(model / "vae")
    return "component vae/ is missing"


def damage_no_index(model):
    (model / "model_index.json").unlink()
    return "model_index.json is missing"


def damage_flux(model):
    edit_json(model / "model_index.json", _class_name="FluxPipeline")
    return "is a FluxPipeline"


def damage_other_transformer(model):
    edit_json(model / "transformer" / "config.json", _class_name="QwenImage21Transformer2DModel")
    return (
        "is not of Qwen-Image's transformer, whose _class_name is QwenImageTransformer2DModel: it is a QwenImage21Trans"
    )


def damage_transformer_without_class(model):
    (model / "transformer" / "config.json").write_text('{"hidden_size": 4, "model_type": "qwen2_5_vl"}')
    return "no _class_name, but the model_type qwen2_5_vl: it is a model of transformers"


def damage_transformer_config(model):
    (model / "transformer" / "config.json").write_text("[]")
    return r"transformer/config\.json holds a list and should hold an object"


def damage_schedule(model):
    (model / "scheduler" / "scheduler_config.json").write_text("{")
    return r"scheduler_config\.json is no readable JSON"


def damage_contradiction(model):
    edit_json(model / "transformer" / "config.json", zero_cond_t=True)
    return "zero_cond_t is set, which marks Qwen-Image-Edit-2511, but .* names a QwenImagePipeline: say --model_family"


def damage_layered(model):
    edit_json(model / "transformer" / "config.json", use_layer3d_rope=True)
    return "use_layer3d_rope is set, which marks Qwen-Image-Layered"


def damage_shape(model):
    edit_json(model / "transformer" / "config.json", joint_attention_dim=48)
    return "configuration and weights belong to different models"


def damage_fewer_blocks(model):
    edit_json(model / "transformer" / "config.json", num_layers=1)
    return r"weights are not this model's: 0 tensors missing, \d+ unknown \(first transformer_blocks.1"


def damage_more_blocks(model):
    edit_json(model / "transformer" / "config.json", num_layers=3)
    return r"\d+ tensors missing \(first transformer_blocks.2"


def damage_truncated(model):
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    return "no readable safetensors file"


def damage_no_weights(model):
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    return "no .safetensors file found"


def damage_vae(model):
    edit_json(model / "vae" / "config.json", _class_name="AutoencoderKL")
    return "is not of Qwen-Image's VAE, whose _class_name is AutoencoderKLQwenImage: it is a AutoencoderKL"


def damage_vae_without_class(model):
    (model / "vae" / "config.json").write_text('{"z_dim": 16, "base_dim": 96}')
    return r"vae/config\.json is not of Qwen-Image's VAE, .* it has no _class_name, only base_dim, z_dim"


def damage_vae_without_config(model):
    (model / "vae" / "config.json").unlink()
    return r"vae/config\.json is missing; the VAE is AutoencoderKLQwenImage in diffusers' layout"


def index_of_weights(model, content):
    (model / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(content)


def damage_weights_elsewhere(model):
    outside = shutil.copy(model / "transformer" / "diffusion_pytorch_model.safetensors", model / "x.safetensors")
    assert outside.is_file()
    index_of_weights(model, json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    return r"index\.json is damaged or not to be trusted: the file name '\.\./x\.safetensors' in it leads to another"


def damage_weights_of_no_name(model):
    index_of_weights(model, json.dumps({"weight_map": {"a": 3}}))
    return "is a int, not text"


def damage_no_weight_map(model):
    index_of_weights(model, "{}")
    return r"index\.json has no weight_map"


def damage_index_of_no_object(model):
    index_of_weights(model, "[]")
    return r"index\.json holds a list and should hold an object"


def damage_model_index(model):
    (model / "model_index.json").write_bytes(b"{\xff")
    return r"model_index\.json is no readable JSON"


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__.removeprefix("damage_"))
def test_what_is_no_qwen_image_is_refused_in_one_line(copy, damage):
    message = damage(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        QwenImagePipeline.from_pretrained(str(copy), components=("transformer", "vae"), dtype=torch.float32)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "model,message",
    [
        ("/no/such/folder", "model folder /no/such/folder does not exist"),
        ("./missing", "does not exist; give a folder"),
        ("Qwen/Qwen-Image-2.1", "is not supported: only Qwen-Image, Qwen-Image-2512 and Qwen-Image-Edit"),
        ("Qwen/Qwen-Image-Layered", "is not supported"),
        ("nobody/no-such-model", "is no local folder and could not be fetched from the hub"),
    ],
)
def test_models_that_cannot_be_found(model, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        resolve_model(ModelSource(model))


def test_hub_id_takes_the_snapshot_and_its_commit(tiny_model, tmp_path, monkeypatch):
    """The hub itself is not reached here: huggingface_hub's download is replaced by a folder of its layout."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = shutil.copytree(tiny_model, tmp_path / "snapshots" / commit)
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    files = resolve_model(ModelSource("Qwen/Qwen-Image", revision="main"), ("transformer", "scheduler"))
    assert files.name == "Qwen/Qwen-Image" and files.revision == commit
    assert asked["repo"] == "Qwen/Qwen-Image" and asked["revision"] == "main"
    assert "transformer/*.safetensors" in asked["allow_patterns"]
    assert "transformer/config.json" in asked["allow_patterns"]
    assert not any("vae" in pattern or "text_encoder" in pattern for pattern in asked["allow_patterns"])


def test_a_path_that_matches_nothing(tiny_model):
    with pytest.raises(FileNotFoundError, match=r"--transformer_path /no/file-\*\.safetensors matches no file"):
        resolve_model(ModelSource(str(tiny_model), transformer_path="/no/file-*.safetensors"))


@pytest.mark.parametrize(
    "pipeline,zero_cond_t,name",
    [
        ("QwenImagePipeline", False, "Qwen-Image"),
        ("QwenImageImg2ImgPipeline", None, "Qwen-Image"),
        ("QwenImageEditPipeline", False, "Qwen-Image-Edit"),
        ("QwenImageEditInpaintPipeline", None, "Qwen-Image-Edit"),
        ("QwenImageEditPlusPipeline", False, "Qwen-Image-Edit-2509"),
        ("QwenImageEditPlusPipeline", None, "Qwen-Image-Edit-2509"),
        ("QwenImageEditPlusPipeline", True, "Qwen-Image-Edit-2511"),
    ],
)
def test_the_member_of_the_family_is_recognized_by_the_folders_files(copy, pipeline, zero_cond_t, name):
    edit_json(copy / "model_index.json", _class_name=pipeline)
    config = copy / "transformer" / "config.json"
    content = json.loads(config.read_text())
    content.pop("zero_cond_t", None)
    config.write_text(json.dumps(content | ({} if zero_cond_t is None else {"zero_cond_t": zero_cond_t})))
    for components in (("transformer",), ("text_encoder", "tokenizer", "vae")):
        assert resolve_model(ModelSource(str(copy)), components).member.name == name
    transformer = QwenImagePipeline.from_pretrained(str(copy), components=("transformer",)).transformer
    assert transformer.config.zero_cond_t == bool(zero_cond_t)


def test_encoders_alone_cannot_tell_2509_from_2511(copy):
    edit_json(copy / "model_index.json", _class_name="QwenImageEditPlusPipeline")
    shutil.rmtree(copy / "transformer")
    with pytest.raises(FileNotFoundError, match="say --model_family edit-2509 or edit-2511"):
        resolve_model(ModelSource(str(copy)), ("vae",))
    files = resolve_model(ModelSource(str(copy), model_family="edit-2511"), ("vae",))
    assert files.member.name == "Qwen-Image-Edit-2511"


def test_a_single_file_is_what_the_flag_or_comfyuis_mark_says(copy, tmp_path):
    weights = {f"model.diffusion_model.{name}": tensor for name, tensor in weights_of(copy).items()}
    plain, marked = tmp_path / "edit.safetensors", tmp_path / "edit_2511.safetensors"
    save_file(weights, plain)
    save_file(weights | {"model.diffusion_model.__index_timestep_zero__": torch.empty(0)}, marked)

    def member(path, family=None):
        source = ModelSource(str(copy), model_family=family, transformer_path=str(path))
        return resolve_model(source, ("transformer",)).member.name

    assert member(plain) == member(plain, "auto") == "Qwen-Image"
    assert member(plain, "edit-2509") == "Qwen-Image-Edit-2509"
    assert member(marked) == member(marked, "edit-2511") == "Qwen-Image-Edit-2511"
    with pytest.raises(
        ValueError, match="__index_timestep_zero__, which marks Qwen-Image-Edit-2511, but --model_family"
    ):
        member(marked, "edit-2509")
    for path, family, zero_cond_t in ((marked, None, True), (plain, "edit-2511", True), (plain, "edit", False)):
        transformer = load(copy, transformer_path=str(path), model_family=family)
        assert transformer.config.zero_cond_t == zero_cond_t
        assert_loaded(transformer, weights_of(copy))
