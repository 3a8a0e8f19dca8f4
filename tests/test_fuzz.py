"""Odd arguments of every public function: one clear error or an answer; no other exception, hang or allocation."""

import inspect
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fitformer
from fitformer import diffusion, execution, generation, official, patching, viz
from fitformer.diffusion import DiffusionConfig
from fitformer.errors import InputError, MissingDependencyError
from fitformer.evaluation import likelihood
from fitformer.models.config import TrunkConfig, preset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

MOST_BYTES = 10**9


class Unlike:
    """An object of no kind that anything takes."""

    def __repr__(self):
        return "Unlike()"


ODD = [None, "x", "4", b"4", math.nan, math.inf, -1, 0, 1.5, 10**18, 2**64, 1e300, [], {}, (), [4], Unlike(), True]
ODD += [np.float64("nan"), np.array([1, 2]), torch.zeros(0), torch.tensor(3), 1j, {"a": 1}, "\ud800", -(10**30)]

TRUNK, CLOSED = preset("tiny"), preset("tiny").closed()
IMAGES, GROUPS = torch.zeros(2, 8, 8, 3), torch.zeros(2, 4, 4, 12)
TOKENS, X, EPS, LEVEL = (
    torch.zeros(2, 3, 4, dtype=torch.int64),
    torch.zeros(2, 5),
    torch.ones(2, 5),
    torch.full((2,), 0.5),
)


def denoise(x, gamma, cond, latents):
    return x, torch.zeros(*x.shape[:1], 1, 1, 1)


def made(role, **arguments):
    return role.from_preset("tiny", **arguments).eval()


ENCODER = made(fitformer.FITImageEncoder, image_size=8, group_size=4, patch_size=2)
DECODER = made(fitformer.FITDecoder, num_groups=3, tokens_per_group=4, vocab_size=11)
REFERENCE = made(fitformer.FITEncoder, num_groups=3, tokens_per_group=4, in_channels=5)

# Every public class and function, with arguments that it takes.
CALLS = {
    fitformer.FITEncoder: {
        "trunk": TRUNK,
        "num_groups": 3,
        "tokens_per_group": 4,
        "in_channels": 5,
        "y_channels": 2,
        "mask": None,
    },
    fitformer.FITImageEncoder: {
        "trunk": TRUNK,
        "image_size": 8,
        "group_size": 4,
        "patch_size": 2,
        "channels": 3,
        "num_classes": 2,
        "glimpses": 0,
        "mask": None,
        "outputs": "logits",
    },
    fitformer.FITImageSegmenter: {
        "trunk": CLOSED,
        "image_size": 8,
        "group_size": 4,
        "patch_size": 2,
        "num_classes": 3,
        "channels": 3,
        "refinement": 4,
        "glimpses": 0,
        "mask": None,
    },
    fitformer.FITDenoiser: {
        "trunk": CLOSED,
        "num_groups": 3,
        "tokens_per_group": 4,
        "out_dim": 5,
        "cond_dim": 3,
        "cond_proj": True,
        "extra_time": 0,
        "self_cond": "none",
        "mask": None,
    },
    fitformer.FITImageDenoiser: {
        "trunk": CLOSED,
        "diffusion": DiffusionConfig(),
        "image_size": 8,
        "group_size": 4,
        "patch_size": 2,
        "channels": 3,
        "num_classes": 2,
        "self_cond": "none",
        "cond_proj": True,
    },
    fitformer.FITDecoder: {
        "trunk": CLOSED,
        "num_groups": 3,
        "tokens_per_group": 4,
        "vocab_size": 11,
        "shared_embedding": True,
        "output_bias": True,
        "num_classes": 0,
    },
    fitformer.from_pretrained: {"source": "nowhere/at/all"},
    TrunkConfig: {},
    preset: {"name": "tiny", "ends_local": False},
    patching.PatchGrid: {"image_size": 8, "group_size": 4, "patch_size": 2, "channels": 3},
    patching.image_to_groups: {"images": IMAGES, "group_size": 4, "patch_size": 2, "order": "raster"},
    patching.groups_to_image: {"x": GROUPS, "image_size": 8, "group_size": 4, "patch_size": 2, "order": "raster"},
    patching.extract_patches: {"images": IMAGES, "patch": 2, "order": "raster"},
    patching.merge_patches: {"patches": torch.zeros(2, 16, 12), "image_size": 8, "patch": 2, "order": "raster"},
    patching.groups_to_map: {"x": GROUPS, "image_size": 8, "group_size": 4, "patch_size": 2, "order": "raster"},
    patching.map_to_groups: {
        "maps": torch.zeros(2, 5, 4, 4),
        "image_size": 8,
        "group_size": 4,
        "patch_size": 2,
        "order": "raster",
    },
    patching.glimpses: {
        "images": IMAGES,
        "group_size": 4,
        "patch_size": 2,
        "copies": 1,
        "shuffle": False,
        "generator": None,
    },
    patching.glimpses_to_image: {
        "x": torch.zeros(2, 5, 4, 12),
        "y": torch.eye(5)[:, None].expand(2, 5, 1, 5),
        "image_size": 8,
        "group_size": 4,
        "patch_size": 2,
        "copies": 1,
    },
    patching.video_to_groups: {"video": torch.zeros(1, 4, 8, 8, 3), "group_size": 4, "patch_size": 2},
    patching.groups_to_video: {
        "x": torch.zeros(1, 4, 8, 24),
        "video_size": (4, 8, 8),
        "group_size": 4,
        "patch_size": 2,
    },
    patching.sequence_to_groups: {"tokens": TOKENS[0], "n": 2},
    patching.pad_to_groups: {"tokens": TOKENS[0], "n": 2},
    patching.groups_to_sequence: {"x": TOKENS, "length": 10},
    patching.shift_right: {"tokens": TOKENS, "documents": TOKENS[..., 0]},
    patching.pack_documents: {"documents": [TOKENS[0, 0], TOKENS[0, 1]], "n": 4, "groups": 3},
    patching.unpack_documents: {"x": TOKENS, "documents": TOKENS[..., 0], "mask": TOKENS == 0},
    patching.pack_rows: {"sizes": [1, 2], "groups": 3},
    patching.places_in_documents: {"documents": TOKENS[..., 0]},
    patching.image_to_pixels: {"images": IMAGES.byte(), "patch": 2, "order": "snake"},
    patching.pixels_to_image: {
        "tokens": torch.zeros(2, 16, 12, dtype=torch.int64),
        "image_size": 8,
        "patch": 2,
        "channels": 3,
        "order": "snake",
    },
    patching.bytes_to_tokens: {"data": b"abc"},
    patching.tokens_to_bytes: {"tokens": TOKENS},
    execution.Streamed: {},
    execution.Inputs: {"tokens": torch.zeros(1, 2, 3, 4), "latents": torch.zeros(1, 2, 3, 4)},
    generation.GenerationConfig: {
        "max_new_tokens": 4,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "eos_token_id": None,
        "stop_strings": None,
        "pad_token_id": None,
        "num_return_sequences": 2,
        "seed": 0,
        "first": 0,
        "use_cache": True,
        "window": None,
    },
    generation.generate: {
        "decoder": DECODER,
        "prompt": None,
        "config": None,
        "logits_processor": (),
        "stopping_criteria": (),
        "streamer": None,
        "generator": None,
        "step": None,
        "max_new_tokens": 4,
        "num_return_sequences": 2,
        "eos_token_id": None,
        "stop_strings": None,
        "window": None,
        "labels": None,
    },
    generation.stream: {"decoder": DECODER, "prompt": None, "config": None, "max_new_tokens": 4},
    generation.Cached: {"decoder": DECODER, "window": None, "labels": None},
    generation.Uncached: {"decoder": DECODER, "window": None, "labels": None},
    generation.TextStreamer: {"file": None, "skip_prompt": False},
    generation.context_start: {"position": 5, "n": 2, "groups": 3},
    generation.filter_logits: {
        "logits": torch.zeros(2, 5),
        "temperature": 1.0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
    },
    generation.likeliest: {"logits": torch.zeros(2, 5)},
    generation.penalize_repetition: {
        "logits": torch.zeros(2, 5),
        "seen": torch.zeros(2, 5, dtype=torch.bool),
        "penalty": 1.5,
    },
    likelihood.token_log_likelihoods: {
        "decoder": DECODER,
        "tokens": TOKENS.flatten(),
        "context": 2,
        "stride": 3,
        "batch_size": 2,
    },
    likelihood.log_likelihood: {"decoder": DECODER, "tokens": TOKENS.flatten(), "context": 2, "batch_size": 2},
    generation.draw: {"logits": torch.zeros(2, 5), "uniforms": torch.zeros(2)},
    DiffusionConfig: {},
    diffusion.VariancePreserving: {},
    diffusion.add_noise: {"x0": X, "gamma": LEVEL, "noise": EPS, "process": diffusion.VariancePreserving()},
    diffusion.target: {"kind": "eps", "x0": X, "eps": EPS, "gamma": LEVEL, "process": diffusion.VariancePreserving()},
    diffusion.predict: {
        "kind": "eps",
        "xt": X,
        "output": EPS,
        "gamma": LEVEL,
        "clip": (-1.0, 1.0),
        "truncate": False,
        "process": diffusion.VariancePreserving(),
    },
    diffusion.loss: {
        "kind": "eps",
        "output": X,
        "xt": X,
        "x0": X,
        "eps": EPS,
        "gamma": LEVEL,
        "on": None,
        "b_scale": 1.0,
        "clip": None,
        "process": diffusion.VariancePreserving(),
    },
    diffusion.normalize: {"x": X},
    diffusion.drop_condition: {"cond": X, "probability": 0.5, "generator": None},
    diffusion.self_condition_half: {
        "denoise": denoise,
        "x": X,
        "gamma": LEVEL,
        "cond": None,
        "rate": 0.5,
        "generator": None,
    },
    diffusion.self_condition_masked: {
        "denoise": denoise,
        "x": X,
        "gamma": LEVEL,
        "cond": None,
        "rate": 0.5,
        "generator": None,
    },
    diffusion.pixels_to_signal: {"images": IMAGES.byte(), "b_scale": 1.0},
    diffusion.signal_to_pixels: {"signal": IMAGES, "b_scale": 1.0},
    diffusion.gamma: {"schedule": "cosine", "t": 0.5},
    diffusion.transition: {
        "sampler": "ddim",
        "xt": X,
        "x0": X,
        "eps": EPS,
        "gamma": LEVEL,
        "gamma_next": LEVEL,
        "noise": None,
        "process": diffusion.VariancePreserving(),
    },
    diffusion.times: {"steps": 3, "td": 0.0},
    diffusion.guided: {"denoise": denoise, "x": X, "gamma": LEVEL, "cond": None, "latents_prev": None, "guidance": 0.0},
    diffusion.sample: {
        "denoise": denoise,
        "init": X,
        "steps": 2,
        "schedule": "cosine",
        "sampler": "ddim",
        "prediction": "eps",
        "guidance": 0.0,
        "td": 0.0,
        "clip": (-1.0, 1.0),
        "cond": None,
        "self_cond": False,
        "momentum": 0.0,
        "noise": None,
        "normalize_input": False,
        "on_step": None,
        "process": diffusion.VariancePreserving(),
    },
    diffusion.seeded_noise: {"seed": 0, "samples": range(2), "shape": (3,), "draw": 0},
    official.build: {"kind": "FIT", "kwargs": {}, "variables": {}},
    official.variables: {"model": REFERENCE},
    official.gradients: {"model": REFERENCE},
    viz.latent_attention: {"encoder": ENCODER, "images": IMAGES},
    viz.heat: {"values": torch.zeros(2, 3)},
    viz.overlay: {"images": IMAGES.byte(), "maps": torch.zeros(2, 8, 8), "strength": 0.5},
    viz.as_colour: {"images": IMAGES.byte()},
    viz.metric_curves: {"lines": [{"step": 1, "loss": 2.0}]},
}
# Protocols, types, tables, ways to run without options, and what only the library makes.
NO_CALLS = {"Decoder", "Step", "Clip", "Denoise", "Level", "Noise", "Prediction", "Process", "Sampler", "PREDICTIONS"}
# Types of functions, and what stands on a decoder: in test_cached.py.
# `fitformer.generate` of a folder has the name of a function that is called here.
NO_CALLS |= {"LogitsProcessor", "StoppingCriterion", "Streamer", "CachedDecoder", "DecodingState"}
NO_CALLS |= {"SAMPLERS", "SCHEDULES", "Execution", "Outputs", "PackedDocuments", "checkpointed", "plain"}
# Takes a run: in test_sharing_work.py.
NO_CALLS |= {"Predictor"}
# What an error may say in place of an argument's name.
OTHER_WORDS = {
    "source": "no folder",
    "name": "no preset",
    "x": "groups of shape|tokens",
    "y": "one-hot index",
    "kwargs": "arguments of FIT",
    "variables": "arguments of FIT",
    "kind": "no prediction|unknown kind",
    "schedule": "noise schedule",
    "copies": "groups of shape",
    "sizes": "document 0 fills",
}


@pytest.fixture
def little_memory():
    """No allocation above `MOST_BYTES`: it fails with an error of torch's or of numpy's."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(re.search(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def faults_of(function, arguments, most_seconds=2.0):
    """What is wrong with how a function takes each argument in turn of each odd kind; one line each."""
    named = getattr(function, "__name__", repr(function))
    for name, parameter in inspect.signature(function).parameters.items():
        for value in ODD if parameter.kind is not parameter.VAR_POSITIONAL and name != "options" else ():
            call, start = f"{named}({name}={value!r})", time.perf_counter()
            try:
                function(**{**arguments, name: value})
            except (InputError, MissingDependencyError, FileNotFoundError) as error:
                if "\n" in str(error) or not re.search(OTHER_WORDS.get(name, name) + f"|{name}", str(error)):
                    yield f"{call} does not name {name} in one line: {error}"
            except Exception as error:
                yield f"{call}: {type(error).__name__}: {str(error).splitlines()[:1]}"
            if time.perf_counter() - start > most_seconds:
                yield f"{call} took {time.perf_counter() - start:.1f} s"


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_an_odd_argument_is_one_clear_error_or_means_something(function, little_memory, monkeypatch):
    # A name on the Hub is looked for, again and again, where there is no network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    faults = list(faults_of(function, CALLS[function]))
    assert not faults, "\n".join(faults)


def test_no_public_name_is_left_out():
    rooms = (fitformer, diffusion, execution, generation, patching)
    names = {name for room in rooms for name in room.__all__}
    assert names - {function.__name__ for function in CALLS} == NO_CALLS
