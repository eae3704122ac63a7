"""What CPU does a governed request cost (identity, policy, quota, meter, journal on) beside what governs nothing?

GET of 1 KiB over 64 kept-alive connections and over one, and a chat completion of 1.9 KiB with an SDK's fields over 16.
The first also with all of creto's processes on the core that the other proxies have for their one.
Baselines: nginx proxy_pass, haproxy, mitmproxy, an aiohttp proxy, and for the completion LiteLLM.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peers import creto, programs
from peers.load import Client, Load, Say, compare
from peers.settings import Settings, started

SDK_FIELDS = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip, deflate",
    "Content-Type": "application/json",
    "User-Agent": "OpenAI/Python 2.8.0",
    "X-Stainless-Lang": "python",
    "X-Stainless-Package-Version": "2.8.0",
    "X-Stainless-OS": "Linux",
    "X-Stainless-Arch": "x64",
    "X-Stainless-Runtime": "CPython",
    "X-Stainless-Runtime-Version": "3.11.7",
    "X-Stainless-Async": "false",
    "X-Stainless-Retry-Count": "0",
    "X-Stainless-Read-Timeout": "600",
    "Authorization": "Bearer sk-bench-00000000000000000000000000000000",
}
CHAT = json.dumps(
    {
        "model": "gpt-4o",
        "max_tokens": 256,
        "messages": [
            {"role": "system", "content": "You are a careful assistant. " * 20},
            {"role": "user", "content": "Summarise what the last benchmark said. " * 30},
        ],
    }
)
GETS = (Load("GET 1 KiB, 64 connections", 64), Load("GET 1 KiB, 1 connection", 1))
TOGETHER = "creto, controller on the same core"
COMPLETION = Load("POST chat completion 1.9 KiB, 16 connections", 16, "/v1/chat/completions", SDK_FIELDS, CHAT)


def measure(folder: Path, settings: Settings, say: Say) -> dict[str, Any]:
    missing: list[str] = []
    with ExitStack() as stack:
        to = stack.enter_context(programs.upstream(folder / "upstream"))
        sidecar = stack.enter_context(creto.sidecar(folder / "creto", to))
        whole = stack.enter_context(creto.sidecar(folder / "creto-together", to, together=True))
        rivals = started(
            stack,
            missing,
            programs.nginx(folder / "nginx", to),
            programs.haproxy(folder / "haproxy", to),
            programs.aiohttp(folder / "aiohttp", to),
            programs.mitmproxy(folder / "mitmproxy", to),
        )
        client = Client(folder, to.pid)
        loads = []
        for load in GETS:
            peers = [*rivals, sidecar.peer(), *([whole.peer(TOGETHER)] if load is GETS[0] else [])]
            loads.append({"title": load.title, "rows": compare(client, peers, load, *settings.rounds_of(say))})
        models = started(stack, missing, programs.litellm(folder / "litellm", to))
        peers = [*rivals, *models, sidecar.peer(prefix="/llm")]
        loads.append({"title": COMPLETION.title, "rows": compare(client, peers, COMPLETION, *settings.rounds_of(say))})
    return {"loads": loads, "missing": missing}
