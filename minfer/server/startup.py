"""The first screen: everything a user needs to make the first request, and what loading cost."""

from __future__ import annotations

from typing import Any

from minfer.engine.async_llm import AsyncLLM
from minfer.runner.load import describe_kv_cache
from minfer.server.job import sampling_defaults
from minfer.server.keys import ApiKeys
from minfer.server.options import ServerOptions
from minfer.server.slot import ModelSlot


def base_url(options: ServerOptions, port: int) -> str:
    """The address to give a client on this machine: a wildcard is no address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    scheme = "http" if options.tls_cert is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def exposure_warning(options: ServerOptions, keys: ApiKeys) -> str | None:
    if options.is_private or keys:
        return None
    return f"WARNING: anyone who can reach {options.host} can use this server; set --api-key, or --host 127.0.0.1"


def first_screen(slot: ModelSlot, llm: AsyncLLM, options: ServerOptions, keys: ApiKeys, port: int) -> str:
    url, engine = base_url(options, port), llm.engine
    loaded = engine.core.loaded
    max_len, block_size = engine.inputs.max_model_len, llm.config.block_size
    fits = loaded.cache.num_blocks // -(-max_len // block_size)
    auth = " -H 'authorization: Bearer YOUR_KEY'" if keys else ""
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in loaded.phases.seconds.items())
    body = f'{{"model": "{slot.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    key = f"one of {len(keys)} is needed, on all routes but /health" if keys else "none"
    shown = ", ".join(f"{name} {value:g}" for name, value in sampling_defaults(engine.model_config, options).items())
    warning = exposure_warning(options, keys)
    lines = [
        f"minfer serves {slot.name} at {url}/v1",
        f"  loaded    {phases}; {sum(loaded.phases.seconds.values()):.2f} s in all",
        f"  runs on   {llm.config.device}, {llm.config.dtype}",
        f"  context   {max_len} tokens; {fits} requests of full length fit at the same time",
        f"  KV cache  {describe_kv_cache(loaded.cache, loaded.model_config)}",
        *([f"  sampling  {shown}, from the checkpoint, where a request doesn't say"] if shown else []),
        *([f"  LoRA      {', '.join(slot.adapters)}: ask for one as the model"] if slot.adapters else []),
        f"  API key   {key}",
        f"  try it    curl {url}/v1/chat/completions{auth} -H 'content-type: application/json' -d '{body}'",
    ]
    return "\n".join(lines if warning is None else [*lines, warning])


def facts(slot: ModelSlot, llm: AsyncLLM, options: ServerOptions, port: int) -> dict[str, Any]:
    """What `minfer ps` is told once: where to ask, and what doesn't change."""
    loaded = llm.engine.core.loaded
    cache = loaded.cache
    return {
        "model": slot.name,
        "url": base_url(options, port),
        "device": loaded.device.type,
        "weights_bytes": loaded.checkpoint.describe().num_bytes,
        "kv_cache_bytes": cache.num_blocks * cache.block_bytes(loaded.model_config, llm.config.block_size, cache.dtype),
        "context": loaded.max_model_len,
    }
