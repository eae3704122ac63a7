"""Layers, variables, validation: the file is right as a whole or every mistake in it is named."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, SecretStr, ValidationError

from creto_proxy.commands.config import render, toml_value
from creto_proxy.config import MASK, Config, load, validate
from creto_proxy.errors import ConfigError
from creto_proxy.layers import read
from creto_proxy.settings import CORE, Endpoint, Network, Section, default_state_dir, host_name, host_pattern

ROOT = Path(__file__).resolve().parents[2]


class Metering(Section):
    budget_usd: float = Field(1.0, description="Spend limit.")
    api_key: str = Field("", description="Key of the billing API.")
    pin: SecretStr = Field(SecretStr(""), description="Another secret.")
    prices: Path | None = Field(None, description="Price rows.")


class Egress(Section):
    allow: tuple[str, ...] = Field((), description="Names agents may reach.")
    deny: tuple[str, ...] = Field((), description="Names they may not.")


MODELS: Mapping[str, type[BaseModel]] = {"metering": Metering, "egress": Egress}


class Loader:
    """Loads TOML text as creto.toml, with an environment and a system-wide file that are the test's own."""

    def __init__(self, folder: Path) -> None:
        self.file, self.system = folder / "creto.toml", folder / "system.toml"

    def __call__(
        self, text: str | None = None, *, system: str | None = None, models: Any = MODELS, **environ: str
    ) -> Config:
        for path, content in ((self.file, text), (self.system, system)):
            if content is not None:
                path.write_text(content)
        return load(
            self.file if text is not None else None, settings=models, environ=environ, system_file=self.system
        )

    def problems(self, text: str | None = None, **kwargs: Any) -> list[str]:
        with pytest.raises(ConfigError) as failed:
            self(text, **kwargs)
        return [problem.replace(f"{self.file.parent}/", "") for problem in failed.value.problems]


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    return Loader(tmp_path)


def test_without_any_file_everything_has_its_default(loader: Loader) -> None:
    config = loader()
    assert config.limits.stage_deadline_ms == 250
    assert config.common.trust_domain == "local"
    assert str(config.listen.explicit) == "127.0.0.1:3128"
    assert config.sections["egress"] == Egress()
    assert {source for _, _, source in config.effective()} == {"default"}


def test_later_layers_win_key_by_key(loader: Loader) -> None:
    config = loader(
        "[limits]\nbody_bytes = 50\nstage_deadline_ms = 200",
        system="[limits]\nbody_bytes = 40\ndrain_s = 1\nstage_deadline_ms = 100",
        CRETO_LIMITS__STAGE_DEADLINE_MS="400",
    )
    assert (config.limits.body_bytes, config.limits.drain_s, config.limits.stage_deadline_ms) == (50, 1, 400)
    sources = {key: Path(source).name for key, _, source in config.effective() if key.startswith("limits.")}
    assert sources["limits.body_bytes"] == "creto.toml"
    assert sources["limits.drain_s"] == "system.toml"
    assert sources["limits.stage_deadline_ms"] == "environment CRETO_LIMITS__STAGE_DEADLINE_MS"
    assert sources["limits.idle_timeout_s"] == "default"


def test_an_empty_table_takes_nothing_away(loader: Loader) -> None:
    assert loader("[limits]\n", system="[limits]\nbody_bytes = 40").limits.body_bytes == 40


def test_arrays_replace_and_do_not_add_up(loader: Loader) -> None:
    config = loader('[egress]\nallow = ["b.example"]', system='[egress]\nallow = ["a.example"]')
    assert config.sections["egress"] == Egress(allow=("b.example",))


def test_lists_and_tables_in_the_environment_are_json(loader: Loader) -> None:
    config = loader(
        CRETO_EGRESS__ALLOW='["a.example", "b.example"]',
        CRETO_EGRESS__RESOLVE='{"api.example.com": "127.0.0.1:8443"}',
        CRETO_LISTEN__EXPLICIT="[::1]:3128",
    )
    assert config.sections["egress"] == Egress(allow=("a.example", "b.example"))
    assert config.network.resolve == {"api.example.com": Endpoint(ipaddress.ip_address("127.0.0.1"), 8443)}
    assert str(config.listen.explicit) == "[::1]:3128"


def test_the_command_line_is_strongest(tmp_path: Path) -> None:
    config = load(
        environ={"CRETO_COMMON__STATE_DIR": "/env"},
        overrides={("common", "state_dir"): str(tmp_path)},
        system_file=tmp_path / "absent",
    )
    assert config.state_dir == tmp_path


class TestVariables:
    def test_are_expanded_with_defaults_and_escapes(self, loader: Loader) -> None:
        text = '[metering]\napi_key = "${KEY}-${NOPE:-none}-$${KEY}"'
        assert loader(text, KEY="abc").sections["metering"] == Metering(api_key="abc-none-${KEY}")

    def test_an_empty_variable_takes_the_default(self, loader: Loader) -> None:
        assert loader('[common]\norg = "${ORG:-acme}"', ORG="").common.org == "acme"

    def test_an_unset_one_is_named(self, loader: Loader) -> None:
        problems = loader.problems('[metering]\napi_key = "${BILLING_KEY}"')
        assert problems == ["creto.toml: metering.api_key: environment variable BILLING_KEY is not set"]

    @pytest.mark.parametrize("text", ["${}", "${1X}", "${A B}", "${A:+x}", "${A"])
    def test_a_malformed_one_is_an_error(self, loader: Loader, text: str) -> None:
        [problem] = loader.problems(f'[metering]\napi_key = "{text}"')
        assert "should be ${NAME} or ${NAME:-default}" in problem

    def test_values_from_variables_are_never_echoed(self, loader: Loader) -> None:
        [problem] = loader.problems('[limits]\nbody_bytes = "${TOKEN}"', TOKEN="sk-very-secret")
        assert "sk-very-secret" not in problem
        assert problem.endswith("(value not shown)")


class TestMistakes:
    def test_all_of_them_are_listed_one_line_each(self, loader: Loader) -> None:
        problems = loader.problems(
            """
            [limits]
            stage_deadline_ms = "soon"
            bdoy_bytes = 5
            [metring]
            x = 1
            [egress]
            alow = []
            resolv = {}
            [egress.resolve]
            "api.example.com" = "localhost:80"
            [zones]
            crm = ["https://crm.example.com"]
            [[reverse]]
            name = "openai"
            [plugins]
            order = ["metrics"]
            """,
            CRETO_COMMON__TRUST_DOMAIN="not a name",
        )
        assert problems == [
            "creto.toml: metring: no such section and no plugin of that name; did you mean metering?",
            "environment CRETO_COMMON__TRUST_DOMAIN: common.trust_domain: should be a host name such as "
            "api.example.com, without scheme, port or path (got 'not a name')",
            "creto.toml: limits.stage_deadline_ms: should be a valid integer, unable to parse string as an integer "
            "(got 'soon')",
            "creto.toml: limits.bdoy_bytes: no such setting; did you mean body_bytes?",
            'creto.toml: egress.resolve."api.example.com": should be ADDRESS:PORT with a literal address, such as '
            "127.0.0.1:8443 (got 'localhost:80')",
            "creto.toml: egress.alow: no such setting; did you mean allow?",
            "creto.toml: egress.resolv: no such setting; did you mean resolve?",
            "creto.toml: zones.crm[0]: should be a host name such as api.example.com, without scheme, port or path "
            "(got 'https://crm.example.com')",
            "creto.toml: reverse[0].upstream: is required",
            "creto.toml: plugins.order[0]: no plugin 'metrics' is installed; did you mean metering?",
        ]

    @pytest.mark.parametrize(
        ("text", "where"),
        [
            ("[limits\n", ":1:8: not TOML: "),
            ("[limits]\ndrain_s = \n", ":2:11: not TOML: "),
            ('a = "', ":1:6: not TOML: "),
            ("a = 1\na = 2\n", ":2:6: not TOML: "),
        ],
    )
    def test_syntax_has_line_and_column(self, loader: Loader, text: str, where: str) -> None:
        [problem] = loader.problems(text)
        assert problem.startswith(f"creto.toml{where}")

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as failed:
            load(tmp_path / "nope.toml", environ={}, system_file=tmp_path / "absent")
        assert failed.value.problems == [f"{tmp_path}/nope.toml: no such file"]

    def test_a_directory_for_a_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
            load(tmp_path, environ={}, system_file=tmp_path / "absent")

    def test_bytes_that_are_not_utf_8_are_located(self, loader: Loader) -> None:
        loader.file.write_bytes(b'[common]\norg = "\xff"\n')
        with pytest.raises(ConfigError, match="not UTF-8 at byte 16"):
            load(loader.file, environ={}, system_file=loader.system)

    def test_brackets_without_end_are_one_clear_line(self, loader: Loader) -> None:
        assert loader.problems("a = " + "[" * 100_000) == ["creto.toml: not TOML: nested too deeply"]

    def test_a_value_where_a_section_belongs(self, loader: Loader) -> None:
        assert loader.problems("limits = 3") == ["creto.toml: limits: should be a table: [limits]"]

    def test_reverse_that_is_no_list_of_tables(self, loader: Loader) -> None:
        assert loader.problems("reverse = 3") == ["creto.toml: reverse: should be tables: [[reverse]]"]

    def test_two_routes_of_one_name(self, loader: Loader) -> None:
        route = '[[reverse]]\nname = "a"\nupstream = "https://a.example"\n'
        assert loader.problems(route * 2) == ["creto.toml: reverse[1].name: 'a' is already taken"]

    def test_environment_without_a_section(self, loader: Loader) -> None:
        assert loader.problems(CRETO___X="1") == ["environment: CRETO___X: should be CRETO_SECTION__KEY"]

    def test_an_unknown_section_in_the_environment(self, loader: Loader) -> None:
        [problem] = loader.problems(CRETO_METERNG__X="1")
        assert problem.endswith("no such section and no plugin of that name; did you mean metering?")

    def test_egress_settings_without_an_egress_plugin(self, loader: Loader) -> None:
        assert loader.problems("[egress]\nallow = []", models={}) == ["creto.toml: egress.allow: no such setting"]

    def test_a_missing_certificate_file(self, loader: Loader) -> None:
        [problem] = loader.problems('[egress]\nupstream_ca = "nope.pem"')
        assert problem.startswith("creto.toml: egress.upstream_ca: path does not point to a file")

    @pytest.mark.parametrize("key", ["api_key", "pin"])
    def test_secrets_are_not_echoed(self, loader: Loader, key: str) -> None:
        [problem] = loader.problems(f"[metering]\n{key} = 987654321")
        assert "987654321" not in problem


class TestSharedTable:
    """[egress] is read by the core and by the egress plugin."""

    def test_each_gets_its_own_keys(self, loader: Loader, tmp_path: Path) -> None:
        (tmp_path / "file.pem").write_text("")
        config = loader(
            """
            [egress]
            upstream_ca = "file.pem"
            resolver = "9.9.9.9:53"
            allow = ["*.example.com"]
            [egress.resolve]
            "API.example.com" = "127.0.0.1:8443"
            """
        )
        assert config.network == Network(
            upstream_ca=tmp_path / "file.pem", resolver="9.9.9.9:53", resolve={"api.example.com": "127.0.0.1:8443"}
        )
        assert config.sections["egress"] == Egress(allow=("*.example.com",))

    def test_a_disabled_plugins_keys_are_left_alone(self, loader: Loader) -> None:
        loader.file.write_text('[plugins]\ndisabled = ["egress"]\n[egress]\nallow = 3')
        draft = read(loader.file, environ={}, system_file=loader.system)
        assert validate(draft, {}, known=("egress",)).plugins.disabled == ("egress",)


class TestPaths:
    def test_are_relative_to_the_file_they_stand_in(self, loader: Loader, tmp_path: Path) -> None:
        (tmp_path / "policies").mkdir()
        config = loader('[policy]\ndir = "policies"\n[metering]\nprices = "rows/p.json"')
        assert config.policy.dir == tmp_path / "policies"
        assert config.sections["metering"] == Metering(prices=tmp_path / "rows/p.json")

    def test_are_relative_to_the_working_directory_in_the_environment(
        self, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "p").mkdir()
        monkeypatch.chdir(tmp_path)
        assert loader(CRETO_POLICY__DIR="p").policy.dir == tmp_path / "p"

    @pytest.mark.parametrize(
        ("environ", "expected"),
        [
            ({"CRETO_STATE": "/srv/creto", "XDG_STATE_HOME": "/x"}, "/srv/creto"),
            ({"XDG_STATE_HOME": "/x", "HOME": "/home/a"}, "/x/creto"),
            ({"HOME": "/home/a"}, "/home/a/.local/state/creto"),
        ],
    )
    def test_state_directory(self, environ: dict[str, str], expected: str) -> None:
        assert default_state_dir(environ) == Path(expected)


class TestShowing:
    def test_secrets_and_url_passwords_are_masked(self, loader: Loader) -> None:
        class Store(Section):
            url: str = ""

        config = loader(
            '[metering]\napi_key = "sk-1"\npin = "1234"\n[store]\nurl = "postgresql://u:pw@db/x"',
            models={"metering": Metering, "store": Store},
        )
        shown = {key: value for key, value, _ in config.effective()}
        assert shown["metering.api_key"] == MASK
        assert "1234" not in str(shown["metering.pin"])
        assert shown["store.url"] == f"postgresql://{MASK}@db/x"
        assert "sk-1" not in str(shown)

    def test_config_is_frozen(self, loader: Loader) -> None:
        config = loader()
        with pytest.raises(AttributeError):
            config.limits = None  # type: ignore[misc,assignment]
        with pytest.raises(ValidationError, match="frozen"):
            config.limits.body_bytes = 3  # type: ignore[misc]


class TestDefaultFile:
    def test_holds_every_setting_and_reads_back_as_the_defaults(self, loader: Loader) -> None:
        defaults = [(key, value) for key, value, _ in loader().effective()]
        written = list(loader(render(MODELS)).effective())
        assert [(key, value) for key, value, _ in written] == defaults
        assert [key for key, _, source in written if source == "default"] == ["metering.prices"]
        assert "# Price rows.\n# prices =\n" in render(MODELS)

    def test_every_setting_of_the_core_says_what_it_is(self) -> None:
        models: list[type[BaseModel]] = [*CORE.values(), Network]
        silent = [
            f"{model.__name__}.{name}"
            for model in models
            for name, field in model.model_fields.items()
            if not field.description
        ]
        assert silent == []

    @given(st.text())
    @settings(max_examples=100)
    def test_any_text_survives_as_a_toml_value(self, text: str) -> None:
        import tomllib

        assert tomllib.loads(f"x = {toml_value(text)}") == {"x": text}


class TestNames:
    @pytest.mark.parametrize("text", ["api.example.com", "API.Example.com.", "xn--bcher-kva.de", "localhost", "a_b.c"])
    def test_host_names_become_canonical(self, text: str) -> None:
        assert host_name(text) == text.lower().rstrip(".")

    @pytest.mark.parametrize("text", ["", ".", "a..b", "-a.b", "a b", "a/b", "a:80", "bücher.de", "a" * 64, "x." * 200])
    def test_what_is_no_host_name_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="should be"):
            host_name(text)

    @pytest.mark.parametrize("text", ["*", "*.example.com", "example.com"])
    def test_patterns(self, text: str) -> None:
        assert host_pattern(text) == text

    @pytest.mark.parametrize("text", ["*.*.com", "a.*.com", "*x.com", "**"])
    def test_a_star_stands_for_the_front_only(self, text: str) -> None:
        with pytest.raises(ValueError, match="should be"):
            host_pattern(text)

    @pytest.mark.parametrize("text", ["127.0.0.1:0", "[::1]:65535", "10.0.0.1:80"])
    def test_endpoints_read_back(self, text: str) -> None:
        assert str(Endpoint.parse(text)) == text

    @pytest.mark.parametrize(
        "text",
        ["127.0.0.1", ":80", "::1:80", "[127.0.0.1]:80", "localhost:80", "1.2.3.4:x", "1.2.3.4:65536", "1.2.3.4:٣"],
    )
    def test_what_is_no_endpoint_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="should"):
            Endpoint.parse(text)

    @pytest.mark.parametrize(
        "url",
        ["ftp://a.example", "https://", "https://u:p@a.example", "https://a.example/?q=1", "http://a.example:x"],
    )
    def test_upstreams_that_cannot_be(self, loader: Loader, url: str) -> None:
        [problem] = loader.problems(f'[[reverse]]\nname = "a"\nupstream = "{url}"')
        assert problem.startswith("creto.toml: reverse[0].upstream: should")
        assert "u:p" not in problem
