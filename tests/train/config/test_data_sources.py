"""ADDRESS and ADDRESS:WEIGHT are told apart, whatever colons an address has."""

from pathlib import Path

import pytest

from train.config.data_sources import DataSource, read_sources
from train.config.train_config import TrainConfig


@pytest.mark.parametrize(
    "text, address, weight",
    [
        ("cats", "cats", 1),
        ("cats:2", "cats", 2),
        ("a/cats:0.5", "a/cats", 0.5),
        ("a:3/cats", "a:3/cats", 1),
        ("cats:.5", "cats", 0.5),
        ("cats:1e-2", "cats", 0.01),
        ("http://host:8080", "http://host:8080", 1),
        ("http://host:8080/", "http://host:8080/", 1),
        ("http://host:8080/set", "http://host:8080/set", 1),
        ("http://host:8080/set:0.25", "http://host:8080/set", 0.25),
        ("s3://bucket/set:2", "s3://bucket/set", 2),
        ("s3://bucket:0.5", "s3://bucket", 0.5),
        ("hf://datasets/a/b@main/encoded", "hf://datasets/a/b@main/encoded", 1),
        ("C:", "C:", 1),
        ("C:\\photos", "C:\\photos", 1),
        ("C:\\photos:2", "C:\\photos", 2),
        ("x:y", "x:y", 1),
        ("x:1:2", "x:1", 2),
        (":2", ":2", 1),
    ],
)
def test_a_weight_is_a_number_behind_the_last_colon_of_the_last_part(text, address, weight):
    assert read_sources("data", (text,)) == [DataSource(address, weight)]


def test_a_folder_of_the_whole_name_goes_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x:2").mkdir()
    assert read_sources("data", ("x:2", "x:2:3", "y:2")) == [("x:2", 1), ("x:2", 3), ("y", 2)]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1001", "0.0001", "1e999"])
def test_a_number_that_is_no_weight_is_refused(weight):
    with pytest.raises(
        ValueError, match=r"^prior_data: a/b:\S+: what follows the last colon is a weight and must be from 0.001"
    ):
        read_sources("prior_data", (f"a/b:{weight}",))


def config(**options: object) -> TrainConfig:
    return TrainConfig(**({"model": "m/m", "data": "a", "deepspeed": "z.json", "output_path": "run"} | options))  # type: ignore[arg-type]


def test_one_source_stands_in_config_yaml_as_it_did():
    assert config().data == ("a",) and config().to_dict()["data"] == "a"
    assert "\ndata: a\n" in config().to_yaml() and "\nprior_data: []\n" in config().to_yaml()
    several = config(data=["a", "b:0.5"])
    assert several.to_dict()["data"] == ["a", "b:0.5"] and several.data_sources == [("a", 1), ("b", 0.5)]
    assert config(loader="webdataset", data="pipe:cat a:2", max_steps=1).data_sources == [("pipe:cat a:2", 1)]
    for options in ({"data": ["a", "b"]}, {"prior_data": ["b"]}):
        with pytest.raises(ValueError, match="loader webdataset reads one set"):
            config(loader="webdataset", max_steps=1, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prior_share": 0.0}, "prior_share must be above 0"),
        ({"prior_share": 1.0}, "prior_share must be below 1"),
        ({"prior_weight": 0.0}, "prior_weight must be above 0"),
        ({"data": []}, "data must not be empty"),
        ({"data": [""]}, "data "),
    ],
)
def test_shares_and_weights_have_limits(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_options_of_a_lever_that_is_off_are_told():
    off = config(prior_share=0.3, prior_weight=0.5, prior_prompt_share=0.2, mask_min_weight=0.25)
    assert off.idle_options() == [
        "warning: prior_share 0.3 does nothing without prior_data",
        "warning: prior_prompt_share 0.2 does nothing without prior_prompt",
        "warning: prior_weight 0.5 does nothing without prior_data or prior_prompt",
        "warning: mask_min_weight 0.25 does nothing without masked_loss",
    ]
    assert not config().idle_options()
    assert not config(prior_data=["b"], prior_share=0.3, prior_weight=0.5).idle_options()
    assert not config(prior_prompt=["a dog"], prior_prompt_share=0.3, prior_weight=0.5).idle_options()
    assert not config(masked_loss=True, mask_min_weight=0.25).idle_options()
