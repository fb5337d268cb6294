"""What the time from the command to the first step was spent on: a slow start explains itself.

    start_clock.begin()                 # first line of the program: the launcher and Python itself have taken their time
    start_clock.reached("imports")      # what lies since the last call was this
    start_clock.line()                  # start: launcher 6.2, python 0.4, imports 18.5, …, in all 81.0 s

One clock a process, since it has one start. Seconds are wall time from when the outermost launcher (deepspeed, torchrun) was
started, or this process where there is none.
"""

import time

_seconds: dict[str, float] = {}
_last = 0.0


def begin() -> None:
    """Start anew: what the launcher took until this process, and this process until here."""
    global _last
    import psutil

    from train.process.launchers import launchers_above

    _seconds.clear()
    own = psutil.Process().create_time()
    above = [launcher.create_time() for launcher in launchers_above()]
    _last = min([own, *above])
    if above:
        reached("launcher", own)
    reached("python")


def reached(part: str, now: float | None = None) -> None:
    """The time since the last call was spent on `part`; several times are added up."""
    global _last
    now = time.time() if now is None else now
    _seconds[part] = _seconds.get(part, 0.0) + max(now - _last, 0.0)
    _last = now


def parts() -> dict[str, float]:
    """Seconds by part, in order, to a tenth."""
    return {name: round(seconds, 1) for name, seconds in _seconds.items()}


def line() -> str:
    """All parts and their sum, for people."""
    told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in _seconds.items())
    return f"start: {told}, in all {sum(_seconds.values()):.1f} s"
