"""What the outputs of an image model mean: an answer by name, in the units of what was learned, and what to explain."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fitformer._support.listed import listed
from fitformer._support.suggest import suggest
from fitformer.errors import InputError
from fitformer.models.heads import risk, survival

Decide = Callable[[Tensor, Tensor], Tensor]
"""What a map explains: `(outputs (..., k), outputs (k,) of the whole image) -> (...)`."""


@dataclass(frozen=True)
class Prediction:
    """What a file was taken for: the likeliest class, its probability, and those of all classes by name."""

    file: str
    label: str
    probability: float
    probabilities: dict[str, float]

    @property
    def row(self) -> list[str | float]:
        """Label, probability, and the probability of each class."""
        return [self.label, self.probability, *self.probabilities.values()]

    @property
    def cells(self) -> list[str]:
        """The same as text."""
        return [self.label, *(f"{share:.6f}" for share in self.row[1:])]


@dataclass(frozen=True)
class Values:
    """Numbers that were predicted of a file, by name."""

    file: str
    values: dict[str, float]

    @property
    def row(self) -> list[str | float]:
        """The numbers."""
        return list(self.values.values())

    @property
    def cells(self) -> list[str]:
        """The same as text."""
        return [f"{value:.7g}" for value in self.values.values()]


Answer = Prediction | Values


@dataclass(frozen=True)
class Said:
    """An answer and what of it a map explains, in words.

    Attributes:
        name: of the class, the number or the label that is explained. title: that with its value, in short.
        measurements: all numbers of the answer, by name.
        sides: what a value above, and one below, 0 does, such as `for cat` and `against cat`.
    """

    name: str
    title: str
    measurements: dict[str, float]
    sides: tuple[str, str]


class Answers(ABC):
    """The meaning of a model's outputs.

    Attributes:
        names: of the quantities that a map can explain.
        columns: of a table of answers, beside the file.
        kind: of the answers.
        sides: words for what raises and what lowers an explained quantity.
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]
    kind: type[Answer] = Values
    sides: tuple[str, str] = ("raises", "lowers")

    @abstractmethod
    def answer(self, file: str, outputs: Tensor) -> Answer:
        """What outputs `(k,)` say of a file."""

    @abstractmethod
    def quantity(self, outputs: Tensor, which: int) -> Tensor:
        """The quantity `(...)` of `names[which]`, of outputs `(..., k)`."""

    def default(self, outputs: Tensor) -> int:
        """The quantity that is explained where none is named, of an image with outputs `(k,)`."""
        return 0

    @property
    def num_outputs(self) -> int:
        """Of the model."""
        return len(self.names)

    @property
    def batch_columns(self) -> tuple[str, ...]:
        """Names of an answer's row beside other columns."""
        return self.columns

    def check_outputs(self, outputs: int) -> None:
        """Check that a model has as many outputs.

        Raises:
            InputError: it has not.
        """
        if outputs != self.num_outputs:
            raise InputError(f"{self.num_outputs} names given to a model of {outputs} outputs")

    def check(self, name: str | None) -> None:
        """Check the name of a quantity, None for the default.

        Raises:
            InputError: there is none of that name, or none is named and there are several.
        """
        if name is not None and name not in self.names:
            raise InputError(f"there is no {name!r} to explain{suggest(name, self.names)} ({listed(self.names)})")

    def which(self, outputs: Tensor, name: str | None) -> int:
        """The number of the quantity to explain of an image with outputs `(k,)`."""
        return self.default(outputs) if name is None else self.names.index(name)

    def decide(self, name: str | None) -> Decide:
        """What a map explains."""
        return lambda outputs, whole: self.quantity(outputs, self.which(whole, name))

    def said(self, outputs: Tensor, name: str | None = None) -> Said:
        """What outputs `(k,)` say, and what a map explains of it."""
        answer, explained = self.answer("", outputs), self.names[self.which(outputs, name)]
        assert isinstance(answer, Values)
        title = f"{explained} {answer.values[explained]:.4g}"
        return Said(explained, title, answer.values, self._sides(explained))

    def _sides(self, name: str) -> tuple[str, str]:
        return f"{self.sides[0]} {name}", f"{self.sides[1]} {name}"


class ClassAnswers(Answers):
    """One class of several: logits `(k,)`; explained are the log-odds of a class, by default the likeliest."""

    kind = Prediction
    sides = ("for", "against")

    def __init__(self, classes: Sequence[str]) -> None:
        self.names = tuple(classes)
        self.columns = ("label", "probability", *classes)

    @property
    def batch_columns(self) -> tuple[str, ...]:
        """Classes with a `p_` in front."""
        return ("label", "probability", *(f"p_{name}" for name in self.names))

    def answer(self, file: str, outputs: Tensor) -> Prediction:
        """The likeliest class and all probabilities."""
        shares = outputs.float().softmax(-1).tolist()
        best = int(outputs.argmax())
        return Prediction(file, self.names[best], shares[best], dict(zip(self.names, shares, strict=True)))

    def quantity(self, outputs: Tensor, which: int) -> Tensor:
        """The log-odds of a class."""
        return log_odds(outputs, which)

    def default(self, outputs: Tensor) -> int:
        """The likeliest class."""
        return int(outputs.argmax())

    def said(self, outputs: Tensor, name: str | None = None) -> Said:
        """A class and its probability, and those of all."""
        shares, explained = self.answer("", outputs).probabilities, self.names[self.which(outputs, name)]
        measurements = {f"probability of {each}": round(share, 6) for each, share in shares.items()}
        return Said(explained, f"{explained} {shares[explained]:.1%}", measurements, self._sides(explained))


class LabelAnswers(Answers):
    """Any number of labels: a logit `(k,)` each, which is explained as it is; by default of the likeliest label."""

    sides = ("for", "against")

    def __init__(self, labels: Sequence[str]) -> None:
        self.names = self.columns = tuple(labels)

    def answer(self, file: str, outputs: Tensor) -> Values:
        """The probability of each label."""
        return Values(file, dict(zip(self.names, outputs.float().sigmoid().tolist(), strict=True)))

    def quantity(self, outputs: Tensor, which: int) -> Tensor:
        """The log-odds of a label."""
        return outputs[..., which]

    def default(self, outputs: Tensor) -> int:
        """The likeliest label."""
        return int(outputs.argmax())


class NumberAnswers(Answers):
    """Numbers in units of their own, as the model gives them `(k,)`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = self.columns = tuple(names)

    def answer(self, file: str, outputs: Tensor) -> Values:
        """The numbers."""
        return Values(file, dict(zip(self.names, outputs.tolist(), strict=True)))

    def quantity(self, outputs: Tensor, which: int) -> Tensor:
        """A number."""
        return outputs[..., which]

    def check(self, name: str | None) -> None:
        """As of all answers; of several numbers one must be named."""
        if name is None and len(self.names) > 1:
            raise InputError(
                f"a map explains one number, and the model gives {listed(self.names)}: name one of them by --target"
            )
        super().check(name)


class RiskAnswers(Answers):
    """The risk of an event: the logarithm of Cox's relative hazard `(1,)`, or logits of hazards `(k,)` with their cuts.

    With cuts, the risk is that of `models.heads.risk`, and the probability of surviving each of them is told.
    """

    names = ("risk",)

    def __init__(self, cuts: Tensor | None = None) -> None:
        self.cuts = None if cuts is None else cuts.detach().cpu()
        self.columns = ("risk", *([] if cuts is None else (f"survival at {cut:g}" for cut in cuts.tolist())))

    @property
    def num_outputs(self) -> int:
        """Of the model."""
        return 1 if self.cuts is None else len(self.cuts) + 1

    def answer(self, file: str, outputs: Tensor) -> Values:
        """The risk, and the probability of surviving each cut."""
        alive = [] if self.cuts is None else survival(outputs.double()).tolist()
        return Values(file, dict(zip(self.columns, [float(self.quantity(outputs, 0)), *alive], strict=True)))

    def quantity(self, outputs: Tensor, which: int) -> Tensor:
        """The risk."""
        return outputs[..., 0] if self.cuts is None else risk(outputs, self.cuts.to(outputs))


def log_odds(logits: Tensor, label: int) -> Tensor:
    """Log of the probability of a label over that of all others together, of logits `(..., classes)`.

    What is added to all logits alike does not change it. Of a single class there are no odds: it is 0.
    """
    own = logits[..., label]
    others = torch.cat([logits[..., :label], logits[..., label + 1 :]], dim=-1)
    return own - (others.logsumexp(-1) if others.shape[-1] else own)


def of_likeliest(logits: Tensor, whole: Tensor) -> Tensor:
    """Log-odds `(...)` of the class that is likeliest by the logits `(classes,)` of the whole image."""
    return log_odds(logits, int(whole.argmax()))
