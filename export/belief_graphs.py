"""ONNX graphs that decode probabilities of per-step tokens. Definition: `rfsq_ref/beliefs.py`."""

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from rfsq.export.graph_builder import LinearForm, batched
from rfsq.export.graphs import LayerBuilder, largest_sum
from rfsq.export.plan import DecoderPlan

#: Beyond it the derivative of Mish is 1.
_STRAIGHT = 20.0


class _BeliefBuilder(LayerBuilder):
    """In double where the processor runs it: weights may be large, and a mean is no whole number as a token is."""

    @property
    def float_type(self) -> int:
        return int(TensorProto.DOUBLE if self.form is LinearForm.GEMM else TensorProto.FLOAT)

    def constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        is_widened = self.form is LinearForm.GEMM and value.dtype == np.float32
        return super().constant(name, value.astype(np.float64) if is_widened else value)

    def summed(self, value: str, axis: int, output: str, *, keep: bool = False) -> str:
        place = self.constant(f"axis_{axis}", np.array([axis], np.int64))
        return self.apply("ReduceSum", [value, place], output, keepdims=int(keep))


def belief_graph(plan: DecoderPlan, form: LinearForm = LinearForm.GEMM) -> bytes:
    """probabilities float32 [batch, T, D, l, K] -> actions and std float32 [batch, T, A].

    Distributions are divided by their sum. The mean of the tokens is decoded as tokens are. The variance of what is
    decoded is that of the tokens through the derivative there, as if all behind the mean were straight.

    No form marks what is illegal: a host has made the probabilities (`runtime/backends/graph_beliefs.py`).
    """
    build = _BeliefBuilder(form)
    mean, variance = _moments(build, plan)
    inner = build.linear(mean, plan.first, "inner")
    outer = build.linear(build.mish(inner, "hidden", largest=largest_sum(plan)), plan.second, "outer")
    if plan.offset.any():
        outer = build.apply("Add", [outer, build.constant("offset", plan.offset)], "outer.with_offset")
    shape = (-1, plan.chunk_length, plan.action_dim)
    deviation = build.apply("Sqrt", [_spread(build, plan, inner, variance)], "deviation")
    for value, output in ((outer, "actions"), (deviation, "std")):
        rounded = build.apply("Cast", [value], f"{output}.flat", to=TensorProto.FLOAT)
        build.reshape(rounded, shape, output)
    sizes = plan.chunk_length, plan.latent_dim, plan.prefix, plan.num_levels
    outputs = [batched(name, TensorProto.FLOAT, *shape[1:]) for name in ("actions", "std")]
    return build.model("belief", [batched("probabilities", TensorProto.FLOAT, *sizes)], outputs)


def _moments(build: _BeliefBuilder, plan: DecoderPlan) -> tuple[str, str]:
    """Mean and variance of the tokens, [N, D * l].

    Both about the whole number next to the mean: of a token that is nearly certain float32 has them to its last digits.
    """
    precise = build.apply("Cast", ["probabilities"], "precise", to=build.float_type)
    flat = build.reshape(precise, (-1, plan.latent_dim * plan.prefix, plan.num_levels), "flat")
    levels = build.constant("levels", np.arange(plan.num_levels, dtype=np.float32))
    total = build.summed(flat, 2, "total", keep=True)

    def expected(factor: str, output: str) -> str:
        parts = build.apply("Mul", [flat, factor], f"{output}.products")
        return build.apply("Div", [build.summed(parts, 2, f"{output}.sums", keep=True), total], output)

    near = build.apply("Round", [expected(levels, "level")], "level.near")
    distance = build.apply("Sub", [levels, near], "distance")
    beyond = expected(distance, "beyond")
    squares = expected(build.apply("Mul", [distance, distance], "distance.squares"), "squares")
    variance = build.apply("Sub", [squares, build.apply("Mul", [beyond, beyond], "beyond.square")], "variance")
    tail = (-1, plan.latent_dim * plan.prefix)
    mean = build.apply("Add", [near, beyond], "mean")
    return build.reshape(mean, tail, "mean.flat"), build.reshape(variance, tail, "variance.flat")


def _spread(build: _BeliefBuilder, plan: DecoderPlan, inner: str, variance: str) -> str:
    """Variance of the actions [N, A], of `inner` [N, H] and the variance of the tokens [N, D * l]."""
    assert plan.latents is not None  # with statistics nothing is known of tokens alone
    slope = build.reshape(_mish_slope(build, inner), (-1, 1, len(plan.hidden.bias)), "slope")
    scaled = build.apply("Mul", [slope, build.constant("slope.weight", plan.second.weight)], "slope.scaled")
    # [N, A, D]: how actions follow latents.
    jacobian = build.product(scaled, "slope.inner", plan.hidden.weight, "jacobian")
    if plan.own_tokens is None:
        jacobian = build.product(jacobian, "latents.weight", plan.latents.weight, "jacobian.by_token")
        width = plan.latent_dim * plan.prefix
    else:
        own = build.constant("own.squares", np.square(plan.own_tokens.astype(np.float64)).astype(np.float32))
        by_latent = build.reshape(variance, (-1, plan.latent_dim, plan.prefix), "variance.by_latent")
        variance = build.summed(build.apply("Mul", [by_latent, own], "variance.of_tokens"), 2, "latents")
        width = plan.latent_dim
    squares = build.apply("Mul", [jacobian, jacobian], "jacobian.squares")
    row = build.reshape(variance, (-1, 1, width), "variance.row")
    return build.summed(build.apply("Mul", [squares, row], "spread.parts"), 2, "spread")


def _mish_slope(build: LayerBuilder, value: str) -> str:
    """The derivative of Mish: g + 4 x e (e + 1) / (n + 2)^2 with e = exp x, n = e (e + 2), g = n / (n + 2).

    tanh(log(1 + e)) = g, and its derivative by x is (1 - g^2) e / (1 + e), where 1 - g^2 = 4 (1 + e)^2 / (n + 2)^2.
    """
    x = build.apply("Min", [value, build.scalar("slope.cap", _STRAIGHT)], "slope.x")
    e, one, two = build.apply("Exp", [x], "slope.e"), build.scalar("slope.one", 1), build.scalar("slope.two", 2)
    n = build.apply("Mul", [e, build.apply("Add", [e, two], "slope.e_2")], "slope.n")
    over = build.apply("Add", [n, two], "slope.n_2")
    gate = build.apply("Div", [n, over], "slope.gate")
    rising = build.apply("Mul", [e, build.apply("Add", [e, one], "slope.e_1")], "slope.rising")
    # One division after the other: the square of the denominator is large.
    share = build.apply("Div", [build.apply("Div", [rising, over], "slope.once"), over], "slope.share")
    four = build.apply("Mul", [x, build.scalar("slope.four", 4)], "slope.4x")
    return build.apply("Add", [gate, build.apply("Mul", [four, share], "slope.more")], "slope.flat")
