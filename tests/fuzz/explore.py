"""Coverage-guided fuzzing: ``python -m tests.fuzz.explore --seconds 60 [target...]`` (``make fuzz``).

atheris (libFuzzer) follows the branches of the Python code. The compiled modules are compared with their twins on
every input, so the branches of the twins lead it through both. An input that breaks a target is made small and
written to ``corpus/<target>/crash-*``, from where the tests replay it; the exit status says that there was one.
What was found to reach new branches is kept in ``build/fuzz``, so that the next run goes on from there.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .targets import CORPUS, TARGETS, Target

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "fuzz"
# Seeds are smaller; what only shows in longer input is the business of the tests of limits.
MOST_BYTES = 8192
# An input that takes longer than this, or this much memory, is a finding like any other.
ONE_INPUT_S, MEMORY_MB = 20, 2048


@dataclass(frozen=True)
class Run:
    """What one target's run says of itself. covered: branches of Python code that were reached."""

    whole: bool
    inputs: int
    per_second: int
    covered: int
    output: str


def words(target: Target) -> str:
    """The target's words as a libFuzzer dictionary."""
    return "".join('"' + "".join(f"\\x{byte:02x}" for byte in piece) + '"\n' for piece in target.pieces)


def explore(target: Target, seconds: int) -> Run:
    """Fuzzes one target for that long."""
    kept = KEPT / target.name
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        dictionary = Path(scratch, "words")
        dictionary.write_text(words(target))
        command = [sys.executable, "-m", "tests.fuzz.guided", target.name, str(kept), str(CORPUS / target.name)]
        command += [f"-dict={dictionary}", f"-artifact_prefix={scratch}/", f"-max_total_time={seconds}"]
        command += [f"-max_len={MOST_BYTES}", f"-timeout={ONE_INPUT_S}", f"-rss_limit_mb={MEMORY_MB}"]
        command += ["-print_final_stats=1", "-reload=0"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        # A target that raised has written its input, made small; of one that hung or died libFuzzer has it.
        for left in Path(scratch).glob("*-*"):
            if not left.name.startswith("crash-") or b"Uncaught Python exception" not in done.stdout:
                (CORPUS / target.name / f"crash-{left.name[-12:]}").write_bytes(left.read_bytes())
    output = done.stdout.decode(errors="replace")

    def number(pattern: str) -> int:
        found = re.findall(pattern, output)
        return int(found[-1]) if found else 0

    inputs, rate = number(r"stat::number_of_executed_units:\s+(\d+)"), number(r"stat::average_exec_per_sec:\s+(\d+)")
    return Run(done.returncode == 0, inputs, rate, number(r"cov: (\d+)"), output)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz.explore", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="target", help=f"default: all of {' '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=30, help="for each target (default: 30)")
    options = parser.parse_args()
    if unknown := set(options.targets) - TARGETS.keys():
        parser.error(f"no such target: {' '.join(sorted(unknown))}; there are {' '.join(TARGETS)}")
    broken = []
    print(f"{'target':16}{'inputs':>10}{'per second':>12}{'branches':>10}")
    for name in options.targets or TARGETS:
        run = explore(TARGETS[name], options.seconds)
        print(f"{name:16}{run.inputs:10}{run.per_second:12}{run.covered:10}", "" if run.whole else "BROKEN", flush=True)
        if not run.whole:
            broken.append(name)
            print("\n".join(run.output.splitlines()[-25:]), file=sys.stderr)
    if broken:
        print(f"broken: {' '.join(broken)}; the inputs are in {CORPUS}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
