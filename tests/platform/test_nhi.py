"""The embedded trust domain: ids, keys made on first use, tokens, proof of possession, revocation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creto_platform.crypto import EmbeddedCrypto
from creto_platform.nhi import BadSpiffeId, Capability, EmbeddedNhi, NhiError, Refused, chain_digest, spiffe
from creto_platform.nhi.directory import Directory
from creto_platform.nhi.embedded import local_user
from creto_platform.wire import pack, unpack

CRYPTO = EmbeddedCrypto()
EGRESS = (Capability("egress.*", "host:**"),)


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def open_nhi(tmp_path: Path, clock: Clock, user: str = "alice") -> EmbeddedNhi:
    return EmbeddedNhi(tmp_path / "nhi", CRYPTO, trust_domain="example.org", clock=clock, user=user)


@pytest.fixture
def nhi(tmp_path: Path, clock: Clock) -> Iterator[EmbeddedNhi]:
    opened = open_nhi(tmp_path, clock)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe:",
        "spiffe://",
        "spiffe://td",
        "spiffe://td/",
        "spiffe:///a",
        "http://td/a",
        "SPIFFE://td/a",
        "spiffe://TD/a",
        "spiffe://td:80/a",
        "spiffe://user@td/a",
        "spiffe://td/a/",
        "spiffe://td//a",
        "spiffe://td/.",
        "spiffe://td/a/..",
        "spiffe://td/a/../b",
        "spiffe://td/%61",
        "spiffe://td/a?b",
        "spiffe://td/a#b",
        "spiffe://td/a b",
        "spiffe://td/a\n",
        "spiffe://td/а",  # a Cyrillic letter
        "spiffe://tд/a",
        "spiffe://td/a\0",
        "spiffe://" + "t" * 256 + "/a",
        "spiffe://td/" + "a" * 2037,
    ],
)
def test_what_is_not_a_spiffe_id_is_refused(text: str) -> None:
    with pytest.raises(BadSpiffeId):
        spiffe.parse(text)


def test_a_spiffe_id_of_2048_bytes_is_accepted() -> None:
    text = "spiffe://td/" + "a" * 2036
    assert len(text) == 2048
    assert str(spiffe.parse(text)) == text


@given(
    st.from_regex(r"[a-z0-9._-]{1,20}", fullmatch=True),
    st.lists(st.from_regex(r"[A-Za-z0-9._-]{1,10}", fullmatch=True), min_size=1, max_size=5),
)
def test_spiffe_ids_read_back_as_written(trust_domain: str, segments: list[str]) -> None:
    text = "spiffe://" + "/".join([trust_domain, *segments])
    if "." in segments or ".." in segments:
        with pytest.raises(BadSpiffeId):
            spiffe.parse(text)
    else:
        parsed = spiffe.parse(text)
        assert (str(parsed), parsed.trust_domain, list(parsed.segments)) == (text, trust_domain, segments)


@given(st.text(max_size=40))
def test_any_text_is_a_spiffe_id_or_refused(text: str) -> None:
    for candidate in (text, "spiffe://" + text, "spiffe://td/" + text):
        try:
            parsed = spiffe.parse(candidate)
        except BadSpiffeId:
            continue
        assert str(parsed) == candidate and candidate.isascii()


def test_an_agent_answers_to_the_local_human(nhi: EmbeddedNhi, clock: Clock) -> None:
    identity = nhi.agent("researcher", ttl_s=600)
    assert identity.id == "spiffe://example.org/agent/researcher"
    assert identity.name == "researcher"
    assert identity.chain == ("spiffe://example.org/human/alice", identity.id)
    assert identity.expires_at == clock.now + 600
    assert identity.chain_digest == chain_digest(identity.tokens) and len(identity.chain_digest) == 32
    assert nhi.verify_chain(identity.tokens, clock.now) == identity
    assert identity.permits("egress.httpRead", "host:api.example.com")
    assert not identity.permits("vault.read", "secret:a")


def test_the_human_root_is_made_on_first_use_and_kept(nhi: EmbeddedNhi, tmp_path: Path, clock: Clock) -> None:
    assert nhi.anchors() == []
    nhi.agent("a")
    (anchor,) = nhi.anchors()
    assert (anchor.principal, anchor.kind) == ("spiffe://example.org/human/alice", "human")
    again = open_nhi(tmp_path, clock)
    identity = again.agent("a")
    assert again.anchors() == [anchor]
    assert nhi.verify_chain(identity.tokens, clock.now) == identity
    again.close()


def test_an_agent_keeps_its_key_and_gets_fresh_tokens(nhi: EmbeddedNhi, clock: Clock) -> None:
    first = nhi.agent("a")
    (key,) = nhi.agents()
    clock.now += 5
    second = nhi.agent("a")
    assert nhi.agents() == [key]
    assert first.tokens != second.tokens and first.chain_digest != second.chain_digest
    assert [token.subject for token in nhi.issued()] == [first.id, first.id]


def test_state_is_private(nhi: EmbeddedNhi, tmp_path: Path) -> None:
    nhi.agent("a")
    files = [path for path in (tmp_path / "nhi").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"nhi.db", "human-alice.key", "agent-a.key", "trust_domain"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in files if path.suffix in (".key", ".db"))
    assert (tmp_path / "nhi").stat().st_mode & 0o777 == 0o700


def test_an_owner_without_a_root_key_is_refused_until_enrolled(nhi: EmbeddedNhi) -> None:
    with pytest.raises(NhiError, match="enrol"):
        nhi.agent("a", owner="bob")
    nhi.enrol_human("bob")
    assert nhi.agent("a", owner="bob").chain[0] == "spiffe://example.org/human/bob"


def test_an_agent_is_not_taken_over_by_another_owner(nhi: EmbeddedNhi) -> None:
    nhi.agent("a")
    nhi.enrol_human("bob")
    with pytest.raises(NhiError, match="belongs to spiffe://example.org/human/alice"):
        nhi.agent("a", owner="bob")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "ä", "a%2fb", "x" * 2048])
def test_names_that_are_no_path_segment_are_refused(nhi: EmbeddedNhi, name: str) -> None:
    with pytest.raises(Refused) as caught:
        nhi.agent(name)
    assert caught.value.reason == "bad_format"


@pytest.mark.parametrize("ttl_s", [0, -1, 91 * 86_400])
def test_a_delegation_has_a_sensible_life(nhi: EmbeddedNhi, ttl_s: float) -> None:
    with pytest.raises(NhiError, match="seconds"):
        nhi.agent("a", ttl_s=ttl_s)


def test_a_directory_belongs_to_one_trust_domain(nhi: EmbeddedNhi, tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(NhiError, match=r"trust_domain: this state belongs to trust domain example\.org"):
        EmbeddedNhi(tmp_path / "nhi", CRYPTO, trust_domain="other.org", clock=clock)
    with pytest.raises(NhiError, match="trust domain 'UPPER'"):
        EmbeddedNhi(tmp_path / "other", CRYPTO, trust_domain="UPPER", clock=clock)


def test_a_damaged_directory_is_an_error_that_names_the_file(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "nhi").mkdir()
    (tmp_path / "nhi" / "nhi.db").write_bytes(b"not a database" * 100)
    with pytest.raises(NhiError, match=r"nhi\.db: file is not a database"):
        open_nhi(tmp_path, clock)


def test_a_chain_expires_to_the_second(nhi: EmbeddedNhi, clock: Clock) -> None:
    identity = nhi.agent("a", ttl_s=60)
    nhi.verify_chain(identity.tokens, clock.now + 59)
    for check in (lambda now: nhi.verify_chain(identity.tokens, now), lambda now: nhi.recheck(identity, now)):
        with pytest.raises(Refused) as caught:
            check(clock.now + 60)
        assert caught.value.reason == "expired"
    with pytest.raises(Refused) as caught:
        nhi.verify_chain(identity.tokens, clock.now - 2)
    assert caught.value.reason == "not_yet_valid"


def test_a_sub_delegate_is_narrower_and_dies_with_its_parent(nhi: EmbeddedNhi, clock: Clock) -> None:
    parent = nhi.agent("parent", ttl_s=100)
    child = nhi.sub_delegate(
        parent, "child", capabilities=[Capability("egress.httpRead", "host:api.example.com")], ttl_s=5000
    )
    assert child.chain == (*parent.chain, "spiffe://example.org/agent/child")
    assert child.expires_at == parent.expires_at
    assert not child.permits("egress.httpWrite", "host:api.example.com")
    assert nhi.verify_chain(child.tokens, clock.now) == child
    with pytest.raises(Refused) as caught:
        nhi.sub_delegate(child, "wider", capabilities=EGRESS)
    assert caught.value.reason == "scope_widened"


def test_an_agent_cannot_delegate_to_itself(nhi: EmbeddedNhi) -> None:
    parent = nhi.agent("a")
    with pytest.raises(Refused) as caught:
        nhi.sub_delegate(parent, "a", capabilities=EGRESS)
    assert caught.value.reason == "chain_broken"


def test_ten_links_are_the_most(nhi: EmbeddedNhi, clock: Clock) -> None:
    identity = nhi.agent("a1")
    for depth in range(2, 11):
        identity = nhi.sub_delegate(identity, f"a{depth}", capabilities=EGRESS)
    assert len(nhi.verify_chain(identity.tokens, clock.now).chain) == 11
    with pytest.raises(Refused) as caught:
        nhi.sub_delegate(identity, "a11", capabilities=EGRESS)
    assert caught.value.reason == "chain_too_deep"


def test_audience_and_binding_must_be_met(nhi: EmbeddedNhi, clock: Clock) -> None:
    identity = nhi.agent("a", audience=["gateway"], binding={"sandbox": "s1"})
    nhi.verify_chain(identity.tokens, clock.now, "gateway", {"sandbox": "s1", "session": "x"})
    for audience, binding, reason in (
        (None, {"sandbox": "s1"}, "wrong_audience"),
        ("other", {"sandbox": "s1"}, "wrong_audience"),
        ("gateway", {"sandbox": "s2"}, "wrong_binding"),
        ("gateway", None, "wrong_binding"),
    ):
        with pytest.raises(Refused) as caught:
            nhi.verify_chain(identity.tokens, clock.now, audience, binding)
        assert caught.value.reason == reason


def refusal(nhi: EmbeddedNhi, tokens: tuple[bytes, ...], proof: bytes, audience: str = "gateway") -> str:
    with pytest.raises(Refused) as caught:
        nhi.authenticate(tokens, proof, audience)
    return caught.value.reason


def test_a_proof_of_possession_counts_once(nhi: EmbeddedNhi) -> None:
    identity = nhi.agent("a")
    proof = nhi.prove(identity, nhi.challenge("gateway"), "gateway")
    assert nhi.authenticate(identity.tokens, proof, "gateway") == identity
    assert refusal(nhi, identity.tokens, proof) == "replay"


def test_a_proof_holds_for_one_nonce_audience_and_minute(nhi: EmbeddedNhi, clock: Clock) -> None:
    identity = nhi.agent("a", ttl_s=3600)
    assert refusal(nhi, identity.tokens, nhi.prove(identity, bytes(32), "gateway")) == "replay"
    elsewhere = nhi.prove(identity, nhi.challenge("other"), "other")
    assert refusal(nhi, identity.tokens, elsewhere) == "unknown_sender"
    crossed = nhi.prove(identity, nhi.challenge("other"), "gateway")
    assert refusal(nhi, identity.tokens, crossed) == "replay"
    nonce = nhi.challenge("gateway")
    early = nhi.prove(identity, nonce, "gateway")
    clock.now += 61
    assert refusal(nhi, identity.tokens, early) == "replay"
    # A fresh signature does not revive an old nonce.
    assert refusal(nhi, identity.tokens, nhi.prove(identity, nonce, "gateway")) == "replay"
    ahead = nhi.challenge("gateway")
    clock.now += 30
    from_the_future = nhi.prove(identity, ahead, "gateway")
    clock.now -= 30
    assert refusal(nhi, identity.tokens, from_the_future) == "replay"


def test_a_stolen_chain_is_useless_without_its_key(nhi: EmbeddedNhi) -> None:
    victim, thief = nhi.agent("victim"), nhi.agent("thief")
    nonce = nhi.challenge("gateway")
    assert refusal(nhi, victim.tokens, nhi.prove(thief, nonce, "gateway")) == "unknown_sender"
    # The thief's own proof, made to claim the victim's chain: the signature is not the victim's.
    envelope = unpack(nhi.prove(thief, nonce, "gateway"), limit=10_000)
    own = unpack(nhi.prove(victim, nonce, "gateway"), limit=10_000)
    assert isinstance(envelope, dict) and isinstance(own, dict)
    assert refusal(nhi, victim.tokens, pack({"b": own["b"], "s": envelope["s"]})) == "unknown_sender"
    # None of these attempts used up the nonce.
    assert nhi.authenticate(victim.tokens, nhi.prove(victim, nonce, "gateway"), "gateway") == victim


@given(st.binary(max_size=200))
def test_a_garbage_proof_is_refused(garbage: bytes) -> None:
    from creto_platform.nhi import possession

    with pytest.raises(Refused) as caught:
        possession.check(
            CRYPTO,
            possession.Challenges(Clock()),
            garbage,
            public=bytes(1984),
            kid=bytes(32),
            digest=bytes(32),
            audience="a",
            now=0,
        )
    assert caught.value.reason == "bad_format"


def test_unanswered_challenges_are_bounded(clock: Clock) -> None:
    from creto_platform.nhi import possession

    challenges = possession.Challenges(clock)
    for _ in range(10_000):
        challenges.issue("a")
    with pytest.raises(NhiError, match="too many"):
        challenges.issue("a")
    clock.now += 61
    challenges.issue("a")


@pytest.mark.parametrize("what", ["token", "agent key", "agent", "root key", "root"])
def test_a_revocation_takes_everything_below(nhi: EmbeddedNhi, clock: Clock, what: str) -> None:
    parent = nhi.agent("parent")
    child = nhi.sub_delegate(parent, "child", capabilities=EGRESS)
    other = nhi.agent("other")
    (anchor,) = nhi.anchors()
    keys = {agent.name: agent.kid.hex() for agent in nhi.agents()}
    root_token = next(token.id for token in nhi.issued() if token.subject == parent.id)
    epoch = nhi.revocation_epoch
    if what == "token":
        nhi.revoke("token", root_token, "")
    elif what == "agent key":
        nhi.revoke("key", keys["parent"], "")
    elif what == "agent":
        nhi.revoke("principal", parent.id, "")
    elif what == "root key":
        nhi.revoke("key", anchor.kid.hex(), "")
    else:
        nhi.revoke("principal", anchor.principal, "")
    assert nhi.revocation_epoch > epoch
    for identity in (parent, child):
        for check in (lambda i: nhi.verify_chain(i.tokens, clock.now), lambda i: nhi.recheck(i, clock.now)):
            with pytest.raises(Refused) as caught:
                check(identity)
            assert caught.value.reason == "revoked"
    if what.startswith("root"):
        with pytest.raises(Refused):
            nhi.verify_chain(other.tokens, clock.now)
    else:
        assert nhi.verify_chain(other.tokens, clock.now) == other


def test_a_revoked_agent_gets_no_token_and_a_revoked_key_is_replaced(nhi: EmbeddedNhi, clock: Clock) -> None:
    old = nhi.agent("a")
    nhi.revoke("key", nhi.agents()[0].kid.hex(), "leaked")
    fresh = nhi.agent("a")
    assert nhi.verify_chain(fresh.tokens, clock.now) == fresh
    with pytest.raises(Refused):
        nhi.verify_chain(old.tokens, clock.now)
    nhi.revoke("principal", fresh.id, "retired")
    with pytest.raises(Refused) as caught:
        nhi.agent("a")
    assert caught.value.reason == "revoked"


def test_rotation_gives_a_new_key_and_leaves_old_tokens_alone(nhi: EmbeddedNhi, clock: Clock) -> None:
    old = nhi.agent("a")
    (before,) = nhi.agents()
    after = nhi.rotate("a")
    assert after.kid != before.kid and after.owner == before.owner
    fresh = nhi.agent("a")
    assert nhi.verify_chain(old.tokens, clock.now) == old
    assert nhi.verify_chain(fresh.tokens, clock.now) == fresh
    with pytest.raises(NhiError, match="no agent"):
        nhi.rotate("unknown")


def test_another_process_sees_a_revocation_at_once(nhi: EmbeddedNhi, tmp_path: Path, clock: Clock) -> None:
    identity = nhi.agent("a")
    other = open_nhi(tmp_path, clock)
    other.verify_chain(identity.tokens, clock.now)
    epoch = other.revocation_epoch
    nhi.revoke("principal", identity.id, "")
    assert other.revocation_epoch > epoch
    with pytest.raises(Refused):
        other.verify_chain(identity.tokens, clock.now)
    other.close()


def test_revocations_are_listed_with_checked_signatures(nhi: EmbeddedNhi, tmp_path: Path) -> None:
    nhi.agent("a")
    done = nhi.revoke("principal", "spiffe://example.org/agent/a", "because")
    nhi.revoke("principal", "spiffe://example.org/agent/a", "again")
    assert nhi.revocations() == [done]
    forged = Directory(tmp_path / "nhi" / "nhi.db")
    (entry,) = forged.revocation_entries()
    forged.add_revocation("principal", "x", entry.replace(b"because", b"becausE"))
    forged.close()
    with pytest.raises(NhiError, match="tampered"):
        nhi.revocations()


@pytest.mark.parametrize(
    ("kind", "value"),
    [("token", "zz"), ("token", "00"), ("key", "00" * 16), ("key", "AA" * 32), ("principal", "bob"), ("planet", "x")],
)
def test_only_ids_can_be_revoked(nhi: EmbeddedNhi, kind: str, value: str) -> None:
    with pytest.raises(Refused) as caught:
        nhi.revoke(kind, value, "")  # type: ignore[arg-type]
    assert caught.value.reason == "bad_format"


def test_the_local_user_fits_a_spiffe_id(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, expected in (("alice", "alice"), ("DOMAIN\\bob smith", "DOMAIN-bob-smith"), ("..", None), ("é", None)):
        monkeypatch.setattr("getpass.getuser", lambda name=name: name)
        user = local_user()
        spiffe.check_segment(user)
        assert expected is None or user == expected

    def nobody() -> str:
        raise OSError("no user name")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert local_user().startswith("uid-")
