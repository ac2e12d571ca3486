"""API keys: where they come from, and telling one from another without telling how close a guess was.

    --api-key KEY               may be repeated; but other users of the machine can read a command line
    MINFER_API_KEY=KEY,KEY      the environment
    --api-key-file FILE         one key a line; empty lines and lines that begin with # don't count

All of them together are valid. Only their SHA-256 digests are kept, and a request's digest is compared with every one of them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from minfer.errors import ConfigError
from minfer.server.options import ServerOptions

VARIABLE = "MINFER_API_KEY"


class ApiKeys:
    """The set of valid keys. Falsy when there is none, which means that everybody is let in."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = {f"key-{place}": hashlib.sha256(key.encode()).digest() for place, key in enumerate(dict.fromkeys(keys), start=1)}

    def __len__(self) -> int:
        return len(self._digests)

    def name_of(self, given: str) -> str | None:
        """The name (`key-1`, ...: for logs and accounts) of the key that was sent, or None if it is none of ours.

        All of them are compared, each in constant time, so the time says nothing about a guess.
        """
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        found = [name for name, own in self._digests.items() if hmac.compare_digest(digest, own)]
        return found[0] if found else None


def load_keys(options: ServerOptions, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """The keys of all three sources. Raises ConfigError for a file that can't be read or a key that no header can carry."""
    sources = [("api_key", list(options.api_key)), (VARIABLE, environment[VARIABLE].split(",") if VARIABLE in environment else [])]
    if options.api_key_file is not None:
        sources.append((f"the file {options.api_key_file}", _read(options.api_key_file)))
    keys = []
    for source, found in sources:
        for key in (text.strip() for text in found):
            if not (key and key.isascii() and key.isprintable()):
                raise ConfigError(f"{source} must hold non-empty keys of printable ASCII characters")
            keys.append(key)
    return ApiKeys(keys)


def _read(name: str) -> list[str]:
    try:
        lines = Path(name).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file {name} can't be read: {error}") from error
    keys = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"api_key_file {name} holds no key; a server that was meant to be locked must not be open")
    return keys
