"""`ServerOptions`: what a user can set about the server, as `EngineConfig` is for the engine; flags are made from its fields."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args
from urllib.parse import urlsplit

from minfer.config import option
from minfer.errors import ConfigError

MetricsCompat = Literal["minfer", "vllm"]
LogFormat = Literal["text", "json"]
GenerationConfigUse = Literal["auto", "none"]


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """A bad value raises `ConfigError` when the options are built."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in, so set --api-key too.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    # Not through option(): a key must not appear where the options are printed.
    api_key: Sequence[str] = field(
        default=(),
        repr=False,
        metadata={"help": "Key that clients must send (all routes but /health). May be repeated; MINFER_API_KEY=KEY,KEY adds more."},
    )
    api_key_file: str | None = option(None, "File with such keys, one a line.")
    tls_cert: str | None = option(None, "Certificate chain (PEM) to serve HTTPS with; needs --tls-key.")
    tls_key: str | None = option(None, "Private key (PEM) of that certificate.")
    allowed_host: Sequence[str] = option((), "Further name that the Host header may hold. May be repeated; * allows any.")
    cors_origin: Sequence[str] = option((), "Origin whose pages may use this server from a browser. May be repeated; * allows any.")
    served_model_name: str | None = option(None, "Name that clients use for the model (default: the model argument as given).")
    any_model_name: bool = option(False, "Answer requests for any model name with this model, instead of 404.")
    generation_config: GenerationConfigUse = option(
        "auto", "Defaults of temperature, top_p and so on for requests without them: auto takes the checkpoint's own, none OpenAI's."
    )
    max_body_bytes: int = option(8 << 20, "Largest request body (suffixes K, M, G).", bytes=True)
    max_request_tokens: int = option(262144, "Most tokens that one request may generate: prompts x n x max_tokens.")
    max_request_sequences: int = option(1024, "Most sequences that one request may start: prompts x n.")
    max_messages: int = option(4096, "Most messages in one chat.")
    max_queue: int = option(1024, "Sequences that may wait beside those that run; who comes then gets 429 and when to try again.")
    requests_per_minute: int | None = option(None, "Most requests a minute of each API key (of all clients together where there is none).")
    read_seconds: float = option(60.0, "How long a client may take to send its request, or not to read its answer, before it is cut off.")
    drain_seconds: float = option(30.0, "How long running requests may go on after SIGTERM or Ctrl-C.")
    watchdog_seconds: float = option(
        300.0,
        "Longest that one step may take before the server fails its requests and exits, for a supervisor to restart it (0: no limit).",
    )
    metrics_compat: MetricsCompat = option("minfer", "Prefix of the names in /metrics; vllm makes boards and tools made for vLLM work.")
    log_format: LogFormat = option("text", "Form of the log on stderr: text, or json with one object a line. -v shows every request.")
    otlp_traces_endpoint: str | None = option(
        None, "URL of an OpenTelemetry collector (OTLP over HTTP, as http://host:4318/v1/traces) that gets a span for each request."
    )
    ping_seconds: float = option(15.0, "Silence on a stream after which a comment is sent, so that proxies keep it open.")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port!r}")
        for name in ("api_key", "allowed_host", "cors_origin"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        if not all(key and key.isascii() and key.isprintable() for key in self.api_key):
            raise ConfigError("api_key must be a non-empty string of printable ASCII characters")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key need each other: give both, or neither")
        if self.served_model_name == "":
            raise ConfigError("served_model_name must not be empty")
        for name, kind in (("metrics_compat", MetricsCompat), ("generation_config", GenerationConfigUse), ("log_format", LogFormat)):
            choices = get_args(kind)
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and (not endpoint.startswith(("http://", "https://")) or not urlsplit(endpoint).hostname):
            raise ConfigError(f"otlp_traces_endpoint must be a URL like http://host:4318/v1/traces, not {endpoint!r}")
        for name in ("max_body_bytes", "max_request_tokens", "max_request_sequences", "max_messages", "requests_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value!r}")
        if self.max_queue < 0:
            raise ConfigError(f"max_queue must be at least 0, not {self.max_queue!r}")
        for name in ("drain_seconds", "watchdog_seconds"):
            if not 0 <= getattr(self, name) < 86400:
                raise ConfigError(f"{name} must be from 0 to 86400, not {getattr(self, name)!r}")
        for name in ("ping_seconds", "read_seconds"):
            if not 0 < getattr(self, name) < 86400:
                raise ConfigError(f"{name} must be above 0 and below 86400, not {getattr(self, name)!r}")

    @property
    def is_private(self) -> bool:
        """Whether only programs on this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
