"""Delegation tokens against forgers: tokens made by hand, signed correctly where the forger holds a key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_platform.crypto import COMPOSITE, EmbeddedCrypto, Key
from creto_platform.nhi import BadScope, Capability, Refused
from creto_platform.nhi.delegation import CONTEXT, Body, Token, Trust, issue, parse, revocation_log, verify
from creto_platform.nhi.port import Anchor
from creto_platform.wire import WireError, pack, unpack

CRYPTO = EmbeddedCrypto()
TD = "example.org"
HUMAN = f"spiffe://{TD}/human/alice"
NOW = 1_700_000_000
WIDE = Capability("egress.*", "host:**")


@dataclass(frozen=True)
class Party:
    id: str
    key: Key


def party(path: str) -> Party:
    return Party(f"spiffe://{TD}/{path}", CRYPTO.keygen(COMPOSITE))


ALICE, A, B, C, D = party("human/alice"), party("agent/a"), party("agent/b"), party("agent/c"), party("agent/d")
SERVICE = party("service/s")
ANCHORS = {
    ALICE.key.kid: Anchor(HUMAN, ALICE.key.kid, ALICE.key.public, "human", 0.0),
    SERVICE.key.kid: Anchor(SERVICE.id, SERVICE.key.kid, SERVICE.key.public, "service", 0.0),
}


def trust(revoked: Sequence[tuple[str, str]] = ()) -> Trust:
    def first_revoked(marks: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
        return next((mark for mark in marks if mark in revoked), None)

    return Trust(TD, ANCHORS.get, first_revoked)


def body(issuer: Party, subject: Party, parent: bytes | None = None, /, **changes: Any) -> Body:
    above = parse(parent).body if parent else None
    fields: dict[str, Any] = {
        "id": bytes(16),
        "issuer": issuer.id,
        "issuer_kid": issuer.key.kid,
        "subject": subject.id,
        "subject_kid": subject.key.kid,
        "subject_public": subject.key.public,
        "root": above.root if above else issuer.id,
        "parent": parse(parent).digest if parent else bytes(32),
        "depth": above.depth + 1 if above else 1,
        "further": above.further - 1 if above else 9,
        "capabilities": (WIDE,),
        "not_before": NOW - 10,
        "expires": NOW + 1000,
        "revocation_log": revocation_log(TD),
    }
    return Body(**(fields | changes))


def forge(
    issuer: Party, subject: Party, parent: bytes | None = None, /, *, signer: Party | None = None, **changes: Any
) -> bytes:
    """A correctly signed token that nobody checked."""
    return sealed(body(issuer, subject, parent, **changes).encode(), (signer or issuer).key)


def sealed(signed: bytes, key: Key) -> bytes:
    return pack({"b": signed, "s": CRYPTO.sign(key, signed, CONTEXT)})


def check(*tokens: bytes, now: float = NOW, **options: Any) -> tuple[Token, ...]:
    return verify(CRYPTO, tokens, now, options.pop("trust", None) or trust(), **options)


def refusal(*tokens: bytes, **options: Any) -> str:
    with pytest.raises(Refused) as caught:
        check(*tokens, **options)
    return caught.value.reason


ROOT = forge(ALICE, A)
CHILD = forge(A, B, ROOT)


def test_a_chain_made_by_the_rules_verifies() -> None:
    chain = check(ROOT, CHILD, forge(B, C, CHILD))
    assert [token.body.subject for token in chain] == [A.id, B.id, C.id]


def test_the_empty_chain_and_eleven_links_are_refused() -> None:
    assert refusal() == "chain_broken"
    assert refusal(*[ROOT] * 11) == "chain_too_deep"


# What a forger changes in a root token, still signed by the root key.
ROOT_FORGERIES: dict[str, tuple[dict[str, Any], str]] = {
    "names a parent": ({"parent": b"\1" * 32}, "chain_broken"),
    "starts at depth 2": ({"depth": 2, "further": 8}, "chain_broken"),
    "names another root": ({"root": f"spiffe://{TD}/human/bob"}, "chain_broken"),
    "allows eleven links": ({"further": 10}, "chain_too_deep"),
    "key of another subject": ({"subject_kid": B.key.kid}, "chain_broken"),
    "allows nothing": ({"capabilities": ()}, "bad_format"),
    "expires before it begins": ({"not_before": NOW + 1000}, "bad_format"),
    "another trust domain": ({"subject": "spiffe://evil.org/agent/a"}, "chain_broken"),
    "a human as subject": ({"subject": f"spiffe://{TD}/human/bob"}, "chain_broken"),
    "another revocation log": ({"revocation_log": "evil.org/revocations"}, "chain_broken"),
    "expired": ({"expires": NOW}, "expired"),
    "not yet valid": ({"not_before": NOW + 1}, "not_yet_valid"),
}


@pytest.mark.parametrize("forgery", ROOT_FORGERIES)
def test_a_forged_root_token_is_refused(forgery: str) -> None:
    changes, reason = ROOT_FORGERIES[forgery]
    assert refusal(forge(ALICE, A, **changes)) == reason


# What an agent that holds its own key tries below its own token.
LINK_FORGERIES: dict[str, tuple[dict[str, Any], str]] = {
    "another parent": ({"parent": b"\1" * 32}, "chain_broken"),
    "no parent": ({"parent": bytes(32)}, "chain_broken"),
    "another root": ({"root": f"spiffe://{TD}/human/bob"}, "chain_broken"),
    "skips a depth": ({"depth": 3, "further": 7}, "chain_broken"),
    "keeps its depth": ({"depth": 1}, "chain_broken"),
    "does not count down": ({"further": 9}, "chain_too_deep"),
    "another issuer id": ({"issuer": C.id}, "chain_broken"),
    "another issuer key": ({"issuer_kid": C.key.kid}, "chain_broken"),
    "lives longer": ({"expires": NOW + 1001}, "scope_widened"),
    "begins earlier": ({"not_before": NOW - 11}, "scope_widened"),
    "other action": ({"capabilities": (Capability("vault.read", "host:**"),)}, "scope_widened"),
    "other resource": ({"capabilities": (Capability("egress.*", "tool:**"),)}, "scope_widened"),
    "one good, one wide": ({"capabilities": (WIDE, Capability("vault.*", "host:**"))}, "scope_widened"),
    "own revocation log": ({"revocation_log": f"{TD}/mine"}, "scope_widened"),
}


@pytest.mark.parametrize("forgery", LINK_FORGERIES)
def test_a_forged_link_is_refused_when_verified(forgery: str) -> None:
    changes, reason = LINK_FORGERIES[forgery]
    assert refusal(ROOT, forge(A, B, ROOT, **changes)) == reason


@pytest.mark.parametrize("forgery", LINK_FORGERIES)
def test_a_forged_link_is_refused_when_issued(forgery: str) -> None:
    changes, reason = LINK_FORGERIES[forgery]
    with pytest.raises(Refused) as caught:
        issue(CRYPTO, A.key, parse(ROOT), body(A, B, ROOT, **changes))
    assert caught.value.reason == reason


def test_an_issued_token_verifies_and_needs_the_issuers_key() -> None:
    token = issue(CRYPTO, A.key, parse(ROOT), body(A, B, ROOT))
    assert check(ROOT, token)[-1].body.subject == B.id
    with pytest.raises(Refused) as caught:
        issue(CRYPTO, C.key, parse(ROOT), body(A, B, ROOT))
    assert caught.value.reason == "chain_broken"


def test_audience_and_binding_only_narrow() -> None:
    root = forge(ALICE, A, audience=("x", "y"), binding={"sandbox": "s"})
    narrow = forge(A, B, root, audience=("x",), binding={"sandbox": "s", "session": "t"})
    check(root, narrow, audience="x", binding={"sandbox": "s", "session": "t"})
    widened: list[dict[str, Any]] = [
        {"audience": (), "binding": {"sandbox": "s"}},
        {"audience": ("x", "z"), "binding": {"sandbox": "s"}},
        {"audience": ("x",), "binding": {}},
        {"audience": ("x",), "binding": {"sandbox": "other"}},
    ]
    for changes in widened:
        assert refusal(root, forge(A, B, root, **changes), audience="x", binding={"sandbox": "s"}) == "scope_widened"


@pytest.mark.parametrize("signer", [ALICE, B, C])
def test_a_link_signed_by_another_key_is_refused(signer: Party) -> None:
    assert refusal(ROOT, forge(A, B, ROOT, signer=signer)) == "bad_signature"


def test_chain_substitution_is_refused() -> None:
    twin = forge(ALICE, A, id=b"\1" * 16)
    grandchild = forge(B, C, CHILD)
    assert refusal(twin, CHILD) == "chain_broken"
    assert refusal(CHILD, ROOT) == "chain_broken"
    assert refusal(CHILD) == "chain_broken"
    assert refusal(ROOT, grandchild) == "chain_broken"
    assert refusal(ROOT, grandchild, CHILD) == "chain_broken"
    assert refusal(ROOT, CHILD, CHILD) == "chain_broken"
    assert refusal(ROOT, CHILD, forge(B, A, CHILD)) == "chain_broken"


def test_the_root_must_be_a_known_human() -> None:
    stranger = party("human/mallory")
    impostor = Party(HUMAN, CRYPTO.keygen(COMPOSITE))
    assert refusal(forge(stranger, A)) == "root_not_human"
    assert refusal(forge(impostor, A)) == "root_not_human"
    assert refusal(forge(SERVICE, A)) == "root_not_human"
    assert refusal(forge(A, B)) == "root_not_human"
    # A service anchor that calls itself human, and a human anchor under another name.
    assert refusal(forge(Party(HUMAN, SERVICE.key), A)) == "root_not_human"
    assert refusal(forge(Party(f"spiffe://{TD}/human/bob", ALICE.key), A)) == "root_not_human"


@pytest.mark.parametrize(
    "mark",
    [
        ("token", bytes(16).hex()),
        ("key", ALICE.key.kid.hex()),
        ("key", A.key.kid.hex()),
        ("key", B.key.kid.hex()),
        ("principal", HUMAN),
        ("principal", A.id),
        ("principal", B.id),
    ],
)
def test_anything_revoked_in_the_chain_refuses_it(mark: tuple[str, str]) -> None:
    assert refusal(ROOT, CHILD, trust=trust([mark])) == "revoked"


def test_two_parent_capabilities_do_not_add_up_to_a_third() -> None:
    root = forge(
        ALICE, A, capabilities=(Capability("egress.httpRead", "host:a"), Capability("egress.httpWrite", "host:b"))
    )
    assert refusal(root, forge(A, B, root, capabilities=(Capability("egress.httpWrite", "host:a"),))) == "scope_widened"


def capabilities(*rows: tuple[str, str, dict[str, Any]]) -> list[Any]:
    return [{"a": action, "r": resource, "c": constraints} for action, resource, constraints in rows]


def raw(**changes: Any) -> dict[str, Any]:
    decoded = unpack(parse(ROOT).signed, limit=65_536)
    assert isinstance(decoded, dict)
    result: dict[str, Any] = decoded
    for name, value in changes.items():
        if value is None:
            del result[name]
        else:
            result[name] = value
    return result


BAD_BODIES: dict[str, Callable[[], dict[str, Any]]] = {
    "version 2": lambda: raw(v=2),
    "version true": lambda: raw(v=True),
    "no version": lambda: raw(v=None),
    "unknown key": lambda: raw(scope="*"),
    "short id": lambda: raw(id=bytes(15)),
    "text for bytes": lambda: raw(id="0" * 16),
    "bytes for text": lambda: raw(iss=HUMAN.encode()),
    "boolean depth": lambda: raw(d=True),
    "negative time": lambda: raw(nbf=-1),
    "time beyond 53 bits": lambda: raw(exp=1 << 53),
    "upper-case trust domain": lambda: raw(iss=HUMAN.replace(TD, TD.upper())),
    "no subject key": lambda: raw(spk=None),
    "short subject key": lambda: raw(spk=bytes(1983)),
    "capability with an extra key": lambda: raw(cap=[{"a": "egress.*", "r": "host:**", "c": {}, "d": 1}]),
    "capability without constraints": lambda: raw(cap=[{"a": "egress.*", "r": "host:**"}]),
    "unknown constraint": lambda: raw(cap=capabilities(("egress.*", "host:**", {"sudo": True}))),
    "constraint of the wrong type": lambda: raw(cap=capabilities(("egress.*", "host:**", {"max_requests": "9"}))),
    "boolean count": lambda: raw(cap=capabilities(("egress.*", "host:**", {"max_requests": True}))),
    "65 capabilities": lambda: raw(cap=capabilities(*[("egress.*", "host:**", {})] * 65)),
    "audience of numbers": lambda: raw(aud=[1]),
    "unknown binding": lambda: raw(bnd={"planet": "mars"}),
    "deep nesting": lambda: raw(**{"x-deep": [[[[[[[[[1]]]]]]]]]}),
}


@pytest.mark.parametrize("what", BAD_BODIES)
def test_a_malformed_body_is_refused_though_it_is_signed(what: str) -> None:
    assert refusal(sealed(pack(BAD_BODIES[what]()), ALICE.key)) == "bad_format"


def test_an_extension_key_is_carried_and_signed() -> None:
    check(sealed(pack(raw(**{"x-note": "hello"})), ALICE.key))


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "never used byte": b"\xc1",
    "non-minimal integer": b"\xcd\x00\x01",
    "non-minimal length": b"\xd9\x01a",
    "duplicate key": b"\x82\xa1a\x01\xa1a\x01",
    "integer key": b"\x81\x01\x01",
    "NaN": b"\xcb\x7f\xf8" + bytes(6),
    "float": b"\xca\x3f\x80\x00\x00",
    "extension": b"\xd4\x05\x00",
    "timestamp extension": b"\xd6\xff" + bytes(4),
    "not UTF-8": b"\xa1\xff",
    "trailing byte": b"\x01\x01",
    "truncated": b"\xa5abc",
    "map of 2^32-1": b"\xdf\xff\xff\xff\xff",
    "array of 2^32-1": b"\xdd\xff\xff\xff\xff",
    "text of 2^32-1": b"\xdb\xff\xff\xff\xff",
    "bytes of 2^32-1": b"\xc6\xff\xff\xff\xff",
    "depth 10,000": b"\x91" * 10_000 + b"\x01",
    "depth 9": b"\x91" * 9 + b"\x01",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_msgpack_is_refused(what: str) -> None:
    with pytest.raises(WireError):
        unpack(HOSTILE[what], limit=65_536)
    with pytest.raises(Refused) as caught:
        parse(HOSTILE[what])
    assert caught.value.reason == "bad_format"


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=10) | st.binary(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(plain)
def test_plain_values_survive_the_wire(value: Any) -> None:
    try:
        assert unpack(pack(value), limit=65_536) == value
    except WireError as error:
        assert "nested" in str(error)


@given(st.binary(max_size=100))
def test_any_bytes_are_the_canonical_form_of_a_value_or_refused(data: bytes) -> None:
    try:
        value = unpack(data, limit=65_536)
    except WireError:
        return
    assert pack(value) == data


def test_longer_than_the_limit_is_refused_unread() -> None:
    with pytest.raises(WireError, match="limit is 10"):
        unpack(msgpack.packb(bytes(20)), limit=10)


@given(st.binary(max_size=300))
def test_garbage_is_no_token(garbage: bytes) -> None:
    for data in (garbage, pack({"b": garbage, "s": bytes(3373)})):
        with pytest.raises(Refused) as caught:
            parse(data)
        assert caught.value.reason == "bad_format"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_mutated_token_never_verifies(data: st.DataObject) -> None:
    victim = data.draw(st.sampled_from([0, 1]))
    token = bytearray((ROOT, CHILD)[victim])
    # Half of the draws hit the 600 bytes that say something; the rest is key and signature.
    place = data.draw(st.integers(0, len(token) - 1) | st.integers(0, 400) | st.integers(2000, 2700))
    kind = data.draw(st.sampled_from(["flip", "drop", "insert", "cut"]))
    if kind == "flip":
        token[place] ^= data.draw(st.integers(1, 255))
    elif kind == "drop":
        del token[place]
    elif kind == "insert":
        token.insert(place, data.draw(st.integers(0, 255)))
    else:
        del token[place:]
    if bytes(token) == (ROOT, CHILD)[victim]:
        return
    tokens = (bytes(token), CHILD) if victim == 0 else (ROOT, bytes(token))
    with pytest.raises(Refused):
        check(*tokens)
    with pytest.raises(Refused):
        check(bytes(token))


@pytest.mark.parametrize(
    "action", ["", "*", ".*", "egress.", "egress..x", "Egress.x", "egress.*.x", "egress. x", "égress", "a" * 129, "a\n"]
)
def test_what_is_not_an_action_is_refused(action: str) -> None:
    with pytest.raises(BadScope):
        Capability(action, "host:**")
    with pytest.raises(BadScope):
        WIDE.covers(action, "host:a")


@pytest.mark.parametrize(
    "resource",
    [
        "",
        "orders/*",
        "topic:",
        "topic:/a",
        "topic:a//b",
        "topic:a/",
        "topic:orders/../x",
        "topic:./x",
        "topic:orders/.",
        "topic:a./b",
        "topic:orders%2fa",
        "topic:orders%2Fa",
        "topic:a\\b",
        "topic:a*",
        "topic:**/a",
        "topic:***",
        "topic:оrders/a",  # a Cyrillic letter
        "topic:a\u2044b",  # fraction slash
        "topic:a b",
        "topic:a\0",
        "Topic:a",
        "host:API.example.com",
        "host:api.example.com.",
        "host:.example.com",
        "host:*.example.com",
        "host:api..example.com",
        "host:bücher.example",
        "host:192.168.001.1/x%",
        "host:2001:DB8::1",
        "host:0:0:0:0:0:0:0:1",
        "topic:" + "a/" * 32 + "a",
        "topic:" + "a" * 1024,
    ],
)
def test_a_resource_has_one_spelling(resource: str) -> None:
    with pytest.raises(BadScope):
        Capability("egress.*", resource)


@pytest.mark.parametrize(
    ("pattern", "resource", "covered"),
    [
        ("topic:orders/*", "topic:orders/a", True),
        ("topic:orders/*", "topic:orders/a/b", False),
        ("topic:orders/*", "topic:orders", False),
        ("topic:orders/**", "topic:orders/a/b", True),
        ("topic:orders/**", "topic:orders", False),
        ("topic:orders/**", "topic:ordersx/a", False),
        ("topic:*/a", "topic:x/a", True),
        ("topic:*/a", "topic:x/y/a", False),
        ("topic:orders/a", "topic:orders/A", False),
        ("host:**", "host:api.example.com", True),
        ("host:**", "host:2001:db8::1", True),
        ("host:10.0.0.1", "host:10.0.0.1", True),
        ("host:example.com", "host:api.example.com", False),
        ("host:**", "topic:a", False),
    ],
)
def test_patterns_cover_whole_segments(pattern: str, resource: str, covered: bool) -> None:
    assert Capability("egress.*", pattern).covers("egress.httpRead", resource) is covered


def test_a_concrete_resource_has_no_wildcards() -> None:
    for resource in ("host:*", "host:**"):
        with pytest.raises(BadScope):
            WIDE.covers("egress.httpRead", resource)
    with pytest.raises(BadScope):
        WIDE.covers("egress.*", "host:a")


@pytest.mark.parametrize(
    ("child", "parent", "within"),
    [
        ({}, {}, True),
        ({"max_requests": 5}, {}, True),
        ({}, {"max_requests": 5}, False),
        ({"max_requests": 5}, {"max_requests": 5}, True),
        ({"max_requests": 6}, {"max_requests": 5}, False),
        ({"methods": ["GET"]}, {"methods": ["GET", "HEAD"]}, True),
        ({"methods": ["GET", "POST"]}, {"methods": ["GET", "HEAD"]}, False),
        ({"ports": [443]}, {"ports": [443, 80]}, True),
        ({"max_cost_nano_usd": 1}, {"max_cost_nano_usd": 0}, False),
    ],
)
def test_constraints_are_repeated_equal_or_tighter(child: dict[str, Any], parent: dict[str, Any], within: bool) -> None:
    assert Capability("a.b", "x:y", child).within(Capability("a.b", "x:y", parent)) is within


segment = st.sampled_from(["a", "b", "*"])
pattern_text = st.builds(
    lambda segments, tail: "x:" + "/".join([*segments, *tail]),
    st.lists(segment, min_size=1, max_size=3),
    st.sampled_from([[], ["**"]]),
)
action_text = st.sampled_from(["n.a", "n.b", "n.*", "n.a.c", "n.a.*", "m.a"])
concrete = st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=4).map(lambda segments: "x:" + "/".join(segments))


@given(action_text, pattern_text, action_text, pattern_text, st.sampled_from(["n.a", "n.b", "n.a.c", "m.a"]), concrete)
def test_a_capability_within_another_covers_nothing_more(
    child_action: str, child_resource: str, parent_action: str, parent_resource: str, action: str, resource: str
) -> None:
    child, parent = Capability(child_action, child_resource), Capability(parent_action, parent_resource)
    if child.within(parent) and child.covers(action, resource):
        assert parent.covers(action, resource)
    assert child.within(child)


def test_a_body_reads_back_as_written() -> None:
    written = replace(
        body(ALICE, A, audience=("x",), binding={"session": "s"}),
        capabilities=(Capability("egress.httpRead", "host:a", {"ports": [443], "max_requests": 3}),),
    )
    assert parse(sealed(written.encode(), ALICE.key)).body == written
