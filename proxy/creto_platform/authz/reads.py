"""Which context attributes a policy looks at, and which hosts and actions it can match.

Both are read off the policy's syntax tree (``cedarpy.pst``) once, at load. They make caching and slicing safe, so
the rule throughout is: anything not understood counts as "reads everything" and "may match anything".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import cedarpy
from cedarpy import pst

from creto_platform.authz.port import GROUPS, INSIDE, PROTOCOLS

# Attributes that only a look into the request, at what a protocol says there, can give.
ATTRIBUTES: Mapping[str, frozenset[str]] = {
    "mcp": frozenset({"rpc_method", "tool", "prompt", "uri"}),
    "a2a": frozenset({"rpc_method"}),
    "llm": frozenset({"model", "provider", "operation", "stream", "max_tokens", "tools"}),
}
CONTENTS = frozenset[str]().union(*ATTRIBUTES.values())
# Whoever asks whether the host is in one of these asks for the attribute that it is made of.
MADE_OF = {"Creto::Tool": "tool", "Creto::Model": "model"}
_PROTOCOL_ACTIONS = frozenset((*PROTOCOLS, *INSIDE))
_NONE: frozenset[str] = frozenset()
_EITHER: frozenset[bool] = frozenset((True, False))


class Opaque(Exception):
    """The expression uses the context as a whole, or syntax that this module does not know."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What one policy depends on.

    reads: context attributes it may look at; None when that cannot be told. bare_reads: the same for a request
    without an approval, where everything behind ``context has approval &&`` is dead. actions, hosts, zones: the only
    ones its scope can match; None for "any". names: every entity it mentions. words: its string literals.
    inside: it names a protocol action, a tool or a model, or reads what only a look into the request can give.
    """

    reads: frozenset[str] | None
    bare_reads: frozenset[str] | None
    actions: frozenset[str] | None
    hosts: frozenset[str] | None
    zones: frozenset[str] | None
    names: frozenset[tuple[str, str]]
    words: frozenset[str]
    inside: bool

    def may_match(self, action: str, host: str, zones: tuple[str, ...]) -> bool:
        """False only when the scope of the policy rules this action or host out."""
        return self.may_be(action) and self.may_be_at(host, zones)

    def may_be_at(self, host: str, zones: tuple[str, ...]) -> bool:
        """False only when the scope of the policy rules this host out."""
        if self.hosts is None and self.zones is None:
            return True
        return host in (self.hosts or ()) or any(zone in (self.zones or ()) for zone in zones)

    def may_be(self, action: str) -> bool:
        """False only when the scope of the policy rules this action out."""
        return self.actions is None or action in self.actions or not self.actions.isdisjoint(GROUPS.get(action, ()))


UNKNOWN_REACH = Reach(None, None, None, None, None, frozenset(), frozenset(), True)


def reach(text: str) -> Reach:
    """What the single static policy in ``text`` depends on; ``UNKNOWN_REACH`` when its syntax is not modelled."""
    try:
        (policy,) = cedarpy.policies_to_pst(text).static_policies.values()
    except ValueError:
        return UNKNOWN_REACH
    hosts, zones = _resource_scope(policy.resource)
    reads = _clause_reads(policy, approval=True)
    names = frozenset((str(uid.type), uid.id) for uid in pst.entity_uids(policy))
    made_of = frozenset(MADE_OF[kind] for kind, _ in names if kind in MADE_OF)
    bare = _clause_reads(policy, approval=False)
    named = any(kind == "Creto::Action" and name in _PROTOCOL_ACTIONS for kind, name in names)
    return Reach(
        reads=None if reads is None else reads | made_of,
        bare_reads=None if bare is None else bare | made_of,
        actions=_action_scope(policy.action),
        hosts=hosts,
        zones=zones,
        names=names,
        words=frozenset(_words(policy.clauses)),
        inside=reads is None or named or bool((reads | made_of) & CONTENTS),
    )


def _action_scope(scope: pst.ActionConstraint) -> frozenset[str] | None:
    match scope:
        case pst.ActionEq(entity):
            # `action == egress` matches no request at all, but "may match" is the safe side.
            return frozenset((entity.id,))
        case pst.ActionIn(entities):
            return frozenset(entity.id for entity in entities)
        case _:
            return None


def _resource_scope(scope: pst.PrincipalOrResourceConstraint) -> tuple[frozenset[str] | None, frozenset[str] | None]:
    match scope:
        case pst.ScopeEq(pst.EntityUid() as entity) | pst.ScopeIn(pst.EntityUid() as entity):
            pass
        case pst.ScopeIsIn(_, pst.EntityUid() as entity):
            pass
        case _:
            return None, None
    match str(entity.type):
        case "Creto::Host":
            return frozenset((entity.id,)), _NONE
        case "Creto::Zone":
            return _NONE, frozenset((entity.id,))
        case _:
            return None, None


def _clause_reads(policy: pst.Template, *, approval: bool) -> frozenset[str] | None:
    """Attributes read by the clauses in order; a clause after one that can never hold is not evaluated."""
    found: set[str] = set()
    try:
        for clause in policy.clauses:
            found |= _reads(clause.expr, approval)
            wanted = isinstance(clause, pst.When)
            if wanted not in _outcomes(clause.expr, approval):
                break
    except Opaque:
        return None
    return frozenset(found)


def _reads(node: object, approval: bool) -> frozenset[str]:
    match node:
        case pst.GetAttr(pst.Var("context"), attr):
            return frozenset((attr,))
        case pst.HasAttr(pst.Var("context"), attrs):
            return frozenset((attrs[0],))
        case pst.Var("context"):
            raise Opaque
        case pst.Var() | pst.BoolLit() | pst.LongLit() | pst.StringLit() | pst.EntityLit():
            return _NONE
        case pst.BinaryOp(op, left, right):
            if op in ("and", "or") and (op == "and") not in _outcomes(left, approval):
                return _reads(left, approval)
            return _reads(left, approval) | _reads(right, approval)
        case pst.IfThenElse(cond, then_expr, else_expr):
            taken = _outcomes(cond, approval)
            branches = ((True, then_expr), (False, else_expr))
            return _reads(cond, approval).union(*(_reads(part, approval) for value, part in branches if value in taken))
        case pst.UnaryOp(_, arg):
            return _reads(arg, approval)
        case pst.GetAttr(base, _) | pst.HasAttr(base, _) | pst.Like(base, _):
            return _reads(base, approval)
        case pst.Is(base, _, in_expr):
            return _reads(base, approval) | (_NONE if in_expr is None else _reads(in_expr, approval))
        case pst.Set(elements):
            return _NONE.union(*(_reads(element, approval) for element in elements))
        case pst.Record(fields):
            return _NONE.union(*(_reads(value, approval) for value in fields.values()))
        case _:
            raise Opaque


def _outcomes(node: object, approval: bool) -> frozenset[bool]:
    """The truth values ``node`` can come to (errors aside); without ``approval`` the context carries none.

    Cedar evaluates ``&&``, ``||`` and ``if`` left to right and stops early (Cedar reference, "Operators"), so what
    stands behind a side that cannot come to the needed value is never looked at. Folding goes no further than that.
    """
    match node:
        case pst.BoolLit(value):
            return frozenset((value,))
        case pst.HasAttr(pst.Var("context"), attrs) if attrs[0] == "approval" and not approval:
            return frozenset((False,))
        case pst.UnaryOp("not", arg):
            return frozenset(not value for value in _outcomes(arg, approval))
        case pst.BinaryOp("and" | "or" as op, left, right):
            stops_at = op == "or"
            first = _outcomes(left, approval)
            return first & {stops_at} | (_outcomes(right, approval) if (not stops_at) in first else frozenset())
        case pst.IfThenElse(cond, then_expr, else_expr):
            taken = _outcomes(cond, approval)
            yes = _outcomes(then_expr, approval) if True in taken else frozenset()
            return yes | (_outcomes(else_expr, approval) if False in taken else frozenset())
        case _:
            return _EITHER


def _words(node: object) -> Iterator[str]:
    match node:
        case pst.StringLit(value):
            yield value
        case pst.When(expr) | pst.Unless(expr):
            yield from _words(expr)
        case pst.BinaryOp(_, left, right):
            yield from _words(left)
            yield from _words(right)
        case pst.UnaryOp(_, arg):
            yield from _words(arg)
        case pst.GetAttr(base, _) | pst.HasAttr(base, _) | pst.Like(base, _):
            yield from _words(base)
        case pst.IfThenElse(cond, then_expr, else_expr):
            for part in (cond, then_expr, else_expr):
                yield from _words(part)
        case tuple() | list():
            for part in node:
                yield from _words(part)
        case pst.Set(elements):
            yield from _words(elements)
        case pst.Record(fields):
            yield from _words(tuple(fields.values()))
