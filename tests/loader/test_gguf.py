from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

import minfer.loader.gguf
import minfer.quant.gguf
from minfer.errors import ModelLoadError
from minfer.loader import Checkpoint, ModelSource, open_checkpoint
from minfer.quant import PackedWeight

NOT_QUANTISED = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}
PLAIN = ("F32", "F16", "BF16")
QUANTISED = [t for t in gguf.GGML_QUANT_SIZES if t.name not in NOT_QUANTISED]


def open_file(path: Path) -> Checkpoint:
    return open_checkpoint(ModelSource(kind="gguf", name="test", path=path))


def dequantizable(kind: GGMLQuantizationType) -> bool:
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def load_with_transformers(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Their GGUF loader dequantises and un-permutes on its own; it asks for accelerate, which loading on the CPU never uses."""
    import transformers.modeling_utils
    from transformers import AutoModelForCausalLM, GgufConfig

    monkeypatch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda *_, **__: True)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )


def test_smollm2_as_transformers_reads_it(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_file(smollm2)
    theirs = load_with_transformers(smollm2, monkeypatch)
    expected = {n: t for n, t in theirs.state_dict().items() if n != "lm_head.weight"}
    loaded = {}
    for name, tensor in checkpoint.tensors():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
        loaded[name] = tensor.shape
    assert loaded.keys() == expected.keys()
    config, hf = checkpoint.config, theirs.config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 576, 9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings, config.rope.theta) == (49152, 8192, hf.rope_parameters["rope_theta"])
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.eos_token_ids) == (hf.rms_norm_eps, True, (2,))
    assert checkpoint.quantization == "Q4_1"
    assert list(checkpoint.describe().bytes_by_dtype) == ["Q4_1", "Q8_0", "F32"]
    assert checkpoint.tokenizer_source["tokenizer.ggml.model"] == "gpt2"


def test_smollm2_as_the_gguf_package_dequantises_it(smollm2: Path, smollm2_reader: gguf.GGUFReader) -> None:
    """Where no row moves, values are bit for bit the package's."""
    loaded = open_file(smollm2)
    for tensor in smollm2_reader.tensors:
        if tensor.name in (
            "token_embd.weight",
            "output_norm.weight",
            "blk.7.ffn_down.weight",
            "blk.29.attn_v.weight",
            "blk.3.attn_norm.weight",
        ):
            name = {
                "token_embd.weight": "model.embed_tokens.weight",
                "output_norm.weight": "model.norm.weight",
                "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
                "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
                "blk.3.attn_norm.weight": "model.layers.3.input_layernorm.weight",
            }[tensor.name]
            assert np.array_equal(loaded.read(name).numpy(), gguf.quants.dequantize(tensor.data, tensor.tensor_type))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 16}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_a_converted_model_comes_back(
    tiny: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    model = tiny(family, **options)
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight" or not options.get("tie_word_embeddings")}
    keys = {"attention.key_length": 16, "rope.dimension_count": 16} if "head_dim" in options else {}
    path = write_gguf(
        tmp_path / "m.gguf", {n: t.numpy() for n, t in state.items()}, arch="qwen2" if family == "qwen2" else "llama", keys=keys
    )
    checkpoint = open_file(path)
    loaded = dict(checkpoint.tensors())
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[n], state[n]) for n in state)
    config = checkpoint.config
    assert config.qkv_bias is (family == "qwen2" or "attention_bias" in options)
    assert config.mlp_bias is ("mlp_bias" in options)
    assert config.attention_output_bias is ("attention_bias" in options)
    assert config.tie_word_embeddings is ("tie_word_embeddings" in options)
    assert (config.rope.theta, config.max_position_embeddings, config.dtype) == (5000.0, 128, "float32")
    assert checkpoint.quantization is None


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_our_converted_file_alike(
    tiny: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Guards the test's own conversion: were its row order wrong, transformers would undo another one."""
    state = {n: t.numpy() for n, t in tiny(family).state_dict().items()}
    path = write_gguf(tmp_path / "m.gguf", state, arch=family)
    theirs = load_with_transformers(path, monkeypatch).state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in open_file(path).tensors())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_keep_their_dtype(
    tiny: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    state = {n: t.to(dtype) if t.dim() == 2 else t for n, t in tiny().state_dict().items()}
    raw = {
        n: (t.view(torch.uint8).numpy(), GGMLQuantizationType.BF16) if t.dtype == torch.bfloat16 else t.numpy() for n, t in state.items()
    }
    checkpoint = open_file(write_gguf(tmp_path / "m.gguf", raw))
    for name, tensor in checkpoint.tensors():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
    assert checkpoint.config.dtype == str(dtype).removeprefix("torch.")
    assert checkpoint.quantization is None


def one_layer(packed: Callable[[int, int], Any]) -> dict[str, Any]:
    """The tensors of a model of one layer, whose matrices are `packed(rows, columns)`."""
    layer = "model.layers.0."
    return {
        "model.embed_tokens.weight": packed(24, 256),
        layer + "input_layernorm.weight": np.ones(256, np.float32),
        layer + "self_attn.q_proj.weight": packed(256, 256),
        layer + "self_attn.k_proj.weight": packed(128, 256),
        layer + "self_attn.v_proj.weight": packed(128, 256),
        layer + "self_attn.o_proj.weight": packed(256, 256),
        layer + "post_attention_layernorm.weight": np.ones(256, np.float32),
        layer + "mlp.gate_proj.weight": packed(512, 256),
        layer + "mlp.up_proj.weight": packed(512, 256),
        layer + "mlp.down_proj.weight": packed(256, 512),
        "model.norm.weight": np.ones(256, np.float32),
    }


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.name)
def test_every_quantised_type(
    write_gguf: Callable[..., Path], tmp_path: Path, kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random bytes are valid blocks of any type, so no quantiser is needed; the package says what they mean."""
    monkeypatch.setattr(minfer.loader.gguf, "CHUNK_ELEMENTS", 256 * 48)  # several chunks, the last one short
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)

    def packed(rows: int, columns: int) -> tuple[np.ndarray, GGMLQuantizationType]:
        return rng.integers(0, 256, (rows, columns // block * size), dtype=np.uint8), kind

    state = one_layer(packed)
    path = write_gguf(tmp_path / "m.gguf", state, keys={"feed_forward_length": 512})
    if not dequantizable(kind):
        with pytest.raises(ModelLoadError, match=f"{kind.name}, which the gguf package can't dequantise"):
            open_file(path)
        return
    checkpoint = open_file(path)
    for name, tensor in checkpoint.tensors():
        value = state[name]
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(value[0], kind) if isinstance(value, tuple) else value
        assert np.array_equal(tensor.numpy(), expected, equal_nan=True), name
    assert checkpoint.quantization == kind.name
    assert checkpoint.config.dtype == "bfloat16"
    for name, tensor in checkpoint.tensors(keep_packed=True):  # kept as it is where that is possible: the same values either way
        assert isinstance(tensor, PackedWeight) == (checkpoint.tensor_infos[name].dtype not in PLAIN)
        value = tensor.dequantize() if isinstance(tensor, PackedWeight) else tensor
        assert torch.equal(value.nan_to_num(), checkpoint.read(name).nan_to_num()), name


def test_a_type_that_no_kernel_runs_is_said(
    write_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As it will be when the gguf package learns a type that is not known here yet: IQ3_S plays one."""
    monkeypatch.delitem(minfer.quant.gguf._TYPES, "IQ3_S")
    state = one_layer(lambda rows, columns: (np.ones((rows, columns // 256 * 110), np.uint8), GGMLQuantizationType.IQ3_S))
    checkpoint = open_file(write_gguf(tmp_path / "m.gguf", state, keys={"feed_forward_length": 512}))
    assert not any(isinstance(tensor, PackedWeight) for _, tensor in checkpoint.tensors(keep_packed=True))
    assert caplog.text.count("no kernel runs IQ3_S") == 1
    assert "to 16 bits a weight or more instead of 3.44" in caplog.text


def test_llama3_frequency_factors_and_yarn(gguf_shaped: Callable[..., Path]) -> None:
    factors = np.array([1, 1, 2.5, 8], np.float32)
    assert open_file(gguf_shaped(extra={"rope_freqs.weight": factors})).config.rope.freq_factors == (1, 1, 2.5, 8)
    with pytest.raises(ModelLoadError, match="rope_freqs"):
        open_file(gguf_shaped(extra={"rope_freqs.weight": factors[:2]}))
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    rope = open_file(gguf_shaped(keys=yarn)).config.rope
    assert (rope.kind, rope.factor, rope.original_max_position, rope.attention_factor) == ("yarn", 4.0, 32, None)
    linear = open_file(gguf_shaped(keys={"rope.scaling.type": "linear", "rope.scaling.factor": 2.0})).config.rope
    assert (linear.kind, linear.factor) == ("linear", 2.0)


def test_sliding_window_and_end_tokens(gguf_shaped: Callable[..., Path]) -> None:
    ends = {
        "tokenizer.ggml.eos_token_id": 9,
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.ggml.eom_token_id": 9,
        "tokenizer.ggml.bos_token_id": 1,
    }
    config = open_file(gguf_shaped(keys={"attention.sliding_window": 8, **ends})).config
    assert config.sliding_windows == (8, 8)
    assert (config.eos_token_ids, config.bos_token_id) == ((9, 7), 1)
    assert open_file(gguf_shaped()).config.sliding_windows == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop": ("model.layers.1.mlp.up_proj.weight",)}, "model.layers.1.mlp.up_proj.weight.*missing"),
        ({"drop": ("model.norm.weight",)}, "model.norm.weight.*missing"),
        (
            {"drop": ("model.layers.1.mlp.up_proj.weight",), "extra": {"blk.1.ffn_up.weight": np.zeros((64, 16), np.float32)}},
            r"\[64, 16\].*\[64, 32\]",
        ),
        ({"extra": {"blk.0.attn_sinks.weight": np.zeros(8, np.float32)}}, "blk.0.attn_sinks.weight.*no place in a llama model"),
        ({"extra": {"blk.00.attn_q.weight": np.zeros((32, 32), np.float32)}}, "blk.00.attn_q.weight.*no place"),
        ({"extra": {"blk.2.attn_q.weight": np.zeros((32, 32), np.float32)}, "keys": {"block_count": 2}}, "layers.2.*no place"),
        ({"extra": {"output.bias": np.zeros(8, np.int32)}}, "I32, which the gguf package can't dequantise"),
        ({"keys": {"block_count": 3}}, "layers.2.*missing"),
        ({"keys": {"block_count": 2**31}}, "beyond any model"),
        ({"keys": {"attention.head_count": 0}}, "can't|wrong kind|positive|multiple"),
        ({"keys": {"attention.head_count": "four"}}, "head_count is four, expected one whole number"),
        ({"keys": {"attention.head_count": [4, 2]}}, r"head_count is \[4, 2\]"),
        ({"keys": {"rope.dimension_count": 4}}, "rope.dimension_count is 4"),
        ({"keys": {"rope.freq_base": "x"}}, "rope.freq_base"),
        ({"keys": {"rope.scaling.type": "longrope"}}, "longrope"),
        ({"keys": {"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}}, "ext_factor"),
        ({"keys": {"expert_count": 8}}, "expert_used_count is missing"),
        ({"keys": {"general.alignment": 48}}, "alignment"),
        ({"keys": {"split.count": 2}}, "split into 2 files"),
        ({"keys": {"split.count": "x"}}, "split into x files"),
    ],
)
def test_files_that_do_not_fit_together_are_explained(gguf_shaped: Callable[..., Path], options: dict[str, Any], words: str) -> None:
    path = gguf_shaped(**options)
    with pytest.raises(ModelLoadError, match=words) as caught:
        open_file(path)
    assert str(path) in str(caught.value)


def test_another_architecture_is_refused(write_gguf: Callable[..., Path], tiny: Callable[..., Any], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {n: t.numpy() for n, t in tiny().state_dict().items()}, arch="falcon")
    with pytest.raises(ModelLoadError, match="architecture 'falcon' is not supported yet; supported are llama, qwen2"):
        open_file(path)


def test_split_files(tiny: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    """Written by the package's own splitting, two tensors a file."""
    state = {n: t.numpy() for n, t in tiny("qwen2").state_dict().items()}
    write_gguf(tmp_path / "m.gguf", state, arch="qwen2", tokens=False, split_max_tensors=2)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 3
    checkpoint = open_file(parts[0])
    assert {n: t.tolist() for n, t in checkpoint.tensors()} == {n: t.tolist() for n, t in state.items()}
    assert checkpoint.tokenizer_source is None
    with pytest.raises(ModelLoadError, match=r"is part 2 of .* give the first part"):
        open_file(parts[1])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(ModelLoadError, match=r"00003-of-.*is in .*00002-of-.*already"):
        open_file(parts[0])
    parts[2].unlink()
    with pytest.raises(ModelLoadError, match=r"00003-of-.*is missing; the model is split into"):
        open_file(parts[0])


def test_a_file_that_shrinks_after_opening(gguf_shaped: Callable[..., Path]) -> None:
    path = gguf_shaped()
    checkpoint = open_file(path)
    path.write_bytes(b"")
    with pytest.raises(ModelLoadError, match="did the file change"):
        list(checkpoint.tensors())
