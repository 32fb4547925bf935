"""All that is wrong with a file is said at once, with its place, its meaning and a way out; each value knows where it is from."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import CheckedConfig, Config, check_config, load_config
from common.config.source import Place, field_at, fields_of
from common.errors import ConfigError

GOOD = "models:\n  - name: tiny\n    source: some/where\n"


def checked(folder: Path, text: str, *overrides: str, **environment: str) -> CheckedConfig:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return check_config(path, overrides=overrides, environment=environment)


def test_every_problem_is_found_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "models:\n  - name: tiny\n    engine: {block_tokens: many, dtype: float8}\nrouter:\n  http_prot: 1\n  migrations: -1\n"
    found = checked(tmp_path, text).problems
    assert [(one.key, one.place) for one in found] == [
        ("models.0.source", Place(2, 5)),  # what is missing has the place of the part that lacks it
        ("models.0.engine.block_tokens", Place(3, 14)),
        ("models.0.engine.dtype", Place(3, 34)),
        ("router.http_prot", Place(5, 3)),
        ("router.migrations", Place(6, 3)),
    ]
    assert "not 'many'" in found[1].message
    assert found[1].help == "Tokens per KV block."
    assert "'float8'" in found[2].message
    assert found[3].suggestion == "did you mean 'http_port'?"
    with pytest.raises(ConfigError, match=r"models\.0\.source: is missing \(and 4 more"):
        load_config(tmp_path / "cluster.yaml", environment={})


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("router: {grpc_prot: 1}", "'grpc_port'"),
        ("router: {kv_pool_tokens: 1}", "there is 'models[].engine.kv_pool_tokens'"),  # right name, wrong part
        ("transfer: {leese_s: 1}", "'lease_s'"),
        ("logging: {xyzzy: 1}", "keys here are: level, format"),
    ],
)
def test_an_unknown_key_comes_with_a_way_out(tmp_path: Path, key: str, suggestion: str) -> None:
    (problem,) = checked(tmp_path, f"{GOOD}{key}\n").problems
    assert suggestion in problem.suggestion


def test_shapes_are_named_as_yaml_names_them(tmp_path: Path) -> None:
    found = checked(tmp_path, "models: hello\nrouter: 5\ncache: {redis: [1]}\n").problems
    assert [one.message.partition(": ")[2] for one in found] == [
        "must be a list, not 'hello'",
        "must be a mapping, not 5",
        "must be a mapping",
    ]


def test_a_key_that_is_given_twice_is_an_error_and_not_the_last_one(tmp_path: Path) -> None:
    found = checked(tmp_path, f"{GOOD}router:\n  http_port: 1\n  grpc_port: 2\n  http_port: 3\n")
    assert found.config is None
    (problem,) = found.problems
    assert problem.key == "router.http_port"
    assert problem.place == Place(7, 3)
    assert "the first time on line 5" in problem.message
    wrong = checked(tmp_path, f"{GOOD}router:\n  http_port: 1\n  http_port: many\n").problems
    assert [one.place for one in wrong] == [Place(6, 3), Place(6, 3)], "the last one counts, so the mistake is there"
    assert checked(tmp_path, f"base: &b {{level: info}}\n{GOOD}").problems[0].key == "base"
    assert not checked(tmp_path, f"{GOOD}logging: &b {{level: info}}\nray: {{}}\n").problems


def test_a_mistake_on_the_command_line_or_in_the_environment_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    text = f"{GOOD}router:\n  http_port: 8000\n"
    (by_option,) = checked(tmp_path, text, "router.http_port=many").problems
    assert by_option.origin == "--set router.http_port"
    assert by_option.place is None
    (by_variable,) = checked(tmp_path, text, PDSERVE_ROUTER__HTTP_PROT="1").problems
    assert by_variable.origin == "PDSERVE_ROUTER__HTTP_PROT"
    assert "did you mean 'http_port'?" in by_variable.line


def test_each_value_knows_where_it_comes_from(tmp_path: Path) -> None:
    source = checked(
        tmp_path,
        f"{GOOD}router:\n  http_port: 8000\n  grpc_port: 1\nlogging: {{level: debug}}\n",
        "router.grpc_port=2",
        "cache={max_bytes: 5}",
        PDSERVE_ROUTER__GRPC_PORT="3",
        PDSERVE_CACHE__MAX_BYTES="4",
    ).source
    assert source.origin(("router", "http_port")) == "cluster.yaml:5"
    assert source.origin(("router", "grpc_port")) == "--set router.grpc_port"
    assert source.origin(("cache", "max_bytes")) == "--set cache"  # it replaced what the environment said
    assert source.origin(("models", "0", "source")) == "cluster.yaml:3"
    assert source.origin(("router", "http_host")) is None
    assert source.origin(("models", "0", "engine", "dtype")) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models: [\n", ":2:1: not YAML"),
        ("a: b: c\n", ":1:5: not YAML"),
        ("\tmodels: 1\n", ":1:1: not YAML"),
    ],
)
def test_what_is_no_yaml_is_said_in_one_line_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(tmp_path, text)
    assert says in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "text",
    ["cache: {redis: {url: 'ftp://me:hunter2@x'}}", "router: {api_keys: [12345678]}", "cache: {redis: {secret: hunter2}}"],
)
def test_no_secret_is_shown_for_being_wrong(tmp_path: Path, text: str) -> None:
    problems = checked(tmp_path, f"{GOOD}{text}\n").problems
    assert problems
    assert not any("hunter2" in str(one) or "12345678" in str(one) for one in problems)


def test_every_key_has_a_help_text() -> None:
    """The help texts of today's fields; parts say theirs in their own words or need none."""
    known = dict(fields_of(Config))
    assert field_at(Config, ("models", "0", "engine", "dtype")) is known["models[].engine.dtype"]
    assert field_at(Config, ("routing", "aliases", "auto", "policy")) is known["routing.aliases.NAME.policy"]
    assert field_at(Config, ("models", "0", "nothing")) is None
    silent = {key for key, field in known.items() if not field.description and not _is_part(field.annotation)}
    assert silent <= {"models", "routing.rules[].when", "routing.prices.NAME.input", "routing.prices.NAME.output"}


def _is_part(annotation: object) -> bool:
    return isinstance(annotation, type) and hasattr(annotation, "model_fields")
