"""What the plan says to people: what is left out and why, each with its first input. A dry run and a run say the same."""

from __future__ import annotations

from data_prep.packing.plan import Plan
from data_prep.packing.workers import LARGE_BYTES
from files.shown import shown

IGNORED_SHOWN = 8


def lines(plan: Plan) -> list[str]:
    """Reasons by number, the first failures, remarks on the sources, files that are no input, and what large images take."""
    said = []
    if plan.images:
        said.append(f"  {plan.images:>8}  images are packed at several sizes, each a sample (--each_image all)")
    for reason, count in sorted(plan.reasons.items(), key=lambda item: -item[1]):
        said.append(f"  {count:>8}  {reason}; first {shown(plan.first[reason], 400)}")
    failures = [example for example in plan.examples if not _is_first(plan, example)]
    said += [f"            {shown(example, 400)}" for example in failures]
    said += [f"  warning: {shown(remark, 500)}" for remark in plan.remarks]
    if plan.masked:
        rest = plan.samples - plan.masked
        without = f"; {rest} have none: all of the image counts" * (rest > 0)
        said.append(
            f"  {plan.masked:>8}  samples have a mask (--masks off packs files of such names as pictures){without}"
        )
    if plan.ignored:
        shown_ones = list(plan.ignored.items())[:IGNORED_SHOWN]
        kinds = ", ".join(f"{count} {shown(extension) or 'without an extension'}" for extension, count in shown_ones)
        more = len(plan.ignored) - len(shown_ones)
        said.append(
            f"  files that are neither images nor captions: {kinds}" + (f", and {more} other kinds" * (more > 0))
        )
    if plan.largest_memory > LARGE_BYTES:
        said.append(
            f"  the largest image takes about {plan.largest_memory / 1e9:.1f} GB while it is decoded; images above "
            f"{LARGE_BYTES / 1e9:.2g} GB are decoded one at a time (--max_image_pixels refuses them)"
        )
    return said


def reasons_line(plan: Plan) -> str:
    """All reasons on one line, the most frequent first, each with its first input."""
    ordered = sorted(plan.reasons.items(), key=lambda item: -item[1])
    return "; ".join(f"{count} {reason}, first {shown(plan.first[reason], 300)}" for reason, count in ordered)


def _is_first(plan: Plan, example: str) -> bool:
    """Whether a failure stands with its reason's count already."""
    return any(example.startswith(first.partition(" (")[0] + ":") for first in plan.first.values())
