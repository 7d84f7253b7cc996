"""What graphs of chunk tokens are made of."""

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from rfsq.export.graph_builder import GraphBuilder, LinearForm


class ChunkBuilder(GraphBuilder):
    """Code bits are digits of integers that float32 holds exactly, so that no runtime needs shifts."""

    def numbers(self, name: str, value: npt.ArrayLike) -> str:
        return self.constant(name, np.asarray(value, np.float32))

    def integers(self, name: str, value: npt.ArrayLike) -> str:
        return self.constant(name, np.asarray(value, np.int64))

    def times(self, value: str, factor: npt.ArrayLike, output: str) -> str:
        return self.apply("Mul", [value, self.numbers(f"{output}.factor", factor)], output)

    def plus(self, value: str, summand: npt.ArrayLike, output: str) -> str:
        return self.apply("Add", [value, self.numbers(f"{output}.summand", summand)], output)

    def clipped(self, value: str, low: float, high: float, output: str) -> str:
        limits = self.scalar(f"{output}.low", low), self.scalar(f"{output}.high", high)
        return self.apply("Clip", [value, *limits], output)

    def reaches(self, value: str, least: float, output: str) -> str:
        """1.0 where value >= least, 0.0 elsewhere."""
        is_reached = self.apply(
            "GreaterOrEqual", [value, self.scalar(f"{output}.least", least)], f"{output}.is_reached"
        )
        return self.apply("Cast", [is_reached], output, to=TensorProto.FLOAT)

    def reduced(self, operator: str, value: str, axis: int, output: str, *, keep: bool = False) -> str:
        return self.apply(operator, [value, self.integers(f"axis_{axis}", [axis])], output, keepdims=int(keep))

    def columns(self, value: str, places: npt.ArrayLike, output: str) -> str:
        """Of value [batch, n] the columns at these places, which are the same for all rows."""
        return self.apply("Gather", [value, self.integers(f"{output}.places", places)], output, axis=1)

    def rows(self, tables: npt.NDArray[np.generic], index: str, output: str) -> str:
        """Of constant tables [C, ...] those of index [batch]: [batch, ...]."""
        return self.apply("Gather", [self.constant(f"{output}.tables", tables), index], output, axis=0)

    def all_of(self, conditions: str, output: str) -> str:
        """Whether all of bool [batch, n] hold: bool [batch, 1]."""
        ones = self.apply("Cast", [conditions], f"{output}.ones", to=TensorProto.FLOAT)
        least = self.reduced("ReduceMin", ones, 1, f"{output}.least", keep=True)
        return self.apply("Cast", [least], output, to=TensorProto.BOOL)

    def floor_of(self, value: str, factor: npt.ArrayLike, output: str) -> str:
        """floor(value * factor)."""
        return self.apply("Floor", [self.times(value, factor, f"{output}.scaled")], output)

    def last_bit(self, shifted: str, output: str) -> str:
        """The last bit of floor(shifted), as 0 or 1: floor(s) - 2 floor(s / 2)."""
        even = self.times(self.floor_of(shifted, 0.5, f"{output}.halves"), 2, f"{output}.even")
        return self.apply("Sub", [self.apply("Floor", [shifted], f"{output}.floor"), even], output)

    def precise(self, value: str, output: str) -> str:
        """In double where the form has it, on the CPU: latents of tokens that no encoder gives reach 30, and float32
        rounds those by 2e-6."""
        return self.apply("Cast", [value], output, to=TensorProto.DOUBLE) if self.form is LinearForm.GEMM else value

    def log_ratio(self, above: str, below: str, output: str) -> str:
        """log(above / below): 2 atanh y of 1 + y and 1 - y, which is what no runtime lacks."""
        return self.apply("Log", [self.apply("Div", [above, below], f"{output}.ratio")], output)

    def log_of_one_more(self, value: str, output: str) -> str:
        """log(1 + value) of values above 0, which may be small."""
        log = self.apply("Log", [self.plus(value, 1, f"{output}.more")], f"{output}.log")
        # s = v / (v + 2) has log(1 + v) = 2 (s + s^3 / 3 + ...); what float32 has lost of 1 + v, it has.
        half = self.apply("Div", [value, self.plus(value, 2, f"{output}.sum")], f"{output}.half")
        cube = self.times(self.apply("Mul", [half, half], f"{output}.square"), 2 / 3, f"{output}.cube")
        series = self.apply("Mul", [half, self.plus(cube, 2, f"{output}.terms")], f"{output}.series")
        is_small = self.apply("Less", [value, self.numbers(f"{output}.small", 0.1)], f"{output}.is_small")
        return self.apply("Where", [is_small, series, log], output)

    def of_class(self, values: str, index: str, width: int, output: str) -> str:
        """Of values [C, batch, width] those of the class index int64 [batch, 1]: [batch, width]."""
        zeros = self.integers(f"{output}.zeros", np.zeros((1, 1, width)))
        wide = self.apply("Add", [index, zeros], f"{output}.index")
        found = self.apply("GatherElements", [values, wide], f"{output}.found", axis=0)
        return self.reshape(found, (-1, width), output)


def powers(num_bits: int) -> npt.NDArray[np.float64]:
    """What each bit counts, the highest first: [num_bits]."""
    return np.exp2(np.arange(num_bits - 1, -1, -1, dtype=np.float64))
