import math
import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fitformer import FITDecoder, FITImageEncoder
from fitformer.config.schema import ByteRecipe
from fitformer.errors import InputError
from fitformer.evaluation.batches import batches, mean_metrics
from fitformer.evaluation.classification import classification, confusion
from fitformer.evaluation.sample_accuracy import sample_accuracy
from fitformer.inference.predict import classify, match_classifier_input
from fitformer.tasks._independent_pixels import IndependentPixels, independent_bits

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def scored(examples=23, batch=5):
    torch.manual_seed(0)
    logits, labels = torch.randn(examples, len(CLASSES)), torch.randint(0, len(CLASSES) - 1, (examples,))
    return logits, labels, list(zip(logits.split(batch), labels.split(batch), strict=True))


def test_classification_is_exact_over_uneven_batches():
    logits, labels, uneven = scored()
    found = dict(classification(uneven, CLASSES))
    assert found["examples"] == 23
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)))
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert found["top5_accuracy"] == pytest.approx(float((ranks < 5).float().mean()))
    assert {k: v for k, v in found.items() if k != "loss"} == {
        k: v for k, v in classification([(logits, labels)], CLASSES) if k != "loss"
    }


def test_accuracy_by_class_leaves_out_classes_that_do_not_occur():
    logits, labels, uneven = scored()
    found = dict(classification(uneven, CLASSES))["accuracy_by_class"]
    assert "gnu" not in found
    for k, name in enumerate(CLASSES[:-1]):
        of = labels == k
        assert found[name] == pytest.approx(float((logits.argmax(1) == k)[of].float().mean()))


def test_confusion_counts_true_classes_in_rows():
    counts = confusion(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(InputError, match="no label"):
        list(classification([(torch.randn(2, 7), torch.tensor([0, -1]))], CLASSES))
    with pytest.raises(InputError, match="no examples"):
        list(classification([], CLASSES))
    with pytest.raises(InputError, match="baseline needs"):
        independent_bits([], [torch.zeros(1, 2, dtype=torch.long)], 3)


def test_independent_pixels_are_laplace_counts_by_place():
    torch.manual_seed(0)
    train, test = torch.randint(0, 5, (40, 2, 3)), torch.randint(0, 5, (11, 2, 3))
    bits = 0.0
    for example in test.flatten(1):
        for place, value in enumerate(example.tolist()):
            count = Counter(train.flatten(1)[:, place].tolist())
            bits -= math.log2((count[value] + 1) / (40 + 5))
    found = independent_bits(iter(train.split(7)), iter(test.split(4)), levels=5)
    assert found == pytest.approx(bits / test.numel())


def test_independent_pixels_of_a_constant_image_cost_nearly_nothing():
    model = IndependentPixels(4, 256, smoothing=1e-6)
    model.fit(torch.full((100, 4), 7))
    assert model.bits(torch.full((10, 4), 7)) < 1e-3
    assert model.bits(torch.full((10, 4), 8)) > 100
    with pytest.raises(InputError, match="smoothing is 0"):
        IndependentPixels(4, 256, smoothing=0)


class _Bytes(torch.utils.data.Dataset):
    """Windows of which the last is padded, as held-out bytes are."""

    def __len__(self):
        return 5

    def __getitem__(self, key):
        _, k = key
        torch.manual_seed(k)
        mask = torch.arange(8) < (8 if k < 4 else 3)
        return {"tokens": torch.randint(0, 256, (8,)), "mask": mask}


def test_bits_are_a_mean_over_the_tokens_that_count_whatever_the_batches():
    recipe = ByteRecipe()
    recipe = type(recipe)(model=type(recipe.model)(tokens_per_group=4))
    torch.manual_seed(0)
    size = {"dim": 8, "latent_dim": 8, "heads": 1, "latent_heads": 1, "latents_per_group": 2}
    network = FITDecoder.from_config(layers="(1)1(1)", num_groups=2, tokens_per_group=4, vocab_size=256, **size).eval()
    found = [dict(mean_metrics(network, batches(_Bytes(), size), recipe)) for size in (1, 2, 3, 5)]
    assert all(each["tokens"] == 4 * 8 + 3 for each in found)
    bits, parts = 0.0, [_Bytes()[0, k] for k in range(5)]
    for part in parts:
        shifted = F.pad(part["tokens"][:-1], (1, 0))
        logits = network(shifted.view(1, 2, 4)).detach().view(8, 256)
        rows = logits.log_softmax(-1)[torch.arange(8), part["tokens"]]
        bits -= float(rows[part["mask"]].sum()) / math.log(2)
    for each in found:
        assert each["bits_per_byte"] == pytest.approx(bits / 35, rel=1e-5)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    size = {"dim": 8, "latent_dim": 8, "heads": 1, "latent_heads": 1, "latents_per_group": 2}
    return FITImageEncoder.from_config(
        layers="(1)1", image_size=8, group_size=4, patch_size=2, channels=1, num_classes=3, **size
    ).eval()


def test_samples_of_another_size_and_channel_count_are_shown_as_the_classifier_sees_them(classifier):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8))
    large = images.repeat_interleave(2, 1).repeat_interleave(2, 2).expand(-1, -1, -1, 3)
    seen = match_classifier_input(large, classifier)
    assert seen.shape == images.shape
    assert (seen.float() - images.float()).abs().mean() < 40
    assert match_classifier_input(images, classifier) is images


def test_recognition_counts_what_the_classifier_says(classifier):
    images = torch.randint(0, 256, (7, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    probabilities = classify(classifier, images, batch_size=3)
    assert torch.allclose(probabilities.sum(1), torch.ones(7))
    said = probabilities.argmax(1).tolist()
    wrong = [*said[:-1], (said[-1] + 1) % 3]
    assert dict(sample_accuracy(classifier, images, said, "abc"))["recognised"] == 1
    assert dict(sample_accuracy(classifier, images, wrong, "abc"))["recognised"] == pytest.approx(6 / 7)
    with pytest.raises(InputError, match="3 classes and the samples have 2"):
        list(sample_accuracy(classifier, images, said, "ab"))


class _Dying(torch.utils.data.Dataset):
    """A dataset whose reader is killed, as by a system that is out of memory."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_reader_that_dies_is_one_clear_error():
    with pytest.raises(ChildProcessError, match=r"reads ahead \(data.num_workers, pid.*num_workers 0"):
        list(batches(_Dying(), 2, workers=1))
