"""Host memory of each rank while a model is loaded: ZeRO-3 here, DeepSpeed's own way, and plain loading.

    python bench/zero3_loading.py                        # 1 B parameters, 2 and 4 CPU ranks; about 2 minutes, 2 GB in /tmp
    python bench/zero3_loading.py --ways zero3 plain deepspeed
    python bench/zero3_loading.py --ranks 2 4 8 --layers 27 --heads 8

Peak resident memory above what the interpreter has with everything imported and the process group joined, divided by the
model's size. `deepspeed` is the way of its manual: zero.Init around the constructor, then GatheredParameters.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = ("zero3", "deepspeed", "plain")
LIMITS = {2: 0.6, 4: 0.35}  # of the model's size


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--heads", type=int, default=8, help="128 channels each")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["zero3", "plain"])
    parser.add_argument("--folder", type=Path, help="where the model goes (default: a temporary folder)")
    parser.add_argument("--rank", nargs=2, metavar=("WAY", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rank:
        print(json.dumps(measure(options.rank[0], Path(options.rank[1]))))
        return 0
    from demo.random_model import write_random_model

    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        parameters, size = write_random_model(folder / "model", options.layers, options.heads, text_dim=1024)
        print(f"{parameters / 1e9:.2f} B parameters, {size / 1e6:.0f} MB in bfloat16\n")
        print("| ranks | way | peak above baseline, MB a rank | of the model | seconds | limit |")
        print("| --- | --- | --- | --- | --- | --- |")
        failed = False
        for world in options.ranks:
            for way in options.ways:
                results = launch(world, way, folder / "model")
                peaks = [result["peak"] - result["baseline"] for result in results]
                share = max(peaks) / size
                limit = LIMITS.get(world) if way == "zero3" else None
                failed |= limit is not None and share > limit
                print(
                    f"| {world} | {way} | {', '.join(f'{peak / 1e6:.0f}' for peak in peaks)} | {share:.2f} "
                    f"| {max(result['seconds'] for result in results):.1f} | {limit or ''} |",
                    flush=True,
                )
        return int(failed)
    finally:
        shutil.rmtree(folder)


def launch(world: int, way: str, model: Path) -> list[dict[str, float]]:
    """Run one way on `world` ranks; what each measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment |= {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        command = [sys.executable, __file__, "--rank", way, str(model)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in ranks]
    assert all(process.returncode == 0 for process in ranks), outputs
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def measure(way: str, model: Path) -> dict[str, float]:
    import logging

    import torch
    import torch.distributed as dist

    from qwen_image.loading.model_files import ModelSource, resolve_model
    from qwen_image.pipeline import load_transformer
    from train.base_model.zero3_loading import load_partitioned
    from train.process.ranks import join_process_group

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    join_process_group()
    config = json.loads((Path(__file__).resolve().parent.parent / "ds_configs" / "zero3.json").read_text())
    config["train_micro_batch_size_per_gpu"] = 1
    files = resolve_model(ModelSource(str(model)), ("transformer", "scheduler"))
    dist.barrier()
    baseline = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.perf_counter()
    if way == "zero3":
        kept: Any = load_partitioned(files, torch.bfloat16, config)
    elif way == "deepspeed":
        kept = load_as_deepspeed_says(files, config)
    else:
        kept = load_transformer(files, torch.bfloat16)
    seconds = time.perf_counter() - start
    del kept
    result = {"baseline": baseline, "peak": resident("VmHWM"), "seconds": seconds}
    dist.barrier()
    dist.destroy_process_group()
    return result


def load_as_deepspeed_says(files: Any, config: dict[str, Any]) -> Any:
    """zero.Init around the constructor, then groups of 16 tensors gathered, filled by rank 0 and scattered again."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from qwen_image.loading.model_files import stream_tensors, transformer_config
    from qwen_image.model.transformer import QwenImageTransformer

    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.bfloat16):
        transformer = QwenImageTransformer(transformer_config(files))
    parameters = dict(transformer.named_parameters())
    group: list[tuple[str, torch.Tensor]] = []
    for name, tensor in stream_tensors(files["transformer"].weights):
        group.append((name, tensor))
        if len(group) == 16 or len(parameters) == len(group):
            names = [name for name, _ in group]
            with deepspeed.zero.GatheredParameters([parameters[name] for name in names], modifier_rank=0):
                if dist.get_rank() == 0:
                    for name, tensor in group:
                        parameters[name].data.copy_(tensor)
            for name in names:
                del parameters[name]
            group = []
    return transformer


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    sys.exit(main())
