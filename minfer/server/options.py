"""`ServerOptions`: what a user can set about the server, as `EngineConfig` is for the engine; flags are made from its fields."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Literal, get_args

from minfer.config import option
from minfer.errors import ConfigError

MetricsCompat = Literal["minfer", "vllm"]


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """A bad value raises `ConfigError` when the options are built."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in, so set --api-key too.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    # Not through option(): the key must not appear where the options are printed.
    api_key: str | None = field(default=None, repr=False, metadata={"help": "Key that clients must send (all routes but /health)."})
    served_model_name: str | None = option(None, "Name that clients use for the model (default: the model argument as given).")
    any_model_name: bool = option(False, "Answer requests for any model name with this model, instead of 404.")
    max_body_bytes: int = option(8 << 20, "Largest request body (suffixes K, M, G).", bytes=True)
    max_request_tokens: int = option(262144, "Most tokens that one request may generate: prompts x n x max_tokens.")
    max_request_sequences: int = option(1024, "Most sequences that one request may start: prompts x n.")
    drain_seconds: float = option(30.0, "How long running requests may go on after SIGTERM or Ctrl-C.")
    metrics_compat: MetricsCompat = option("minfer", "Prefix of the names in /metrics; vllm makes boards and tools made for vLLM work.")
    ping_seconds: float = option(15.0, "Silence on a stream after which a comment is sent, so that proxies keep it open.")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port!r}")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("api_key must be a non-empty string of printable ASCII characters")
        if self.served_model_name == "":
            raise ConfigError("served_model_name must not be empty")
        if self.metrics_compat not in get_args(MetricsCompat):
            raise ConfigError(f"metrics_compat must be one of {', '.join(get_args(MetricsCompat))}, not {self.metrics_compat!r}")
        for name in ("max_body_bytes", "max_request_tokens", "max_request_sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)!r}")
        if not 0 <= self.drain_seconds < 86400:
            raise ConfigError(f"drain_seconds must be from 0 to 86400, not {self.drain_seconds!r}")
        if not 0 < self.ping_seconds < 86400:
            raise ConfigError(f"ping_seconds must be above 0 and below 86400, not {self.ping_seconds!r}")

    @property
    def is_private(self) -> bool:
        """Whether only programs on this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
