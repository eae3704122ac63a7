"""The ``[oversight]`` section: who decides about what, how long it may take, and how much asking is too much.

    [oversight.groups]
    finance = ["alice", "bob"]

    [oversight.profiles.payments-refund]
    quorum = 2
    approvers = ["group:finance", "carol"]
    groups = { finance = 1 }          # one of the two has to be from finance
    volatile = ["/request_id"]        # may differ between what was approved and what is sent

Policies name a profile with ``@require_oversight("payments-refund")``. There is no default profile: a name that is
not defined here is a mistake, reported when the policies are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Self

from pydantic import Field, model_validator

from creto_oversight.approvers import HUMAN, Directory
from creto_oversight.fingerprint import tokens_of
from creto_oversight.requests import Level, Rules, Separation
from creto_proxy.settings import Section

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@+-]{0,62}[A-Za-z0-9])?")
_IDENTITY = re.compile(r"[a-z][a-z0-9]*:[^\s\x00-\x1f\x7f]+")
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_GROUP = "group:"
_DAY_S = 86_400

Count = Annotated[int, Field(ge=1, le=100)]
Seconds = Annotated[int, Field(ge=1, le=30 * _DAY_S)]
Cooldown = Annotated[int, Field(ge=0, le=30 * _DAY_S)]
Cap = Annotated[int, Field(ge=1, le=10_000)]
Names = tuple[str, ...]


class LevelSettings(Section):
    after_s: Seconds = Field(description="Seconds without a decision until these people may decide as well.")
    add: Names = Field(min_length=1, description="Names or group:NAME; nobody is removed.")


class ProfileSettings(Section):
    """How one kind of action is approved."""

    quorum: Count = Field(1, description="Number of different people who must approve.")
    approvers: Names = Field(description="Who may decide: names or group:NAME. Nobody is not an answer.")
    groups: dict[str, Count] = Field({}, description="Group -> how many of its members must be among them.")
    timeout_s: Seconds = Field(3600, description="Seconds until an undecided request is refused.")
    deny_threshold: Count = Field(1, description="Number of denials that end it; 1 is a veto.")
    separation: Separation | None = Field(
        None,
        description="Who may not approve: none, owner (the human at the root of the delegation chain) or chain (no "
        "human in it). Unset: chain when quorum is over 1, else none.",
    )
    grant_ttl_s: Seconds = Field(300, description="Seconds an approval may stay unused.")
    deny_cooldown_s: Cooldown = Field(
        300, description="Seconds in which the identical action gets the same no and nobody is asked."
    )
    escalation: tuple[LevelSettings, ...] = Field((), description="Who may decide as well when time passes.")
    volatile: Names = Field((), description="JSON pointers into the body that may differ from what was approved.")
    redact: Names = Field((), description="JSON pointers into the body that are not shown or stored.")
    bind_headers: Names = Field((), description="Header fields that must be the same as approved.")


class OversightSettings(Section):
    """Who decides about what, how long it may take, and how much asking is too much."""

    hold_max_s: Annotated[float, Field(ge=0, le=600)] = Field(
        110, description="Longest time a call is kept open; clients that stand less are held for less."
    )
    held_max: Annotated[int, Field(ge=0)] = Field(
        1000, description="Calls kept open at once; the next ones are answered 428 at once."
    )
    open_max_per_agent: Cap = Field(20, description="Undecided requests of one agent; beyond: 429, nobody is told.")
    open_max_per_root: Cap = Field(50, description="The same for all agents of one human.")
    new_per_minute_per_agent: Cap = Field(10, description="New requests of one agent per minute.")
    new_per_minute_per_root: Cap = Field(30, description="The same for all agents of one human.")
    groups: dict[str, Names] = Field({}, description="Group -> names of its members.")
    humans: dict[str, Names] = Field(
        {},
        description="Approver -> the identities that are this person, such as os:alice. An approver who is not listed "
        "is the OS user of that name.",
    )
    profiles: dict[str, ProfileSettings] = Field({}, description="What @require_oversight(NAME) in a policy means.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*self._people_problems(), *self._identity_problems()]
        for name, profile in self.profiles.items():
            problems += [f"profiles.{name}: {problem}" for problem in self._profile_problems(profile)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def rules(self, name: str) -> Rules:
        """The profile as it is stored with a request. Raises KeyError when it is not defined."""
        profile = self.profiles[name]
        separation = profile.separation or ("chain" if profile.quorum > 1 else "none")
        groups = {_member(entry) for entry in profile.approvers if entry.startswith(_GROUP)} | set(profile.groups)
        return Rules(
            name=name,
            quorum=profile.quorum,
            approvers=self._people(profile.approvers),
            timeout_s=profile.timeout_s,
            deny_threshold=profile.deny_threshold,
            separation=separation,
            grant_ttl_s=profile.grant_ttl_s,
            deny_cooldown_s=profile.deny_cooldown_s,
            groups={group: self._people((_GROUP + group,)) for group in sorted(groups)},
            group_quorum=dict(profile.groups),
            escalation=tuple(Level(level.after_s, self._people(level.add)) for level in profile.escalation),
            volatile=profile.volatile,
            redact=profile.redact,
            bind_headers=tuple(header.lower() for header in profile.bind_headers),
        )

    def directory(self) -> Directory:
        """Which identity is which person."""
        claimed = {identity: HUMAN + human for human, identities in self.humans.items() for identity in identities}
        return Directory(claimed, frozenset(HUMAN + human for human in self.humans))

    def oversight_profiles(self) -> Mapping[str, tuple[int, frozenset[str] | None]]:
        """profile -> (people behind an approval that satisfies it, groups they can come from), for asking policy
        whether an approval would help at all."""
        rules = (self.rules(name) for name in self.profiles)
        return {r.name: (max(r.quorum, sum(r.group_quorum.values())), frozenset(r.groups)) for r in rules}

    def undefined(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the profile names (as policies use them) that are not defined, sorted."""
        return tuple(sorted(set(names) - set(self.profiles)))

    def _people(self, entries: Iterable[str]) -> tuple[str, ...]:
        named = (self.groups[_member(entry)] if entry.startswith(_GROUP) else (entry,) for entry in entries)
        return tuple(dict.fromkeys(HUMAN + name for names in named for name in names))

    def _people_problems(self) -> list[str]:
        named = {name for members in self.groups.values() for name in members} | set(self.humans)
        for profile in self.profiles.values():
            entries = (*profile.approvers, *(name for level in profile.escalation for name in level.add))
            named |= {entry for entry in entries if not entry.startswith(_GROUP)}
        problems = [f"{name!r} is not the name of a person" for name in sorted(named) if not _NAME.fullmatch(name)]
        problems += [f"group {group!r} has no members" for group, members in self.groups.items() if not members]
        folded: dict[str, str] = {}
        for name in sorted(named):
            other = folded.setdefault(name.casefold(), name)
            if other != name:
                problems.append(f"approvers {other!r} and {name!r} differ only in case")
        return problems

    def _identity_problems(self) -> list[str]:
        problems = []
        owners: dict[str, str] = {}
        for human, identities in self.humans.items():
            for identity in identities:
                if not _IDENTITY.fullmatch(identity):
                    problems.append(f"humans.{human}: {identity!r} is not an identity such as 'os:{human}'")
                if owners.setdefault(identity, human) != human:
                    problems.append(f"humans: {identity!r} is claimed by {owners[identity]!r} and {human!r}")
        return problems

    def _profile_problems(self, profile: ProfileSettings) -> list[str]:
        entries = (*profile.approvers, *(name for level in profile.escalation for name in level.add))
        wanted = {_member(entry) for entry in entries if entry.startswith(_GROUP)} | set(profile.groups)
        missing = sorted(wanted - set(self.groups))
        if missing:
            return [f"group {group!r} is not defined in oversight.groups" for group in missing]
        problems = [] if profile.approvers else ["approvers is empty, so nobody could ever approve"]
        everybody = set(self._people(entries))
        if profile.approvers and profile.quorum > len(everybody):
            problems.append(f"quorum {profile.quorum} can never be reached by {len(everybody)} approver(s)")
        for group, least in profile.groups.items():
            if least > len(everybody & set(self._people((_GROUP + group,)))):
                problems.append(f"groups.{group} = {least}, but fewer of its members are approvers")
        if any(level.after_s >= profile.timeout_s for level in profile.escalation):
            problems.append("an escalation falls due only after the timeout")
        odd = [header for header in profile.bind_headers if not _FIELD_NAME.fullmatch(header.lower())]
        problems += [f"bind_headers: {header!r} is not a field name" for header in odd]
        for pointer in (*profile.volatile, *profile.redact):
            try:
                tokens_of(pointer)
            except ValueError as error:
                problems.append(str(error))
        return problems


def _member(entry: str) -> str:
    return entry.removeprefix(_GROUP)
