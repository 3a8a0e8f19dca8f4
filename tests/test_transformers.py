"""The decoder as a model of transformers: the same logits, whatever is cached, padded, searched, saved or trained."""

import copy
import importlib
import itertools
import random
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fitformer
from fitformer.errors import InputError, MissingDependencyError

transformers = pytest.importorskip("transformers")

from fitformer.interop import transformers as hf  # noqa: E402
from fitformer.interop.byte_tokenizer import ByteTokenizer  # noqa: E402
from fitformer.interop.padding import Columns  # noqa: E402
from fitformer.interop.transformers_cache import FITCache  # noqa: E402

# Beside the package that only the slow tests install: torchmetrics imports it wherever it is, in 2 s a process.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SIZES = {"layers": "(1)1(1)2(1)", "dim": 16, "latent_dim": 24, "heads": 2, "latent_heads": 4, "latents_per_group": 2}
VARIANTS = {
    "tables": {"num_groups": 8, "position": "sin_cos", "latent_position": "sin_cos"},
    "any length": {"num_groups": None, "latent_position": "index", "rotary": True, "global_window": 3},
    "untied": {"num_groups": 8, "shared_embedding": False, "output_bias": False},
}


def build(seed=0, **options):
    torch.manual_seed(seed)
    given = {"num_groups": 8, "tokens_per_group": 4, "vocab_size": 13, **SIZES, **options}
    model = hf.FITForCausalLM(hf.FITConfig(**given))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def tokens(batch=3, length=11, seed=0, vocab_size=13):
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows):
    """Ids and mask of rows of several lengths, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.stack([F.pad(row, (longest - len(row), 0), value=5) for row in rows])
    return ids, torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])


@pytest.fixture(params=VARIANTS)
def model(request):
    return build(**VARIANTS[request.param])


def test_logits_are_those_of_the_decoder_one_place_later(model):
    ids = tokens()
    following = model.decoder.logits(F.pad(ids, (0, 1)))[:, 1:]
    torch.testing.assert_close(model(ids, use_cache=False).logits, following)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=True).logits, following)


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_rows_are_read_as_if_they_had_no_padding_in_any_pieces(model, seed):
    choice, ids = random.Random(seed), tokens(4, 17, seed)
    mask = (torch.rand(4, 17, generator=torch.Generator().manual_seed(seed)) < 0.7).long()
    mask[0], mask[1, :6], mask[1, 6:] = 1, 0, 1
    plain = model(ids, mask, use_cache=False).logits
    for row in range(4):
        own = mask[row].bool()
        alone = model(ids[None, row, own], use_cache=False).logits[0]
        torch.testing.assert_close(plain[row, own], alone)
    cuts = [0, *sorted(choice.sample(range(1, 17), 3)), 17]
    cache, pieces = None, []
    for start, end in itertools.pairwise(cuts):
        out = model(ids[:, start:end], mask[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), plain, rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 17
    assert cache.state.position == (1 + mask.sum(1)).tolist()


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4])], ids=str)
@torch.no_grad()
def test_kept_logits_are_some_of_all(model, keep):
    ids = tokens()
    every = model(ids, use_cache=False).logits
    wanted = every[:, -keep:] if isinstance(keep, int) else every[:, keep]
    for use_cache in (False, True):
        torch.testing.assert_close(model(ids, logits_to_keep=keep, use_cache=use_cache).logits, wanted)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_search_is_the_decoders(model, use_cache):
    ids = tokens()
    wanted = model.decoder.generate(ids, max_new_tokens=14)
    assert torch.equal(model.generate(ids, max_new_tokens=14, do_sample=False, use_cache=use_cache), wanted)


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_several_lengths_are_searched_as_alone(model, use_cache):
    rows = [tokens(1, length, length)[0] for length in (3, 8, 5, 8)]
    ids, mask = left_padded(rows)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, use_cache=use_cache)
    for row, whole in zip(rows, found):
        assert torch.equal(whole[-10:], model.decoder.generate(row[None], max_new_tokens=10)[0, -10:])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 7},
        {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 4, "do_sample": True, "length_penalty": 0.5},
        {"do_sample": False, "repetition_penalty": 1.5, "eos_token_id": 4, "pad_token_id": 0},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_search_is_the_same_with_and_without_a_cache(model, options):
    ids, mask = left_padded([tokens(1, 3, 1)[0], tokens(1, 8, 2)[0]])
    found = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        found.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=12,
                use_cache=use_cache,
                return_dict_in_generate=True,
                output_scores=True,
                **options,
            )
        )
    cached, plain = found
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(plain.scores), rtol=1e-4, atol=1e-4)
    assert isinstance(cached.past_key_values, FITCache)
    assert plain.past_key_values is None


def test_samples_follow_the_logits(model):
    ids = tokens(1, 5).expand(4000, -1)
    torch.manual_seed(0)
    drawn = model.generate(ids, max_new_tokens=1, do_sample=True, top_k=0)[:, -1]
    shares = torch.bincount(drawn, minlength=13) / len(drawn)
    torch.testing.assert_close(shares, model(ids[:1]).logits[0, -1].softmax(-1).detach(), rtol=0, atol=0.03)


def test_generating_goes_on_from_what_was_returned(model):
    ids, options = tokens(), {"do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(ids, max_new_tokens=12, do_sample=False)
    begun = model.generate(ids, max_new_tokens=5, **options)
    kept = copy.deepcopy(begun.past_key_values)
    for cache in (begun.past_key_values, kept):
        went_on = model.generate(begun.sequences, past_key_values=cache, max_new_tokens=7, **options)
        assert torch.equal(went_on.sequences, whole)
    assert kept.get_seq_length() == whole.shape[1] - 1


def test_a_prompt_in_chunks_and_a_cache_of_ones_own(model):
    ids = tokens()
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, past_key_values=FITCache(), prefill_chunk_size=3, **options)
    assert torch.equal(cached, model.generate(ids, **options))


@torch.no_grad()
def test_rows_of_a_cache_are_chosen_and_repeated(model):
    ids = tokens(3, 6)
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
    ):
        cache = model(ids[:, :5]).past_key_values
        change(cache)
        assert cache.batch_size == len(rows)
        found = model(ids[rows, 5:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids[rows], use_cache=False).logits[:, -1:])
    cache.reset()
    assert (cache.batch_size, cache.get_seq_length(), cache.get_max_length()) == (-1, 0, -1)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)


def test_loss_is_that_of_the_next_tokens(model):
    ids = tokens()
    labels = ids.masked_fill(torch.arange(11) < 4, -100)
    loss = model(ids, labels=labels).loss
    logits = model.decoder.logits(ids)
    wanted = F.cross_entropy(logits[:, 4:].flatten(0, 1), ids[:, 4:].flatten())
    torch.testing.assert_close(loss, wanted)
    ours, theirs = (torch.autograd.grad(each, tuple(model.parameters()), allow_unused=True) for each in (loss, wanted))
    for name, one, other in zip(dict(model.named_parameters()), ours, theirs):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


def test_hidden_states_lead_from_the_embedding_to_the_logits(model):
    ids, mask = left_padded([tokens(1, 3, 1)[0], tokens(1, 8, 2)[0]])
    out = model(ids, mask, output_hidden_states=True)
    assert len(out.hidden_states) == 1 + model.config.num_hidden_layers == 4
    assert {tuple(states.shape) for states in out.hidden_states} == {(2, 8, 16)}
    weight = (model.decoder.output_embedding or model.decoder.embedding).weight
    torch.testing.assert_close(F.linear(out.hidden_states[-1], weight, model.decoder.output_bias), out.logits)
    # Token 2 of the longer row is input 3 of its first group, token 3 input 0 of the second.
    first = model.decoder.embedding(ids[1, 2:4]) + model.decoder.trunk.position.at()[[3, 0]]
    torch.testing.assert_close(out.hidden_states[0][1, 2:4], first)


def test_checkpointing_is_a_way_to_run_the_decoder(model):
    ids = tokens()
    model.train()
    model(ids, labels=ids).loss.backward()
    plain = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    assert model.decoder.execution is fitformer.execution.checkpointed
    model(ids, labels=ids).loss.backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    assert model.decoder.execution is fitformer.execution.plain


def test_saved_and_loaded_by_auto_classes(model, tmp_path):
    ids = tokens()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is hf.FITForCausalLM
    assert not loaded.training
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.decoder.config == model.decoder.config
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is hf.FITConfig
    drop = {"transformers_version", "_name_or_path", "architectures", "dtype"}
    kept, given = ({k: v for k, v in each.to_dict().items() if k not in drop} for each in (config, model.config))
    assert kept == given


def test_half_precision_is_loaded_and_generates(model, tmp_path):
    model.save_pretrained(tmp_path)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert half.generate(tokens(), max_new_tokens=9, do_sample=False).shape == (3, 20)


def test_from_fitformers_folder_and_back(model, tmp_path):
    ids = tokens()
    model.decoder.save_pretrained(tmp_path / "fit")
    for source in (tmp_path / "fit", fitformer.from_pretrained(tmp_path / "fit")):
        wrapped = hf.FITForCausalLM.from_fit(source)
        assert torch.equal(wrapped(ids).logits, model(ids).logits)
        assert not wrapped.training
    wrapped.save_pretrained(tmp_path / "hf")
    back = hf.FITForCausalLM.from_pretrained(tmp_path / "hf").decoder
    back.save_pretrained(tmp_path / "again")
    names = "model.safetensors", "config.json"
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "fit" / name).read_bytes()


def test_weights_that_no_file_has_are_drawn_as_in_a_new_decoder(model, tmp_path):
    torch.manual_seed(3)
    new = hf.FITForCausalLM(copy.deepcopy(model.config)).state_dict()
    torch.manual_seed(3)
    drawn = hf.FITForCausalLM.from_pretrained(None, config=copy.deepcopy(model.config), state_dict={})
    assert drawn.state_dict().keys() == new.keys()
    for name, tensor in drawn.state_dict().items():
        assert torch.equal(tensor, new[name]), name


def test_vocabulary_grows_and_shrinks(model, tmp_path):
    ids = tokens()
    before = model(ids).logits
    model.resize_token_embeddings(20)
    assert model.config.vocab_size == model.decoder.vocab_size == 20
    torch.testing.assert_close(model(ids).logits[..., :13], before)
    assert model(ids + 7).logits.shape == (3, 11, 20)
    model.decoder.save_pretrained(tmp_path)
    assert fitformer.from_pretrained(tmp_path).vocab_size == 20
    model.resize_token_embeddings(13)
    torch.testing.assert_close(model(ids).logits, before)
    with pytest.raises(InputError, match=r"\b13\b"):
        model(ids + 7)


def test_a_class_stands_before_the_tokens():
    model, ids, classes = build(num_classes=3), tokens(), torch.tensor([2, 0, 1])
    found = model.generate(ids, class_labels=classes, max_new_tokens=9, do_sample=False)
    assert torch.equal(found, model.decoder.generate(ids, max_new_tokens=9, labels=classes))
    plain = model.generate(ids, class_labels=classes, max_new_tokens=9, do_sample=False, use_cache=False)
    assert torch.equal(found, plain)
    beams = model.generate(ids, class_labels=classes, max_new_tokens=9, num_beams=2)
    assert torch.equal(beams[:, :11], ids)
    with pytest.raises(InputError, match="labels"):
        model(ids)


def test_names_that_transformers_asks_for():
    config = hf.FITConfig(hidden_size=48, num_attention_heads=3, tie_word_embeddings=False, layers="(1)2(1)")
    assert (config.dim, config.heads, config.shared_embedding, config.num_hidden_layers) == (48, 3, False, 2)
    assert config.max_position_embeddings == 16 * 64 - 1
    config.latent_position = "index"
    assert config.max_position_embeddings is None


def test_as_many_tokens_are_generated_as_the_decoder_has_positions_for():
    model = build(num_groups=3)
    ids = tokens(1, 5)
    found = model.generate(ids, max_new_tokens=7, do_sample=False)
    assert found.shape == (1, model.config.max_position_embeddings + 1)
    with pytest.raises(InputError, match=r"\b13\b.*\b12\b"):
        model.generate(ids, max_new_tokens=8, do_sample=False)


def bad_calls():
    ids = tokens()
    yield "token", lambda model: model(ids + 5), r"\b13\b"
    yield "mask", lambda model: model(ids, torch.ones(3, 4)), r"\(3, 4\)"
    yield "shape", lambda model: model(ids[0]), r"\(11,\)"
    yield "empty", lambda model: model(ids[:, :0]), r"\(3, 0\)"
    yield "other cache", lambda model: model(ids, past_key_values=transformers.DynamicCache()), "FITCache"
    yield (
        "other batch",
        lambda model: model(ids[:2], past_key_values=model(ids, use_cache=True).past_key_values),
        "2.*3",
    )
    yield "hidden", lambda model: model(ids, use_cache=True, output_hidden_states=True), "use_cache=False"
    yield "attentions", lambda model: model(ids, output_attentions=True), "attentions"
    yield "crop", lambda model: model(ids, use_cache=True).past_key_values.crop(-1), "rewound"
    yield "options", lambda model: hf.FITForCausalLM(hf.FITConfig(dim=10, heads=4)), r"\b10\b"


@pytest.mark.parametrize(("call", "words"), [pytest.param(*rest, id=name) for name, *rest in bad_calls()])
def test_bad_input_is_one_clear_error(call, words):
    with pytest.raises(InputError, match=words):
        call(build())


def test_a_cache_that_a_call_failed_with_is_as_before():
    model, ids, cache = build(num_groups=2), tokens(1, 11), FITCache()
    with pytest.raises(InputError, match=r"\b12\b.*\b8\b"):
        model(ids, past_key_values=cache)
    torch.testing.assert_close(
        model(ids[:, :4], past_key_values=cache).logits, model(ids[:, :4], use_cache=False).logits
    )


def test_assisted_generation_is_refused_since_a_cache_cannot_be_rewound():
    model = build()
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens(1), assistant_model=build(seed=1), max_new_tokens=4)


TOKENIZER = ByteTokenizer()


@given(st.text())
def test_text_is_its_bytes_and_comes_back(text):
    ids = TOKENIZER(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert TOKENIZER.decode(ids) == text


def test_tokenizer_pads_and_is_saved(tmp_path):
    ByteTokenizer().save_pretrained(tmp_path)
    hf.FITConfig().save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is ByteTokenizer
    batch = tokenizer(["ab", "c"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[97, 98], [0, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert tokenizer.decode([0xE2, 65]) == "�A"
    assert (len(tokenizer), tokenizer.get_vocab()["a"]) == (256, 97)


def test_pipeline_of_text():
    model = build(vocab_size=256, num_groups=16)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=TOKENIZER)
    (found,) = pipe("def f(", max_new_tokens=20, do_sample=False)
    wanted = model.decoder.generate([b"def f("], max_new_tokens=20)[0]
    assert found["generated_text"] == bytes(wanted.tolist()).decode(errors="replace")


def test_trainer_trains_and_its_checkpoint_is_loaded(tmp_path):
    pytest.importorskip("accelerate")
    ids = list(b"far-reaching interleaved" * 2)
    model = build(vocab_size=256, num_groups=16, drop_units=0.1).train()
    options = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 40, "save_steps": 40}
    arguments = transformers.TrainingArguments(
        tmp_path, use_cpu=True, report_to=[], disable_tqdm=True, activation_checkpointing=True, **options
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 32)
    before = model.eval()(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    trainer.train()
    after = model.eval()(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert after < before / 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-40")
    assert loaded(torch.tensor([ids]), labels=torch.tensor([ids])).loss == after


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "fitformer.interop.byte_tokenizer")
    with pytest.raises(MissingDependencyError, match=r"fitformer\[transformers\]"):
        importlib.import_module("fitformer.interop.byte_tokenizer")


def test_columns_move_a_rows_own_to_the_front():
    columns = Columns.of(torch.tensor([[7, 8, 9], [7, 8, 9]]), torch.tensor([[1, 0, 1], [0, 0, 1]]))
    assert columns.inputs().tolist() == [[0, 7, 9, 0], [0, 9, 0, 0]]
    assert columns.counts.tolist() == [[1, 1, 2], [0, 0, 1]]
    assert columns.after(torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])).tolist() == [[11, 11, 12], [20, 20, 21]]
