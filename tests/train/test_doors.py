"""The configuration ends at each room's door: what goes further in is the room's own small value.

A door is a file that imports TrainConfig. It reads the configuration where it is built (`from_config`, or the function that
is the room's entry), and hands it on to nobody but other doors of its own file.
"""

import ast
from pathlib import Path

import pytest

TRAIN = Path(__file__).resolve().parents[2] / "train"
DOORS = {
    "base_model/base_plan.py",
    "base_model/prior_prompt.py",
    "loader/from_config.py",
    "engine/lr_scheduler.py",
    "engine/optimizer.py",
    "fit/fit_step.py",
    "fit/memory_plan.py",
    "flow/timestep_sampling.py",
    "lora/spec.py",
    "process/watchdog.py",
    "reporting/dry_run.py",
    "reporting/start_table.py",
    "saving/checkpoints.py",
    "saving/lora_export.py",
    "saving/run_folder.py",
    "step/build.py",
    "watching/metrics.py",
    "watching/sample_images.py",
    "watching/validation.py",
}
ENTRIES = {
    "fit_step",
    "graphs_policy",
    "prepare_run_folder",
    "check_room",
    "needed_bytes",
    "open_data",
    "make_order",
    "dry_run",
}
READERS = {"from_config", "from_options"}  # a door's constructor; qwen_image's ModelSource, which reads flags too


def files_inside() -> list[Path]:
    """Everything in train/ but its commands and the room that defines the configuration."""
    return sorted(f for f in TRAIN.glob("*/*.py") if f.parent.name != "config")


def reads_configuration(tree: ast.Module) -> bool:
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return "TrainConfig" in names | {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}


def faults(source: str) -> list[str]:
    """Functions of a door that take the configuration without being its entry; calls that hand it on."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found = []
    for function in functions:
        annotated = [
            arg for arg in function.args.args if arg.annotation and "TrainConfig" in ast.unparse(arg.annotation)
        ]
        if annotated and function.name not in READERS | ENTRIES:
            found.append(f"{function.name} takes the configuration")
    own = {function.name for function in functions} & ENTRIES
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        callee = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        if any(isinstance(arg, ast.Name) and arg.id == "config" for arg in given) and callee not in READERS | own:
            found.append(f"{callee} is given the configuration")
        if (
            isinstance(call.func, ast.Name)
            and call.func.id == "replace"
            and call.args
            and ast.unparse(call.args[0]) == "config"
        ):
            found.append("the configuration is changed in flight")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "self.config" and isinstance(node.ctx, ast.Store):
            found.append("an object keeps the configuration")
    return found


def test_the_configuration_enters_by_the_doors_alone() -> None:
    entered = {f.relative_to(TRAIN).as_posix() for f in files_inside() if reads_configuration(ast.parse(f.read_text()))}
    assert entered == DOORS


@pytest.mark.parametrize("door", sorted(DOORS))
def test_a_door_hands_the_configuration_on_to_nobody(door: str) -> None:
    assert faults((TRAIN / door).read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "def plan(config: TrainConfig): pass",
        "def from_config(config: TrainConfig): plan(config)",
        "def from_config(config: TrainConfig): config = replace(config, seed=1)",
        "class A:\n    def from_config(self, config: TrainConfig): self.config = config",
        "def fit_step(config: TrainConfig): run(options=config)",
    ],
)
def test_a_fault_is_found(source: str) -> None:
    assert faults(source)


def test_the_entry_changes_no_configuration() -> None:
    source = (TRAIN / "train_lora.py").read_text()
    assert "replace(config" not in source and "config = " not in source.replace("config = parse(argv)", "")
    train = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert train.end_lineno is not None and train.end_lineno - train.lineno < 70


def test_the_deepspeed_json_is_read_in_one_place() -> None:
    """Everybody else asks the ZeroPlan."""
    asking = [
        f.name for f in TRAIN.rglob("*.py") if '["zero_optimization"]' in f.read_text() or "ZERO_STAGE" in f.read_text()
    ]
    assert sorted(asking) == ["deepspeed_json.py", "zero_plan.py"]
