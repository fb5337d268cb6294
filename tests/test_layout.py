"""The shape of the repository, checked by machine: packages, rooms, circles, module names, scripts' `--help`, paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["files", "qwen_image", "data_prep", "train", "demo", "bench"]  # each may import those before it
SCRIPT_FOLDERS = ["data_prep", "train", "demo", "bench"]
HELP_SECONDS = 5.0
FULLEST_ROOM = 12  # files; what a newcomer takes in at one look

# The rooms of each package from the ground up: a room imports those before it and never one after it. Files beside the
# rooms stand above them all (the commands), but for those listed here by name.
ROOMS: dict[str, list[str]] = {
    "qwen_image": [
        *("noise_schedule", "out_of_memory", "free_memory"),
        *("kernels", "model", "float8", "loading", "streaming", "encoders"),
    ],
    "data_prep": ["images", "shard_format", "sources", "packing", "encoding", "checking"],
    "train": [
        *("config", "process", "flow", "lora", "data", "loader", "step"),
        *("engine", "base_model", "fit", "saving", "watching", "reporting"),
    ],
    "demo": ["tiny_model", "pictures", "drawing"],
}
# Of the packer, training knows the format of shards, their pixels, what was said of the encoders and what captions may become:
# no more.
TRAIN_SEES = (
    *("data_prep.shard_format.", "data_prep.images.stored_pixels"),
    *("data_prep.encoding.encoder_facts", "data_prep.encoding.caption_variants"),
)


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def scripts() -> list[Path]:
    return [file for file in python_files(*SCRIPT_FOLDERS) if '__name__ == "__main__"' in file.read_text()]


def short(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def module_name(file: Path) -> str:
    return short(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_modules(source: str, modules: Iterable[str]) -> set[str]:
    """Full names of the `modules` that a file imports anywhere, inside functions too; a relative import is ".name"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            for (
                alias
            ) in node.names:  # `from data_prep.shard_format import shards` names a module only in its second half
                found.add(f"{name}.{alias.name}" if f"{name}.{alias.name}" in modules else name)
    return {name for name in found if name.startswith(".") or name.split(".")[0] in PACKAGES}


def arrows(*packages: str) -> dict[str, set[str]]:
    """From each module of ours to those it imports."""
    files = {module_name(file): file for file in python_files(*packages)}
    return {name: imported_modules(file.read_text(), files) - {name} for name, file in files.items()}


def height(module: str) -> int:
    """The floor of a module's room in its package: 0 is the ground."""
    package, *rest = module.split(".")
    rooms = ROOMS.get(package, [])
    return rooms.index(rest[0]) if rest and rest[0] in rooms else len(rooms)


def violations(user: str, used: str) -> list[str]:
    """What is wrong with module `user` importing module `used`."""
    own, other = user.split(".")[0], used.split(".")[0]
    if used.startswith("."):
        return [f"{user} imports {used}: write the whole name"]
    if PACKAGES.index(other) > PACKAGES.index(own):
        return [f"{user} imports {used}: {other} is built upon {own}"]
    if own == other and height(used) > height(user):
        return [f"{user} imports {used}: a lower room imports a higher one"]
    if own == "train" and other == "data_prep" and not used.startswith(TRAIN_SEES):
        return [f"{user} imports {used}: training reads shards, it does not pack them"]
    sizes_only = used == "qwen_image.model.family"  # at which inference takes source images; no torch in it
    if own == "data_prep" and other == "qwen_image" and not user.startswith("data_prep.encod") and not sizes_only:
        return [f"{user} imports {used}: only encoding needs the model"]
    return []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a loop: strongly connected components (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in graph[node]:
            if other not in graph:
                continue
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(group)

    for node in graph:
        if node not in order:
            visit(node)
    return found


def test_lower_rooms_never_import_higher_ones():
    graph = arrows(*PACKAGES)
    assert len(graph) > 100
    wrong = [line for user, used in graph.items() for each in sorted(used) for line in violations(user, each)]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_floor():
    """A new room must be put into ROOMS, or its arrows would go unchecked."""
    for package, rooms in ROOMS.items():
        folders = {file.parent.name for file in (ROOT / package).glob("*/__init__.py")}
        assert folders <= set(rooms), f"{package}: {sorted(folders - set(rooms))} stand in no order"


@pytest.mark.parametrize(
    ("user", "used"),
    [
        ("qwen_image.encoders.vae", "train.flow.objective"),
        ("qwen_image.model.layers", "qwen_image.pipeline"),
        ("qwen_image.kernels.padding", "qwen_image.model.layers"),
        ("data_prep.images.convert", "qwen_image.encoders.vae"),
        ("data_prep.sources.captions", "data_prep.packing.plan"),
        ("train.data.batch", "data_prep.images.convert"),
        ("train.data.batch", "demo.run"),
        ("train.data.batch", "train.step.cuda_graphs"),
        ("train.watching.metrics", "train.sample"),
        ("train.data.batch", ".draws"),
        ("files.atomic", "train.config.train_config"),
    ],
)
def test_a_forbidden_import_is_found(user: str, used: str):
    assert violations(user, used)


@pytest.mark.parametrize(
    ("user", "used"),
    [
        ("data_prep.encode_shards", "qwen_image.encoders.vae"),
        ("data_prep.make_shards", "data_prep.packing.plan"),
        ("train.data.shard_dataset", "data_prep.shard_format.shards"),
        ("train.train_lora", "train.watching.metrics"),
        ("train.watching.metrics", "train.config.train_config"),
        ("demo.run", "train.config.train_config"),
    ],
)
def test_an_allowed_import_passes(user: str, used: str):
    assert not violations(user, used)


def test_imports_inside_functions_are_seen():
    source = "def f():\n    from train.data import batch\n    import train.flow.objective"
    assert imported_modules(source, {"train.data.batch"}) == {"train.data.batch", "train.flow.objective"}


def test_no_files_import_each_other_in_a_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert not circles(arrows(*PACKAGES))


def test_no_room_is_too_full():
    rooms: dict[Path, list[str]] = {}
    for file in python_files(*PACKAGES):
        if file.name != "__init__.py":
            rooms.setdefault(file.parent, []).append(file.name)
    full = {
        short(room): len(files) for room, files in rooms.items() if len(files) > FULLEST_ROOM and room.name != "bench"
    }
    assert not full, f"rooms of more than {FULLEST_ROOM} files: {full}"


def test_no_module_or_room_hides_another():
    """`python train/x.py` puts train/ first on the path: train/wandb.py would be found instead of the real wandb."""
    taken = set(sys.stdlib_module_names) | {name for name in packages_distributions() if name not in PACKAGES}
    assert {"torch", "json", "wandb"} <= taken
    beside_scripts = [path for folder in SCRIPT_FOLDERS for path in (ROOT / folder).iterdir()]
    names = {path: path.stem for path in beside_scripts if path.suffix == ".py" or (path / "__init__.py").is_file()}
    hidden = [short(path) for path, name in names.items() if name in taken and name != "__init__"]
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


def test_no_path_of_one_machine():
    """Nothing may depend on where somebody's home or checkout lies."""
    pattern = re.compile(r"(?<![\w.}])/(home|root|work|Users|opt)/\w+")
    kinds = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".sh", ""}
    files = [file for file in ROOT.iterdir() if file.is_file() and file.name != ".git"]
    for folder in [*PACKAGES, "tests", "ds_configs", "slurm", "docs", "examples", ".ci"]:
        files += [file for file in (ROOT / folder).rglob("*") if file.is_file()]
    found = []
    for file in files:
        if file.suffix in kinds and file.name != Path(__file__).name and "__pycache__" not in file.parts:
            found += [f"{short(file)}: {match.group()}" for match in pattern.finditer(file.read_text())]
    assert not found, found
