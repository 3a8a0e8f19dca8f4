"""Decoders that are told the class of an example: in place of its first input token, and nowhere else."""

import pytest
import torch

import fitformer
from fitformer import official
from fitformer.config import load as config
from fitformer.errors import InputError
from fitformer.execution import Streamed, checkpointed, plain
from fitformer.tasks import build_model, pixels
from small_models import DROPS, SIZES, N, T, check_equal, decoder, outcome

V, CLASSES = 11, 3
LABELS = torch.tensor([2, 0])


def tokens_of(batch, seed=0):
    return torch.randint(V, (batch, T, N), generator=torch.Generator().manual_seed(seed))


def decode(model, x):
    return (model((x[..., 0].detach().abs() * 3).long() % V, labels=LABELS),)


def rough(model):
    """Weights away from their initial values, which are too small to show in every logit."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return model.eval()


def test_the_other_weights_of_a_seed_are_those_of_the_unconditional_model():
    without, told = decoder().state_dict(), decoder(num_classes=CLASSES).state_dict()
    assert set(told) - set(without) == {"class_embedding.weight"}
    assert all(torch.equal(told[name], tensor) for name, tensor in without.items())


def test_a_class_changes_every_logit_and_none_is_the_unconditional_model():
    model, tokens = rough(decoder(num_classes=CLASSES)), tokens_of(1).expand(CLASSES, T, N)
    logits = model(tokens, labels=torch.arange(CLASSES))
    for one, other in ((0, 1), (1, 2), (0, 2)):
        moved = (logits[one] - logits[other]).abs().amax(-1)
        assert moved.min() > 1e-5, "some position does not hear of the class"
    without = decoder()
    without.load_state_dict({name: w for name, w in model.state_dict().items() if not name.startswith("class_")})
    assert torch.equal(model(tokens, labels=torch.full((CLASSES,), -1)), without.eval()(tokens))
    # The token that the class stands for is not read.
    changed = tokens.clone()
    changed[:, 0, 0] = (changed[:, 0, 0] + 1) % V
    assert torch.equal(model(changed, labels=torch.arange(CLASSES)), logits)


def test_fewer_groups_are_the_beginning():
    model, tokens = rough(decoder(num_classes=CLASSES)), tokens_of(2)
    torch.testing.assert_close(
        model(tokens[:, :2], labels=LABELS), model(tokens, labels=LABELS)[:, :2], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("way", [checkpointed, Streamed(1), Streamed(3), Streamed(2, keep="disk")], ids=str)
def test_every_way_equals_plain_and_the_classes_that_occur_get_gradients(way):
    model = decoder(num_classes=CLASSES, **DROPS)
    plainly = outcome(model, decode, plain)
    check_equal(outcome(model, decode, way), plainly)
    gradient = plainly[1]["class_embedding.weight"].abs().amax(-1)
    assert gradient[LABELS].min() > 0
    assert gradient[1] == 0


def test_a_saved_model_keeps_its_classes_and_others_begin_anew(tmp_path):
    model, tokens = decoder(num_classes=CLASSES).eval(), tokens_of(2)
    model.save_pretrained(tmp_path)
    back = fitformer.FITDecoder.from_pretrained(tmp_path)
    assert torch.equal(back(tokens, labels=LABELS), model(tokens, labels=LABELS))
    more = fitformer.FITDecoder.from_pretrained(tmp_path, num_classes=5)
    assert more.loading_report.new == ("class_embedding.weight",)
    assert torch.equal(more.embedding.weight, model.embedding.weight)
    none = fitformer.FITDecoder.from_pretrained(tmp_path, num_classes=0)
    assert none.loading_report.dropped == ("class_embedding.weight",)


def test_the_reference_has_no_classes():
    with pytest.raises(InputError, match="options that the reference lacks"):
        official.variables(decoder(num_classes=CLASSES))


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (CLASSES, None, "labels are missing.*num_classes=3.*0 to 2, -1 for none"),
        (0, LABELS, "labels are given.*num_classes=0"),
        (CLASSES, torch.tensor([0, 3]), r"class 3 is out of range: classes are 0 to 2, -1 for none"),
        (CLASSES, torch.tensor([-2, 0]), "class -2"),
        (CLASSES, torch.tensor([0.0, 1.0]), r"torch.float32 \(2,\)"),
        (CLASSES, torch.tensor([[0], [1]]), r"\(2, 1\)"),
        (CLASSES, torch.tensor([0]), r"labels \(1,\).*2 examples"),
    ],
)
def test_labels_that_do_not_go_with_the_model_are_refused(classes, labels, message):
    with pytest.raises(InputError, match=message):
        decoder(num_classes=classes)(tokens_of(2), labels=labels)


@pytest.mark.parametrize("classes", [-1, 1.5, 10**18])
def test_a_number_of_classes_that_is_none_is_refused(classes):
    with pytest.raises(InputError, match="classes"):
        fitformer.FITDecoder.from_config(
            layers="(1)1(1)", num_groups=T, tokens_per_group=N, vocab_size=V, num_classes=classes, **SIZES
        )


# ---- decoding ----


def shifted(tokens):
    return torch.nn.functional.pad(tokens, (1, 0))[:, :-1]


@pytest.mark.parametrize("pieces", [[T * N], [1] * 9, [4, 3, 20], [N, 2 * N, 1]])
def test_cached_decoding_is_told_the_class_as_the_whole_sequence_is(pieces, tmp_path):
    model = rough(decoder(num_classes=CLASSES))
    labels, inputs = torch.tensor([2, 0, -1]), shifted(tokens_of(3).flatten(1))
    whole = model(inputs.unflatten(1, (T, N)), labels=labels).flatten(1, 2)
    cached = fitformer.generation.CachedDecoder(model)
    state = cached.start(3, labels)
    done = 0
    for length in pieces:
        logits = cached.feed(state, inputs[:, done : done + length])
        torch.testing.assert_close(logits, whole[:, done : done + length], rtol=1e-5, atol=1e-5)
        done += length
    # Rows in another order, from a file, and one that begins only now.
    if done < T * N:
        state.select([2, 0]).save(tmp_path / "state")
        logits = cached.feed(cached.load(tmp_path / "state"), inputs[[2, 0], done : done + 1])
        torch.testing.assert_close(logits[:, 0], whole[[2, 0], done], rtol=1e-5, atol=1e-5)
        state.cache.put([1], cached.start(1, labels[1:2]).cache)
        places = torch.tensor([done, 0, done])
        logits = cached.feed(state, inputs[torch.arange(3), places][:, None])
        torch.testing.assert_close(logits[:, 0], whole[torch.arange(3), places], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_takes_a_class_for_each_prompt(use_cache):
    model, prompts = rough(decoder(num_classes=CLASSES)), tokens_of(2).flatten(1)[:, :5]
    made = model.generate(prompts, max_new_tokens=20, num_return_sequences=2, labels=LABELS, use_cache=use_cache)
    logits = model(
        torch.nn.functional.pad(shifted(made), (0, T * N - 25)).unflatten(1, (T, N)), labels=LABELS[[0, 0, 1, 1]]
    )
    assert torch.equal(logits.flatten(1, 2).argmax(-1)[:, 5:25], made[:, 5:])
    other = model.generate(prompts, max_new_tokens=20, labels=LABELS.flip(0), use_cache=use_cache)
    assert not torch.equal(other, made[::2])
    # Several lengths, and further than the decoder's length.
    ragged = model.generate([prompts[0], prompts[1, :2]], max_new_tokens=20, labels=LABELS, use_cache=use_cache)
    assert torch.equal(ragged[0], made[0])
    options = {"max_new_tokens": T * N, "window": T, "do_sample": True, "labels": LABELS}
    assert torch.equal(
        model.generate(prompts, use_cache=use_cache, **options),
        model.generate(prompts, use_cache=not use_cache, **options),
    )
    for labels, message in ((None, "labels are missing"), (LABELS[:1], r"\(1,\); .* each of the 2 prompts")):
        with pytest.raises(InputError, match=message):
            model.generate(prompts, max_new_tokens=1, labels=labels, use_cache=use_cache)
    with pytest.raises(InputError, match=r"labels are given.*num_classes=0"):
        decoder().eval().generate(prompts, max_new_tokens=1, labels=LABELS, use_cache=use_cache)


# ---- the task of pixels ----


class Shades:
    """What the task asks of a dataset."""

    channels = 1

    def __init__(self, classes=4):
        self.classes = tuple("abcd"[:classes])

    def describe(self):
        return "shades"


def pixel_recipe(*overrides):
    small = ["--model.preset=tiny", "--model.layers=(1)1(1)", "--data.image_size=4", "--model.patch_size=2x4"]
    return config.load("digits-pixels", ["--objective.class_conditional=true", *small, *overrides])


def shades(classes=4):
    """Images whose pixels are all their class."""
    label = torch.arange(4) % classes
    image = label[:, None, None, None].expand(4, 4, 4, 1).to(torch.uint8) * 4
    return {"image": image, "label": label, "index": torch.arange(4)}


def test_a_class_conditional_recipe_learns_what_only_the_class_tells():
    torch.manual_seed(0)
    recipe, batch = pixel_recipe("--model.drop_units=0"), shades()
    network = build_model(recipe, Shades())
    assert network.num_classes == 4
    adamw = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(150):
        loss, _ = pixels.loss(network, batch, recipe)
        adamw.zero_grad()
        loss.backward()
        adamw.step()
    with torch.no_grad():
        told, _ = pixels.measure(network.eval(), batch, recipe)
        wrong, _ = pixels.measure(network, {**batch, "label": batch["label"].flip(0)}, recipe)
    # Without the class, the first of the 16 pixels alone takes 2 bits.
    assert told["bits_per_dim"] < 0.5 * 2 / 16
    assert wrong["bits_per_dim"] > 2 / 16


def test_a_class_conditional_recipe_needs_classes():
    with pytest.raises(InputError, match="class_conditional needs classes, and the data have none: shades"):
        build_model(pixel_recipe(), Shades(0))
    assert build_model(pixel_recipe("--objective.class_conditional=false"), Shades(0)).num_classes == 0
