"""`--deepspeed_log`: what DeepSpeed says about itself in each rank. (Its launcher is another program: `deepspeed --quiet`.)"""

import logging

NAME = "DeepSpeed"  # of its logger, which it makes when it is imported; filters that are there already stay


class OnceOnMain(logging.Filter):
    """Errors always; warnings once each, from rank 0; nothing else. The search for an accelerator is told by us, and that
    DeepSpeed has not tested an optimizer has been (tests/train/engine/test_optimizers.py)."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.told = rank, set[str]()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        text = record.getMessage()
        if record.levelno < logging.WARNING or self.rank > 0 or text in self.told:
            return False
        if "accelerator to CPU" in text or "untested optimizer" in text:
            return False
        self.told.add(text)
        return True


def quiet_deepspeed(rank: int, log: str) -> None:
    """Filter DeepSpeed's logger unless `log` is all; before DeepSpeed is imported."""
    logger = logging.getLogger(NAME)
    for each in [*logger.filters]:
        if isinstance(each, OnceOnMain):  # of an earlier run in this process
            logger.removeFilter(each)
    if log != "all":
        logger.addFilter(OnceOnMain(rank))
