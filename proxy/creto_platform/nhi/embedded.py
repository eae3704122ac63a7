"""The trust domain in files and SQLite: a root key per local human, a key per agent, tokens made here."""

from __future__ import annotations

import getpass
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from creto_platform.crypto import COMPOSITE, BadSignature, Crypto, Key, KeyInvalid, KeyStore
from creto_platform.nhi import delegation, possession, spiffe
from creto_platform.nhi.directory import Directory
from creto_platform.nhi.port import (
    DEFAULT_CAPABILITIES,
    AgentKey,
    Anchor,
    Identity,
    IssuedToken,
    NhiError,
    Refused,
    Revocation,
    RevocationKind,
)
from creto_platform.nhi.scope import Capability
from creto_platform.wire import WireError, pack, unpack

REVOCATION_CONTEXT = b"creto/v1/revocation"
# Times are whole seconds: a token must be valid at once wherever the same clock is rounded otherwise.
_BACKDATE_S = 1
# Identity keys are meant to rotate every 90 days; no delegation outlives that.
_MAX_TTL_S = 90 * 86_400
_MAX_FURTHER = delegation.MAX_DEPTH - 1
_REVOCATION_LIMIT = 16_384
_KINDS: Mapping[str, RevocationKind] = {"token": "token", "key": "key", "principal": "principal"}


class EmbeddedNhi:
    """The identity port over ``directory``: ``trust_domain`` (text), ``keys/`` (seeds, 0600), ``nhi.db``.

    clock gives unix seconds. user is the local human, by default whoever runs the process. Raises NhiError when the
    directory belongs to another trust domain.
    """

    def __init__(
        self,
        directory: Path,
        crypto: Crypto,
        *,
        trust_domain: str,
        clock: Callable[[], float],
        user: str | None = None,
    ) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._crypto = crypto
        self._clock = clock
        self._trust_domain = _claim_trust_domain(directory / "trust_domain", trust_domain)
        self._user = local_user() if user is None else user
        self._keys = KeyStore(directory / "keys", crypto)
        self._directory = Directory(directory / "nhi.db")
        self._trust = delegation.Trust(trust_domain, self._directory.anchor, self._directory.revoked)
        self._challenges = possession.Challenges(clock)
        # One at a time: looking for an agent's key and giving it another must not interleave.
        self._lock = threading.Lock()

    @property
    def trust_domain(self) -> str:
        return self._trust_domain

    @property
    def revocation_epoch(self) -> int:
        return self._directory.revocation_epoch()

    def agent(
        self,
        name: str,
        *,
        owner: str | None = None,
        ttl_s: float = 900.0,
        capabilities: Sequence[Capability] = DEFAULT_CAPABILITIES,
        audience: Sequence[str] = (),
        binding: Mapping[str, str] | None = None,
    ) -> Identity:
        human = self._make_id("human", self._user if owner is None else owner)
        with self._lock:
            root = self._human_key(human)
            subject, key = self._agent_key(name, human)
        now = int(self._clock())
        body = delegation.Body(
            id=os.urandom(16),
            issuer=human,
            issuer_kid=root.kid,
            subject=subject,
            subject_kid=key.kid,
            subject_public=key.public,
            root=human,
            parent=bytes(32),
            depth=1,
            further=_MAX_FURTHER,
            capabilities=tuple(capabilities),
            not_before=now - _BACKDATE_S,
            expires=_expiry(now, ttl_s),
            audience=tuple(audience),
            binding=dict(binding or {}),
            revocation_log=self._trust.revocation_log,
        )
        return self._issue(root, (), body)

    def sub_delegate(
        self,
        parent: Identity,
        name: str,
        *,
        capabilities: Sequence[Capability],
        ttl_s: float = 900.0,
        audience: Sequence[str] = (),
        binding: Mapping[str, str] | None = None,
    ) -> Identity:
        above = delegation.parse(parent.tokens[-1])
        with self._lock:
            issuer = self._key_by_kid(above.body.subject_kid)
            subject, key = self._agent_key(name, above.body.root)
        now = int(self._clock())
        body = delegation.Body(
            id=os.urandom(16),
            issuer=above.body.subject,
            issuer_kid=issuer.kid,
            subject=subject,
            subject_kid=key.kid,
            subject_public=key.public,
            root=above.body.root,
            parent=above.digest,
            depth=above.body.depth + 1,
            further=max(0, above.body.further - 1),
            capabilities=tuple(capabilities),
            not_before=max(now - _BACKDATE_S, above.body.not_before),
            expires=min(_expiry(now, ttl_s), above.body.expires),
            audience=tuple(audience or above.body.audience),
            binding={**above.body.binding, **(binding or {})},
            revocation_log=above.body.revocation_log,
        )
        return self._issue(issuer, parent.tokens, body)

    def verify_chain(
        self,
        tokens: Sequence[bytes],
        now: float,
        audience: str | None = None,
        binding: Mapping[str, str] | None = None,
    ) -> Identity:
        chain = delegation.verify(self._crypto, tokens, now, self._trust, audience, binding)
        return _identity(chain)

    def recheck(self, identity: Identity, now: float) -> None:
        if now >= identity.expires_at:
            raise Refused("expired", "the delegation has expired")
        delegation.check_revoked(
            [delegation.parse(token, link) for link, token in enumerate(identity.tokens)], self._trust
        )

    def challenge(self, audience: str) -> bytes:
        return self._challenges.issue(audience)

    def prove(self, identity: Identity, nonce: bytes, audience: str) -> bytes:
        key = self._key_by_kid(delegation.parse(identity.tokens[-1]).body.subject_kid)
        return possession.prove(self._crypto, key, identity.chain_digest, nonce, audience, self._clock())

    def authenticate(
        self,
        tokens: Sequence[bytes],
        proof: bytes,
        audience: str,
        binding: Mapping[str, str] | None = None,
    ) -> Identity:
        now = self._clock()
        chain = delegation.verify(self._crypto, tokens, now, self._trust, audience, binding)
        identity = _identity(chain)
        possession.check(
            self._crypto,
            self._challenges,
            proof,
            public=chain[-1].body.subject_public,
            kid=chain[-1].body.subject_kid,
            digest=identity.chain_digest,
            audience=audience,
            now=now,
        )
        return identity

    def revoke(self, kind: RevocationKind, value: str, reason: str) -> Revocation:
        _check_mark(kind, value)
        by = self._make_id("human", self._user)
        with self._lock:
            key = self._human_key(by, even_if_revoked=True)
        at = int(self._clock())
        signed = pack({"v": 1, "kind": kind, "value": value, "at": at, "why": reason[:1024], "by": by, "ik": key.kid})
        entry = pack({"b": signed, "s": self._crypto.sign(key, signed, REVOCATION_CONTEXT)})
        self._directory.add_revocation(kind, value, entry)
        return Revocation(kind, value, float(at), reason, by)

    def anchors(self) -> list[Anchor]:
        return self._directory.anchors()

    def agents(self) -> list[AgentKey]:
        return self._directory.agents()

    def issued(self) -> list[IssuedToken]:
        return self._directory.tokens()

    def revocations(self) -> list[Revocation]:
        """Every revocation, oldest first, signatures checked. Raises NhiError when an entry was tampered with."""
        return [self._read_revocation(entry) for entry in self._directory.revocation_entries()]

    def enrol_human(self, user: str) -> Anchor:
        """Gives another person a root key on this machine, so that agents can be theirs."""
        human = self._make_id("human", user)
        with self._lock:
            key = self._human_key(human, create=True)
        anchor = self._directory.anchor(key.kid)
        if anchor is None:
            raise NhiError(f"the root key of {human} was not recorded")
        return anchor

    def rotate(self, name: str) -> AgentKey:
        known = self._directory.agent(name)
        if known is None:
            raise NhiError(f"there is no agent {name!r}")
        file = f"agent-{name}@{os.urandom(4).hex()}"
        with self._lock:
            key = self._keys.load_or_create(file, COMPOSITE)
            agent = AgentKey(name, known[0].id, known[0].owner, key.kid, known[0].created_at)
            self._directory.put_agent(agent, file)
        return agent

    def close(self) -> None:
        self._directory.close()

    def _issue(self, key: Key, above: Sequence[bytes], body: delegation.Body) -> Identity:
        parent = delegation.parse(above[-1]) if above else None
        token = delegation.issue(self._crypto, key, parent, body)
        # Verified as anyone else would, before it is given out: a revoked name gets no token.
        audience = body.audience[0] if body.audience else None
        chain = delegation.verify(self._crypto, (*above, token), self._clock(), self._trust, audience, body.binding)
        self._directory.add_token(
            body.id, body.issuer, body.subject, body.subject_kid, body.depth, body.not_before, body.expires
        )
        return _identity(chain)

    def _human_key(self, human: str, *, create: bool = False, even_if_revoked: bool = False) -> Key:
        user = spiffe.parse(human).name
        name = f"human-{user}"
        if user != self._user and not create and self._keys.load(name) is None:
            raise NhiError(f"{human} has no root key here; enrol the person first")
        key = self._keys.load_or_create(name, COMPOSITE)
        self._directory.add_anchor(Anchor(human, key.kid, key.public, "human", self._clock()))
        if not even_if_revoked:
            hit = self._directory.revoked([("principal", human), ("key", key.kid.hex())])
            if hit is not None:
                raise Refused("revoked", f"{hit[0]} {hit[1]} was revoked")
        return key

    def _agent_key(self, name: str, owner: str) -> tuple[str, Key]:
        """The agent's id and its key, a new one when it has none or the old one was revoked."""
        agent_id = self._make_id("agent", name)
        known = self._directory.agent(name)
        if known is not None and known[0].owner != owner:
            raise NhiError(f"agent {name!r} belongs to {known[0].owner}, not to {owner}")
        if known is not None and self._directory.revoked([("key", known[0].kid.hex())]) is None:
            return agent_id, self._keys.load_or_create(known[1], COMPOSITE)
        file = f"agent-{name}"
        while True:
            key = self._keys.load_or_create(file, COMPOSITE)
            if self._directory.revoked([("key", key.kid.hex())]) is None:
                break
            file = f"agent-{name}@{os.urandom(4).hex()}"
        self._directory.put_agent(AgentKey(name, agent_id, owner, key.kid, self._clock()), file)
        return agent_id, key

    def _key_by_kid(self, kid: bytes) -> Key:
        file = self._directory.key_of(kid)
        key = self._keys.load(file) if file else None
        if key is None or key.kid != kid:
            raise Refused("unknown_sender", "the key of that identity is not here")
        return key

    def _make_id(self, kind: str, name: str) -> str:
        try:
            spiffe.check_segment(name)
            return str(spiffe.make(self._trust_domain, kind, name))
        except spiffe.BadSpiffeId as error:
            raise Refused("bad_format", f"not a name for a {kind}: {error}") from None

    def _read_revocation(self, entry: bytes) -> Revocation:
        try:
            envelope = unpack(entry, limit=_REVOCATION_LIMIT)
            if not isinstance(envelope, dict):
                raise WireError("not an envelope")
            signed, signature = envelope["b"], envelope["s"]
            if not isinstance(signed, bytes) or not isinstance(signature, bytes):
                raise WireError("not an envelope")
            said = unpack(signed, limit=_REVOCATION_LIMIT)
            if not isinstance(said, dict) or not isinstance(said["ik"], bytes):
                raise WireError("not a revocation")
            anchor = self._directory.anchor(said["ik"])
            if anchor is None or anchor.principal != said["by"]:
                raise WireError("signed by nobody we know")
            self._crypto.verify(COMPOSITE, anchor.public, signed, signature, REVOCATION_CONTEXT)
            at = said["at"]
            if type(at) is not int:
                raise WireError("not a revocation")
            return Revocation(
                _KINDS[str(said["kind"])], str(said["value"]), float(at), str(said["why"]), anchor.principal
            )
        except (WireError, KeyError, BadSignature, KeyInvalid) as error:
            raise NhiError(f"a stored revocation was tampered with: {error}") from None


def local_user() -> str:
    """The name of whoever runs this process, made fit for a SPIFFE id; ``uid-<n>`` when the system knows no name."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = ""
    fit = re.sub(r"[^A-Za-z0-9._-]+", "-", name, flags=re.ASCII).strip(".-")
    return fit or f"uid-{os.getuid()}"


def _identity(chain: Sequence[delegation.Token]) -> Identity:
    last = chain[-1].body
    data = tuple(token.data for token in chain)
    return Identity(
        id=last.subject,
        name=spiffe.parse(last.subject).name,
        chain=(chain[0].body.root, *(token.body.subject for token in chain)),
        chain_digest=delegation.chain_digest(data),
        expires_at=float(last.expires),
        tokens=data,
        capabilities=last.capabilities,
    )


def _expiry(now: int, ttl_s: float) -> int:
    if not 0 < ttl_s <= _MAX_TTL_S:
        raise NhiError(f"a delegation lasts more than 0 and at most {_MAX_TTL_S} seconds, not {ttl_s}")
    return now + max(1, int(ttl_s))


def _check_mark(kind: str, value: str) -> None:
    try:
        if kind == "principal":
            spiffe.parse(value)
        elif kind not in _KINDS or bytes.fromhex(value).hex() != value or len(value) != {"token": 32, "key": 64}[kind]:
            raise ValueError("not a lower-case hex id of that kind")
    except ValueError as error:
        raise Refused("bad_format", f"{kind} cannot be revoked by that value: {error}") from None


def _claim_trust_domain(path: Path, trust_domain: str) -> str:
    try:
        spiffe.check_trust_domain(trust_domain)
    except spiffe.BadSpiffeId as error:
        raise NhiError(f"trust domain {trust_domain!r}: {error}") from None
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        # An empty file: the process that made it died before writing, so it was never used.
        recorded = path.read_text(encoding="ascii").strip()
        if recorded == trust_domain:
            return trust_domain
        if recorded:
            raise NhiError(f"{path}: this state belongs to trust domain {recorded}, not {trust_domain}") from None
        path.write_text(f"{trust_domain}\n", encoding="ascii")
        return trust_domain
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(f"{trust_domain}\n")
    return trust_domain
