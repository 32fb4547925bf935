"""The router's addresses, keys and budgets."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from common.api_keys import entry_of
from common.config.admission import AdmissionConfig, PlacementConfig, PricesConfig, SloConfig
from common.config.part import Part
from common.config.tenants import TENANT_NAME, BandName, TenantConfig
from common.loopback import is_loopback


class ConsoleConfig(Part):
    """The page at / and the JSON under /admin/v1 that it reads. With API keys, reading it needs one of a tenant with `admin`."""

    enabled: bool = Field(True, description="Serve the console on the HTTP port.")
    max_viewers: int = Field(32, ge=1, description="Pages that are kept up to date at the same time; more get 429.")


class RouterConfig(Part):
    http_host: str = Field("127.0.0.1", description="Address of the OpenAI HTTP server.")
    http_port: int = Field(8000, ge=0, le=65_535, description="0 takes a free port.")
    grpc_host: str = Field("127.0.0.1", description="Address of the gRPC server.")
    grpc_port: int = Field(50_051, ge=0, le=65_535, description="0 takes a free port.")
    api_keys: tuple[str, ...] = Field(
        (),
        repr=False,
        description="Accepted bearer tokens, or their entries (`pdserve keys hash`); each is a tenant of its own."
        " No key here, in keys_file or in tenants means no authentication (loopback only).",
    )
    keys_file: str = Field(
        "",
        description="More keys: lines of a tenant and an entry, as `pdserve keys new` prints them. When it"
        " changes, it is read again by the next request.",
    )
    tenants: dict[str, TenantConfig] = Field({}, description="By name; `default` is for keys without a tenant.")
    admission: AdmissionConfig = AdmissionConfig()
    request_timeout_s: float = Field(600.0, gt=0, description="Budget of one request.")
    connect_timeout_s: float = Field(5.0, gt=0, description="Budget for reaching a worker.")
    first_token_retries: int = Field(2, ge=0, description="Other workers tried when one dies before the first token.")
    migrations: int = Field(
        3, ge=0, description="How often the rest of an answer goes elsewhere when its worker dies; 0 ends it in an error."
    )
    migration_wait_s: float = Field(
        60.0,
        ge=0,
        description="How long such an answer waits for a worker that can take it over, and a new request for the successor of"
        " the last worker of its model.",
    )
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024, description="Larger request bodies get 413.")
    max_choices: int = Field(16, ge=1, description="Largest n.")
    placement: PlacementConfig = PlacementConfig()
    slo: dict[BandName, SloConfig] = Field({}, description="By priority: what counts as goodput.")
    prices: PricesConfig = PricesConfig()
    console: ConsoleConfig = ConsoleConfig()
    grammar_timeout_s: float = Field(
        1.0, gt=0, description="How long a JSON schema, regular expression or grammar may take to compile before it is refused."
    )

    @property
    def authenticates(self) -> bool:
        return bool(self.api_keys or self.keys_file or any(tenant.keys for tenant in self.tenants.values()))

    @field_validator("api_keys")
    @classmethod
    def _no_key_in_the_clear(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(entry_of(key) for key in keys)

    @field_validator("tenants")
    @classmethod
    def _names_are_plain(cls, tenants: dict[str, TenantConfig]) -> dict[str, TenantConfig]:
        for name in tenants:
            if not TENANT_NAME.fullmatch(name):
                raise ValueError(f"a tenant's name is up to 64 letters, digits, '.', '_' and '-', not {name[:80]!r}")
        return tenants

    @model_validator(mode="after")
    def _no_key_twice(self) -> RouterConfig:
        entries = [*self.api_keys, *(key for tenant in self.tenants.values() for key in tenant.keys)]
        if len(set(entries)) < len(entries):
            raise ValueError("an API key is given twice")
        return self

    @model_validator(mode="after")
    def _keys_off_loopback(self) -> RouterConfig:
        exposed = [host for host in (self.http_host, self.grpc_host) if not is_loopback(host)]
        if exposed and not self.authenticates:
            raise ValueError(f"binding to {exposed[0]} needs api_keys")
        return self
