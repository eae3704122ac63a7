"""Proof that whoever presents a chain holds its last key: challenge, signed answer, used once.

The verifier gives a random nonce for one audience; the agent signs nonce, audience, its chain digest and the time.
Nonces live in the verifier's memory for 60 seconds; after a restart old ones are unknown, so the proof is refused
and the agent asks again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from creto_platform.crypto import COMPOSITE, BadSignature, Crypto, Key, KeyInvalid
from creto_platform.crypto.port import SIGNATURE_BYTES
from creto_platform.nhi.port import NhiError, Refused
from creto_platform.wire import WireError, pack, unpack

CONTEXT = b"creto/v1/possession"
LIFETIME_S = 60
# Clocks of agent and verifier may differ a little; the nonce bounds the age exactly, whatever the agent's clock says.
SKEW_S = 5
_OUTSTANDING_LIMIT = 10_000
_PROOF_LIMIT = 8192


class Challenges:
    """Nonces handed out and not yet answered, at most 10,000 at a time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._issued: dict[bytes, tuple[str, float]] = {}

    def issue(self, audience: str) -> bytes:
        """A fresh nonce (32 bytes). Raises NhiError while too many are unanswered."""
        nonce = os.urandom(32)
        now = self._clock()
        with self._lock:
            if len(self._issued) >= _OUTSTANDING_LIMIT:
                self._issued = {n: made for n, made in self._issued.items() if now - made[1] <= LIFETIME_S}
            if len(self._issued) >= _OUTSTANDING_LIMIT:
                raise NhiError("too many unanswered challenges; try again in a minute")
            self._issued[nonce] = (audience, now)
        return nonce

    def redeem(self, nonce: bytes, audience: str) -> None:
        """Returns once per nonce, within its minute and for its audience. Raises Refused("replay")."""
        with self._lock:
            issued = self._issued.pop(nonce, None)
        if issued is None:
            raise Refused("replay", "the nonce is unknown or was used")
        if issued[0] != audience or not 0 <= self._clock() - issued[1] <= LIFETIME_S:
            raise Refused("replay", "the nonce is for another audience or older than a minute")


def prove(crypto: Crypto, key: Key, digest: bytes, nonce: bytes, audience: str, now: float) -> bytes:
    """The proof for one nonce and audience; ``digest`` is the chain digest."""
    signed = pack({"v": 1, "dch": digest, "sk": key.kid, "non": nonce, "aud": audience, "ts": int(now)})
    return pack({"b": signed, "s": crypto.sign(key, signed, CONTEXT)})


def check(
    crypto: Crypto,
    challenges: Challenges,
    proof: bytes,
    *,
    public: bytes,
    kid: bytes,
    digest: bytes,
    audience: str,
    now: float,
) -> None:
    """Raises Refused: "bad_format", "unknown_sender" (another key, chain or audience), "replay"."""
    try:
        envelope = unpack(proof, limit=_PROOF_LIMIT)
        if not isinstance(envelope, dict) or envelope.keys() != {"b", "s"}:
            raise WireError("not an envelope")
        signed, signature = envelope["b"], envelope["s"]
        if not isinstance(signed, bytes) or not isinstance(signature, bytes):
            raise WireError("not an envelope")
        if len(signature) != SIGNATURE_BYTES[COMPOSITE]:
            raise WireError("the signature has the wrong length")
        said = unpack(signed, limit=_PROOF_LIMIT)
    except WireError as error:
        raise Refused("bad_format", f"not a proof of possession: {error}") from None
    if not isinstance(said, dict) or said.keys() != {"v", "dch", "sk", "non", "aud", "ts"} or said["v"] != 1:
        raise Refused("bad_format", "not a proof of possession: unknown content")
    nonce, made = said["non"], said["ts"]
    if not isinstance(nonce, bytes) or type(made) is not int:
        raise Refused("bad_format", "not a proof of possession: unknown content")
    if said["dch"] != digest or said["sk"] != kid or said["aud"] != audience:
        raise Refused("unknown_sender", "the proof is for another chain, key or audience")
    try:
        crypto.verify(COMPOSITE, public, signed, signature, CONTEXT)
    except (BadSignature, KeyInvalid):
        raise Refused("unknown_sender", "the presenter does not hold the agent's key") from None
    if not -SKEW_S <= now - made <= LIFETIME_S:
        raise Refused("replay", "the proof is older than a minute or from the future")
    # Last, so that only the holder of the key can use up a nonce.
    challenges.redeem(nonce, audience)
