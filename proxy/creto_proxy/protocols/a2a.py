"""Agent2Agent protocol, 0.2 to 1.0: JSON-RPC methods and REST paths become actions."""

from __future__ import annotations

import re

from creto_proxy.protocols.call import Call, recorded
from creto_proxy.protocols.jsonrpc import Body, Rpc

HEADERS = ("a2a-version", "a2a-extensions", "x-a2a-extensions")
MEDIA_TYPE = "application/a2a+json"

SENDS = frozenset(
    {
        "message/send",
        "message/stream",
        "tasks/send",
        "tasks/sendSubscribe",
        "SendMessage",
        "SendStreamingMessage",
    }
)
READS = frozenset(
    {
        "tasks/get",
        "tasks/list",
        "tasks/resubscribe",
        "tasks/pushNotificationConfig/get",
        "tasks/pushNotificationConfig/list",
        "agent/getAuthenticatedExtendedCard",
        "GetTask",
        "ListTasks",
        "SubscribeToTask",
        "GetTaskPushNotificationConfig",
        "ListTaskPushNotificationConfigs",
        "GetExtendedAgentCard",
    }
)
METHODS = (
    SENDS
    | READS
    | {
        "tasks/cancel",
        "tasks/pushNotificationConfig/set",
        "tasks/pushNotificationConfig/delete",
        "CancelTask",
        "CreateTaskPushNotificationConfig",
        "DeleteTaskPushNotificationConfig",
    }
)
# MCP has methods of the same names.
_SHARED = frozenset({"tasks/get", "tasks/list", "tasks/cancel"})

# The REST binding (A2A 1.0 section 11). The first are like no other API's paths, the others need a word of A2A besides.
_DISTINCT: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"/message:(send|stream)$"), "a2aSend"),
    (re.compile(r"/tasks/[^/]+:subscribe$"), "a2aRead"),
    (re.compile(r"/tasks/[^/]+:cancel$"), "a2aWrite"),
    (re.compile(r"/tasks/[^/]+/pushNotificationConfigs(/[^/]+)?$"), ""),
    (re.compile(r"^/\.well-known/agent(-card)?\.json$"), ""),
)
_COMMON = re.compile(r"/(tasks(/[^/]+)?|extendedAgentCard|card)$")
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


def call(message: Rpc) -> Call:
    """What one JSON-RPC message asks for."""
    method = message.method
    if method is None:
        return Call("a2aWrite", "a2a:answer")
    action = "a2aSend" if method in SENDS else "a2aRead" if method in READS else "a2aWrite"
    return Call(action, recorded("a2a", method), (("rpc_method", method),))


def speaks(body: Body) -> bool:
    """Whether all calls in it are methods of this protocol and of no other known here."""
    return bool(body.messages) and all(message.method in METHODS - _SHARED for message in body.messages)


def other_call(method: str) -> Call:
    """A request that is A2A and says nothing more."""
    return Call("a2aRead" if method in _READING else "a2aWrite", "a2a:other")


def rest_call(method: str, path: str, *, declared: bool) -> Call | None:
    """What a request of the REST binding asks for, None when it is none of its paths. declared: it says it is A2A."""
    plain = "a2aRead" if method in _READING else "a2aWrite"
    for pattern, action in _DISTINCT:
        if match := pattern.search(path):
            return Call(action or plain, recorded("a2a", path[match.start() :].lstrip("/").partition("/")[0]))
    if declared and _COMMON.search(path):
        return Call(plain, "a2a:tasks" if "/tasks" in path else "a2a:card")
    return None
