"""What DeepSpeed says: errors always, warnings once and from rank 0, all of it by flag."""

import logging

import pytest

from train.engine.deepspeed_log import NAME, quiet_deepspeed


@pytest.mark.parametrize(
    "rank,log,expected",
    [
        (0, "quiet", ["careful", "broken", "broken"]),
        (1, "quiet", ["broken", "broken"]),
        (0, "all", ["hello", "careful", "careful", "Setting accelerator to CPU.", "broken", "broken"]),
    ],
)
def test_what_comes_through(rank: int, log: str, expected: list[str]) -> None:
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, ear = logging.getLogger(NAME), Ear()
    level, propagate = logger.level, logger.propagate
    quiet_deepspeed(rank, log)
    quiet_deepspeed(rank, log)  # a second run in this process
    logger.addHandler(ear)
    logger.setLevel(logging.INFO)
    try:
        logger.info("hello")
        logger.warning("careful")
        logger.warning("care%s", "ful")
        logger.warning("Setting accelerator to CPU.")
        logger.error("broken")
        logger.error("broken")
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)
        logger.propagate = propagate
        quiet_deepspeed(0, "all")
    assert heard == expected and not [each for each in logger.filters if type(each).__name__ == "OnceOnMain"]
