"""The interface of operators, their text form and their composition; ``operators`` has the theory."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor


class Operator(ABC):
    """A deterministic degradation of images; image i of the result depends on image i of the input only.

    Attributes:
        gain: the c of A A^T = c I on the observed values, for a linear operator that has one; None otherwise.
        mask: which values of y are observed, bool and broadcastable to y; None if all are.
        value_range: the range of the images that the operator is for, such as (0, 1); None if it is for any.
        form: how it is written as text, such as "pool:SIZE"; the part before the colon is its name. Empty for an
            operator without a text form.
        help: what was done to the pictures, for the lists of operators.
        examples: texts of this form. The first one appears in messages, and the demo offers those that fit its images.
    """

    gain: float | None = None
    mask: Tensor | None = None
    value_range: tuple[float, float] | None = None
    form: ClassVar[str] = ""
    help: ClassVar[str] = ""
    examples: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def measure(self, x: Tensor) -> Tensor:
        """The measurement y = A x of images (N, C, H, W). The range of the values is not checked.

        Raises:
            ValueError: if the shape of x does not fit the operator.
        """

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The image A^+ y. For an operator with a gain it is A^T y / c, the smallest image whose measurement is y.

        For an operator without a gain it turns the difference of two measurements into a change of the image. The
        default, y itself, is right for most measurements of the image's shape, such as a blur; the inverse of an
        ill-conditioned matrix would amplify noise. If y has another shape, the operator has to define this method, for
        example as an enlargement of y.

        Raises:
            ValueError: if the shape of y does not fit the operator.
        """
        return y

    def as_image(self, y: Tensor) -> Tensor:
        """The measurement as an image to look at: ``pseudo_inverse(y)``; for ``Grayscale`` a gray RGB image."""
        return self.pseudo_inverse(y)

    def carry_mask(self, mask: Tensor) -> Tensor | None:
        """Converts a mask of x to the mask of y: M' with A M x = M' A x, where M is multiplication by ``mask``.

        If A has a gain and such a mask exists, ``A @ Mask(mask)`` has a gain.

        Args:
            mask: bool, broadcastable to x, True where x is observed.

        Returns:
            The mask of y, bool and broadcastable to y; None if a value of y depends on both observed and unobserved
            values of x.
        """
        return None

    def __matmul__(self, inner: Operator) -> Operator:
        """``(A @ B).measure(x)`` is ``A.measure(B.measure(x))``.

        Raises:
            ValueError: if masks of A and B do not fit each other.
        """
        return _Composition(self, inner) if isinstance(inner, Operator) else NotImplemented

    def to(self, device: torch.device | str) -> Operator:
        """The operator with its tensors on a device."""
        return self

    def with_axes(self, axes: int) -> Operator:
        """The operator for batches with this number of axes: 4 for images, 3 for signals (N, C, L), 2 for (N, D).

        A mask with as many axes as the batch has one mask for each sample. ``Observation`` calls this method.
        """
        return self

    def rows(self, rows: slice) -> Operator:
        """The operator for a slice of the batch: with one mask per image, the masks of those images."""
        return self

    def drawn(self, x: Tensor, seeds: Sequence[int]) -> Operator:
        """The operator for images x, where what is random is drawn, such as the mask of ``Hole``.

        Args:
            x: images (N, C, H, W).
            seeds: one for each image.
        """
        return self

    def __len__(self) -> int:
        """The batch size that the operator requires, or 1 if it can be applied to any batch."""
        return 1

    # -- Text ---------------------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, arguments: str) -> Operator:
        """The operator from the part of its text after the colon, arguments of the constructor such as "4" or "left=2".

        Raises:
            TypeError, ValueError: if they are not arguments of the constructor.
        """
        parts = [part.partition("=") for part in arguments.split(",")] if arguments else []
        values = [_number(name) for name, equals, _ in parts if not equals]
        named = {name: _number(value) for name, equals, value in parts if equals}
        signature = inspect.signature(cls)
        if len(values) + len(named) < len(parts) or bool(parts) != bool(signature.parameters):
            raise TypeError("an argument is missing or named twice" if signature.parameters else "it has no arguments")
        if unknown := named.keys() - signature.parameters:
            raise TypeError(f"its arguments are {', '.join(signature.parameters)}, got {min(unknown)!r}")
        signature.bind(*values, **named)
        return cls(*values, **named)

    def text(self) -> str | None:
        """The text from which ``as_operator`` makes the operator; None if it has none, such as a mask."""
        arguments, name = self._arguments(), self.form.partition(":")[0]
        if arguments is None or not name:
            return None
        return f"{name}:{','.join(arguments)}" if arguments else name

    def __str__(self) -> str:
        """The text form, or the ``repr`` of an operator without one."""
        return self.text() or repr(self)

    def __repr__(self) -> str:
        arguments = self._arguments()
        return super().__repr__() if arguments is None else f"{type(self).__name__}({', '.join(arguments)})"

    def _arguments(self) -> list[str] | None:
        """The constructor's arguments, from the attributes of the same names; None if one of them is not a number."""
        found = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name, None)
            if not isinstance(value, int | float):
                return None
            if parameter.kind is not parameter.KEYWORD_ONLY:
                found.append(f"{value}")
            elif value != parameter.default:
                found.append(f"{name}={value}")
        return found


def _number(text: str) -> Any:
    """The number that a text is, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


class _Composition(Operator):
    """``outer @ inner``: the inner operator, followed by the outer one."""

    _axes = 4  # of a batch

    def __init__(self, outer: Operator, inner: Operator) -> None:
        self.outer, self.inner = outer, inner
        self.value_range = outer.value_range or inner.value_range
        if outer.gain is None or inner.gain is None:
            return
        mask = outer.mask
        if inner.mask is not None:
            # The composition has a gain only if the outer operator does not mix observed and unobserved values.
            carried = outer.carry_mask(inner.mask)
            if carried is None:
                return
            try:
                mask = carried if mask is None else carried & mask.to(carried.device)
            except RuntimeError as error:
                raise ValueError(f"the masks of an operator must fit each other, got {self!r}.") from error
        self.gain, self.mask = outer.gain * inner.gain, mask

    def text(self) -> str | None:
        """The text forms of both, joined by @."""
        outer, inner = self.outer.text(), self.inner.text()
        return None if outer is None or inner is None else f"{outer} @ {inner}"

    def __repr__(self) -> str:
        return f"{self.outer!r} @ {self.inner!r}"

    def __len__(self) -> int:
        return max(len(self.outer), len(self.inner))

    def measure(self, x: Tensor) -> Tensor:
        """The outer measurement of the inner one."""
        return self.outer.measure(self.inner.measure(x))

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """That of the outer operator, then that of the inner one."""
        return self.inner.pseudo_inverse(self.outer.pseudo_inverse(y))

    def as_image(self, y: Tensor) -> Tensor:
        """The image of the outer operator, then of the inner one."""
        return self.inner.as_image(self.outer.as_image(y))

    def carry_mask(self, mask: Tensor) -> Tensor | None:
        """The mask carried through the inner operator, then through the outer one."""
        between = self.inner.carry_mask(mask)
        return None if between is None else self.outer.carry_mask(between)

    def drawn(self, x: Tensor, seeds: Sequence[int]) -> Operator:
        """The composition of both, drawn from the same seeds."""
        inner = self.inner.drawn(x, seeds)
        outer = self.outer.drawn(inner.measure(x), seeds)
        return self if (outer, inner) == (self.outer, self.inner) else outer @ inner

    def to(self, device: torch.device | str) -> Operator:
        """The operator on a device."""
        return self._with(lambda part: part.to(device), None if self.mask is None else self.mask.to(device))

    def with_axes(self, axes: int) -> Operator:
        """The operator for batches with this number of axes."""
        new = self._with(lambda part: part.with_axes(axes), self.mask)
        new._axes = axes
        return new

    def rows(self, rows: slice) -> Operator:
        """The operator for a slice of the batch."""
        if len(self) == 1:
            return self
        mask = self.mask
        if mask is not None and mask.ndim == self._axes and len(mask) > 1:
            mask = mask[rows]
        return self._with(lambda part: part.rows(rows), mask)

    def _with(self, change: Callable[[Operator], Operator], mask: Tensor | None) -> _Composition:
        """A copy with other parts and the same gain. Computing the gain again would synchronize with the device."""
        new = copy.copy(self)
        new.outer, new.inner, new.mask = change(self.outer), change(self.inner), mask
        return new
