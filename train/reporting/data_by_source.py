"""Images × weight by source: what an epoch holds of each set of shards. For the start's table, the dry run and the report."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from files.shown import shown
from train.data.mixture import Mixture
from train.data.prior_order import PriorOrder
from train.data.shard_dataset import ShardDataset
from train.loader.from_config import RunData

WEIGHTS = 4  # more different ones are told as a range


def data_by_source(data: RunData) -> list[dict[str, Any]]:
    """JSON, one entry a set; none where one set has no weights: then the epoch is its samples."""
    dataset = data.dataset
    if not isinstance(dataset, ShardDataset | Mixture):
        return []
    found = []
    for part in dataset.parts:
        weight = dataset.index.weight[part.samples]
        values, counts = np.unique(weight, return_counts=True)
        entry = {"name": part.name, "samples": len(weight), "an_epoch": float(weight.sum()), "weights": len(values)}
        entry["largest"] = [[float(values[place]), int(counts[place])] for place in np.argsort(-values)[:WEIGHTS]]
        entry["least"] = float(values.min(initial=1.0)) if len(values) else 1.0
        if part.prior and isinstance(data.order, PriorOrder) and isinstance(dataset, Mixture):
            entry["prior"] = {"share": float(data.order.share), "loss": dataset.prior_weight}
        found.append(entry)
    plain = len(found) == 1 and found[0]["largest"] in ([], [[1.0, found[0]["samples"]]])
    return [] if plain else found


def lines_by_source(sources: list[dict[str, Any]]) -> Iterator[str]:
    """For people: `cats: 20 × 10 + 50 × 1 = 250 an epoch`. What isn't of the form of `data_by_source` is passed over."""
    for entry in sources:
        if (
            not isinstance(entry, dict)
            or not {"name", "samples", "an_epoch", "weights", "largest", "least"} <= entry.keys()
        ):
            continue
        if entry["weights"] > WEIGHTS:
            how = f"{entry['samples']:,} of weights {entry['least']:g} to {entry['largest'][0][0]:g}"
        else:
            how = " + ".join(f"{count:,} × {weight:g}" for weight, count in entry["largest"]) or "none"
        told = f"{shown(entry['name'])}: {how} = {entry['an_epoch']:,.6g} an epoch"
        if prior := entry.get("prior"):
            told = f"prior, {told}; {prior['share']:.4g} of the micro-batches, loss × {prior['loss']:g}"
        yield told
