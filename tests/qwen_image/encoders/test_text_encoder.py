"""Loading the text encoder: transformers' own embeddings, every spelling of its file, and nothing but its file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from qwen_image.encoders import encoder_room
from qwen_image.encoders.text_encoder import EncoderBytes, TextEncoder, language_model_name
from qwen_image.encoders.vae import VAE
from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.pipeline import QwenImagePipeline

CAPTIONS = ["a", "a longer caption with more words", ""]


def load(model, dtype=torch.float32, **paths):
    files = resolve_model(ModelSource(str(model), **paths), ("text_encoder", "tokenizer"))
    return TextEncoder.from_files(files["text_encoder"], files["tokenizer"], dtype, "cpu")


@pytest.fixture(scope="module")
def state(tiny_model):
    (file,) = (tiny_model / "text_encoder").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embeddings_are_bit_for_bit_transformers(tiny_model, dtype):
    ours = load(tiny_model, dtype)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tiny_model / "text_encoder", dtype=dtype
    ).model.language_model
    assert {p.dtype for p in ours.language_model.parameters()} == {dtype}
    assert not any(tensor.is_meta for tensor in (*ours.language_model.parameters(), *ours.language_model.buffers()))
    ids, mask = ours.tokenize(CAPTIONS)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        actual = ours.language_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.equal(actual, expected)


SPELLINGS = {  # of the language model, the vision tower, the vocabulary head
    "transformers 5": ("model.language_model.", "model.visual.", "lm_head."),
    "transformers 4, ComfyUI": ("model.", "visual.", "lm_head."),
    "language model alone": ("", None, None),
    "language_model.model": ("language_model.model.", "visual.", "language_model.lm_head."),
}


def spelled(state, spelling):
    language, vision, head = SPELLINGS[spelling]
    found = {}
    for name, tensor in state.items():
        own = language_model_name(name)
        if own is not None:
            found[language + own] = tensor
        elif "visual." in name and vision is not None:
            found[vision + name.partition("visual.")[2]] = tensor
        elif "lm_head." in name and head is not None:
            found[head + name.partition("lm_head.")[2]] = tensor
    return found


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_embeddings(tiny_model, state, tmp_path, spelling):
    path = tmp_path / "text_encoder.safetensors"
    save_file(spelled(state, spelling), path)
    expected, actual = load(tiny_model).encode(CAPTIONS), load(tiny_model, text_encoder_path=str(path)).encode(CAPTIONS)
    assert torch.equal(actual.embeds, expected.embeds)


def as_comfyui_fp8(state):
    """`qwen_2.5_vl_7b_fp8_scaled`: linear weights in float8 with one scale each, names of transformers 4."""
    found = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in spelled(state, "transformers 4, ComfyUI").items():
        found[name] = tensor
        if name.endswith("proj.weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            found[name] = (tensor / scale).to(torch.float8_e4m3fn)
            found[name.removesuffix(".weight") + ".scale_weight"] = scale
            found[name.removesuffix(".weight") + ".scale_input"] = torch.ones(())
    return found


def test_comfyuis_scaled_float8_file_gives_nearly_the_same_embeddings(tiny_model, state, tmp_path):
    path = tmp_path / "qwen_2.5_vl_7b_fp8_scaled.safetensors"
    save_file(as_comfyui_fp8(state), path)
    expected, actual = load(tiny_model).encode(CAPTIONS), load(tiny_model, text_encoder_path=str(path)).encode(CAPTIONS)
    cosine = torch.nn.functional.cosine_similarity(actual.embeds.flatten(), expected.embeds.flatten(), dim=0)
    assert cosine > 0.99, "3 bits of mantissa; 0.17 without the scales"
    file, exact = load_file(path), tmp_path / "exact.safetensors"
    for name in [name for name in file if name.endswith(".scale_weight")]:
        weight = name.replace("scale_weight", "weight")
        file[weight] = file[weight].float() * file[name]
    save_file({name: tensor for name, tensor in file.items() if "scale" not in name}, exact)
    assert torch.equal(actual.embeds, load(tiny_model, text_encoder_path=str(exact)).encode(CAPTIONS).embeds)
    stripped = {name: tensor for name, tensor in as_comfyui_fp8(state).items() if "scale" not in name}
    save_file(stripped, path)
    with pytest.raises(ValueError, match="is float8 without a scale, so its values are lost or off"):
        load(tiny_model, text_encoder_path=str(path))


def damage_vae(state):
    return {"decoder.conv_in.weight": torch.ones(2, 2)}


def damage_transformer(state):
    return {"transformer_blocks.0.attn.to_q.weight": torch.ones(2, 2)}


def damage_layer_missing(state):
    return {name: tensor for name, tensor in state.items() if ".layers.1." not in name}


def damage_width(state):
    return {
        name: torch.cat([tensor, tensor], -1) if "embed_tokens" in name else tensor for name, tensor in state.items()
    }


def damage_nan(state):
    return {name: tensor * torch.nan if name.endswith("norm.weight") else tensor for name, tensor in state.items()}


def damage_two_spellings(state):
    return spelled(state, "transformers 5") | spelled(state, "transformers 4, ComfyUI")


def damage_more(state):
    return spelled(state, "transformers 5") | {"model.language_model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}


@pytest.mark.parametrize(
    "damage,message",
    [
        (damage_vae, r"tensors missing .* 1 unknown \(first decoder.conv_in.weight\)"),
        (damage_transformer, "tensors missing"),
        (damage_layer_missing, r"tensors missing \(first layers.1."),
        (damage_width, "has shape .* but the configuration says"),
        (damage_nan, "has values that are NaN or infinite"),
        (damage_two_spellings, "are two spellings of one weight"),
        (damage_more, r"1 unknown \(first model.language_model.layers.9"),
    ],
)
def test_another_models_file_is_refused(tiny_model, state, tmp_path, damage, message):
    path = tmp_path / "foreign.safetensors"
    save_file({name: tensor.clone() for name, tensor in damage(state).items()}, path)
    with pytest.raises(ValueError, match=message) as error:
        load(tiny_model, text_encoder_path=str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_vae_is_compared_too(tiny_model, state, tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file(state, path)
    files = resolve_model(ModelSource(str(tiny_model), vae_path=str(path)), ("vae",))
    with pytest.raises(ValueError, match="these weights are not this model's"):
        VAE.from_files(files["vae"], torch.float32, "cpu")


def test_another_kind_of_configuration_is_refused(tiny_model, tmp_path):
    shutil.copytree(tiny_model / "text_encoder", tmp_path / "text_encoder")
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "qwen3_vl"}))
    with pytest.raises(ValueError, match="says model_type 'qwen3_vl'; the text encoder is a qwen2_5_vl"):
        load(tiny_model, text_encoder_path=str(tmp_path / "text_encoder"))


def test_a_tokenizer_with_more_tokens_than_the_encoder_knows_is_refused(tiny_model, tmp_path):
    shutil.copytree(tiny_model / "text_encoder", tmp_path / "text_encoder")
    config = tmp_path / "text_encoder" / "config.json"
    content = json.loads(config.read_text())
    content["text_config"]["vocab_size"] = 100
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokens, the text encoder knows 100: tokenizer and text encoder belong"):
        load(tiny_model, text_encoder_path=str(tmp_path / "text_encoder"))


def test_an_encoder_of_another_width_is_refused(tiny_model, tmp_path):
    from demo.tiny_model import build_tiny_model

    other = build_tiny_model(tmp_path / "other", text_dim=128)
    paths = {"text_encoder_path": str(other / "text_encoder"), "tokenizer_path": str(other / "tokenizer")}
    with pytest.raises(ValueError, match="makes prompt embeddings 128 wide, but the transformer takes 64"):
        QwenImagePipeline.from_pretrained(ModelSource(str(tiny_model), **paths), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_layers_give_the_same_embeddings_from_fewer_bytes(tiny_model, dtype):
    files = resolve_model(ModelSource(str(tiny_model)), ("text_encoder", "tokenizer"))
    places = files["text_encoder"], files["tokenizer"], dtype, "cpu"
    whole, streamed = (TextEncoder.from_files(*places, streamed=streamed) for streamed in (False, True))
    streamed.streamed.stream.poisoned = True
    for _ in range(2):
        for a, b in zip(whole.encode_list(CAPTIONS), streamed.encode_list(CAPTIONS), strict=True):
            assert torch.equal(a, b)
    counted = EncoderBytes.of(files["text_encoder"], dtype)
    assert counted.whole == sum(p.nbytes for p in whole.language_model.parameters())
    model, stream = streamed.language_model, streamed.streamed.stream
    there = stream.slot_bytes + sum(p.nbytes for p in model.parameters() if p.ndim == 1)
    assert counted.streamed == pytest.approx(there, rel=0.1) and stream.fetches >= 2 * len(model.layers) - 2


def test_a_card_without_room_for_it_streams_it_and_a_smaller_one_refuses(tiny_model, monkeypatch):
    component = resolve_model(ModelSource(str(tiny_model)), ("text_encoder",))["text_encoder"]
    text, card = EncoderBytes.of(component, torch.bfloat16), torch.device("cuda", 0)
    monkeypatch.setattr(encoder_room, "MARGIN_BYTES", 0)

    def line(free: int) -> str | None:
        monkeypatch.setattr(encoder_room, "device_free_bytes", lambda device: free)
        return encoder_room.streaming_line(component, torch.bfloat16, 10, card, beside=1000)

    work = 10 * text.token + 1000
    assert line(int((text.whole + work) * 1.05)) is None
    assert "layers come from host memory one after the other" in line(int((text.streamed + work) * 1.05))
    with pytest.raises(ValueError, match=r"its layers one after the other, takes .* are free: end other"):
        line((text.streamed + work) // 2)
    assert encoder_room.streaming_line(component, torch.bfloat16, 10, torch.device("cpu")) is None
