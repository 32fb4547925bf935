"""One YAML file, overlaid by environment and command line; whatever is wrong is said with its key and, in a file, its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from common.config import Config, ModelConfig, RouterConfig, load_config, pdserve_home
from common.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
MINIMAL = "models:\n  - name: tiny\n    source: some/where\n"


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return path

    return _write


def load(path: Path, *overrides: str, **environment: str) -> Config:
    return load_config(path, overrides=overrides, environment=environment)


def test_defaults_fill_in_what_the_file_leaves_out(write) -> None:
    config = load(write(MINIMAL))
    assert [(model.name, model.source) for model in config.models] == [("tiny", "some/where")]
    assert config.router == RouterConfig()
    assert config.router.http_host == "127.0.0.1"


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "deploy/configs").glob("*.yaml"))])
def test_the_shipped_configurations_load(name: str) -> None:
    assert load(ROOT / "deploy/configs" / name).models


@pytest.mark.parametrize(
    ("overrides", "environment", "port"),
    [
        ((), {}, 8101),
        ((), {"PDSERVE_ROUTER__HTTP_PORT": "8102"}, 8102),
        (("router.http_port=8103",), {"PDSERVE_ROUTER__HTTP_PORT": "8102"}, 8103),
        (("router.http_port=8103", "router.http_port=8104"), {}, 8104),
    ],
)
def test_command_line_over_environment_over_file(write, overrides, environment, port) -> None:
    path = write("router:\n  http_port: 8101\n" + MINIMAL)
    assert load(path, *overrides, **environment).router.http_port == port


def test_overrides_reach_into_lists_and_hold_yaml(write) -> None:
    config = load(write(MINIMAL), "models.0.aliases=[small, default]", PDSERVE_MODELS__0__ENGINE__EXACT="true")
    assert config.models[0].aliases == ("small", "default")
    assert config.models[0].engine.exact is True
    assert config.model_named("small") is config.models[0]


def test_variables_that_are_not_settings_are_left_alone(write) -> None:
    load(write(MINIMAL), PDSERVE_HOME="/somewhere", PDSERVE_CLUSTER_ID="x", HOME="/root")
    assert pdserve_home({"PDSERVE_HOME": "/somewhere"}) == Path("/somewhere")
    assert pdserve_home({}) == Path.home() / ".cache/pdserve"


@pytest.mark.parametrize(
    ("text", "line", "param", "says"),
    [
        (MINIMAL + "router:\n  http_prot: 1\n", 5, "router.http_prot", "did you mean 'http_port'?"),
        (MINIMAL + "    decode:\n      replicsa: 2\n", 5, "models.0.decode.replicsa", "did you mean 'replicas'?"),
        (MINIMAL + "router:\n  http_port: 70000\n", 5, "router.http_port", "65535"),
        (MINIMAL + "router:\n  http_port: many\n", 5, "router.http_port", "integer"),
        ("cluster: Has Spaces\n" + MINIMAL, 1, "cluster", "pattern"),
        (MINIMAL + "  - name: tiny\n    source: else\n", 1, "models", "'tiny' is given twice"),
        (MINIMAL + "    aliases: [tiny]\n", 1, "models", "'tiny' is given twice"),
        (MINIMAL + "router:\n  http_host: 0.0.0.0\n", 4, "router", "needs api_keys"),
        (MINIMAL + "router: {grpc_host: 10.0.0.1}\n", 4, "router", "10.0.0.1 needs api_keys"),
        (MINIMAL + "    decode: {preemption: swap, swap_bytes: 0}\n", 4, "models.0.decode", "needs swap_bytes"),
        ("models: []\n", 1, "models", "at least 1"),
    ],
)
def test_a_mistake_is_named_with_key_and_line(write, text, line, param, says) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{path}:{line}: ")
    assert says in caught.value.message


def test_off_loopback_is_fine_with_keys(write) -> None:
    config = load(write(MINIMAL + "router: {http_host: 0.0.0.0, api_keys: [secret]}\n"))
    assert config.router.http_host == "0.0.0.0"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("router.http_port", "key=value"),
        ("models.3.name=x", "index into a list of 1"),
        ("models.first.name=x", "index into a list of 1"),
        ("cluster.name=x", "plain value"),
        ("roouter.http_port=1", "unknown key 'roouter'; did you mean 'router'?"),
    ],
)
def test_a_bad_override_is_refused(write, override, says) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        load(write("cluster: local\n" + MINIMAL), override)
    assert says in caught.value.message


@pytest.mark.parametrize("text", ["", "- a\n", "models: [", "just words"])
def test_a_file_that_is_no_mapping_is_refused(write, text) -> None:
    with pytest.raises(ConfigError):
        load(write(text))


def test_a_missing_file_and_a_missing_model_are_config_errors(tmp_path: Path, write) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="other"):
        load(write(MINIMAL)).model_named("other")


def test_a_pool_may_have_its_own_blocks_and_dtype(write) -> None:
    given = ("models.0.prefill.block_tokens=64", "models.0.decode.dtype=bfloat16", "models.0.engine.dtype=float32")
    model = load(write(MINIMAL), *given).models[0]
    prefill, decode = model.prefill.engine(model.engine), model.decode.engine(model.engine)
    assert (prefill.block_tokens, prefill.dtype) == (64, "float32")
    assert (decode.block_tokens, decode.dtype) == (16, "bfloat16")
    assert model.engine.model_copy(update={"block_tokens": 64}) == prefill, "nothing else changed"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("models.0.prefill.dtype=bfloat16", "one dtype in both pools"),
        ("models.0.decode.block_tokens=24", "divide 64"),
        ("models.0.decode.block_tokens=128", "divide 64"),
        ("models.0.decode.block_tokens=32", ""),
    ],
)
def test_exact_mode_wants_the_same_bits_in_both_pools(write, override: str, says: str) -> None:
    given = ("models.0.engine.exact=true", "models.0.engine.dtype=float32", override)
    if not says:
        assert load(write(MINIMAL), *given).models[0].decode.block_tokens == 32
        return
    with pytest.raises(ConfigError, match=says):
        load(write(MINIMAL), *given)
    assert load(write(MINIMAL), override), "in fast mode it is no matter"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("degree", ["prefill.tensor_parallel", "decode.pipeline_parallel"])
def test_several_ranks_may_be_on_either_device(write, degree: str, device: str) -> None:
    model = load(write(MINIMAL), f"models.0.engine.device={device}", f"models.0.{degree}=2").models[0]
    assert model.engine.device == device


def test_the_tree_is_frozen(write) -> None:
    config = load(write(MINIMAL))
    with pytest.raises(ValidationError):
        config.router.http_port = 1


ROUTED = """
models: [{name: small, source: a, aliases: [tiny]}, {name: large, source: b}]
routing:
  aliases: {auto: ALIAS}
  rules: [RULE]
"""
GOOD_ALIAS, GOOD_RULE = "{candidates: [small, large]}", "{when: {tokens_over: 10}, use: large}"


def routed(folder: Path, alias: str = GOOD_ALIAS, rule: str = GOOD_RULE, name: str = "auto") -> Config:
    path = folder / "routed.yaml"
    path.write_text(ROUTED.replace("ALIAS", alias).replace("RULE", rule).replace("auto", name))
    return load_config(path, environment={})


def test_routes_are_read(tmp_path: Path) -> None:
    config = routed(tmp_path)
    assert config.routing.aliases["auto"].models == ("small", "large")
    assert config.routing.rules[0].when.tokens_over == 10


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"alias": "{candidates: [small, huge]}"}, "names 'huge'"),
        ({"rule": "{when: {tokens_over: 10}, use: tiny}"}, "names 'tiny'"),
        ({"alias": "{}"}, "either candidates or weights"),
        ({"alias": "{candidates: [small], weights: {large: 1}}"}, "either candidates or weights"),
        ({"alias": "{weights: {small: 0}}"}, "one of them above 0"),
        ({"alias": "{weights: {small: -1}}"}, "greater than or equal to 0"),
        ({"alias": "{candidates: [small], strong_share: 0.5}"}, "belong to policy: predicted"),
        ({"alias": "{candidates: [small, large], policy: predicted}"}, "needs strong_share or quality_floor"),
        ({"alias": "{candidates: [small, large], policy: predicted, strong_share: 0.5}"}, "needs routing.predictor"),
        ({"rule": "{when: {}, use: large}"}, "a rule needs"),
        ({"rule": "{when: {token_over: 1}, use: large}"}, "did you mean 'tokens_over'"),
        ({"name": "tiny"}, "is the name of a model"),
    ],
)
def test_routes_that_lead_nowhere_are_refused(tmp_path: Path, change: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        routed(tmp_path, **change)


def test_the_shipped_configuration_with_two_models_is_read() -> None:
    config = load_config(Path(__file__).parents[3] / "deploy" / "configs" / "two-models.yaml", environment={})
    assert {"auto", "best", "canary"} == set(config.routing.aliases)


@pytest.mark.parametrize(
    ("autoscaling", "complaint"),
    [
        ({"prefill": {"min_replicas": 3, "max_replicas": 2}}, "min_replicas 3 is above max_replicas 2"),
        ({"mode": "on", "decode": {"min_replicas": 0, "max_replicas": 0}}, "nobody could ever serve"),
        ({"mode": "on", "decode": {"min_replicas": 0, "max_replicas": 1}}, "sleeps as a whole"),
        ({"mode": "on", "max_workers": 1}, "max_workers is below"),
        ({"mode": "auto"}, "mode"),
        ({"min_replica": 1}, "min_replica"),
    ],
)
def test_autoscaling_that_makes_no_sense_is_refused(autoscaling: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ModelConfig.model_validate({"name": "m", "source": "s", "autoscaling": autoscaling})


def test_a_model_may_sleep_only_if_both_pools_may_be_empty() -> None:
    none, one = {"min_replicas": 0}, {"min_replicas": 1}
    for prefill, decode, sleeps in ((none, none, True), (none, one, False), (one, one, False)):
        config = ModelConfig.model_validate(
            {"name": "m", "source": "s", "autoscaling": {"mode": "on", "prefill": prefill, "decode": decode}}
        )
        assert config.autoscaling.may_sleep is sleeps


@pytest.mark.parametrize(("written", "mode"), [("on", "on"), ("off", "off"), ("dry-run", "dry-run"), ('"on"', "on")])
def test_on_and_off_mean_what_they_say_in_yaml(tmp_path: Path, written: str, mode: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"models: [{{name: m, source: s, autoscaling: {{mode: {written}}}}}]", encoding="utf-8")
    assert load_config(path, environment={}).models[0].autoscaling.mode == mode
