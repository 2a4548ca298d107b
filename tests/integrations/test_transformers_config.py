"""Test what a model's config keeps of the score function, and what is refused by name."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers: make test-transformers")

import torch
import transformers
from flash_attn.integrations.transformers import loader, register, registered
from tiny_models import DECODERS, NEW, SCORES, assert_equal, decoder, eager, name_of, padding, tokens
from transformers import modeling_flash_attention_utils as utils
from transformers.masking_utils import create_causal_mask

Auto = transformers.AutoModelForCausalLM


def model_of(name: str, kind: str = "llama"):
    return Auto.from_config(DECODERS[kind](), attn_implementation=name).double().eval()


# ---- Saved and loaded ----


@pytest.mark.parametrize("score", SCORES)
def test_save_and_load(score, tmp_path):
    tested = model_of(name_of(score))
    tested.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["no_softmax"]["activation"] == SCORES[score].get("activation", "identity")
    options = {} if NEW else {"attn_implementation": name_of(score)}
    loaded = Auto.from_pretrained(tmp_path, dtype=torch.float64, **options)
    assert loaded.config._attn_implementation == name_of(score)
    assert loaded.config.no_softmax == tested.config.no_softmax == registered()[name_of(score)].saved
    ids = tokens(2, 12)
    assert_equal(loaded(ids).logits, tested(ids).logits)


@pytest.mark.skipif(not NEW, reason="transformers 4 does not read attn_implementation from config.json")
def test_a_saved_name_that_is_not_registered_is_an_error(tmp_path):
    model_of(name_of("relu")).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace(name_of("relu"), "flash_of_another_process"))
    with pytest.raises(ValueError, match="flash_of_another_process"):
        Auto.from_pretrained(tmp_path)


def test_another_implementation_warns(tmp_path):
    model_of(name_of("relu")).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="says no_softmax=.*relu.* but .sdpa. as .* has softmax"):
        loaded = Auto.from_pretrained(tmp_path, attn_implementation="sdpa")
    del loaded.config.no_softmax
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Auto.from_config(loaded.config, attn_implementation="sdpa")


def test_another_score_function_is_an_error(tmp_path):
    model_of(name_of("relu")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no_softmax=.*relu.*flash_silu_tested is registered with .*silu"):
        Auto.from_pretrained(tmp_path, attn_implementation=name_of("silu"))
    changed = model_of(name_of("relu"))
    changed.set_attn_implementation(name_of("silu"))
    with pytest.raises(ValueError, match="no_softmax=.*relu"):
        changed(tokens(1, 4))


def test_the_config_keeps_it_before_a_call():
    assert model_of(name_of("relu")).config.no_softmax == {
        "activation": "relu", "sigmoid_bias": 0.0, "normalization": "1/visible",
    }  # fmt: skip


def test_the_block_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"test_transformers_config\.py\. -->\n```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    assert (
        json.loads((tmp_path / "softmax-free" / "config.json").read_text())["no_softmax"]["activation"]
        == "relu"
    )


# ---- Registered ----


@pytest.mark.parametrize(
    "name",
    [
        "eager",
        "sdpa",
        "my_sdpa",
        "flex_attention",
        "flash_attention_2",
        "owner/flash",
        "paged|flash",
        "",
        3,
        None,
    ],
)
def test_a_name_that_transformers_reads_otherwise(name):
    with pytest.raises(ValueError, match="name="):
        register(name)


def test_a_registered_name_keeps_its_score_function():
    register(name_of("relu"), **SCORES["relu"])
    with pytest.raises(ValueError, match="flash_relu_tested.*another name"):
        register(name_of("relu"), activation="silu")
    transformers.AttentionInterface.register("flash_of_others", lambda *args: None)
    with pytest.raises(ValueError, match="flash_of_others.*another package"):
        register("flash_of_others")


def test_the_loader_leaves_other_names_to_transformers():
    with pytest.raises(Exception, match="flash_not_registered"):
        utils._lazy_imports("flash_not_registered")
    loaded = utils._lazy_imports(name_of("relu"))
    q = torch.randn(1, 4, 2, 8)
    expected = eager("relu")(None, *(x.transpose(1, 2) for x in (q, q, q)), None)[0]
    torch.testing.assert_close(loaded[0](q, q, q), expected)
    with pytest.raises(NotImplementedError, match="s_aux"):
        loaded[0](q, q, q, s_aux=torch.zeros(2))


def test_an_unknown_loader_is_an_error_that_names_the_version(monkeypatch):
    monkeypatch.setattr(utils, "_lazy_imports", lambda other: None)
    with pytest.raises(ImportError, match=f"transformers {transformers.__version__} loads.*without .flash."):
        register("flash_too_new")
    register("no_softmax_too_new")
    assert "flash_too_new" not in registered() and not hasattr(loader, "flash_too_new")


# ---- n ----


@pytest.mark.parametrize(
    "score",
    [
        dict(normalization="1/n"),
        dict(activation="sigmoid", sigmoid_bias="-log n"),
        dict(normalization="1/sqrt(n)"),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_n_is_not_counted_in_a_cache(score, padded):
    name = "flash_counted_" + "".join(c for c in str(score) if c.isalnum())
    register(name, **score)
    model, ids = model_of(name), tokens(2, 6)
    kept = padding([4, 6] if padded else [6, 6], 6, left=True)
    with pytest.raises(ValueError, match="counts the keys of a call, 7 with this cache.*n=1024"):
        model.generate(ids, attention_mask=kept, max_new_tokens=3)
    model.generate(ids, attention_mask=kept, max_new_tokens=3, use_cache=False)
    register(name + "_given", **score, n=32)
    model_of(name + "_given").generate(ids, attention_mask=kept, max_new_tokens=3)


def test_a_given_n_equals_the_counted_one():
    ids = tokens(2, 16)
    register("flash_counted_silu", activation="silu", normalization="1/n")
    counted, given = model_of("flash_counted_silu"), decoder("llama", "silu")[0]
    given.load_state_dict(counted.state_dict())
    assert_equal(given(ids[:, :8]).logits, counted(ids[:, :8]).logits)  # SCORES["silu"] has n=8
    assert (given(ids).logits - counted(ids).logits).abs().max() > 1e-3


# ---- Refused by name ----


@pytest.mark.parametrize("name", ["position_bias", "s_aux", "head_mask", "score_mod", "new_bias"])
def test_an_argument_that_would_be_left_out(name):
    with pytest.raises(NotImplementedError, match=f"LlamaAttention gives.* {name} to its attention"):
        dtype = torch.float32 if name == "new_bias" else torch.long
        model_of(name_of("relu"))(tokens(1, 4), **{name: torch.zeros(4, dtype=dtype)})


@pytest.mark.parametrize(
    "options", [dict(use_softmax=True), dict(activation="silu"), dict(normalization=0.5)]
)
def test_a_score_function_in_a_call(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*register"):
        model_of(name_of("relu"))(tokens(1, 4), **options)
    model_of(name_of("relu"))(tokens(1, 4), use_softmax=False)


def test_weights_that_are_never_formed():
    with pytest.raises(ValueError, match="output_attentions"):
        model_of(name_of("relu"))(tokens(1, 4), output_attentions=True)


def test_a_mask_for_pairs():
    with pytest.raises(NotImplementedError, match=r"attention_mask of LlamaAttention is \(1, 1, 4, 4\)"):
        model_of(name_of("relu"))(tokens(1, 4), attention_mask=torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("kind", ["or prefix", "or blocks", "or even", "and even"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_of_the_model(kind, compiled):
    """Some models lay an own mask over the causal one, which is refused for causal layers."""
    joined, kind = kind.split()
    overlays = {
        "prefix": lambda b, h, q, k: (q < 4) & (k < 4),
        "blocks": lambda b, h, q, k: q // 3 == k // 3,
        "even": lambda b, h, q, k: (q + k) % 2 == 0,
    }
    model = model_of(name_of("relu")).model
    ids = tokens(1, 4 if kind == "prefix" else 12)  # all of them prefix: a band, and not a causal one
    positions = {} if NEW else {"cache_position": torch.arange(ids.shape[1])}
    cache = {"cache" if NEW else "past_key_values": None}
    name = "inputs_embeds" if NEW else "input_embeds"
    embeddings = model.embed_tokens(ids)

    def run():
        options = {name: embeddings, f"{joined}_mask_function": overlays[kind], **positions, **cache}
        mask = create_causal_mask(model.config, attention_mask=None, **options)
        return model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)

    torch._dynamo.reset()
    run = torch.compile(run, backend="eager") if compiled else run
    with pytest.raises((NotImplementedError, RuntimeError), match="own mask over attention"):
        run()


@pytest.mark.parametrize("kind, score", [("mistral", "relu"), ("llama", "retention")])
def test_padding_within_a_sequence(kind, score):
    ids, kept = tokens(1, 6), torch.tensor([[1, 1, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask has padding within a sequence"):
        model_of(name_of(score), kind)(ids, attention_mask=kept)
    tested, reference = decoder("llama", "relu")
    asked = dict(attention_mask=kept, use_cache=False)
    assert_equal(tested(ids, **asked).logits, reference(ids, **asked).logits, kept)


def test_lengths_without_the_rest():
    with pytest.raises(ValueError, match="max_length_q is missing"):
        lengths = torch.tensor([0, 4], dtype=torch.int32)
        model_of(name_of("relu"))(tokens(1, 4), cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)


def small(config: type, **more):
    return config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, **more,
    )  # fmt: skip


REFUSED = {
    "T5": lambda: transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
    ),
    "Bloom": lambda: transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4),
    "GptOss": lambda: small(transformers.GptOssConfig, num_local_experts=2, num_experts_per_tok=1),
    "Llama4": lambda: small(
        transformers.Llama4TextConfig, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48
    ),
}
if not NEW:
    REFUSED["Bert"] = lambda: transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_whose_attention_can_not_be_replaced(kind):
    """Refused when it is made, or at its first call: a position bias, ALiBi, sinks, chunks.

    transformers itself takes GPT-OSS from any "flash" to the kernels that it lists, and says so.
    """
    register("softmax_free", activation="relu", normalization="1/visible")
    config, auto = REFUSED[kind](), transformers.AutoModel if kind in ("T5", "Bert") else Auto
    with pytest.raises(NotImplementedError, match=f"(?i){kind}|s_aux|mask"):
        name = "softmax_free" if kind == "GptOss" else name_of("relu")
        model = auto.from_config(config, attn_implementation=name)
        ids = tokens(1, 8)
        model(ids, **({"decoder_input_ids": ids} if kind == "T5" else {}))


def test_a_compiled_model_sees_no_positions():
    """A compiler can't branch on positions: equal to eager without packing, and an error with it."""
    tested, _ = decoder("llama", "relu")
    ids, positions = tokens(1, 12), torch.arange(12)[None]
    torch._dynamo.reset()
    compiled = torch.compile(tested, backend="eager", fullgraph=True)
    assert_equal(compiled(ids, position_ids=positions, use_cache=False).logits, tested(ids).logits)
    with pytest.raises(RuntimeError, match="position_ids pack several|own mask over attention"):
        compiled(ids, position_ids=positions % 5, use_cache=False)
