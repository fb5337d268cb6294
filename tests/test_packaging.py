"""What a wheel holds: every module that the checkout has, the DeepSpeed files, commands that exist; nothing loose."""

import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

import qwen_image_lora

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WHEEL = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]


def test_every_room_lies_in_the_one_folder_of_the_wheel():
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"bench", "demo"}
    assert rooms | {"ds_configs"} == set(WHEEL["only-include"])
    moved = set(WHEEL["only-include"]) - {"qwen_image_lora"}
    assert WHEEL["sources"] == {name: f"qwen_image_lora/{name}" for name in moved}


def test_every_folder_of_modules_is_a_package():
    """A folder without __init__.py would be a namespace, in which another distribution's files may lie."""
    for room in WHEEL["only-include"]:
        for file in (ROOT / room).rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), file


@pytest.mark.parametrize(("command", "target"), PROJECT["project"]["scripts"].items())
def test_a_command_is_the_script_of_its_name(
    command: str, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    module, _, function = target.partition(":")
    assert module == "qwen_image_lora" and command == f"qwen-image-lora-{function.replace('_', '-')}"
    monkeypatch.setattr("sys.argv", [command, "--help"])
    with pytest.raises(SystemExit) as ended:
        getattr(qwen_image_lora, function)()
    assert (ended.value.code == 0 and "--output_path" in capsys.readouterr().out) or function in (
        "check_shards",
        "convert",
        "report",
    )


def test_dependencies_stand_in_one_place():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["-e ."]
    names = {text.split(">")[0].split("=")[0].lower() for text in PROJECT["project"]["dependencies"]}
    assert {"pydantic", "jinja2", "torch", "deepspeed", "wandb"} <= names


def test_the_wheel_holds_what_is_no_module_too(tmp_path: Path):
    """Templates, style sheets and scripts of the reports."""
    builders = pytest.importorskip(
        "hatchling.builders.wheel", reason="hatchling builds the wheel: pip install hatchling"
    )
    with ZipFile(
        next(iter(builders.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])))
    ) as wheel:
        held = set(wheel.namelist())
    pages = [*ROOT.glob("train/*/*.[chj]*s*"), *ROOT.glob("*/*/*.html"), *ROOT.glob("ds_configs/*.json")]
    assert {page.suffix for page in pages} >= {".html", ".css", ".js", ".json"}
    assert {f"qwen_image_lora/{page.relative_to(ROOT).as_posix()}" for page in pages} <= held
