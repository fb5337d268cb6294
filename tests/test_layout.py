"""The shape of the repository, checked by machine: import arrows, module names, scripts' `--help`, lengths, paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["qwen_image", "data_prep", "train", "demo", "bench"]
SCRIPT_FOLDERS = ["data_prep", "train", "demo", "bench"]
HELP_SECONDS = 5.0
LONGEST_FILE = 300
LONGEST_TEST = 400

# From user to used. A file of its own line may import what its package may, and what the line adds.
ARROWS: dict[str, set[str]] = {
    "qwen_image": set(),
    "data_prep": set(),
    "data_prep/encode_shards.py": {"qwen_image"},
    "train": {
        "qwen_image",
        "data_prep.shard_format.shards",
        "data_prep.shard_format.scan_tars",
        "data_prep.images.stored_pixels",
        "data_prep.encoding.encoder_facts",
    },  # no packer
    "demo": {"qwen_image", "data_prep", "train"},
    "bench": {"qwen_image", "data_prep", "train", "demo"},
}


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def scripts() -> list[Path]:
    return [file for file in python_files(*SCRIPT_FOLDERS) if '__name__ == "__main__"' in file.read_text()]


def short(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imported_modules(source: str) -> set[str]:
    """Full names of the modules a file imports anywhere, inside functions too; a relative import is ".name"."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            # `from data_prep import shards` names a module only in its second half
            modules |= {f"{name}.{alias.name}" for alias in node.names} if name in PACKAGES else {name}
    return modules


def arrow_violations(file: str, source: str) -> list[str]:
    """The imports of `file` (path from the root) that ARROWS does not allow."""
    package = file.split("/")[0]
    allowed = {package} | ARROWS[package] | ARROWS.get(file, set())
    wrong = []
    for module in sorted(imported_modules(source)):
        ours = module.split(".")[0] in PACKAGES or module.startswith(".")
        if ours and not any(module == name or module.startswith(name + ".") for name in allowed):
            wrong.append(f"{file} imports {module}")
    return wrong


def test_imports_follow_the_arrows():
    wrong = [line for file in python_files(*PACKAGES) for line in arrow_violations(short(file), file.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("qwen_image/encoders/vae.py", "def f():\n    from train.flow.objective import sigma"),
        ("qwen_image/encoders/vae.py", "import data_prep.shard_format.shards"),
        ("data_prep/images/convert.py", "from qwen_image import vae"),
        ("train/data/shard_dataset.py", "from data_prep.images.convert import decode"),
        ("train/data/shard_dataset.py", "from data_prep import images"),
        ("train/data/shard_dataset.py", "if True:\n    import demo"),
        ("train/data/shard_dataset.py", "from .flow import sigma"),
    ],
)
def test_a_forbidden_import_is_found(file: str, source: str):
    assert arrow_violations(file, source)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data_prep/encode_shards.py", "from qwen_image.encoders.vae import encode"),
        (
            "train/data/shard_dataset.py",
            "from data_prep.shard_format.shards import ShardReader\nimport torch",
        ),
        ("demo/run.py", "import train.config.train_config, data_prep.images.convert"),
    ],
)
def test_an_allowed_import_passes(file: str, source: str):
    assert not arrow_violations(file, source)


def test_no_module_hides_another():
    """`python train/x.py` puts train/ first on the path: train/wandb.py would be found instead of the real wandb."""
    taken = set(sys.stdlib_module_names) | {name for name in packages_distributions() if name not in PACKAGES}
    assert {"torch", "json", "wandb"} <= taken
    hidden = [short(file) for file in python_files(*SCRIPT_FOLDERS) if file.stem in taken and file.stem != "__init__"]
    assert not hidden, f"rename {hidden}: a module of that name exists already"


def declared_flags(source: str) -> set[str]:
    """The flags that a file declares by literal `add_argument` calls, hidden ones aside."""
    flags = set()
    for node in ast.walk(ast.parse(source)):
        call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        if call and "SUPPRESS" not in ast.unparse(node):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            flags |= {name for name in names if str(name).startswith("--")}
    return flags


def documented_flags(text: str, script: str) -> set[str]:
    """The flags in the commands of `text` that run `script`; a command goes on after a backslash or an indentation."""
    flags: set[str] = set()
    for command in re.findall(rf"(?:python|deepspeed)[^\n]*{re.escape(script)}[^\n]*(?:\n\s+-[^\n]*)*", text):
        command = command.replace("\\\n", " ").partition(script)[2].split("#")[0]
        flags |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", command))
    return flags


@pytest.fixture(scope="module")
def help_texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, float]]:
    """Exit code, output and seconds of every script's `--help`, run from a folder that has nothing to do with us."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    texts = {}
    for script in scripts():
        for _ in range(2):  # a second try when the machine was busy
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, str(script), "--help"], cwd=elsewhere, capture_output=True, text=True, timeout=60
            )
            seconds = time.perf_counter() - start
            if seconds < HELP_SECONDS:
                break
        texts[short(script)] = (done.returncode, done.stdout + done.stderr, seconds)
    return texts


def test_every_script_answers_help_quickly_from_a_foreign_folder(help_texts):
    assert help_texts
    for script, (code, text, seconds) in help_texts.items():
        assert code == 0, f"{script} --help failed:\n{text}"
        assert seconds < HELP_SECONDS, f"{script} --help took {seconds:.1f} s: import heavy libraries inside functions"


def test_help_mentions_every_flag(help_texts):
    from dataclasses import fields

    from train.config.train_config import TrainConfig

    for script, (_, text, _) in help_texts.items():
        flags = declared_flags((ROOT / script).read_text())
        if script == "train/train_lora.py":
            flags |= {f"--{field.name}" for field in fields(TrainConfig)}
        missing = sorted(flag for flag in flags if not re.search(rf"{flag}(?![\w-])", text))
        assert not missing, f"{script} --help does not mention {missing}"


def test_documented_commands_use_flags_that_exist(help_texts):
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *scripts()]
    assert documented_flags("python a/b.py X --c_d 1 \\\n    --e # --no\n", "a/b.py") == {"--c_d", "--e"}
    for document in documents:
        source = document.read_text()
        text = (ast.get_docstring(ast.parse(source)) or "") if document.suffix == ".py" else source
        for script, (_, help_text, _) in help_texts.items():
            known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_text))
            unknown = sorted(documented_flags(text, script) - known)
            assert not unknown, f"{short(document)} uses {unknown} with {script}, which has no such flag"


def test_every_script_opens_with_its_command():
    for script in scripts():
        docstring = ast.get_docstring(ast.parse(script.read_text())) or ""
        assert re.search(rf"(python|deepspeed) .*{re.escape(short(script))}", docstring), (
            f"{short(script)} does not open with a command to paste"
        )


def test_files_are_short_enough_to_read():
    limits = dict.fromkeys(python_files(*PACKAGES), LONGEST_FILE) | dict.fromkeys(python_files("tests"), LONGEST_TEST)
    lengths = {file: len(file.read_text().splitlines()) for file in limits}
    long = [f"{short(file)}: {lengths[file]} > {limit}" for file, limit in limits.items() if lengths[file] > limit]
    assert not long, f"one noun a file, split {long}"


def test_no_path_of_one_machine():
    """Nothing may depend on where somebody's home or checkout lies."""
    pattern = re.compile(r"(?<![\w.}])/(home|root|work|Users|opt)/\w+")
    kinds = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".sh", ""}
    files = [file for file in ROOT.iterdir() if file.is_file()]
    for folder in [*PACKAGES, "tests", "ds_configs", "slurm", ".ci"]:
        files += [file for file in (ROOT / folder).rglob("*") if file.is_file()]
    found = []
    for file in files:
        if file.suffix in kinds and file.name != Path(__file__).name and "__pycache__" not in file.parts:
            found += [f"{short(file)}: {match.group()}" for match in pattern.finditer(file.read_text())]
    assert not found, found
