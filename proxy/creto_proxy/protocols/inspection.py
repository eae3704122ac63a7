"""Looks into HTTP requests for what they ask of MCP servers, A2A agents and models, where policy wants to know.

A request *declares* a protocol by its header fields, or by a host that the configuration names. An agent that would
rather not be understood declares nothing, so where a policy speaks of what is inside, every body that a server may read
as JSON is looked into, declared or not. Nothing else is kept or parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from creto_hotpath.jsonrpc import NotJson
from creto_platform.authz import Authz, Watch
from creto_proxy.bodies import AmbiguousBody
from creto_proxy.model import Request
from creto_proxy.paths import readings
from creto_proxy.protocols import a2a, llm, mcp
from creto_proxy.protocols.call import Call
from creto_proxy.protocols.detect import READS, Declared, Places, declared, essence, reads_only
from creto_proxy.protocols.jsonrpc import AMBIGUOUS, MALFORMED, Body, Rpc, read, refused

METHODS = mcp.METHODS | a2a.METHODS
_RPC = frozenset({"mcp", "a2a"})
# Bodies that no server of these protocols takes for JSON, so that uploads need not be kept.
_NEVER_JSON = ("multipart/", "image/", "audio/", "video/", "font/", "application/grpc", "application/x-git-")
_NOT_JSON = frozenset(
    {
        "application/octet-stream",
        "application/x-www-form-urlencoded",
        "application/zip",
        "application/gzip",
        "application/x-tar",
        "application/pdf",
        "application/x-protobuf",
        "application/protobuf",
    }
)
_CHARSET = re.compile(r"""charset\s*=[\s"']*([^\s"';,]*)""", re.IGNORECASE)
_UTF_8 = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
_UNREADABLE = "Policy decides on the body of this request; send it unencoded, in UTF-8."


class Inspector:
    """Says what is inside a request. mcp, a2a: where every request is one, as the configuration names it."""

    def __init__(
        self, authz: Authz, providers: llm.Providers, *, mcp: Sequence[str] = (), a2a: Sequence[str] = ()
    ) -> None:
        self._authz = authz
        self._providers = providers
        self._mcp = Places(mcp)
        self._a2a = Places(a2a)

    def looks_at_paths(self, host: str) -> bool:
        """Whether what a request to ``host`` asks for may depend on its path."""
        return bool(self._authz.watch(host).protocols) or self._mcp.any or self._a2a.any

    def wants_body(self, request: Request) -> bool:
        """Whether the calls in a request can only be told from its body."""
        if request.kind != "http":
            return False
        watch = self._authz.watch(request.host)
        watched = _watches_rpc(watch)
        if not watched and request.method in READS:
            return False
        acts = not reads_only(request.method, request.headers)
        if acts and self._declared(request).protocol:
            return True
        endpoint = self._endpoint(request, watch)
        if endpoint is not None and _names_model(endpoint, request):
            return request.headers.get("upgrade") is None
        return acts and watched and _may_be_json(request)

    def calls(self, request: Request) -> tuple[Call, ...]:
        """What the request asks for, () when nothing that policy has a word for.

        Raises Refused (400) when it cannot be told, or when servers may understand something else.
        """
        if request.kind != "http":
            return ()
        watch = self._authz.watch(request.host)
        watched = _watches_rpc(watch)
        endpoint = self._endpoint(request, watch)
        if endpoint is None and not watched and request.body is None:
            return ()
        said = self._declared(request)
        calls: list[Call] = []
        if endpoint is not None:
            calls.append(self._model_call(request, endpoint, watch))
            if endpoint.operation is not None and not said.certain:
                return tuple(calls)
        if said.protocol or watched:
            found = self._of_head(request, said, watch)
            calls += found
            if not reads_only(request.method, request.headers):
                # What the path says already need not be said by the body.
                calls += self._of_body(request, Declared(said.protocol, False) if found else said, watched=watched)
        return tuple(dict.fromkeys(calls))

    def _declared(self, request: Request) -> Declared:
        if self._mcp.have(request.host, request.path):
            return Declared("mcp", True)
        if self._a2a.have(request.host, request.path):
            return Declared("a2a", True)
        return declared(request.method, request.headers)

    def _endpoint(self, request: Request, watch: Watch) -> llm.Endpoint | None:
        return self._providers.of(request) if "llm" in watch.protocols else None

    def _model_call(self, request: Request, endpoint: llm.Endpoint, watch: Watch) -> Call:
        body = request.body if _names_model(endpoint, request) else None
        if body and not _is_plain(request):
            raise refused("unreadable_body", _UNREADABLE)
        try:
            return llm.call(endpoint, request, body, watch.reads)
        except AmbiguousBody as error:
            raise refused("ambiguous_body", f"Servers may read the request differently: {error}.") from None
        except ValueError:
            raise refused("unreadable_body", "Policy decides on the body, which is not UTF-8 JSON.") from None

    def _of_head(self, request: Request, said: Declared, watch: Watch) -> tuple[Call, ...]:
        for path in readings(request.path) if said.protocol == "a2a" or "a2a" in watch.protocols else ():
            rest = a2a.rest_call(request.method, path, declared=said.protocol == "a2a")
            if rest is not None:
                return (rest,)
        if said.certain and request.method != "POST" and not request.body:
            return (mcp.session_call(request.method) if said.protocol == "mcp" else a2a.other_call(request.method),)
        return ()

    def _of_body(self, request: Request, said: Declared, *, watched: bool) -> tuple[Call, ...]:
        if not said.protocol and not _may_be_json(request):
            return ()
        if not _is_plain(request):
            if watched and request.body:
                raise refused("unreadable_body", _UNREADABLE)
            return ()
        body = _read(request, said, watched=watched)
        if body is None:
            return ()
        if body.flaw:
            raise refused(AMBIGUOUS, f"Servers may read this body differently: {body.flaw}.")
        calls: list[Call] = []
        speaks_mcp = False
        for message in body.messages:
            found = _meanings(message, said)
            speaks_mcp = speaks_mcp or any(meaning is mcp.call for meaning in found)
            calls += [meaning(message) for meaning in found]
        if speaks_mcp:
            mcp.check_headers(request.headers, body)
        return tuple(calls)


def _read(request: Request, said: Declared, *, watched: bool) -> Body | None:
    """The messages of a request, None when it has none. Raises Refused where there should be some."""
    data = request.body or b""
    if not data and not said.certain:
        return None
    try:
        body = read(data, METHODS)
    except NotJson as error:
        if said.certain or (watched and (_says_json(request) or b"jsonrpc" in data.lower())):
            raise refused(MALFORMED, f"Policy decides on this body, which is {error}.") from None
        return None
    if body is None and said.certain:
        raise refused(MALFORMED, "What this says it is, is JSON-RPC; its body is not.")
    return body


def _meanings(message: Rpc, said: Declared) -> list[Callable[[Rpc], Call]]:
    """What a message may mean to its server. Some names are methods of both protocols: then both are judged."""
    method = message.method
    if method is None:
        return [a2a.call if said.protocol == "a2a" else mcp.call]
    found: list[Callable[[Rpc], Call]] = []
    if method in mcp.METHODS:
        found.append(mcp.call)
    if method in a2a.METHODS:
        found.append(a2a.call)
    if not found and said.protocol:
        found.append(mcp.call if said.protocol == "mcp" else a2a.call)
    return found


def _names_model(endpoint: llm.Endpoint, request: Request) -> bool:
    """Whether the body is looked at for a model. What is not known to call one may be anything, files for example."""
    return endpoint.operation is not None or _says_json(request)


def _watches_rpc(watch: Watch) -> bool:
    return not watch.protocols.isdisjoint(_RPC)


def _may_be_json(request: Request) -> bool:
    kinds = [essence(value) for value in request.headers.getall("content-type")]
    never = bool(kinds) and all(kind in _NOT_JSON or kind.startswith(_NEVER_JSON) for kind in kinds)
    return not never or _says_json(request)


def _says_json(request: Request) -> bool:
    """Servers look for the word in quite different places of the field: in a list, among parameters, anywhere."""
    return any("json" in value.lower() for value in request.headers.getall("content-type"))


def _is_plain(request: Request) -> bool:
    """False for a body that is compressed or in another charset: its bytes are not the text that the server reads."""
    charsets = [charset for value in request.headers.getall("content-type") for charset in _CHARSET.findall(value)]
    return all(charset.lower() in _UTF_8 for charset in charsets) and all(
        essence(value) in ("", "identity") for value in request.headers.getall("content-encoding")
    )
