"""Whose key it is, in every way in which the configuration can say so."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from common.api_keys import entry_of, slow_entry_of
from common.clock import Clock, ManualClock
from common.config import RouterConfig
from common.errors import AuthenticationFailed, ConfigError, Overloaded, PermissionDenied
from router import keys
from router.admission.bands import Band
from router.admission.tenants import standing_of
from router.keys import KeyRing


def ring(clock: Clock | None = None, **router: Any) -> KeyRing:
    return KeyRing(RouterConfig.model_validate(router), clock or ManualClock())


async def tenant_of(known: KeyRing, key: str) -> str:
    return (await known.identify(f"Bearer {key}")).tenant.name


async def test_without_keys_everybody_is_one_tenant_that_may_administrate() -> None:
    identity = await ring().identify(None)
    assert identity.tenant.name == "default"
    assert identity.tenant.cache_salt == ""
    identity.require_admin()


async def test_keys_belong_to_tenants(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\nacme {entry_of('from-file')}  # the batch job\nacme {slow_entry_of('chosen')}\n")
    known = ring(
        keys_file=str(path),
        api_keys=["alone"],
        tenants={"acme": {"keys": ["clear", entry_of("hashed")], "weight": 4}, "ops": {"keys": ["root"], "admin": True}},
    )
    for key in ("clear", "hashed", "from-file", "chosen", "chosen"):
        assert await tenant_of(known, key) == "acme"
    acme = await known.identify("bearer clear")
    assert acme.tenant.weight == 4
    assert acme.tenant.cache_salt == (await known.identify("Bearer hashed")).tenant.cache_salt
    assert acme.key_id != (await known.identify("Bearer hashed")).key_id
    with pytest.raises(PermissionDenied):
        acme.require_admin()
    (await known.identify("Bearer root")).require_admin()
    salts = {(await known.identify(f"Bearer {key}")).tenant.cache_salt for key in ("clear", "alone", "root")}
    assert len(salts | {""}) == 4


async def test_a_key_of_nobody_is_a_tenant_under_the_rules_of_default() -> None:
    known = ring(api_keys=["one", "two"], tenants={"default": {"weight": 2, "bands": ["batch"]}})
    one, two = await known.identify("Bearer one"), await known.identify("Bearer two")
    assert one.tenant.name != two.tenant.name
    assert one.tenant.cache_salt != two.tenant.cache_salt
    assert one.tenant.label == two.tenant.label  # what metrics say of them is bounded
    assert (one.tenant.weight, one.tenant.bands) == (2, (Band.BATCH,))


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", "Basic one", "Bearer one two", "Bearer \udcff"])
async def test_other_keys_are_refused(given: str | None) -> None:
    for known in (ring(api_keys=["one"]), ring(api_keys=[slow_entry_of("one")])):
        for _ in range(2):
            with pytest.raises(AuthenticationFailed):
                await known.identify(given)


async def test_an_entry_is_not_a_key() -> None:
    known = ring(api_keys=["one"])
    with pytest.raises(AuthenticationFailed):
        await known.identify(f"Bearer {entry_of('one')}")


async def test_slow_entries_are_tried_once_per_key(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    matching = keys._matching

    def counted(entries: Any, key: str) -> Any:
        tried.append(key)
        return matching(entries, key)

    known = ring(api_keys=[slow_entry_of("right")])
    monkeypatch.setattr(keys, "_matching", counted)
    for _ in range(3):
        await known.identify("Bearer right")
        with pytest.raises(AuthenticationFailed):
            await known.identify("Bearer wrong")
    # The fast entries, then the slow ones; a wrong key is compared with the fast ones each time.
    assert tried.count("right") == 2
    assert tried.count("wrong") == 4


async def test_a_flood_of_unknown_keys_does_not_hold_up_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_TRYING_SLOWLY", 3)
    known = ring(api_keys=["quick", slow_entry_of("right")])
    await known.identify("Bearer right")
    flood = [asyncio.ensure_future(known.identify(f"Bearer wrong{index}")) for index in range(40)]
    await asyncio.sleep(0)
    assert await tenant_of(known, "right")
    assert await tenant_of(known, "quick")
    found = await asyncio.gather(*flood, return_exceptions=True)
    assert {type(one) for one in found} == {AuthenticationFailed, Overloaded}


def test_a_configuration_never_holds_a_key_in_the_clear() -> None:
    config = RouterConfig.model_validate({"api_keys": ["secret-one"], "tenants": {"a": {"keys": ["secret-two"]}}})
    assert "secret" not in repr(config) + config.model_dump_json()


@pytest.mark.parametrize(
    "router",
    [
        {"api_keys": [""]},
        {"api_keys": ["sha256:12"]},
        {"api_keys": ["same", entry_of("same")]},
        {"api_keys": ["same"], "tenants": {"a": {"keys": ["same"]}}},
        {"tenants": {"not a name": {}}},
        {"tenants": {"a": {"bands": []}}},
        {"tenants": {"a": {"bands": ["urgent"]}}},
        {"tenants": {"a": {"weight": 0}}},
        {"admission": {"ttft_slo_s": {"urgent": 1}}},
        {"admission": {"ttft_slo_s": {"batch": 0}}},
    ],
)
def test_wrong_configurations(router: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RouterConfig.model_validate(router)


@pytest.mark.parametrize(
    "text", ["acme secret", "sha256:" + "0" * 64, "acme sha256:00", "nobody sha256:" + "0" * 64, "acme a b", "\udcff"]
)
def test_a_keys_file_that_is_wrong_names_itself(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as refused:
        ring(keys_file=str(path), tenants={"acme": {}})
    assert refused.value.param == "router.keys_file"
    assert "secret" not in refused.value.message


def test_a_keys_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        ring(keys_file=str(tmp_path / "keys"))


async def refused(known: KeyRing, key: str) -> bool:
    try:
        await known.identify(f"Bearer {key}")
    except AuthenticationFailed:
        return True
    return False


async def test_a_key_that_leaves_the_file_is_refused_and_one_that_comes_is_known(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", ManualClock()
    path.write_text(f"acme {entry_of('old')}\nacme {slow_entry_of('chosen')}\n")
    known = ring(clock, keys_file=str(path), api_keys=["alone"], tenants={"acme": {}})
    assert await tenant_of(known, "old") == await tenant_of(known, "chosen") == "acme"
    assert await refused(known, "new")

    replaced = tmp_path / "keys.new"
    replaced.write_text(f"acme {entry_of('new')}\n")
    replaced.rename(path)
    assert await tenant_of(known, "old") == "acme"  # not looked at yet
    clock.advance(1.0)
    assert await tenant_of(known, "new") == "acme"
    assert await refused(known, "old")
    assert await refused(known, "chosen")
    assert await tenant_of(known, "alone")

    path.write_text(f"acme {entry_of('old')}\n")  # in place
    clock.advance(1.0)
    assert await tenant_of(known, "old") == "acme"
    assert await refused(known, "new")


@pytest.mark.parametrize("text", ["nobody " + entry_of("new"), "acme new", "\udcff", None])
async def test_a_file_that_is_not_understood_changes_nothing(tmp_path: Path, text: str | None) -> None:
    path, clock = tmp_path / "keys", ManualClock()
    path.write_text(f"acme {entry_of('old')}\n")
    known = ring(clock, keys_file=str(path), tenants={"acme": {}})
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for _ in range(2):
        clock.advance(1.0)
        assert await tenant_of(known, "old") == "acme"
        assert await refused(known, "new")
    path.write_text(f"acme {entry_of('new')}\n")
    clock.advance(1.0)
    assert await tenant_of(known, "new") == "acme"
    assert await refused(known, "old")


async def test_what_was_found_out_about_a_key_ends_with_the_file_that_it_was_in(tmp_path: Path) -> None:
    """A key is being compared, slowly, while the file loses it: the answer is not remembered for later callers."""
    path, clock = tmp_path / "keys", ManualClock()
    path.write_text(f"acme {slow_entry_of('old')}\n")
    known = ring(clock, keys_file=str(path), tenants={"acme": {}})
    asked = asyncio.ensure_future(known.identify("Bearer old"))
    await asyncio.sleep(0)
    path.write_text("")
    clock.advance(1.0)
    assert await refused(known, "old")
    assert (await asked).tenant.name == "acme"
    assert await refused(known, "old")


async def test_bands_are_the_tenants() -> None:
    identity = await ring(tenants={"default": {"bands": ["batch", "background"]}}).identify(None)
    assert standing_of(identity, None).band is Band.BATCH
    assert standing_of(identity, Band.BACKGROUND).band is Band.BACKGROUND
    with pytest.raises(PermissionDenied) as refused:
        standing_of(identity, Band.INTERACTIVE)
    assert refused.value.param == "priority"
