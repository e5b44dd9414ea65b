"""What an optimizer holds and what a step moves, in bytes, computed from shapes without allocating anything.

The states are made by the functions that make them in a step, on the meta device, so that nothing here repeats how many
bytes a storage has. What a step moves follows from what there is: it reads every tensor once, and writes every tensor
but gradients, fixed masks and positions. Clocks (one number for each tensor) and refreshes are not counted.
"""

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from epi_kernels.delta.entries import narrow
from epi_kernels.engine import storages
from epi_kernels.engine.gathering import check_flags
from epi_kernels.engine.state import ensure, ensure_slots, new_state
from epi_kernels.optim import EPIAdamW, EPILion, MaskedAdamW, SparseAdamW
from epi_kernels.rules import rule_of

# entries that lie apart share no line of the processor's caches, which is what memory brings at a time
LINE = 64

Shape = tuple[int, ...]

# stands for large matrices with rows of a multiple of 64 entries
ENTRIES: list[Shape] = [(64, 64)]


def decoder(
    vocabulary: int,
    hidden: int,
    layers: int,
    keys: int,
    intermediate: int,
    *,
    queries: int | None = None,
    norms: int = 2,
    biases: bool = False,
    tied: bool = False,
) -> list[Shape]:
    """Return the shapes of a decoder as transformers has them.

    Args:
        vocabulary: number of tokens.
        hidden: size between layers.
        layers: number of blocks.
        keys: key heads times the size of a head.
        intermediate: size inside of a feed-forward network.
        queries: query heads times the size of a head; None: `hidden`.
        norms: number of norms in a block.
        biases: queries, keys and values have one.
        tied: the head is the embedding.
    """
    queries = queries or hidden
    attention = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    feed_forward = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    vectors = [*([(hidden,)] * norms), *([(queries,), (keys,), (keys,)] if biases else [])]
    layer: list[Shape] = [*attention, *feed_forward, *vectors]
    ends: list[Shape] = [(hidden,)] if tied else [(hidden,), (vocabulary, hidden)]
    return [(vocabulary, hidden), *(layer * layers), *ends]


def _gpt2() -> list[Shape]:
    """Return the shapes of the smallest GPT-2, whose linear layers have biases and whose norms have two vectors."""
    linear = [(768, 2304), (2304,), (768, 768), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *([*linear, *[(768,)] * 4] * 12), (768,), (768,)]


MODELS = {
    "llama-3-8b": decoder(128256, 4096, 32, 8 * 128, 14336),
    "qwen2.5-7b": decoder(152064, 3584, 28, 4 * 128, 18944, biases=True),
    "mistral-7b": decoder(32000, 4096, 32, 8 * 128, 14336),
    "gemma-2-9b": decoder(256000, 3584, 42, 8 * 256, 14336, queries=16 * 256, norms=4, tied=True),
    "gpt2": _gpt2(),
}


def on_meta(shapes: Iterable[Shape], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of these shapes that have no memory."""
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


@dataclass(frozen=True)
class Settings:
    """An optimizer, and what of its arguments and of its surroundings decides about memory.

    Attributes:
        rule: of the step, "adamw" or "lion".
        mask: "evolving": EPI's; "fixed": MaskedAdamW with a mask for every parameter; "none": no isolation.
        trainable: the share of the entries that SparseAdamW moves; None: another optimizer.
        amsgrad, importance, state_dtype, importance_dtype, master_weight_bits: as in `epi_kernels.EPIAdamW`.
        grad_dtype: of the gradients; None: that of their parameters.
        release: each gradient is freed once its parameter has been stepped, so that none is held.
    """

    rule: str = "adamw"
    mask: Literal["evolving", "fixed", "none"] = "evolving"
    trainable: float | None = None
    amsgrad: bool = False
    importance: str = "ema"
    state_dtype: storages.StorageArgument = None
    importance_dtype: storages.StorageArgument = None
    master_weight_bits: int | None = None
    grad_dtype: torch.dtype | None = None
    release: bool = False

    @property
    def optimizer(self) -> type[torch.optim.Optimizer]:
        """Return the class that has this rule and this mask.

        Raises:
            ValueError: there is none.
        """
        if self.rule == "lion" and self.mask != "fixed" and self.trainable is None:
            return EPILion
        if self.rule != "adamw":
            raise ValueError(f"rule={self.rule!r} is the rule of EPILion alone, which has neither frozen nor trainable")
        if self.trainable is not None:
            return SparseAdamW
        return MaskedAdamW if self.mask == "fixed" else EPIAdamW

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the optimizer that differ from their defaults."""
        names = ("amsgrad", "importance", *storages.DEFAULTS)
        settings = {name: value for name, value in asdict(self).items() if name in names}
        usual = asdict(Settings())
        return {
            name: value
            for name, value in settings.items()
            if value != usual[name] and not (name in storages.DEFAULTS and storages.is_usual(name, value))
        }

    def check(self, params: Sequence[Tensor]) -> None:
        """Check that the optimizer takes these settings for these parameters.

        Raises:
            ValueError: it has no such argument, or not with these values or parameters.
            NotImplementedError: it refuses a setting, or a kind of parameter.
        """
        taken = inspect.signature(self.optimizer).parameters
        for name, value in self.arguments.items():
            if name not in taken:
                raise ValueError(f"{name}={value!r}: {self.optimizer.__name__} has no such argument")
        if self.trainable is not None:
            if not 0.0 < self.trainable <= 1.0:
                raise ValueError(f"Invalid trainable: {self.trainable!r}; it is a share of the entries, 0 < share <= 1")
            check_flags(asdict(self))
        storages.check_settings(asdict(self))
        storages.check_parameters([{**asdict(self), "params": list(params)}], lambda param: "the first")
        for param in params:
            storages.check_parameter(param, f"a parameter of shape {tuple(param.shape)}", asdict(self))

    def __str__(self) -> str:
        """Return the call that makes the optimizer."""
        special = {"isolation_ratio": 0} if self.mask == "none" and self.trainable is None else {}
        arguments = [f"{name}={value!r}" for name, value in {**special, **self.arguments}.items()]
        masks = ["frozen=masks"] if self.optimizer is MaskedAdamW else []
        masks += ["trainable=masks"] if self.optimizer is SparseAdamW else []
        return f"{self.optimizer.__name__}({', '.join(['params', *masks, *arguments])})"


class Bytes(NamedTuple):
    """Bytes that are held from step to step, and that one step reads and writes."""

    held: float = 0
    read: float = 0
    written: float = 0

    def plus(self, other: "Bytes") -> "Bytes":
        """Return the sums."""
        return Bytes(*map(sum, zip(self, other, strict=True)))

    def times(self, factor: float) -> "Bytes":
        """Return the products."""
        return Bytes(*(number * factor for number in self))


def bytes_of(params: Iterable[Tensor], settings: Settings) -> dict[str, Bytes]:
    """Return the bytes of "weight", "gradient" and every kind of state, of all parameters together.

    States are named as in the optimizer's state, codes as values, and "scales" are those of all of them. An importance
    that is the second moment has no bytes of its own.

    Args:
        params: plain tensors, on any device; only shapes and dtypes are read.
        settings: of the optimizer.

    Raises:
        ValueError, NotImplementedError: as `Settings.check`.

    Example:
        >>> bytes_of([torch.empty(64, 64)], Settings(state_dtype="8bit"))["scales"]
        Bytes(held=768.0, read=768.0, written=768.0)
    """
    counts = Counter((param.shape, param.dtype) for param in params)
    alike = {kind: torch.empty(kind[0], dtype=kind[1], device="meta") for kind in counts}
    settings.check(list(alike.values()))
    found: dict[str, Bytes] = {}
    for kind, count in counts.items():
        for name, part in _parts(alike[kind], settings):
            found[name] = found.get(name, Bytes()).plus(part.times(count))
    return {name: found[name] for name in sorted(found, key=("rest", "scales").count)}


def total(parts: dict[str, Bytes]) -> Bytes:
    """Return the sum of all parts."""
    whole = Bytes()
    for part in parts.values():
        whole = whole.plus(part)
    return whole


def _parts(param: Tensor, settings: Settings) -> Iterator[tuple[str, Bytes]]:
    """Yield the name and bytes of the weight, the gradient and each state of one parameter."""
    grad = torch.empty_like(param, dtype=settings.grad_dtype or param.dtype)
    weight_moved, grad_moved = (_nearby(tensor, settings.trainable) for tensor in (param, grad))
    yield "weight", Bytes(_size(param), weight_moved, weight_moved)
    yield "gradient", Bytes(0 if settings.release else _size(grad), grad_moved, 0)
    if settings.trainable is None:
        states, entries = _states(param, settings), 1.0
    else:  # those of one entry, for all that are trainable
        states, entries = _states_of_entry(param, settings), settings.trainable * param.numel()
    for key, state in states.items():
        held = _size(state) * entries
        name = "scales" if key.endswith("_scales") else storages.name_of_key(key)
        yield name, Bytes(held, held, 0 if key in ("frozen", "indices") else held)


def _states(param: Tensor, settings: Settings) -> dict[str, Any]:
    """Return the state that a step makes for a parameter of which all entries may move, without a clock."""
    state: dict[str, Any] = {}
    group = asdict(settings)
    ensure_slots(rule_of(settings.rule), state, param, group)
    if settings.mask == "evolving" and settings.importance == "ema":
        ensure(state, "importance", param, storages.importance_setting(group))
    if settings.mask == "fixed":
        state["frozen"] = new_state(param, "frozen")
    return state


def _states_of_entry(param: Tensor, settings: Settings) -> dict[str, Any]:
    """Return the state for one trainable entry of a parameter, without a clock."""
    state: dict[str, Any] = {}
    ensure_slots(rule_of(settings.rule), state, param.new_empty(1), asdict(settings))
    return {**state, "indices": narrow(torch.empty(1, dtype=torch.int64, device="meta"), param.numel())}


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _nearby(tensor: Tensor, share: float | None) -> float:
    """Return the bytes of a tensor's lines in which a share of the entries lies, scattered; None: all."""
    return _size(tensor) * (1.0 if share is None else 1.0 - (1.0 - share) ** (LINE / tensor.element_size()))


# Text ----------------------------------------------------------------------------------------------------------------

_COMPACT: dict[str, Any] = {"state_dtype": "8bit", "master_weight_bits": 24}

# what `comparison` calls a combination, the dtype of its parameters, its settings; indented: what is above, and this
COMBINATIONS: list[tuple[str, torch.dtype, Settings]] = [
    ("torch.optim.AdamW, float32", torch.float32, Settings(mask="none")),
    ("EPIAdamW, float32", torch.float32, Settings()),
    ("  importance 16 bits", torch.float32, Settings(importance_dtype=torch.bfloat16)),
    ("  all states 16 bits", torch.float32, Settings(state_dtype=torch.bfloat16)),
    ("EPIAdamW, bfloat16", torch.bfloat16, Settings()),
    ("  weights 32 bits, states 16", torch.bfloat16, Settings(state_dtype=torch.bfloat16, master_weight_bits=32)),
    ("  weights 24 bits, states 8", torch.bfloat16, Settings(**_COMPACT)),
    ('    importance="exp_avg_sq"', torch.bfloat16, Settings(**_COMPACT, importance="exp_avg_sq")),
    ("      gradients released", torch.bfloat16, Settings(**_COMPACT, importance="exp_avg_sq", release=True)),
]

_MOVED = ("read", "written", "moved")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_OTHERS = ("importance", "rest", "scales")


def comparison(shapes: Sequence[Shape], count: int) -> str:
    """Return a table of COMBINATIONS, one a line.

    Args:
        shapes: of the parameters, over whose entries the averages are taken.
        count: of parameters, for GiB.
    """
    rows: list[list[str | float]] = []
    for label, dtype, settings in COMBINATIONS:
        parts = _averages(on_meta(shapes, dtype), settings)
        held = defaultdict(float, {name: part.held for name, part in parts.items()})
        moments = sum(held[name] for name in _MOMENTS)
        kinds = [held["weight"], held["gradient"], moments, *(held[name] for name in _OTHERS), held["sum"]]
        rows.append([label, *kinds, f"{parts['sum'].held * count / 2**30:,.1f}", *_moved(parts["sum"])])
    return _aligned([["", "weight", "gradient", "moments", *_OTHERS, "sum", "GiB", *_MOVED], *rows])


def details(shapes: Sequence[Shape], count: int, dtype: torch.dtype, settings: Settings) -> str:
    """Return a table of one combination: a line for the weight, the gradient, each state, and their sum.

    Args:
        shapes: of the parameters, over whose entries the averages are taken.
        count: of parameters, for GiB.
        dtype: of the parameters.
        settings: of the optimizer.

    Raises:
        ValueError, NotImplementedError: as `Settings.check`.
    """
    params = on_meta(shapes, dtype)
    rows: list[list[str | float]] = [
        [name, part.held, _gib(part.held * count), *_moved(part)] for name, part in _averages(params, settings).items()
    ]
    lines = [f"{settings}, {_name(dtype)} parameters", "", _aligned([["", "held", "GiB", *_MOVED], *rows])]
    if settings.release and shapes is not ENTRIES:
        largest = max(map(_size, params)) / dtype.itemsize * (settings.grad_dtype or dtype).itemsize
        lines += ["", f"Gradients are released: one is held at a time, the largest of {_gib(largest)} GiB."]
    if settings.trainable is not None:
        lines += ["", f"Trainable entries lie apart: weights and gradients move in lines of {LINE} bytes."]
    return "\n".join(lines)


def _averages(params: Sequence[Tensor], settings: Settings) -> dict[str, Bytes]:
    """Return the bytes of each part for each entry, and their sum."""
    parts, entries = bytes_of(params, settings), sum(param.numel() for param in params)
    return {name: part.times(1 / entries) for name, part in {**parts, "sum": total(parts)}.items()}


def _moved(part: Bytes) -> list[float]:
    return [part.read, part.written, part.read + part.written]


def _gib(number: float) -> str:
    return f"{number / 2**30:,.2f}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _aligned(rows: Sequence[Sequence[str | float]]) -> str:
    """Return rows as lines of columns: the first to the left, the others to the right, numbers at their points."""
    columns = [_column(column) for column in zip(*rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for first, *others in zip(*columns, strict=True):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _column(cells: Sequence[str | float]) -> list[str]:
    """Return the texts of a column: a number with at most 3 decimals, spaces for those that others have, "-" for 0."""
    texts = [cell if isinstance(cell, str) else _decimal(cell) for cell in cells]
    numbers = [not isinstance(cell, str) for cell in cells]
    decimals = [len("".join(text.partition(".")[1:])) for text in texts]
    longest = max((length for length, is_number in zip(decimals, numbers, strict=True) if is_number), default=0)
    return [
        text + " " * (longest - length) * is_number
        for text, length, is_number in zip(texts, decimals, numbers, strict=True)
    ]


def _decimal(number: float) -> str:
    text = f"{number:.3f}"
    # what is small is not nothing
    return "-" if number == 0 else text if float(text) == 0 else text.rstrip("0").rstrip(".")
