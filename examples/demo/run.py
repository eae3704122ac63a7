"""The demo: an unmodified agent under ``creto run``, stand-ins for the world, and a person who approves.

Needs no network and no account. Everything it writes goes into a temporary directory that is removed at the end.
The exit status is the agent's, through ``creto run``.
"""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from standins import StandIns, standins

HERE = Path(__file__).resolve().parent
HOSTS = ["api.openai.com", "api.anthropic.com", "payments.example.com"]
CRETO = [sys.executable, "-m", "creto_proxy", "--config", str(HERE / "creto.toml")]


def approve_when_asked(environment: dict[str, str], done: threading.Event) -> None:
    """The person: waits until something needs approval, looks, and says yes, from a process of their own."""
    while not done.wait(0.3):
        listing = subprocess.run(
            [*CRETO, "approvals", "list", "--json"], env=environment, capture_output=True, text=True, check=False
        )
        waiting = json.loads(listing.stdout or "[]")
        for request in waiting if isinstance(waiting, list) else waiting.get("approvals", []):
            print(f"  {'(another terminal)':<22} $ creto approvals approve {request['id']}", flush=True)
            subprocess.run([*CRETO, "approvals", "approve", request["id"]], env=environment, check=False,
                           stdout=subprocess.DEVNULL)  # fmt: skip
            return


def run(world: StandIns, directory: Path) -> int:
    environment = {
        **os.environ,
        "STANDIN_HTTPS": str(world.https),
        "STANDIN_CA": str(world.ca),
        "DEMO_STATE": str(directory / "state"),
        "DEMO_APPROVER": getpass.getuser(),
        "OPENAI_API_KEY": "sk-demo",
        "ANTHROPIC_API_KEY": "sk-ant-demo",
    }
    done = threading.Event()
    person = threading.Thread(target=approve_when_asked, args=(environment, done), daemon=True)
    person.start()
    print("$ creto run --config creto.toml --policy ./policies --name researcher -- python agent.py\n", flush=True)
    child = subprocess.run(
        [*CRETO, "run", "--policy", str(HERE / "policies"), "--name", "researcher", *sys.argv[1:], "--",
         sys.executable, str(HERE / "agent.py")],
        env=environment, check=False,
    )  # fmt: skip
    done.set()
    person.join(10)
    arrived = world.seen.count("POST", "/v1/refunds")
    print(f"\nThe payments API received the refund {arrived} time{'s' if arrived != 1 else ''}.")
    return child.returncode if arrived == 1 else child.returncode or 1


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="creto-demo-") as name, standins(Path(name), HOSTS) as world:
        return run(world, Path(name))


if __name__ == "__main__":
    sys.exit(main())
