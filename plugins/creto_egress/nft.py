"""Loads a ruleset into the network namespace of the calling process, in one netlink transaction: all of it or nothing.

The messages are pyroute2's; they are sent and acknowledged here, because its high-level calls commit one transaction
each and its errors do not say which message failed. No ``nft`` program is needed.

Source: net/netfilter/nf_tables_api.c, nfnetlink.c (batches), linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

from creto_egress.ruleset import (
    Chain,
    Expression,
    FragmentHeader,
    MetaIs,
    PayloadIs,
    RedirectTo,
    Reject,
    Rule,
    Table,
    Translated,
    Verdict,
    translated_status,
)
from creto_proxy.errors import Unsupported

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEW_TABLE, _DELETE_TABLE, _NEW_CHAIN, _NEW_RULE = 0, 2, 3, 6
_REQUEST, _ACK, _CREATE, _APPEND = 0x1, 0x4, 0x400, 0x800
_INET = 1
_ERROR = 2

# The table belongs to the loading socket, so nobody else may change it, and outlives it. PERSIST is of Linux 6.12;
# OWNER alone would take the rules away with us.
OWNER_AND_PERSIST = 0x2 | 0x4
# The kernel answers as fast as it computes; this only keeps a broken one from holding up the start for ever.
_ANSWER_TIMEOUT_S = 10.0

_REGISTER = 1
_EQUAL, _NOT_EQUAL = 0, 1
_CT_STATUS = 2
_REJECT_ICMPX, _ADMIN_PROHIBITED = 2, 3


class RuleRefused(OSError):
    """The kernel did not take ``what`` (a table, chain or rule in nft syntax)."""

    def __init__(self, code: int, what: str) -> None:
        super().__init__(code, f"nftables refuses {what!r}: {os.strerror(code)}")
        self.what = what


def load(table: Table) -> int:
    """Replaces the table of that name by this one; the flags it now has (0 where the kernel knows no owners).

    Raises ``Unsupported`` when the kernel lacks nftables or a part of it, ``RuleRefused`` for other answers.
    """
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as channel:
            channel.settimeout(_ANSWER_TIMEOUT_S)
            channel.bind((0, 0))
            for flags in (OWNER_AND_PERSIST, 0):
                try:
                    _commit(channel, _messages(table, flags))
                except RuleRefused as error:
                    if flags and error.errno in (errno.EOPNOTSUPP, errno.EINVAL) and error.what.startswith("table"):
                        continue
                    raise
                return flags
    except OSError as error:
        if error.errno in (errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT, errno.EAFNOSUPPORT):
            raise Unsupported(
                f"The kernel lacks a part of nftables ({error.strerror}). creto run needs nf_tables with nft_redir, "
                "nft_ct and nft_reject (modprobe nf_tables nft_redir nft_ct nft_reject_inet)."
            ) from error
        raise
    raise AssertionError("the last attempt returns or raises")


_Message = tuple[str, Any]


def _messages(table: Table, flags: int) -> list[_Message]:
    from pyroute2.netlink.nfnetlink import nftsocket

    name = ("NFTA_TABLE_NAME", table.name)
    title = f"table inet {table.name}"

    def new_table() -> Any:
        attributes = [name, ("NFTA_TABLE_FLAGS", flags)] if flags else [name]
        return _headed(nftsocket.nft_table_msg(), _NEW_TABLE, attributes)

    # add, delete, add: replaces the table whether or not there was one.
    messages: list[_Message] = [
        (title, new_table()),
        (title, _headed(nftsocket.nft_table_msg(), _DELETE_TABLE, [name])),
        (title, new_table()),
    ]
    for chain in table.chains:
        messages.append((f"chain {chain.name}", _chain(table, chain)))
        messages += [(rule.text, _rule(table, chain, rule)) for rule in chain.rules]
    return messages


def _headed(message: Any, kind: int, attributes: Sequence[tuple[str, Any]], flags: int = 0) -> Any:
    message["header"]["type"] = _SUBSYSTEM << 8 | kind
    message["header"]["flags"] = _REQUEST | _ACK | (0 if kind == _DELETE_TABLE else _CREATE) | flags
    message["nfgen_family"] = _INET
    message["attrs"] = list(attributes)
    return message


def _chain(table: Table, chain: Chain) -> Any:
    from pyroute2.netlink.nfnetlink import nftsocket

    hook = {"attrs": [("NFTA_HOOK_HOOKNUM", int(chain.hook)), ("NFTA_HOOK_PRIORITY", chain.priority)]}
    return _headed(
        nftsocket.nft_chain_msg(),
        _NEW_CHAIN,
        [
            ("NFTA_CHAIN_TABLE", table.name),
            ("NFTA_CHAIN_NAME", chain.name),
            ("NFTA_CHAIN_HOOK", hook),
            ("NFTA_CHAIN_POLICY", int(chain.policy)),
            ("NFTA_CHAIN_TYPE", chain.kind),
        ],
    )


def _rule(table: Table, chain: Chain, rule: Rule) -> Any:
    from pyroute2.netlink.nfnetlink import nftsocket

    return _headed(
        nftsocket.nft_rule_msg(),
        _NEW_RULE,
        [
            ("NFTA_RULE_TABLE", table.name),
            ("NFTA_RULE_CHAIN", chain.name),
            ("NFTA_RULE_EXPRESSIONS", [part for expression in rule.expressions for part in _compiled(expression)]),
        ],
        _APPEND,
    )


def _compiled(expression: Expression) -> list[Any]:
    """The kernel's expressions for one of ours: load into a register, then compare, as nft(8) compiles them."""
    from pyroute2.nftables.expressions import genex, verdict

    def compare(value: bytes, operation: int = _EQUAL) -> Any:
        return genex("cmp", {"sreg": _REGISTER, "op": operation, "data": _data(value)})

    def mask(value: bytes) -> Any:
        zero = bytes(len(value))
        return genex(
            "bitwise",
            {"sreg": _REGISTER, "dreg": _REGISTER, "len": len(value), "mask": _data(value), "xor": _data(zero)},
        )

    match expression:
        case MetaIs(key, value):
            return [genex("meta", {"key": int(key), "dreg": _REGISTER}), compare(value)]
        case PayloadIs(base, offset, value, bits, negate):
            header = {"network": 1, "transport": 2}[base]
            place = {"dreg": _REGISTER, "base": header, "offset": offset, "len": len(value)}
            masked = [] if bits is None else [mask(bits)]
            return [genex("payload", place), *masked, compare(value, _NOT_EQUAL if negate else _EQUAL)]
        case FragmentHeader():
            fragment = 44  # IPPROTO_FRAGMENT
            present = {"type": fragment, "offset": 0, "len": 1, "flags": ["NFT_EXTHDR_F_PRESENT"]}
            return [genex("exthdr", {"dreg": _REGISTER, **present}), compare(b"\1")]
        case Translated():
            bit = translated_status()
            loaded = genex("ct", {"key": _CT_STATUS, "dreg": _REGISTER})
            return [loaded, mask(bit), compare(bytes(len(bit)), _NOT_EQUAL)]
        case RedirectTo(port):
            loaded = genex("immediate", {"dreg": _REGISTER, "data": _data(struct.pack(">H", port))})
            return [loaded, genex("redir", {"reg_proto_min": _REGISTER, "flags": ["NF_NAT_RANGE_PROTO_SPECIFIED"]})]
        case Reject():
            return [genex("reject", {"type": _REJECT_ICMPX, "icmp_code": _ADMIN_PROHIBITED})]
        case Verdict():
            return list(verdict(int(expression)))


def _data(value: bytes) -> dict[str, Any]:
    return {"attrs": [("NFTA_DATA_VALUE", value)]}


def _mark(kind: int) -> Any:
    from pyroute2.netlink.nfnetlink import nfgen_msg

    message = nfgen_msg()
    message["res_id"] = _SUBSYSTEM
    message["header"]["type"] = kind
    message["header"]["flags"] = _REQUEST
    return message


def _commit(channel: socket.socket, messages: Sequence[_Message]) -> None:
    """Sends one batch and reads its answers: one per message, or fewer when the batch was not taken at all."""
    batch = [("the transaction", _mark(_BATCH_BEGIN)), *messages, ("the transaction", _mark(_BATCH_END))]
    data = bytearray()
    for sequence, (_, message) in enumerate(batch, start=1):
        message["header"]["sequence_number"] = sequence
        message.encode()
        data += message.data
    channel.send(data)
    refused: RuleRefused | None = None
    pending = len(messages)
    while pending:
        for sequence, code in _answers(channel.recv(1 << 16)):
            what = batch[sequence - 1][0]
            pending -= 1
            if code:
                refused = refused or RuleRefused(code, what)
                if what == "the transaction":
                    pending = 0
    if refused is not None:
        raise refused


def _answers(data: bytes) -> list[tuple[int, int]]:
    """(sequence number, errno or 0) of every acknowledgement in a datagram."""
    found = []
    offset = 0
    while offset + 16 <= len(data):
        length, kind, _, sequence, _ = struct.unpack_from("=IHHII", data, offset)
        if kind == _ERROR:
            found.append((sequence, -struct.unpack_from("=i", data, offset + 16)[0]))
        offset += max(16, (length + 3) & ~3)
    return found
