"""Test transformers' models without softmax against models that form every score: logits, gradients and
generated tokens."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs transformers: make test-transformers")

import torch
import transformers
from flash_attn.integrations.transformers import register
from tiny_models import (
    DECODERS,
    NEW,
    PAIRS,
    VOCABULARY,
    assert_equal,
    decoder,
    name_of,
    padding,
    pair,
    tokens,
)

LENGTHS = [9, 12, 4]


@pytest.fixture(params=list(DECODERS))
def models(request) -> tuple:
    return decoder(request.param, PAIRS[request.param])


# ---- One pass ----


@pytest.mark.parametrize("layout", ["dense", "left", "right"])
def test_logits(models, layout):
    tested, reference = models
    ids, kept = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    if layout != "dense":
        kept = padding(LENGTHS, 12, layout == "left")
    asked = {} if layout == "dense" else {"attention_mask": kept}
    assert_equal(tested(ids, **asked).logits, reference(ids, **asked, use_cache=False).logits, kept)


def test_padding_changes_nothing(models):
    tested, _ = models
    ids, kept = tokens(3, 12), padding(LENGTHS, 12, left=True)
    rows = tested(ids, attention_mask=kept, position_ids=(kept.cumsum(1) - 1).clamp(min=0)).logits
    for row, sequence, length in zip(rows, ids, LENGTHS):
        assert_equal(row[-length:], tested(sequence[None, -length:]).logits[0])


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_gradients(models, checkpointing, left):
    gradients = []
    ids, kept = tokens(3, 12), padding(LENGTHS, 12, left)
    labels = torch.where(kept.bool(), ids, -100)
    for model in models:
        model.train()
        if checkpointing is not None and model is models[0]:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model(ids, attention_mask=kept, labels=labels, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=1e-7, atol=1e-9, msg=name)
    assert any("q_proj" in name and grad.abs().max() > 1e-4 for name, grad in gradients[0].items())


def collated(sequences: list[torch.Tensor], **options) -> dict:
    collator = transformers.DataCollatorWithFlattening(return_tensors="pt", **options)
    return collator([{"input_ids": x.tolist(), "labels": x.tolist()} for x in sequences])


@pytest.mark.parametrize(
    "how", ["position_ids", "position_ids, no cache", "collator", "collator with lengths"]
)
def test_packing(models, how):
    tested, reference = models
    ids = tokens(3, 12)
    sequences = [row[:length] for row, length in zip(ids, LENGTHS)]
    batch = collated(sequences, return_flash_attn_kwargs=how == "collator with lengths")
    if how.startswith("position_ids"):
        batch = {name: batch[name] for name in ("input_ids", "position_ids")}
    if how.endswith("no cache"):
        batch["use_cache"] = False
    batch.pop("labels", None)
    logits = tested(**batch).logits[0].split(LENGTHS)
    for sequence, of_sequence in zip(sequences, logits):
        assert_equal(of_sequence, reference(sequence[None], use_cache=False).logits[0])


def test_several_packed_rows(models):
    tested, reference = models
    ids = tokens(2, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    logits = tested(ids, position_ids=positions).logits
    for row, start, stop in [(0, 0, 4), (0, 4, 9), (1, 0, 9)]:
        alone = reference(ids[row : row + 1, start:stop], use_cache=False).logits[0]
        assert_equal(logits[row, start:stop], alone)


def test_packed_gradients():
    tested, reference = decoder("llama", "relu")
    sequences = [row[:length] for row, length in zip(tokens(3, 12), LENGTHS)]
    tested(**collated(sequences)).loss.backward()
    # The collator's labels leave out the first token of each sequence, as the shift does.
    losses = [reference(x[None], labels=x[None], use_cache=False).loss * (len(x) - 1) for x in sequences]
    (sum(losses) / (sum(LENGTHS) - 3)).backward()
    of_reference = dict(reference.named_parameters())
    for name, p in tested.named_parameters():
        torch.testing.assert_close(p.grad, of_reference[name].grad, rtol=1e-7, atol=1e-9, msg=name)


def test_decay_of_retention():
    tested, reference = decoder("llama", "retention")
    ids = tokens(2, 12)
    assert_equal(tested(ids).logits, reference(ids, use_cache=False).logits)


def test_several_names_in_one_process():
    ids = tokens(2, 12)
    models = {score: decoder("llama", score) for score in ("relu", "silu", "identity")}
    weights = models["relu"][0].state_dict()
    outs = []
    for tested, reference in models.values():
        tested.load_state_dict(weights)
        reference.load_state_dict(weights)
        outs.append(tested(ids).logits)
        assert_equal(outs[-1], reference(ids, use_cache=False).logits)
    assert (outs[0] - outs[1]).abs().max() > 1e-3 < (outs[1] - outs[2]).abs().max()


def test_a_model_that_changes_its_implementation():
    """set_attn_implementation reaches the model, and the score function its config."""
    tested, reference = decoder("llama", "silu")
    plain = transformers.AutoModelForCausalLM.from_config(DECODERS["llama"]()).double().eval()
    plain.load_state_dict(tested.state_dict())
    ids = tokens(2, 12)
    plain.set_attn_implementation(name_of("silu"))
    assert_equal(plain(ids).logits, reference(ids, use_cache=False).logits)
    assert plain.config.no_softmax == tested.config.no_softmax


def test_a_name_without_flash():
    register("softmax_free", activation="relu", normalization="1/visible")
    tested, reference = decoder("gemma2", "relu")
    tested.set_attn_implementation("softmax_free")
    ids, kept = tokens(3, 12), padding(LENGTHS, 12, left=True)
    assert_equal(
        tested(ids, attention_mask=kept).logits,
        reference(ids, attention_mask=kept, use_cache=False).logits,
        kept,
    )


# ---- Generation ----


def generated(model, ids, kept, **options) -> torch.Tensor:
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    return model.generate(ids, attention_mask=kept, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_greedy_tokens(models, padded, cache):
    tested, reference = models
    ids = tokens(3, 12)
    kept = padding(LENGTHS if padded else [12] * 3, 12, left=True)
    options = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    expected = generated(reference, ids, kept, use_cache=False)
    assert torch.equal(generated(tested, ids, kept, **options), expected)
    assert len(set(expected.flatten().tolist())) > 3


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=3),
        dict(num_beams=3, cache_implementation="static"),
        dict(prompt_lookup_num_tokens=3),
        dict(prefill_chunk_size=5),
        dict(prefill_chunk_size=5, cache_implementation="static"),
    ],
    ids=["beams", "beams, static", "prompt lookup", "chunked prefill", "chunked prefill, static"],
)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_ways_to_generate(kind, options):
    tested, reference = decoder(kind, "relu")
    looked_up = "prompt_lookup_num_tokens" in options
    ids = tokens(1, 6).repeat(1, 2) if looked_up else tokens(3, 12)
    # transformers 4 gives padded prompts other positions in chunks, with every implementation.
    padded = not looked_up and (NEW or "prefill_chunk_size" not in options)
    kept = padding(LENGTHS if padded else [12] * len(ids), 12, left=True)
    plain = {name: x for name, x in options.items() if name == "num_beams"}
    if looked_up:  # transformers 4 wants a token that ends a sequence
        options, plain = {**options, "eos_token_id": 1}, {"eos_token_id": 1}
    expected = generated(reference, ids, kept, use_cache=False, **plain)
    assert torch.equal(generated(tested, ids, kept, **options), expected)


def test_a_static_cache_by_hand():
    """Not generate's mask but none at all: the empty rows of the cache must not be seen."""
    tested, reference = decoder("gemma2", "relu")
    ids = tokens(2, 12)
    cache = transformers.StaticCache(config=tested.config, max_cache_len=32)
    name = "past_key_values"
    pieces = []
    for start, stop in [(0, 5), (5, 9), (9, 10), (10, 12)]:
        positions = torch.arange(start, stop)
        more = {} if NEW else {"cache_position": positions}
        out = tested(ids[:, start:stop], **{name: cache}, position_ids=positions[None], **more)
        pieces.append(out.logits)
    assert_equal(torch.cat(pieces, dim=1), reference(ids, use_cache=False).logits)


def test_decoding_after_right_padding():
    """A cache then has keys of padding between those of a sequence."""
    tested, reference = decoder("llama", "relu")
    ids, kept = tokens(3, 12), padding(LENGTHS, 12, left=False)
    new = tokens(3, 2)
    cache = tested(ids, attention_mask=kept, use_cache=True).past_key_values
    kept = torch.cat([kept, torch.ones(3, 2, dtype=torch.long)], dim=1)
    positions = torch.arange(12, 14)[None].expand(3, 2)
    out = tested(new, attention_mask=kept, past_key_values=cache, position_ids=positions).logits
    expected = reference(torch.cat([ids, new], dim=1), attention_mask=kept, use_cache=False).logits
    assert_equal(out, expected[:, 12:])


@pytest.mark.skipif(not NEW, reason="transformers 4 takes its own names alone for continuous batching")
def test_continuous_batching():
    tested, reference = decoder("llama", "relu")
    tested, reference = tested.float(), reference.float()
    prompts = [row[:length].tolist() for row, length in zip(tokens(3, 12), LENGTHS)]
    options = transformers.GenerationConfig(
        max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    results = tested.generate_batch(inputs=prompts, generation_config=options, progress_bar=False)
    found = [r.generated_tokens for r in sorted(results.values(), key=lambda r: r.request_id)]
    alone = [
        generated(reference, torch.tensor([p]), None, max_new_tokens=6, use_cache=False)[0].tolist()
        for p in prompts
    ]
    assert sorted(found) == sorted(alone)


# ---- Encoders ----


@pytest.mark.skipif(not NEW, reason="transformers 4 does not read config.is_causal")
def test_a_decoder_used_as_an_encoder():
    tested, reference = decoder("llama", "sigmoid", is_causal=False)
    ids, kept = tokens(3, 12), padding(LENGTHS, 12, left=False)
    asked = dict(attention_mask=kept, use_cache=False)
    assert_equal(tested(ids, **asked).logits, reference(ids, **asked).logits, kept)
    seen = tested(ids, use_cache=False).logits
    assert (seen - decoder("llama", "sigmoid")[0](ids).logits).abs().max() > 1e-3


def test_a_layer_of_a_config_that_is_not_causal():
    """Some versions give the layer no is_causal then."""
    layer = decoder("llama", "relu")[0].model.layers[0].self_attn
    attend = transformers.AttentionInterface()[name_of("relu")]
    q, k, v = (torch.randn(2, 4, 6, 8, dtype=torch.float64) for _ in range(3))
    causal, full = (attend(layer, q, k, v, None, is_causal=x)[0] for x in (True, False))
    assert torch.equal(attend(layer, q, k, v, None)[0], causal) and not torch.equal(full, causal)
    layer.config.is_causal = False
    assert torch.equal(attend(layer, q, k, v, None)[0], full)


@pytest.mark.skipif(not NEW, reason="BERT of transformers 4 has no FlashAttention")
@pytest.mark.parametrize("score", ["sigmoid", "identity"])
def test_bert(score):
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.4,
    )  # fmt: skip
    tested, reference = pair(transformers.AutoModelForMaskedLM, config, score)
    ids, kept = tokens(3, 12), padding(LENGTHS, 12, left=False)
    assert_equal(tested(ids).logits, reference(ids).logits)
    assert_equal(tested(ids, attention_mask=kept).logits, reference(ids, attention_mask=kept).logits, kept)


def test_vit():
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32,
        patch_size=8, initializer_range=0.4,
    )  # fmt: skip
    tested, reference = pair(transformers.AutoModelForImageClassification, config, "silu")
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_equal(tested(pixels).logits, reference(pixels).logits)


@pytest.mark.skipif(not NEW, reason="BART of transformers 4 makes masks of its own, which are refused")
def test_a_decoder_that_attends_to_an_encoder():
    """Queries of the decoder count all, whatever padding the encoder's tokens have."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        init_std=0.4, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=None,
    )  # fmt: skip
    tested, reference = pair(transformers.AutoModelForSeq2SeqLM, config, "relu")
    ids, kept, answers = tokens(3, 12), padding(LENGTHS, 12, left=False), tokens(3, 12)
    for length in (12, 7):
        asked = dict(attention_mask=kept, decoder_input_ids=answers[:, :length])
        assert_equal(tested(ids, **asked).logits, reference(ids, **asked, use_cache=False).logits)
    options = dict(max_new_tokens=6, do_sample=False, attention_mask=kept, num_beams=2)
    assert torch.equal(tested.generate(ids, **options), reference.generate(ids, use_cache=False, **options))
