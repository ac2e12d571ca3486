"""`compare list` names every system of the tables, each with an honest state; adapters can be read without their engines."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest

from compare import environments
from compare.cli import engine_row
from compare.engines import all_infos, info_of
from compare.engines.base import Adapter, EngineInfo, Install
from compare.errors import CompareError, SetupError
from compare.plan import wanted

NAMED = """
minfer llamacpp xllamacpp vllm transformers ctranslate2 onnxruntime openvino tinygrad max litgpt lightning ctransformers
deepspeed exllamav2 exllamav3 gptqmodel autoawq tensorrt-llm optimum-nvidia sglang lmdeploy lightllm unsloth mlc-llm
openai ollama tgi openllm llama-server candle burn powerinfer bitnet.cpp llama2.c nanoflow distserve vattention
sarathi-serve
""".split()  # noqa: SIM905 - forty names read better as a paragraph
STATES = ("runs here", "runs on CUDA only", "through its server", "cannot be installed")


def test_every_system_has_a_row() -> None:
    assert set(NAMED) <= {info.name for info in all_infos()}
    assert len({info.name for info in all_infos()}) == len(all_infos())


@pytest.mark.parametrize("name", [info.name for info in all_infos()])
def test_a_row_says_which_state_it_is_in(name: str) -> None:
    row = engine_row(name, "cpu")
    assert row["state"] in STATES
    assert row["url"] or name == "openai"
    if row["state"] != "runs here":
        assert row["note"], "a row that can't run carries its reason"
    else:
        assert row["precisions"]


@pytest.mark.parametrize("name", [info.name for info in all_infos() if info.adapter])
def test_an_adapter_can_be_read_without_its_engine(name: str) -> None:
    info = info_of(name)
    module = importlib.import_module(f"compare.engines.{name.replace('-', '_')}")
    adapter = getattr(module, info.adapter)
    assert issubclass(adapter, Adapter)
    assert adapter.info is info
    assert info.setting
    assert info.modules
    if info.scores:
        assert adapter.score is not Adapter.score
    assert set(info.install) <= {"cpu", "cuda", "any"}


def test_no_engine_was_imported_by_reading_the_rows() -> None:
    assert not {"vllm", "llama_cpp", "openvino", "ctranslate2"} & set(sys.modules)


def test_rows_of_a_run() -> None:
    labels = [w.label for w in wanted(["vllm", "llamacpp/q4_1"], ["bf16", "int4"], "cpu")]
    assert labels == ["minfer/bf16", "minfer/int4", "vllm/bf16", "llamacpp/q4_1"]
    both = [w.label for w in wanted(["llamacpp"], [], "cpu")]
    assert both == [f"{engine}/{precision}" for engine in ("minfer", "llamacpp") for precision in ("bf16", "int8", "int4")]
    server = wanted(["openai=http://127.0.0.1:1/v1"], [], "cpu")[-1]
    assert server.argument == "http://127.0.0.1:1/v1"
    everyone = {w.info.name for w in wanted(["all"], [], "cpu")}
    assert {"minfer", "llamacpp", "vllm", "transformers", "openvino", "ctranslate2", "onnxruntime"} <= everyone
    assert not {"sglang", "openai", "candle"} & everyone
    with pytest.raises(CompareError, match="no engine is called 'vlm'"):
        wanted(["vlm"], [], "cpu")
    with pytest.raises(CompareError, match="needs the address"):
        wanted(["openai"], [], "cpu")


def test_an_environment_that_cannot_be_made_says_why(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = EngineInfo(
        "x", "x", "", precisions={"cpu": ("bf16",)}, install={"cpu": (Install(("./no-such-package-here",)),)}, modules=("x_y",)
    )
    with pytest.raises(SetupError, match="no-such-package-here"):
        environments.setup(broken, "cpu")
    assert environments.find_python(broken, "cpu", here=True) is None
    with pytest.raises(SetupError, match="CUDA only"):
        environments.setup(replace(broken, precisions={"cuda": ("bf16",)}), "cpu")
    with pytest.raises(SetupError, match=r"needs Python 9\.9"):
        environments.setup(replace(broken, min_python=(9, 9)), "cpu")
    assert environments.clean("x")
    assert not environments.clean("x")
