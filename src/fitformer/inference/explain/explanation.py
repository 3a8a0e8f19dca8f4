"""The three ways to explain a decision, each a label and one or two maps.

- `leave-out`: what each group adds to the log-odds of the label, measured by leaving it out; exact, a value a group.
- `gradient`: the relevance of every patch to first order, and the attention; some forward passes.
- `attention`: where the latents looked; one forward pass.

The latter two come with their agreement with the first on the groups where they are largest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from fitformer.errors import InputError
from fitformer.inference.explain.agreement import TOP_GROUPS, Agreement, group_values, measure_agreement
from fitformer.inference.explain.attribution import PASSES, attend, attribute
from fitformer.inference.explain.leave_out import Tell, after_first_phase, leave_out
from fitformer.models.image_encoder import FITImageEncoder
from fitformer.patching.any_size import GroupedImage, PixelSource
from fitformer.tasks.answers import Decide, of_likeliest

Method = Literal["leave-out", "gradient", "attention"]

MAPS: Mapping[Method, tuple[str, ...]] = {
    "leave-out": ("leave-out",),
    "gradient": ("attention", "relevance"),
    "attention": ("attention",),
}
"""The maps of each method; the last one is what it is about."""

SIGNED = ("leave-out", "relevance")
"""Maps whose values support a label above 0 and oppose it below; the sum over a group is the group's."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """A decision and its maps.

    Attributes:
        logits: `(classes,)`.
        maps: `(t, n)` by the names of `MAPS`.
        image: the groups.
        agreement: of the last map with leaving out; None for that itself.
    """

    logits: Tensor
    maps: Mapping[str, Tensor]
    image: GroupedImage
    agreement: Agreement | None = None


def explain(
    classifier: FITImageEncoder,
    image: Tensor | PixelSource | GroupedImage,
    method: Method = "gradient",
    tell: Tell | None = None,
    decide: Decide = of_likeliest,
) -> Explanation:
    """Classify an image and explain the decision.

    Args:
        classifier: in eval mode; `set_execution` says how it runs.
        image: one image, float `(H, W, channels)` or read lazily.
        method: see above.
        tell: called now and then with the share of the work that is done, from 0 to 1.
        decide: the quantity that is explained; by default the log-odds of the likeliest class.

    Raises:
        InputError: an unknown method, an image that the classifier was not built for, a classifier without a head, or
            for maps of attention one without a block that reads.
    """
    if method not in get_args(Method):
        raise InputError(f"method is {method!r}; known are {', '.join(get_args(Method))}")
    if method == "leave-out":
        found = leave_out(classifier, image, tell, decide)
        return Explanation(found.logits, {"leave-out": found.values}, found.image)
    passes = PASSES if method == "gradient" else 1
    work = passes + 1 + TOP_GROUPS
    grouped = classifier.grouped(image)
    maps: dict[str, Tensor] = {}
    before = _part(tell, 0, passes / work)
    if method == "gradient":
        seen = attribute(classifier, grouped, before, decide)
        logits, maps = seen.logits, {"attention": seen.attention, "relevance": seen.relevance}
    else:
        logits, maps["attention"] = attend(classifier, grouped, before)
    name = MAPS[method][-1]
    claimed = group_values(maps[name], grouped, signed=name in SIGNED)
    with after_first_phase(classifier, grouped, decide) as later:
        after = _part(tell, (passes + 1) / work, 1)
        agreement = measure_agreement(later, logits, claimed, signed=name in SIGNED, tell=after)
    return Explanation(logits, maps, grouped, agreement)


def _part(tell: Tell | None, start: float, end: float) -> Tell | None:
    """Tells shares of a part of the work as shares of all of it."""
    return None if tell is None else lambda share: tell(start + share * (end - start))
