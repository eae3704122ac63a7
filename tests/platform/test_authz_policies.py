"""Loading: every mistake in a policy directory is found, named exactly, and keeps all of it from being used."""

from __future__ import annotations

from pathlib import Path

import pytest

from creto_platform.authz import OversightProfile, PolicyError, bundled_policies
from creto_platform.authz.policyset import ANNOTATIONS, PolicySet, load_policies, split_statements

PERMIT = '@id("ok") permit (principal, action, resource);'
KNOWN = "description, id, quota, rate, require_oversight"


def write(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        (directory / f"{name}.cedar").write_text(text, encoding="utf-8")
    return directory


def problems(directory: Path, **options: object) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        load_policies(directory, **options)  # type: ignore[arg-type]
    return [str(problem) for problem in caught.value.problems]


BAD = {
    "permit (principal, action, resource);": "a.cedar:1: policy #1: has no @id annotation",
    '@id("") permit (principal, action, resource);': "a.cedar:1: policy #1: @id must not be empty",
    "@id permit (principal, action, resource);": "a.cedar:1: policy #1: @id must not be empty",
    '@id("a b") permit (principal, action, resource);': (
        "a.cedar:1: policy #1: @id may hold at most 128 letters, digits and . _ - : /"
    ),
    '@id("a") @id("b") permit (principal, action, resource);': "a.cedar:1: policy #1: duplicate annotation: @id",
    '@id("x") @require_oversight("ops") permit (principal, action, resource);': (
        "a.cedar:1: policy x: @require_oversight belongs on forbid, not on permit"
    ),
    '@id("x") @require_oversight("") forbid (principal, action, resource);': (
        "a.cedar:1: policy x: @require_oversight must not be empty"
    ),
    '@id("x") @require_oversight("opps") forbid (principal, action, resource);': (
        'a.cedar:1: policy x: @require_oversight names the unknown profile "opps" (known: ops, payments)'
    ),
    '@id("x") @qouta("llm") permit (principal, action, resource);': (
        f"a.cedar:1: policy x: unknown annotation @qouta (known: {KNOWN})"
    ),
    '@id("x") @quota("llm") forbid (principal, action, resource);': (
        "a.cedar:1: policy x: @quota belongs on permit, not on forbid"
    ),
    '@id("x") @quota("") permit (principal, action, resource);': "a.cedar:1: policy x: @quota must not be empty",
    '@id("x") @rate("60") permit (principal, action, resource);': (
        'a.cedar:1: policy x: @rate must be COUNT/s, COUNT/m, COUNT/h or COUNT/d, not "60"'
    ),
    '@id("x") permit (principal == ?principal, action, resource);': (
        "a.cedar:1: policy #1: templates are not supported: write principal and resource out"
    ),
    '@id("x") permit (principal, action, resource) when { context.path = "/" };': (
        "a.cedar:1: policy #1: '=' is not a valid operator in Cedar"
    ),
    '@id("x") permit (principal, action, resource); nonsense': "a.cedar:1: policy #2: unexpected end of input",
    '@id("x") permit (principal, action, resource == Creto::Host::"A.example.com");': (
        'a.cedar:1: policy x: Creto::Host::"A.example.com" is not a lower-case host name without port and trailing dot'
    ),
    '@id("x") permit (principal, action, resource == Creto::Host::"*.example.com");': (
        'a.cedar:1: policy x: Creto::Host::"*.example.com" is not a lower-case host name without port and trailing dot'
        "; put patterns in a zone"
    ),
    '@id("x") permit (principal, action, resource == Creto::Host::"127.1");': (
        'a.cedar:1: policy x: Creto::Host::"127.1" looks like an address but is not a canonical one'
    ),
    '@id("x") permit (principal, action, resource == Creto::Host::"0:0:0:0:0:0:0:1");': (
        'a.cedar:1: policy x: Creto::Host::"0:0:0:0:0:0:0:1" must be written "::1"'
    ),
    '@id("x") forbid (principal, action, resource in Creto::Zone::"lmm");': (
        'a.cedar:1: policy x: Creto::Zone::"lmm" is not configured (known: crm, llm)'
    ),
}


@pytest.mark.parametrize("text", BAD)
def test_mistake_is_named(text: str, tmp_path: Path) -> None:
    profiles = {"ops": OversightProfile(), "payments": OversightProfile()}
    zones = {"llm": ["api.openai.com"], "crm": ["*.crm.example"]}
    assert problems(write(tmp_path, a=text), profiles=profiles, zones=zones) == [BAD[text]]


VALIDATION = {
    "when { context.amount_minor > 5 }": "amount_minor",
    "when { context has x || context.nope }": "nope",
    'when { context.path == "a" && context.port like "4*" }': "unexpected type",
    'when { context.ip.isInRange(ip("10.0.0.0/8")) }': "ip",
    'when { ip("1.2.3.400").isIpv4() }': "1.2.3.400",
    'when { principal in Creto::Team::"x" }': "Creto::Team",
    'when { action in Creto::Action::"exit" }': "exit",
}


@pytest.mark.parametrize("clause", VALIDATION)
def test_strict_validation_is_on(clause: str, tmp_path: Path) -> None:
    [problem, *_] = problems(write(tmp_path, a=f'@id("x") permit (principal, action, resource) {clause};'))
    assert problem.startswith("a.cedar:1: policy x: ")
    assert VALIDATION[clause] in problem
    assert "policy0" not in problem
    assert "\n" not in problem


def test_duplicate_id_names_both_places(tmp_path: Path) -> None:
    directory = write(tmp_path, a=PERMIT, b=f"// second\n\n{PERMIT}")
    assert problems(directory) == ['b.cedar:3: policy ok: @id "ok" is already used at a.cedar:1']


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    bad = "\n".join(
        [
            "permit (principal, action, resource);",
            '@id("one") permit (principal, action, resource) when { context.nope };',
            "",
            '@id("two") @rate("x")',
            "permit (principal, action,",
            '        resource == Creto::Host::"A");',
        ]
    )
    found = problems(write(tmp_path, a=bad, b='@id("three") nonsense;'))
    places = [problem.split(": ")[:2] for problem in found]
    assert places == [
        ["a.cedar:1", "policy #1"],
        ["a.cedar:2", "policy one"],
        ["a.cedar:4", "policy two"],
        ["a.cedar:4", "policy two"],
        ["b.cedar:1", "policy #1"],
    ]


def test_semicolons_in_strings_and_comments_end_no_policy() -> None:
    text = '// a; b\n@id("a;\\"b;") permit (principal, action, resource); // c;\n\n  forbid (principal, action, x);\n//'
    assert [(part.line, part.text.count("permit")) for part in split_statements(text)] == [(2, 1), (4, 0)]


def test_text_after_the_last_policy_is_not_dropped() -> None:
    assert [part.text.strip() for part in split_statements("a; b")] == ["a;", "b"]
    assert list(split_statements(" \n // only a comment")) == []


def test_directory_without_policies_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path) == [f"{tmp_path}: holds no *.cedar file, so everything would be denied"]


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path / "no") == [f"{tmp_path / 'no'}: is not a directory"]


def test_policies_in_a_sub_folder_are_not_silently_skipped(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", b=PERMIT)
    found = problems(write(tmp_path, a=PERMIT))
    assert found == ["more/b.cedar: is in a sub-folder and would not be loaded"]


def test_hidden_folder_of_a_mounted_config_map_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "..data").mkdir()
    write(tmp_path / "..data", a=PERMIT)
    (tmp_path / "a.cedar").symlink_to(tmp_path / "..data" / "a.cedar")
    assert set(load_policies(tmp_path).policies) == {"ok"}


def test_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.cedar").write_bytes(b"\xff" + PERMIT.encode())
    assert problems(tmp_path) == ["a.cedar: is not UTF-8 (byte 0)"]


def test_bad_zone_is_named(tmp_path: Path) -> None:
    assert problems(write(tmp_path, a=PERMIT), zones={"z": ["Example.com"]}) == [
        'configuration: zone "z": "Example.com" is not a lower-case host name without port and trailing dot'
    ]


def schema_with(directory: Path, old: str, new: str) -> Path:
    text = (bundled_policies() / "schema.cedarschema").read_text(encoding="utf-8")
    assert old in text
    (directory / "schema.cedarschema").write_text(text.replace(old, new), encoding="utf-8")
    return write(directory, a=PERMIT)


def test_schema_must_cover_every_action(tmp_path: Path) -> None:
    directory = schema_with(tmp_path, "httpRead, httpWrite, tunnel, tcp in", "httpRead, httpWrite, tunnel in")
    assert problems(directory) == [
        'schema.cedarschema: action "tcp" is missing, or does not apply to principal Agent and resource Host'
    ]


def test_schema_must_keep_actions_in_their_group(tmp_path: Path) -> None:
    directory = schema_with(tmp_path, "tunnel, tcp in [egress]", "tunnel, tcp")
    assert 'schema.cedarschema: action "tcp" is not in [egress]' in problems(directory)


def test_schema_must_keep_every_attribute(tmp_path: Path) -> None:
    directory = schema_with(tmp_path, "depth: Long,", "")
    assert 'schema.cedarschema: context of action "httpRead" has no attribute "depth"' in problems(directory)


def test_schema_may_not_demand_what_the_proxy_does_not_know(tmp_path: Path) -> None:
    directory = schema_with(tmp_path, "depth: Long,", "depth: Long, mood: String,")
    [problem, *_] = problems(directory)
    assert problem.startswith('schema.cedarschema: action "httpRead" cannot be asked about: ')


def test_schema_may_add_optional_attributes(tmp_path: Path) -> None:
    directory = schema_with(tmp_path, "depth: Long,", "depth: Long, ticket?: String,")
    write(directory, b='@id("b") forbid (principal, action, resource) unless { context has ticket };')
    assert load_policies(directory).policies["b"].reach.reads == frozenset(("ticket",))


def test_broken_schema_is_named(tmp_path: Path) -> None:
    (tmp_path / "schema.cedarschema").write_text("namespace Creto {", encoding="utf-8")
    [problem] = problems(write(tmp_path, a=PERMIT))
    assert problem.startswith("schema.cedarschema: ")


def test_without_zones_configured_any_may_be_named(tmp_path: Path) -> None:
    text = '@id("x") forbid (principal, action, resource in Creto::Zone::"anything");'
    assert set(load_policies(write(tmp_path, a=text)).policies) == {"x"}


@pytest.mark.parametrize("folder", ["", "default", "examples"])
def test_bundled_policies_load(folder: str) -> None:
    assert load_policies(bundled_policies() / folder).policies


def test_top_folder_of_the_bundled_policies_stands_for_the_default() -> None:
    assert load_policies(bundled_policies()).digest == load_policies(bundled_policies() / "default").digest


def digest(directory: Path, **options: object) -> str:
    loaded: PolicySet = load_policies(directory, **options)  # type: ignore[arg-type]
    return loaded.digest


def test_digest_follows_everything_answers_depend_on(tmp_path: Path) -> None:
    first = digest(write(tmp_path, a=PERMIT))
    assert digest(tmp_path) == first
    assert digest(tmp_path, zones={"z": ["a.example"]}) != first
    assert digest(tmp_path, profiles={"p": OversightProfile(2)}) != first
    assert digest(write(tmp_path, a=PERMIT.replace("ok", "other"))) != first


def test_digest_does_not_follow_file_names(tmp_path: Path) -> None:
    first = digest(write(tmp_path, a=PERMIT))
    (tmp_path / "a.cedar").rename(tmp_path / "z.cedar")
    assert digest(tmp_path) == first


def test_known_annotations_are_those_of_the_message() -> None:
    assert ", ".join(ANNOTATIONS) == KNOWN
