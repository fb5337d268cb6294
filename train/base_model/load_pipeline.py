"""The frozen pipeline of a run: which components it needs, and whether its data was made for it."""

from dataclasses import replace
from pathlib import Path

from data_prep.encoding.encoder_facts import LATENTS, PROMPTS, check_encoding
from qwen_image.loading.model_files import (
    ModelSource,
    resolve_model,
)
from qwen_image.model.family import Member
from qwen_image.pipeline import QwenImagePipeline, check_prompt_width
from train.base_model.base_plan import BasePlan
from train.base_model.import_ahead import import_ahead
from train.base_model.load_transformer import load_base
from train.base_model.local_model_copy import on_local_disks
from train.base_model.online_encoder import EncoderPlace
from train.data.sample import DataSet
from train.process import start_clock
from train.process.ranks import Ranks

# Importing these takes about as long as reading the weights (bench/LOG.md).
NEEDED_NEXT = ("peft", "torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.async_compile")


def load_pipeline(
    base: BasePlan,
    dataset: DataSet,
    encoder_place: EncoderPlace,
    ranks: Ranks,
    local_model_copy: Path | None = None,
) -> QwenImagePipeline:
    """The transformer, and both encoders when the shards hold images; these go where `encoder_place` says. A collective.

    `local_model_copy`: the files are copied to this folder of each node first.

    Raises ValueError when the shards were encoded for another model, before weights are read.
    """
    start_clock.reached("plan")
    source = base.source
    check_data(source, dataset, base)
    base = on_local_disks(base, dataset.encoded, local_model_copy, ranks)
    files = resolve_model(base.source, ("transformer", "scheduler"))
    pipeline = QwenImagePipeline.from_pretrained(
        base.source,
        components=() if dataset.encoded else ("text_encoder", "vae"),
        dtype=base.dtype,
        device="cpu" if encoder_place == "cpu" else ranks.device,
        stream_text_encoder=encoder_place == "swap",
    )
    if pipeline.text_encoder is not None:
        check_prompt_width(pipeline.text_encoder, base.empty.config.joint_attention_dim)
    with import_ahead(*NEEDED_NEXT):
        transformer = load_base(base, files, pipeline.schedule, ranks)
    start_clock.reached("loading")
    return replace(pipeline, transformer=transformer, files=files)


def check_data(source: ModelSource, dataset: DataSet, base: BasePlan) -> None:
    """Refuse data for another model: pairs or none, and of encoded shards their conventions, the prompts' width, and the
    encoders if at hand."""
    if dataset.encoded:
        check_encoded(source, dataset, base.member, base.empty.config.joint_attention_dim)
    for bucket in dataset.manifest.buckets:
        base.member.check_sources(len(bucket.sources), f"{dataset.name}: each of {bucket.count} samples ({bucket})")


def check_encoded(source: ModelSource, dataset: DataSet, member: Member, prompt_width: int) -> None:
    """Of encoded shards: what was encoded, by which rules and encoders."""
    encoding = dataset.manifest.encoding or {}
    own: dict[str, str] = {"latents": LATENTS, "prompts": PROMPTS}
    if member.most_sources:
        own |= {"family": member.name, "picture_positions": source.picture_positions or "grid"}
    for component in ("vae", "text_encoder"):
        try:
            files = resolve_model(source, (component,), local_only=True)
            own[component] = files.fingerprint(component)
        except FileNotFoundError:
            continue  # training needs no encoder, so it may well lie elsewhere
    check_encoding(dataset.name, encoding, own, source.model)
    if dataset.prompt_width != prompt_width:
        raise ValueError(
            f"{dataset.name}: prompt embeddings are {dataset.prompt_width} wide, but {source.model} takes "
            f"{prompt_width}: the shards were encoded for another model"
        )
