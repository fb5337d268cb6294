"""What the documents promise, as far as a machine can tell: links, paths, make targets, flags and options exist."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from train.config.train_config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
HISTORY = ("bench/LOG.md", "CHANGELOG.md")  # what is told of the past keeps its names
WRITTEN = {"bench/gpu_tests.log"}  # by `make test-gpu`
SCRIPT_FOLDERS = ("data_prep", "train", "demo", "bench")
RUN_BY = {  # what a job script of slurm/ passes its flags on to
    "slurm/make_shards.sh": "data_prep/make_shards.py",
    "slurm/encode_shards.sh": "data_prep/encode_shards.py",
    "slurm/qwen_lora.sh": "train/train_lora.py",
}
# Flags of other programs that our documents speak of: Slurm's, launchers', pip's, pytest's, pre-commit's, apptainer's
FOREIGN_FLAGS = {
    *("--account", "--partition", "--nodes", "--time", "--signal", "--requeue", "--mem", "--array", "--constraint"),
    *("--gpus-per-node", "--ntasks-per-node", "--cpus-per-task", "--nproc_per_node", "--no_python", "--nv", "--help"),
    *("--editable", "--hook-type", "--hypothesis-profile", "--container-image", "--container-mounts"),
    *("--dependency", "--export", "--full", "--no-requeue"),
}
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def documents() -> dict[str, str]:
    """Every Markdown file of the project but for history, and the examples: path from the root to text."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and ours(path.name)]
    files = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]
    files += (ROOT / "examples").glob("*.yaml")
    return {short(path): path.read_text(encoding="utf-8") for path in sorted(files) if short(path) not in HISTORY}


@functools.cache
def ours(folder: str) -> bool:
    """Whether a folder of the top level belongs to the project: git has files in it, or there is no git."""
    if folder.startswith("."):
        return folder == ".ci"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", folder], cwd=ROOT, capture_output=True)
    return listed.returncode != 0 or bool(listed.stdout)


def blocks(text: str, language: str = r"\w*") -> list[str]:
    """The fenced blocks of a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    """What stands between backticks in running text."""
    return re.findall(r"`([^`\n]+)`", without_blocks(text))


# ── links, paths, make targets ───────────────────────────────────────────────────────────────────────────────────────


def links(text: str) -> list[str]:
    """Targets of inline links, of reference definitions, and of HTML's src and href."""
    text = without_blocks(text)
    inline, references = re.findall(r"\]\(([^)\s]+)\)", text), re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE)
    return inline + references + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)


def anchors(text: str) -> set[str]:
    """The ids that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    broken = []
    for link in links(document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):  # the net is not asked
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists():
            broken.append(f"{document}: {link} leads nowhere")
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(f"{document}: {link}: there is no such heading")
    return broken


def test_links_lead_somewhere():
    assert {"README.md", "docs/data.md", "slurm/README.md", "examples/zero3.yaml"} <= documents().keys()
    assert not [line for name in documents() for line in broken_links(ROOT / name)]


def test_a_broken_link_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        '# A `b`: c\n[x](page.md#a-b-c) [y](page.md#d) [z](gone.md) [w][w]\n<img src="no.png">\n[w]: lost/\n'
    )
    assert [line.split()[1].rstrip(":") for line in broken_links(page)] == ["page.md#d", "gone.md", "lost/", "no.png"]


def named_paths(text: str) -> set[str]:
    """Paths of this project in a text (`train/lora/`, slurm/common.sh); URLs, patterns and placeholders are none.

    Nor are those after `git log --`, which finds what is gone.
    """
    text = re.sub(r"https?://\S+|`git log[^`]*`", "", text)
    inside_a_word = r"(?<![\w./$<~-])"
    paths = re.findall(rf"{inside_a_word}\.?\w[\w.-]*(?:/[\w.*<>{{}}-]+)+/?", text)
    paths = [path for path in paths if (ROOT / path.split("/")[0]).is_dir() and ours(path.split("/")[0])]
    paths += re.findall(rf"{inside_a_word}[\w-]+\.(?:md|toml)\b", text)
    return {path.rstrip(".") for path in paths if not re.search(r"[*<>{}]", path)}


def missing_paths(document: str, text: str) -> list[str]:
    """The paths that lead nowhere, neither from the root nor (`name.md`) from the document's folder."""
    places = (ROOT, (ROOT / document).parent)
    gone = [
        path for path in sorted(named_paths(text) - WRITTEN) if not any((place / path).exists() for place in places)
    ]
    return [f"{document}: {path} does not exist" for path in gone]


def test_named_paths_exist():
    made_up = (
        "`train/gone/` and slurm/none.sh, but run/lora.safetensors, https://x.y/train/z, `train/<x>.py` are no paths"
    )
    assert named_paths(made_up) == {"train/gone/", "slurm/none.sh"}
    assert len(missing_paths("README.md", made_up)) == 2
    assert not [line for name, text in documents().items() for line in missing_paths(name, text)]


def test_no_path_of_one_machine():
    for name, text in documents().items():
        assert not (found := re.search(r"(?<![\w.}])/(home|root|work|Users|opt)/\w+", text)), f"{name}: {found}"


def test_contributing_names_every_room():
    rooms = {
        short(init.parent)
        for package in ("qwen_image", "data_prep", "train")
        for init in ROOT.glob(f"{package}/*/__init__.py")
    }
    assert len(rooms) > 15
    named = {path.rstrip("/") for path in named_paths((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))}
    assert rooms <= named, f"where things live: {sorted(rooms - named)} are missing"


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "check"} <= targets
    for name, text in documents().items():
        lines = "\n".join([*blocks(text), *inline_code(text)])
        unknown = set(re.findall(r"^make ([a-z][\w-]*)", lines, re.MULTILINE)) - targets
        assert not unknown, f"{name}: the Makefile has no {sorted(unknown)}"


# ── flags and options ────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def flags_of(script: str) -> frozenset[str]:
    """The flags that a script's --help shows."""
    command = [sys.executable, str(ROOT / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return frozenset(FLAG.findall(done.stdout))


def commands(text: str) -> list[tuple[str, str]]:
    """(script, its arguments) of each command; one goes on after a backslash or in indented lines of flags."""
    text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)  # of an example's comments
    text = re.sub(r"\\\n|\n\s+(?=-)", " ", text)
    found = re.findall(r"(?:python|deepspeed|torchrun|sbatch)\b[^\n`|]*? ([\w/]+\.(?:py|sh))([^\n`]*)", text)
    return [(script, arguments.partition(" #")[0]) for script, arguments in found if not script.startswith("tests/")]


def unknown_flags(document: str, text: str) -> list[str]:
    wrong = []
    for script, arguments in commands(text):
        unknown = sorted(set(FLAG.findall(arguments)) - flags_of(RUN_BY.get(script, script)))
        wrong += [f"{document}: {script} has no flag {flag}" for flag in unknown]
    return wrong


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("sbatch --nodes=4 slurm/qwen_lora.sh run.yaml --x 1\n", [("slurm/qwen_lora.sh", " run.yaml --x 1")]),
        ("# python train/sample.py --a 1 \\\n#   --b # --no\n", [("train/sample.py", " --a 1    --b")]),
        ("`deepspeed a/b.py --c` and --d", [("a/b.py", " --c")]),
        ("python -m pytest tests/x.py --x", []),
    ],
)
def test_commands_are_found(text: str, found: list[tuple[str, str]]):
    assert commands(text) == found


def test_commands_use_flags_that_exist():
    wrong = unknown_flags("a.md", "sbatch --nodes=2 slurm/qwen_lora.sh run.yaml --learning_rat 1")
    assert wrong == ["a.md: slurm/qwen_lora.sh has no flag --learning_rat"]
    assert sum(len(commands(text)) for text in documents().values()) > 20
    assert not [line for name, text in documents().items() for line in unknown_flags(name, text)]


def test_flags_in_running_text_exist():
    """`--lora_rank 16` in a sentence is a flag of some script of ours, or of a program that FOREIGN_FLAGS thinks of."""
    sources = [file.read_text() for folder in SCRIPT_FOLDERS for file in (ROOT / folder).rglob("*.py")]
    declared = {flag for source in sources for flag in re.findall(r"[\"'](--[a-z][\w-]*)[\"']", source)}
    known = declared | FOREIGN_FLAGS | flags_of("train/train_lora.py") | flags_of("train/sample.py")
    assert {"--lora_rank", "--max_pixels", "--lora_strength"} <= known and "--lora_rnak" not in known
    for name, text in documents().items():
        unknown = {flag for code in inline_code(text) for flag in FLAG.findall(code)} - known
        assert not unknown, f"{name} speaks of {sorted(unknown)}, which no script has"


def test_options_in_yaml_exist():
    """`max_steps: 1500` between backticks, and each line of a block of YAML, names an option of the trainer."""
    options = {field.name for field in fields(TrainConfig)} | {"error"}
    for name, text in documents().items():
        named = {match[1] for code in inline_code(text) if (match := re.fullmatch(r"([a-z_]+): \S.*", code))}
        named |= {option for block in blocks(text, "yaml") for option in yaml.safe_load(block)}
        assert named <= options, f"{name} names options that don't exist: {sorted(named - options)}"
