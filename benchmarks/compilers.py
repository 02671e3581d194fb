"""One work of ours under settings of XLA, and with the steps of attacks written out: which is fastest?

Command: ``python -m benchmarks.compilers "resnet18_64 train-pgd-10 linf 512 bf16"`` on a GPU. Not run there yet.
"""

import os
import sys
from typing import NamedTuple

from benchmarks.process import Side
from benchmarks.speed import Timing, in_turns
from benchmarks.work import Work, parse

ROUNDS = 10

_GRAPHS = "--xla_gpu_enable_command_buffer"


class Setting(NamedTuple):
    """A side, and flags for XLA beside those of the caller."""

    side: str = "jaxnets"
    flags: str = ""


SETTINGS = {
    "as it is": Setting(),
    "attacks without loops": Setting("jaxnets_unrolled"),
    "no CUDA graphs": Setting(flags=f"{_GRAPHS}="),
    "CUDA graphs of loops as well": Setting(
        flags=f"{_GRAPHS}=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
    "no autotuning": Setting(flags="--xla_gpu_autotune_level=0"),
    "latency hiding": Setting(flags="--xla_gpu_enable_latency_hiding_scheduler=true"),
}


def measured(work: Work, rounds: int = ROUNDS) -> dict[str, Timing]:
    """By setting, all in turns."""
    given = os.environ.get("XLA_FLAGS", "")
    sides = {
        name: Side(one.side, settings={"XLA_FLAGS": f"{given} {one.flags}".strip()}) for name, one in SETTINGS.items()
    }
    try:
        return in_turns(work, sides, rounds)
    finally:
        for side in sides.values():
            side.close()


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit('benchmarks.compilers: say what is timed, such as "resnet18_64 train-pgd-10 linf 512 bf16"')
    try:
        work = parse(sys.argv[1])
    except ValueError as error:
        raise SystemExit(f"benchmarks.compilers: {error}") from None
    print(f"{work!s:32}{'first call':>12}{'others':>10}")
    for name, found in measured(work).items():
        print(f"{name:32}" + (found.missing or f"{found.first:10.1f} s{1000 * found.median:7.1f} ms"))


if __name__ == "__main__":
    main()
