"""The interface of operators, their text form and their composition; ``operators`` has the theory."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from scorematch.core.batches import without_history
from scorematch.core.randomness import standard_normal
from scorematch.restoration.decomposition import Decomposition, decompose

_LARGEST = 2048  # values of a sample for which the matrix of an operator is decomposed, in some seconds


class Linearization(NamedTuple):
    """An operator near x: its measurement A(x), and the products with its Jacobian A' at x and with the transpose."""

    value: Tensor
    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]


class Operator(ABC):
    """A deterministic measurement of samples, such as images; row i of the result depends on row i of the input only.

    Attributes:
        linear: whether ``measure`` is linear, A x without a constant term. An operator with a gain is linear.
        separable: whether ``measure`` acts on each axis after the channels in turn, as on signals (N, C, L).
        gain: the c of A A^T = c I on the observed values, for a linear operator that has one; None otherwise.
        mask: which values of y are observed, bool and broadcastable to y; None if all are.
        value_range: the range of the images that the operator is for, such as (0, 1); None if it is for any.
        form: how it is written as text, such as "pool:SIZE"; the part before the colon is its name. Empty for an
            operator without a text form.
        help: what was done to the pictures, for the lists of operators.
        examples: texts of this form. The first one appears in messages, and the demo offers those that fit its images.
    """

    linear: bool = False
    separable: bool = False
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

    def adjoint(self, y: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        r"""The sample :math:`A^\top y` of a linear operator.

        The default is c A^+ y for an operator with a gain. For others it is computed by automatic differentiation of
        ``measure``.

        Args:
            y: a measurement (N, ...).
            shape: the shape of one sample. Operators that can derive it from y ignore it. None is the shape of y.

        Raises:
            ValueError: if the shapes do not fit the operator.
        """
        gain = self.with_axes(y.ndim).gain
        if gain is not None and type(self).pseudo_inverse is not Operator.pseudo_inverse:
            return self.pseudo_inverse(y) * gain
        linearization = _linearized(self, y.new_zeros((len(y), *(y.shape[1:] if shape is None else shape))))
        if linearization.value.shape[1:] != y.shape[1:]:
            raise ValueError(
                f"y of {self!r} must have shape {tuple(linearization.value.shape[1:])} for each sample, got "
                f"{tuple(y.shape[1:])}. If the samples have another shape than y, pass shape=."
            )
        return linearization.adjoint(y)

    def sample_shape(self, y: Tensor) -> tuple[int, ...] | None:
        """The shape of one sample that y measures; None if y does not determine it.

        The default is that of A^+ y for an operator with a gain, and None for others.
        """
        return None if self.gain is None else tuple(self.pseudo_inverse(y).shape[1:])

    def linearized(self, x: Tensor) -> Linearization:
        """The operator near x, (N, ...): itself if it is linear, otherwise by automatic differentiation of ``measure``.

        An operator without a gradient, such as JPEG, overrides this method with an approximation.

        Raises:
            ValueError: if the measurement has no gradient.
        """
        if self.is_linear:
            return Linearization(self.measure(x), self.measure, lambda v: self.adjoint(v, x.shape[1:]))
        return _linearized(self, x)

    def decomposition(self, x: Tensor) -> Decomposition | None:
        """The singular value decomposition of the operator on samples (N, ...) of the shape and device of x.

        The default is that of an operator with a gain, whose coefficients are the values of y divided by the square
        root of the gain. For other linear operators the matrix is decomposed if x has at most 2,048 values per sample.

        Returns:
            The decomposition, or None if the operator is not linear or the matrix is too large.
        """
        gain = self.with_axes(x.ndim).gain
        if gain is not None:
            root = gain**0.5
            values = x.new_full((), root) if self.mask is None else self.mask.to(x) * root
            return Decomposition(values, lambda x: self.measure(x) / root, lambda c: self.pseudo_inverse(c) * root)
        if not self.is_linear or x[0].numel() > _LARGEST:
            return None
        units = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).view(-1, *x.shape[1:])
        return decompose(self.measure(units).flatten(1).T, x)

    @property
    def is_linear(self) -> bool:
        """Whether the operator is linear: it says so, or it has a gain."""
        return self.linear or self.gain is not None

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The sample A^+ y = A^T y / c of an operator with a gain, the smallest one whose measurement is y.

        For an operator without a gain it is only looked at (``as_image``); the default is y itself.

        Raises:
            ValueError: if the shape of y does not fit the operator.
        """
        return y if self.gain is None else self.adjoint(y) / self.gain

    def as_image(self, y: Tensor) -> Tensor:
        """The measurement as an image to look at: ``pseudo_inverse(y)``; for ``Grayscale`` a gray RGB image."""
        return self.pseudo_inverse(y)

    def seen(self, y: Tensor) -> Tensor:
        """Which values of x a measurement like y depends on, bool: those that ``pseudo_inverse`` can make nonzero."""
        return self.pseudo_inverse(standard_normal(y.shape, torch.Generator().manual_seed(0), y.device).to(y)) != 0

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

    def mask_of(self, y: Tensor) -> Tensor | None:
        """The mask of a measurement like y; the default is ``mask``, which does not depend on the sizes of y."""
        return self.mask

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

    def for_samples(self, x: Tensor) -> Operator:
        """The operator for batches with the shape of x, (N, ...); a composition calls this for each of its parts."""
        return self.with_axes(x.ndim)

    def rows(self, rows: slice | Tensor) -> Operator:
        """The operator for a slice of the batch or for indices: with one mask per image, the masks of those images."""
        return self

    def drawn(self, x: Tensor, seeds: Sequence[int]) -> Operator:
        """The operator for images x, where what is random is drawn, such as the mask of ``Hole``.

        Args:
            x: images (N, C, H, W).
            seeds: one for each image.
        """
        return self

    def parts(self) -> list[Operator]:
        """The operators of a composition, the outermost first; of any other operator, itself."""
        return [self]

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
        positional = [name for name, each in signature.parameters.items() if each.kind is not each.KEYWORD_ONLY]
        twice = len(values) + len(named) < len(parts) or not named.keys().isdisjoint(positional[: len(values)])
        if twice or bool(parts) != bool(signature.parameters):
            raise TypeError("an argument is missing or named twice" if signature.parameters else "it has no arguments")
        if unknown := [*values[len(positional) :], *(named.keys() - signature.parameters)]:
            raise TypeError(f"its arguments are {'=, '.join(signature.parameters)}=, got {unknown[0]!r}")
        required = [name for name, each in signature.parameters.items() if each.default is each.empty]
        if missing := [name for name in required if name not in {*positional[: len(values)], *named}]:
            raise TypeError(f"the argument {missing[0]} is missing")
        return cls(*values, **named)

    def text(self) -> str | None:
        """The text from which ``as_operator`` makes the operator; None if it has none, such as a mask."""
        arguments, name = self._arguments(str), self.form.partition(":")[0]
        if arguments is None or not name:
            return None
        return f"{name}:{','.join(arguments)}" if arguments else name

    def __str__(self) -> str:
        """The text form, or the ``repr`` of an operator without one."""
        return self.text() or repr(self)

    def __repr__(self) -> str:
        arguments = self._arguments(repr)
        return super().__repr__() if arguments is None else f"{type(self).__name__}({', '.join(arguments)})"

    def _arguments(self, write: Callable[[object], str]) -> list[str] | None:
        """The constructor's arguments, from the attributes of the same names; None if one is not a number or a name."""
        found = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name, None)
            if not isinstance(value, int | float | str):
                return None
            if parameter.kind is not parameter.KEYWORD_ONLY:
                found.append(write(value))
            elif value != parameter.default:
                found.append(f"{name}={write(value)}")
        return found


class SameShape(Operator):
    """An operator whose measurement has the shape of x."""

    def sample_shape(self, y: Tensor) -> tuple[int, ...]:
        """That of y."""
        return tuple(y.shape[1:])


def _linearized(operator: Operator, x: Tensor) -> Linearization:
    """An operator near x by automatic differentiation."""
    with torch.inference_mode(False), torch.enable_grad():
        x = without_history(x).requires_grad_()
        value = operator.measure(x)
        transposed = v = torch.zeros_like(value, requires_grad=True)
        if value.requires_grad:
            (transposed,) = torch.autograd.grad(value, x, v, create_graph=True)  # A'^T v, whose gradient in v is A'
        if not (value.requires_grad and transposed.requires_grad):  # the latter as for rounding
            raise ValueError(
                f"the measurement of {operator!r} has no gradient. Write measure with differentiable functions of "
                "torch, or define the method linearized."
            )

    def adjoint(v: Tensor) -> Tensor:
        return torch.autograd.grad(value, x, v, retain_graph=True)[0]

    def forward(u: Tensor) -> Tensor:
        return torch.autograd.grad(transposed, v, u, retain_graph=True)[0]

    return Linearization(value.detach(), forward, adjoint)


def spatial_axes(x: Tensor) -> int:
    """The number of axes after the channels: two of images (N, C, H, W); one of vectors (N, D)."""
    return max(1, x.ndim - 2)


def kind_of(value: Any) -> str:
    """The type of a value for messages; of a tensor, that of its values, and its shape."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


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
        self.linear = outer.is_linear and inner.is_linear
        self.value_range = outer.value_range or inner.value_range
        self.mask = outer.mask
        if outer.gain is None or inner.gain is None:
            return
        if inner.mask is not None:
            # The composition has a gain only if the outer operator does not mix observed and unobserved values.
            carried = outer.carry_mask(inner.mask)
            if carried is None:
                return
            try:
                self.mask = carried if self.mask is None else carried & self.mask.to(carried.device)
            except RuntimeError as error:
                raise ValueError(f"the masks of an operator must fit each other, got {self!r}.") from error
        self.gain = outer.gain * inner.gain

    def parts(self) -> list[Operator]:
        """Those of the outer operator, then those of the inner one."""
        return [*self.outer.parts(), *self.inner.parts()]

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

    def adjoint(self, y: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """That of the outer operator, then that of the inner one."""
        if shape is None:
            return self.inner.adjoint(self.outer.adjoint(y))
        between = self.inner.measure(y.new_zeros((len(y), *shape)))
        return self.inner.adjoint(self.outer.adjoint(y, between.shape[1:]), shape)

    def sample_shape(self, y: Tensor) -> tuple[int, ...] | None:
        """The shape that the inner operator derives from that of the outer one."""
        between = self.outer.sample_shape(y)
        return None if between is None else self.inner.sample_shape(y.new_zeros((len(y), *between)))

    def linearized(self, x: Tensor) -> Linearization:
        """The chain rule, so that each operator uses its own adjoint or approximation."""
        inner = self.inner.linearized(x)
        outer = self.outer.linearized(inner.value)
        return Linearization(
            outer.value, lambda u: outer.forward(inner.forward(u)), lambda v: inner.adjoint(outer.adjoint(v))
        )

    def decomposition(self, x: Tensor) -> Decomposition | None:
        """That of the outer operator if the inner one has a gain and observes all values: its rows are orthogonal."""
        c, inner = self.inner.with_axes(x.ndim).gain, self.inner
        if self.gain is not None or c is None or inner.mask is not None:
            return super().decomposition(x)
        outer = self.outer.decomposition(inner.measure(x))
        return outer and Decomposition(
            outer.values * c**0.5,
            lambda x: outer.coefficients(inner.measure(x)) / c**0.5,
            lambda v: inner.pseudo_inverse(outer.sample(v)) * c**0.5,
            outer.measured,
        )

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

    def mask_of(self, y: Tensor) -> Tensor | None:
        """Also without a gain, what the outer operator observes of the values that the inner one observes."""
        own, inner = self.outer.mask_of(y), None
        if self.gain is None and self.outer.gain is not None:
            inner = self.inner.mask_of(self.outer.pseudo_inverse(y))
        carried = self.mask if inner is None else self.outer.carry_mask(inner)
        return carried if own is None else own if carried is None else own & carried.to(own.device)

    def drawn(self, x: Tensor, seeds: Sequence[int]) -> Operator:
        """The composition of both, drawn from the same seeds."""
        inner = self.inner.drawn(x, seeds)
        outer = self.outer.drawn(inner.measure(x), seeds)
        return self if (outer, inner) == (self.outer, self.inner) else outer @ inner

    def to(self, device: torch.device | str) -> Operator:
        """The operator on a device."""
        return self._with(lambda part: part.to(device), None if self.mask is None else self.mask.to(device))

    def with_axes(self, axes: int) -> Operator:
        """The composition of both for batches with this number of axes, on which the gain and the mask depend."""
        if axes == self._axes:
            return self
        # Of the samples before a matrix or a function the number of axes is not known here; see ``for_samples``.
        known = all(part.gain or type(part).sample_shape is not Operator.sample_shape for part in self.outer.parts())
        new = _Composition(self.outer.with_axes(axes), self.inner.with_axes(axes) if known else self.inner)
        new._axes = axes
        return new

    def for_samples(self, x: Tensor) -> Operator:
        """The composition of both, each for batches like those that it measures."""
        inner = self.inner.for_samples(x)
        outer = self.outer.for_samples(inner.measure(x))
        if (outer, inner) == (self.outer, self.inner):
            return self
        new = _Composition(outer, inner)
        new._axes = self._axes
        return new

    def rows(self, rows: slice | Tensor) -> Operator:
        """The operator for a slice of the batch, or for indices."""
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
